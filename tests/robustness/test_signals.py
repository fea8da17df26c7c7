"""Ctrl-C at any moment of any command: a line, 130, nothing half-written."""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors.numpy
from test_train import write_tiny
from zygote import ROOT

from fat5_jax import interrupts
from fat5_jax.checkpoints import history

MOMENTS = int(os.environ.get("FAT5_JAX_MOMENTS", "4"))
LINES = 3000
ENVIRONMENT = os.environ | {"PYTHONPATH": ROOT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A working directory with a finished run, and lines to predict."""
  folder = write_tiny(tmp_path_factory.mktemp("signals"))
  (folder / "lines.txt").write_text("number 5\n" * LINES)
  done = subprocess.run(
    command("train", "--gin.MODEL_DIR=done"), cwd=folder, env=ENVIRONMENT
  )
  assert done.returncode == 0
  return folder


def command(name, *flags):
  if name == "convert":
    tool = os.path.join(ROOT, "tools", "convert_checkpoint.py")
    return [sys.executable, tool, "done", "exported", "--no_transformers"]
  files = ["--gin_file=tiny.gin"] if name == "train" else []
  return [sys.executable, "-m", f"fat5_jax.{name}", *files, *flags]


COMMANDS = {
  "train": (
    *("--gin.MODEL_DIR=run", "--gin.TRAIN_STEPS=1000000"),
    *("--gin.EVAL_PERIOD=40", "--gin.CHECKPOINT_PERIOD=20"),
  ),
  "infer": (
    *("--gin.MODEL_DIR=done", "--gin.INPUT=lines.txt"),
    *("--gin.OUTPUT=out.jsonl", "--gin.INFER_BATCH_SIZE=8"),
  ),
  "convert": (),
}
# Seconds in which all that a command does has begun.
LONG = {"train": 25, "infer": 20, "convert": 5}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_moment_is_a_line(folder, name, number, seed):
  rng, bad = random.Random(f"{seed} {name} {number}"), []
  for _ in range(MOMENTS):
    process = subprocess.Popen(
      command(name, *COMMANDS[name]),
      cwd=folder,
      env=ENVIRONMENT,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    seconds = rng.uniform(0.3, LONG[name])
    time.sleep(seconds)
    begin = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    took, status = time.monotonic() - begin, process.returncode
    print(
      f"{name}, {signal.Signals(number).name} after {seconds:.1f} s:"
      f" status {status} in {took:.1f} s"
    )
    # A command may just have ended by itself; SIGTERM is content with a save.
    fine = {interrupts.status(number), 0, -number}
    if "is saved in" in said:
      fine = {0 if number == signal.SIGTERM else interrupts.status(number)}
    if status not in fine or "Traceback" in said or took > 40:
      bad.append(f"after {seconds:.1f} s: status {status}, {said[-1500:]}")
    for path in (folder / "out.jsonl", folder / "exported"):
      # Python's own ending is no part of the command, whose file is whole.
      if status not in (0, -number) and path.exists():
        bad.append(f"after {seconds:.1f} s: left {path}")
      elif path.is_file():
        lines = path.read_text().splitlines()
        assert len(lines) == LINES and all(map(json.loads, lines))
      elif path.is_dir():
        assert safetensors.numpy.load_file(path / "model.safetensors")
        assert json.loads((path / "config.json").read_text())
      remove = shutil.rmtree if path.is_dir() else os.unlink
      with contextlib.suppress(FileNotFoundError):
        remove(path)
  assert not bad, "\n".join(bad)
  if name == "train":
    step, damaged = history.latest_whole(str(folder / "run"))
    assert not damaged


def test_a_signal_that_a_callback_swallows_comes_again():
  """Whatever is raised in a garbage collector's callback is lost."""
  once = []

  def callback(phase, info):
    if phase == "start" and not once:
      once.append(True)
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.01)

  assert threading.current_thread() is threading.main_thread()
  with interrupts.watched("a test"):
    interrupts.loaded()
    gc.callbacks.append(callback)
    try:
      with pytest.raises(interrupts.Stopped):
        gc.collect()
        for _ in range(100):
          time.sleep(0.02)
    finally:
      gc.callbacks.remove(callback)
    assert interrupts.ending() == 143


@pytest.mark.slow
def test_a_disk_that_fills_is_a_line_and_the_last_good_step_stays(folder):
  """A real file system of 1 MB, again and again."""
  script = """
    mount -t tmpfs -o size=1m tmpfs small || exit 77
    for i in 1 2 3; do
      "$@" > out 2>&1
      echo "status $?"; tail -1 out; grep -c Traceback out
      "$PYTHON" "$TOOL" small/run
    done
  """
  (folder / "small").mkdir()
  flags = ("--gin.MODEL_DIR=small/run", "--gin.KEEP=None")
  done = subprocess.run(
    ["unshare", "-rm", "sh", "-c", script, "sh", *command("train", *flags)],
    cwd=folder,
    env=ENVIRONMENT
    | {
      "PYTHON": sys.executable,
      "TOOL": os.path.join(ROOT, "tools", "check_checkpoint.py"),
    },
    capture_output=True,
    text=True,
  )
  if done.returncode == 77 or "unshare" in done.stderr:
    pytest.skip(f"no file system of one's own here: {done.stderr.strip()}")
  lines = done.stdout.splitlines()
  print(done.stdout)
  assert lines.count("status 1") == 3 and lines.count("0") == 3
  told = [line for line in lines if line.startswith("error: ")]
  assert len(told) == 3
  for line in told:
    assert "No space left on device" in line
    assert "untouched" in line or "no earlier one" in line
  assert not [line for line in lines if "damaged" in line]
