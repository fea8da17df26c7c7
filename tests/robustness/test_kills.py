"""kill -9 at any moment, the newest checkpoint damaged between: same bits."""

import csv
import json
import os
import random

import damage
import pytest
from test_train import (
  TINY,
  assert_equal_bit_for_bit,
  final_state,
)

from fat5_jax import checkpoints

pytestmark = pytest.mark.slow
STEPS = 300
FLAGS = (
  "--gin_file=tiny.gin",
  f"--gin.TRAIN_STEPS={STEPS}",
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


def position(folder):
  path = folder / f"checkpoint_{STEPS}" / "data" / "metadata"
  found = json.loads(path.read_text())
  found["sums"] = None  # Of the speed too.
  return found


def test_killed_and_damaged_a_run_ends_with_the_same_bits(
  zygote, seed, tmp_path
):
  """FAT5_JAX_KILLS times; each way of damage has its turn."""
  rng = random.Random(seed)
  rows = "".join(f"number {i}\t{i * 7 % 100}\n" for i in range(60))
  (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows)
  (tmp_path / "tiny.gin").write_text(TINY)

  def train(name, seconds):
    flags = [*FLAGS, f"--gin.MODEL_DIR={name}"]
    return zygote.run("train", flags, str(tmp_path), seconds)

  whole = train("whole", 300)
  assert whole.status == 0, whole.stderr
  killed, told = 0, []
  ways = list(damage.WAYS)
  rng.shuffle(ways)
  # A life long enough to get on, and not to the end.
  life, found = whole.seconds / 2, []
  while killed < int(os.environ.get("FAT5_JAX_KILLS", "4")):
    seconds, before = rng.uniform(0.02, 1) * life, len(found)
    outcome = train("killed", seconds)
    if outcome.status is not None:
      assert outcome.status == 0, outcome.stderr
      break
    killed += 1
    found = checkpoints.steps(tmp_path / "killed")
    life *= 1.2 if len(found) <= before else 0.8
    way = ways[killed % len(ways)]
    if len(found) > 1:
      step = tmp_path / "killed" / f"checkpoint_{found[-1]}"
      damage.WAYS[way](str(step), rng)
      told.append(f"{seconds:.1f} s, step {found[-1]}: {way}")
    else:
      told.append(f"{seconds:.1f} s, steps {found}")
  assert killed >= 2, "it ended before it could be killed: make it longer"
  last = train("killed", 300)
  assert last.status == 0, (told, last.stderr)
  print("\n".join(told))
  assert_equal_bit_for_bit(
    final_state(tmp_path / "whole", STEPS),
    final_state(tmp_path / "killed", STEPS),
  )
  assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed"), told
  assert position(tmp_path / "whole") == position(tmp_path / "killed"), told
  left = [n for n in os.listdir(tmp_path / "killed") if "tmp" in n]
  assert not left and len(told) == killed
