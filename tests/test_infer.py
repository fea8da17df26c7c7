# ruff: noqa: F811 (fixtures are imported)
"""infer over many rows: cut short, in shards, in order, of few shapes."""

import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT
import numpy as np
import pytest
from test_run_folder import command, made, run, user  # noqa: F401

from fat5_jax.inference import batches, output_file, writers
from fat5_jax.models.config import HeadConfig

pytestmark = pytest.mark.xdist_group("run_folder")


@pytest.fixture
def rows(user):
  """A run folder's working folder, with 300 lines of mixed lengths."""
  rng = np.random.default_rng(0)
  lines = [
    " ".join(f"w{n}" for n in rng.integers(0, 99, rng.integers(1, 40)))
    for _ in range(300)
  ]
  (user / "lines.txt").write_text("\n".join(lines) + "\n")
  return user


TEXT = (
  "--gin.MODEL_DIR=text",
  "--gin.INPUT=lines.txt",
  "--gin.MAX_OUTPUT_LENGTH=4",
  "--gin.INFER_BATCH_SIZE=8",
)
DRAWN = ("--gin.TOP_K=5", "--gin.OUTPUT_SCORES=True")


def predictions(name):
  with open(name, encoding="utf-8") as file:
    return file.read()


class _Cut(KeyboardInterrupt):
  """As Ctrl-C ends a command."""


def cut_after(monkeypatch, count):
  """The next command is interrupted after so many records."""
  whole = writers.write

  def write(*arguments, **more):
    for number, text in enumerate(whole(*arguments, **more)):
      if number == count:
        raise _Cut
      yield text

  monkeypatch.setattr(writers, "write", write)


@pytest.mark.parametrize("form,search", [("jsonl", DRAWN), ("tsv", ())])
def test_a_command_that_was_cut_goes_on_to_the_same_file(
  rows, capfd, monkeypatch, form, search
):
  flags = (*TEXT, *search)
  run(capfd, "infer", *flags, f"--gin.OUTPUT=whole.{form}")
  output = f"--gin.OUTPUT=cut.{form}"
  there = 0
  for count in (7, 100, 31):
    with monkeypatch.context() as patch:
      cut_after(patch, count)
      assert command("infer", *flags, output) == 130
    assert not os.path.exists(f"cut.{form}")
    there += count
    # The last line is not whole.
    with open(f"cut.{form}.partial", "a", encoding="utf-8") as file:
      file.write('{"inputs": "half')
  done = run(capfd, "infer", *flags, output)
  assert f"{there} predictions are there already" in done.err
  assert "300 predictions in" in done.err
  assert predictions(f"cut.{form}") == predictions(f"whole.{form}")
  assert not [name for name in os.listdir() if ".partial" in name]


@pytest.mark.parametrize(
  "change",
  ["--gin.NUM_BEAMS=2", "input", "checkpoint"],
)
def test_another_command_begins_anew(rows, capfd, monkeypatch, change):
  with monkeypatch.context() as patch:
    cut_after(patch, 9)
    assert command("infer", *TEXT, "--gin.OUTPUT=out.jsonl") == 130
  flags = [*TEXT, change] if change.startswith("--") else TEXT
  if change == "input":
    with open("lines.txt", "a", encoding="utf-8") as file:
      file.write("one more\n")
  if change == "checkpoint":
    steps = [n for n in os.listdir("text") if n.startswith("checkpoint_")]
    newest = max(steps, key=lambda name: int(name.split("_")[1]))
    for path, _, names in os.walk(f"text/{newest}/params"):
      for file in names:
        os.utime(os.path.join(path, file))
  done = run(capfd, "infer", *flags, "--gin.OUTPUT=out.jsonl")
  assert "already" not in done.err
  run(capfd, "infer", *flags, "--gin.OUTPUT=again.jsonl")
  assert predictions("out.jsonl") == predictions("again.jsonl")


def test_an_error_leaves_nothing(rows, capfd):
  (rows / "bad.jsonl").write_text('{"text": "a"}\n{"other": "b"}\n')
  flags = ("--gin.MODEL_DIR=text", "--gin.INPUT=bad.jsonl")
  run(capfd, "infer", *flags, "--gin.OUTPUT=out.jsonl", status=1)
  assert not [name for name in os.listdir() if name.startswith("out.jsonl")]


@pytest.mark.parametrize("search", [(), DRAWN], ids=["greedy", "drawn"])
def test_shards_one_after_the_other_are_the_whole(rows, capfd, search):
  flags = (*TEXT, *search)
  run(capfd, "infer", *flags, "--gin.OUTPUT=whole.tsv")
  for shard in range(3):
    more = (f"--gin.SHARD={shard}", "--gin.NUM_SHARDS=3")
    run(capfd, "infer", *flags, *more, "--gin.OUTPUT=part.tsv")
  names = sorted(n for n in os.listdir() if n.startswith("part.tsv"))
  assert names == [f"part.tsv-{i:05d}-of-00003" for i in range(3)]
  parts, whole = "".join(map(predictions, names)), predictions("whole.tsv")
  rows_of = lambda text: [row.split("\t") for row in text.splitlines()]
  assert len(rows_of(parts)) == 301
  for one, two in zip(rows_of(parts), rows_of(whole), strict=True):
    assert one[:2] == two[:2]
    # Rows are in other batches, whose sums round in other ways.
    if search and one[0] != "inputs":
      assert abs(float(one[2]) - float(two[2])) < 1e-4


def test_shards_of_a_head_are_the_whole(rows, capfd):
  flags = (
    *("--gin.MODEL_DIR=pairs", "--gin.INPUT=pairs.tsv"),
    *("--gin.OUTPUT_FORMAT=glue", "--gin.INFER_BATCH_SIZE=2"),
  )
  run(capfd, "infer", *flags, "--gin.OUTPUT=whole")
  for shard in range(3):
    more = (f"--gin.SHARD={shard}", "--gin.NUM_SHARDS=3")
    run(capfd, "infer", *flags, *more, "--gin.OUTPUT=part")
  names = sorted(n for n in os.listdir() if n.startswith("part"))
  assert "".join(map(predictions, names)) == predictions("whole")


@pytest.mark.parametrize(
  "flags,told",
  [
    (("--gin.SHARD=3", "--gin.NUM_SHARDS=3"), "from 0 to 2"),
    (("--gin.NUM_SHARDS=2", "--gin.OUTPUT=-"), "set INPUT and OUTPUT"),
  ],
)
def test_a_shard_that_is_none_is_a_line(rows, capfd, flags, told):
  done = run(capfd, "infer", *TEXT, "--gin.OUTPUT=x.jsonl", *flags, status=1)
  assert told in done.err


def test_shapes_are_few_and_told(rows, capfd):
  done = run(capfd, "infer", *TEXT, "--gin.OUTPUT=out.jsonl")
  (line,) = [x for x in done.err.splitlines() if "compiled for" in x]
  lengths = [
    len(f"say {x} loudly") + 1
    for x in predictions("lines.txt").split("\n")[:-1]
  ]
  most = len({batches.padded_length(n) for n in lengths})
  count = int(line.split("compiled for ")[1].split(" ")[0])
  # A last batch of fewer rows may have a shape of its own.
  assert count <= most + 1
  assert int(line.split("; ")[1].split("%")[0]) < 35


def test_a_padded_length_is_at_most_half_more():
  for length in range(1, 5000):
    padded = batches.padded_length(length)
    assert length <= padded <= max(16, 1.5 * length)
  assert len({batches.padded_length(n) for n in range(1, 4097)}) <= 17


@pytest.mark.parametrize("form", ["jsonl", "tsv", "glue", "conll"])
def test_what_is_whole_is_found_at_any_cut(form):
  head = HeadConfig("sequence_classification", label_names=("a", "b"))
  records = [
    {"prediction": "a", "label": 0}
    if form == "glue"
    else {"words": ["x", "y z"], "tags": ["O", "B"]}
    if form == "conll"
    else {"inputs": "a\nb", "prediction": "x\ty"}
    for _ in range(4)
  ]
  texts = list(writers.write(records, form, head))
  ends = np.cumsum([len(text.encode()) for text in texts]).tolist()
  data = "".join(texts).encode()
  for size in range(len(data) + 1):
    count = sum(end <= size for end in ends)
    wanted = (count, ends[count - 1]) if count else (0, 0)
    assert writers.whole_records(data[:size], form, True) == wanted


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_same_file_in_the_end(rows, capfd):
  flags = (*TEXT, *DRAWN, "--gin.INFER_BATCH_SIZE=4")
  run(capfd, "infer", *flags, "--gin.OUTPUT=whole.jsonl")
  environment = os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu"}
  asked = [sys.executable, "-m", "fat5_jax.infer", *flags]
  asked.append("--gin.OUTPUT=out.jsonl")
  rng = np.random.default_rng(0)
  killed = 0
  while killed < 5:
    process = subprocess.Popen(
      asked, env=environment, stderr=subprocess.DEVNULL
    )
    partial, there = "out.jsonl.partial", 0
    if os.path.exists(partial):
      there = predictions(partial).count("\n")
    while process.poll() is None and (
      not os.path.exists(partial)
      or predictions(partial).count("\n") < there + 20
    ):
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
      break
    killed += 1
  assert killed >= 3
  assert subprocess.run(asked, env=environment).returncode == 0
  assert predictions("out.jsonl") == predictions("whole.jsonl")
  for line in predictions("out.jsonl").splitlines():
    assert np.isfinite(json.loads(line)["score"])


def test_a_second_command_on_one_output_is_a_line(rows, capfd, monkeypatch):
  with output_file.opened(
    "out.jsonl", output_file.Kept({}, lambda text: (0, 0))
  ) as file:
    file.write("of the first\n")
    file.flush()
    done = run(capfd, "infer", *TEXT, "--gin.OUTPUT=out.jsonl", status=1)
    assert "being written by another command" in done.err
  assert predictions("out.jsonl") == "of the first\n"


@pytest.mark.parametrize(
  "flags,told",
  [
    (["--gin.MIN_OUTPUT_LENGTH=3"], "as they are, long or short"),
    (["--gin.NO_REPEAT_NGRAM_SIZE=2"], "as they are, long or short"),
    (["--gin.MAX_OUTPUT_LENGTH=3"], "'yes' and its end are 4 tokens"),
    (["--gin.OUTPUT_PROMPT=abcd"], "beginning has 4 tokens"),
    (["--gin.MODE=rank", "--gin.NUM_BEAMS=2"], "does not search"),
  ],
)
def test_what_no_allowed_answer_can_be_is_a_line(rows, capfd, flags, told):
  allowed = "--gin.ALLOWED_OUTPUTS=['yes', 'no']"
  done = run(capfd, "infer", *TEXT, allowed, *flags, status=1)
  assert told in done.err


def test_an_allowed_answer_comes_after_a_forced_token(rows, capfd):
  run(
    capfd,
    "infer",
    *TEXT[:2],
    "--gin.MAX_OUTPUT_LENGTH=9",
    "--gin.ALLOWED_OUTPUTS=['yes', 'no']",
    "--gin.FORCED_FIRST_TOKEN='a'",
    "--gin.OUTPUT=out.jsonl",
  )
  with open("out.jsonl", encoding="utf-8") as file:
    found = {json.loads(line)["prediction"] for line in file}
  assert found <= {"ayes", "ano"}
