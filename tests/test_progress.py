"""What a long command shows: on a terminal a line, in a log some."""

import os
import pty
import re
import subprocess
import sys
import threading
import types

from conftest import ROOT
import pytest
from test_train import write_tiny

from fat5_jax import console


class Clock:
  """Time that passes when it is told to."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(
      console, "time", types.SimpleNamespace(monotonic=lambda: self.now)
    )


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


@pytest.fixture
def said(monkeypatch):
  lines = []
  monkeypatch.setattr(console, "say", lines.append)
  return lines


def test_a_log_has_a_line_each_half_minute_and_one_at_the_end(clock, said):
  for _ in console.counted(range(1000), "predicting", "rows", 1000):
    clock.now += 0.125
  assert said == [
    "predicting: 240 of 1,000 rows, 8/s, 1m35s left",
    "predicting: 480 of 1,000 rows, 8/s, 1m05s left",
    "predicting: 720 of 1,000 rows, 8/s, 35s left",
    "predicting: 960 of 1,000 rows, 8/s, 5s left",
    "predicting: 1,000 rows, 8/s, 2m05s",
  ]


def test_what_is_done_at_once_is_not_told(clock, said):
  for _ in console.counted(range(1000), "predicting", "rows", 1000):
    clock.now += 0.01
  assert not said


def test_a_stream_has_no_time_left(clock, said):
  for _ in console.counted(range(4), "preparing", "examples"):
    clock.now += 20
  assert said == [
    "preparing: 2 examples, 0.05/s, 40s",
    "preparing: 4 examples, 0.05/s, 1m20s",
    "preparing: 4 examples, 0.05/s, 1m20s",
  ]


def test_more_than_was_expected_has_no_time_left(clock, said):
  for _ in console.counted(range(2), "preparing", "examples", 1):
    clock.now += 40
  assert said[1] == "preparing: 2 examples, 0.025/s, 1m20s"


def test_a_failure_ends_without_a_last_line(clock, said):
  with pytest.raises(OSError), console.Count("writing", "MiB", 10) as count:
    clock.now += 31
    count.add(5)
    raise OSError
  assert said == ["writing: 5 of 10 MiB, 0.16/s, 31s left"]


def test_a_training_tells_a_log_now_and_then_and_the_last_step(clock, said):
  progress = console.Progress(0, 1000)
  for step in range(1, 1001):
    clock.now += 0.1
    progress.update(
      step,
      loss=1.0,
      learning_rate=None,
      tokens_per_second=1.0,
      padding=0.0,
      epochs=(),
      force=True,
    )
  # 100 seconds, a line each 10, not a thousand; the first step and the last.
  assert 10 <= len(said) <= 12
  assert said[0].startswith("step 1/1000 ") and "  1m40s left" in said[0]
  assert said[-1].startswith("step 1000/1000 ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = write_tiny(tmp_path_factory.mktemp("progress"))
  (folder / "lines.txt").write_text("".join(f"{i}\n" for i in range(40)))
  return folder


# Each command in a process whose waits are a hundredth, as if it took long.
PROGRAM = """
import runpy, sys
from fat5_jax import console
init = console.Count.__init__
def soon(self, *arguments, **options):
  init(self, *arguments, **options)
  self._wait = 0.0
console.Count.__init__ = soon
console.LOG_SECONDS = 0.0
name = sys.argv[1]
sys.argv = sys.argv[1:]
if name.endswith(".py"):
  runpy.run_path(name, run_name="__main__")
else:
  from fat5_jax.gin_config import cli
  sys.exit(cli.main(name, sys.argv[1:]))
"""


def shown(folder, arguments, terminal):
  """What a command writes for a person, on a terminal or to a file."""
  command = [sys.executable, "-c", PROGRAM, *arguments]
  options = {
    "cwd": folder,
    "env": os.environ | {"PYTHONPATH": ROOT, "TERM": "xterm"},
    "stdout": subprocess.DEVNULL,
  }
  if not terminal:
    done = subprocess.run(command, stderr=subprocess.PIPE, **options)
    assert done.returncode == 0, done.stderr
    return done.stderr.decode()
  ours, theirs = pty.openpty()
  pieces = []

  def read():
    try:
      while piece := os.read(ours, 4096):
        pieces.append(piece)
    except OSError:
      pass  # The other end is closed.

  process = subprocess.Popen(command, stderr=theirs, **options)
  os.close(theirs)
  reader = threading.Thread(target=read)
  reader.start()
  assert process.wait(timeout=200) == 0, b"".join(pieces)
  reader.join()
  os.close(ours)
  return b"".join(pieces).decode()


TRAIN = ("--gin_file=tiny.gin", "--gin.MODEL_DIR=run")
TOOLS = os.path.join(ROOT, "tools")
COMMANDS = {
  "prepare": (
    [f"{TOOLS}/prepare_data.py", *TRAIN, "--gin.CACHE_DIR=cache"],
    r"preparing tiny, train: \d+ of 60 examples, [\d,.e+]+/s, \d+s left",
  ),
  "train": (
    ["train", *TRAIN, "--gin.EVAL_PERIOD=12", "--gin.CHECKPOINT_PERIOD=12"],
    r"step \d+/12  loss [\d.]+  \d+s left",
  ),
  "eval": (
    ["eval", *TRAIN],
    r"predicting tiny: \d+ of 60 rows, [\d,.e+]+/s, \d+s left",
  ),
  "infer": (
    [
      *("infer", "--gin.MODEL_DIR=run", "--gin.INPUT=lines.txt"),
      *("--gin.OUTPUT=answers.jsonl", "--gin.MAX_OUTPUT_LENGTH=4"),
    ],
    r"predicting: \d+ of 40 rows, [\d,.e+]+/s, \d+s left",
  ),
  "convert": (
    [f"{TOOLS}/convert_checkpoint.py", "run", "out", "--no_transformers"],
    r"comparing: [\d.e-]+ of 0\.\d+ MiB, [\d,.e+-]+/s, \d+s left",
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_every_long_command_shows_how_far_it_is(folder, terminal):
  """One after the other, as each needs what the one before has made."""
  for name in ("cache", "run", "out", "answers.jsonl"):
    subprocess.run(["rm", "-rf", folder / name], check=True)
  for name, (arguments, line) in COMMANDS.items():
    text = shown(folder, arguments, terminal)
    assert re.search(line, text), f"{name}: {text}"
    # On a terminal a line takes the place of the one before; never in a log.
    rewritten = re.findall(r"\r\x1b\[2K" + line, text)
    assert bool(rewritten) == terminal, f"{name}: {text!r}"
