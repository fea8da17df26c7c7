"""kill -9 at any moment, the newest checkpoint damaged between: same bits."""

import csv
import json
import os
import random
import time

import damage
import pytest
from test_hosts import Run
from test_train import (
  TINY,
  assert_equal_bit_for_bit,
  final_state,
)

from fat5_jax.checkpoints import history

pytestmark = pytest.mark.slow
FLAGS = (
  "--gin.CHECKPOINT_PERIOD=5",
  "--gin.EVAL_PERIOD=15",
  "--gin.KEEP=None",
)


def metrics(folder):
  """All that a run measured but its speed."""
  with open(folder / "metrics.csv", newline="") as file:
    rows = [tuple(row.values()) for row in csv.DictReader(file)]
  with open(folder / "inference_eval" / "tiny-metrics.jsonl") as file:
    scores = [json.loads(line) for line in file]
  return [row for row in rows if not row[2].startswith("timing/")], scores


def position(folder, steps):
  path = folder / f"checkpoint_{steps}" / "data" / "metadata"
  found = json.loads(path.read_text())
  found["sums"] = None  # Of the speed too.
  return found


@pytest.fixture
def folder(tmp_path):
  rows = "".join(f"number {i}\t{i * 7 % 100}\n" for i in range(60))
  (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows)
  (tmp_path / "tiny.gin").write_text(TINY)
  return tmp_path


def survives(train, folder, steps, seed):
  """A run that is killed and damaged again and again equals one that is not.

  FAT5_JAX_KILLS times; each way of damage has its turn.

  Args:
    train: of MODEL_DIR's name and seconds: the exit status, None where it was
      killed after them; the seconds it took; standard error.
    folder: where it runs.
    steps: of a whole run.
    seed: of the moments and the damage.
  """
  rng = random.Random(seed)
  status, took, said = train("whole", 600)
  assert status == 0, said
  killed, told = 0, []
  ways = list(damage.WAYS)
  rng.shuffle(ways)
  # A life long enough to get on, and not to the end.
  life, found = took / 2, []
  while killed < int(os.environ.get("FAT5_JAX_KILLS", "4")):
    seconds, before = rng.uniform(0.02, 1) * life, len(found)
    status, _, said = train("killed", seconds)
    if status is not None:
      assert status == 0, said
      break
    killed += 1
    found = history.steps(folder / "killed")
    life *= 1.2 if len(found) <= before else 0.8
    way = ways[killed % len(ways)]
    if len(found) > 1:
      step = folder / "killed" / f"checkpoint_{found[-1]}"
      damage.WAYS[way](str(step), rng)
      told.append(f"{seconds:.1f} s, step {found[-1]}: {way}")
    else:
      told.append(f"{seconds:.1f} s, steps {found}")
  assert killed >= 2, "it ended before it could be killed: make it longer"
  status, _, said = train("killed", 600)
  assert status == 0, (told, said)
  print("\n".join(told))
  assert_equal_bit_for_bit(
    final_state(folder / "whole", steps), final_state(folder / "killed", steps)
  )
  assert metrics(folder / "whole") == metrics(folder / "killed"), told
  assert position(folder / "whole", steps) == position(
    folder / "killed", steps
  ), told
  left = [n for n in os.listdir(folder / "killed") if "tmp" in n]
  assert not left and len(told) == killed


def test_killed_and_damaged_a_run_ends_with_the_same_bits(zygote, seed, folder):
  def train(name, seconds):
    flags = ["--gin_file=tiny.gin", *FLAGS, "--gin.TRAIN_STEPS=300"]
    flags.append(f"--gin.MODEL_DIR={name}")
    outcome = zygote.run("train", flags, str(folder), seconds)
    return outcome.status, outcome.seconds, outcome.stderr

  survives(train, folder, 300, seed)


def test_so_does_a_run_of_two_hosts_of_which_one_or_both_are_killed(
  seed, folder
):
  rng = random.Random(f"hosts {seed}")

  def train(name, seconds):
    flags = (*FLAGS, "--gin.TRAIN_STEPS=60", f"--gin.MODEL_DIR={name}")
    begin = time.monotonic()
    run = Run(folder, "train", 2, *flags, "--initialization_timeout=20")
    while any(process.poll() is None for process in run.processes):
      if time.monotonic() - begin > seconds:
        for process in rng.choice(
          [run.processes[:1], run.processes[1:], run.processes]
        ):
          process.kill()
        # Who is left ends by itself.
        run.wait(60)
        return None, seconds, ""
      time.sleep(0.02)
    said = run.said(0) + run.said(1)
    return max(run.wait()), time.monotonic() - begin, said

  survives(train, folder, 60, seed)
