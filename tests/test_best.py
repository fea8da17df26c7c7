"""The best step, early stopping and averages: of any metric, after any kill."""

import csv
import json
import os

import jax
import numpy as np
import pytest
from test_run_folder import MODEL, TEXT, command, run
from test_train import assert_equal_bit_for_bit, final_state

from fat5_jax.checkpoints import history
from fat5_jax.errors import UserError
from fat5_jax.training.best import Best

pytestmark = pytest.mark.xdist_group("best")
STEPS = 8


@pytest.fixture
def user(tmp_path, monkeypatch):
  rows = "".join(f"number {i}\tthe answer {i}\n" for i in range(12))
  for name in ("train", "dev"):
    (tmp_path / f"{name}.tsv").write_text("text\tanswer\n" + rows)
  (tmp_path / "text.gin").write_text(MODEL + TEXT)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def train(capfd, name, *flags, steps=STEPS):
  return run(
    capfd,
    "train",
    "--gin_file=text.gin",
    f"--gin.MODEL_DIR={name}",
    f"--gin.TRAIN_STEPS={steps}",
    "--gin.CHECKPOINT_PERIOD=1",
    "--gin.EVAL_PERIOD=1",
    *flags,
  ).err


# ---- The average -------------------------------------------------------------

DECAY = 0.7


def test_the_average_is_that_of_the_equations_and_changes_no_step(user, capfd):
  train(capfd, "plain", "--gin.KEEP=None")
  train(capfd, "run", "--gin.KEEP=None", f"--gin.EMA_DECAY={DECAY}")
  wanted, _ = final_state(user / "plain", 0)
  for step in range(STEPS + 1):
    live, plain_optimizer = final_state(user / "plain", step)
    if step:
      share = 1 - min(DECAY, (1 + step) / (10 + step))
      wanted = jax.tree.map(
        lambda w, x, share=share: w + share * (x - w), wanted, live
      )
    average, optimizer = final_state(user / "run", step)
    jax.tree.map(
      lambda a, w: np.testing.assert_allclose(a, w, rtol=2e-6, atol=1e-7),
      average,
      wanted,
    )
    # The live parameters, and all else of the optimizer, are as without.
    assert_equal_bit_for_bit(optimizer["average"], live)
    assert_equal_bit_for_bit(optimizer["inner"], plain_optimizer)


def test_what_is_evaluated_and_read_is_the_average(user, capfd):
  train(capfd, "plain", "--gin.KEEP=None")
  train(capfd, "run", f"--gin.EMA_DECAY={DECAY}")
  average, _ = final_state(user / "run", STEPS)
  # eval by itself reads what training evaluated.
  run(capfd, "eval", "--gin_file=text.gin", "--gin.MODEL_DIR=run")
  lines = (user / "run/inference_eval").glob("*-metrics.jsonl")
  own = json.loads(next(lines).read_text().splitlines()[-1])
  lines = (user / "run/eval/inference_eval").glob("*-metrics.jsonl")
  assert json.loads(next(lines).read_text().splitlines()[-1]) == own
  # The loss of the average is not that of the last step.
  loss = lambda name: [
    row["value"]
    for row in csv.DictReader(open(user / name / "metrics.csv"))
    if row["metric"] == "loss" and row["dataset"].startswith("training_eval")
  ]
  assert loss("run") != loss("plain")
  # A run that starts from it starts from the average.
  said = train(
    capfd, "next", "--gin.INITIAL_CHECKPOINT_PATH=run", steps=STEPS + 1
  )
  assert "a fresh optimizer" in said
  begin, _ = final_state(user / "next", STEPS)
  assert_equal_bit_for_bit(begin, average)


def test_a_run_with_an_average_goes_on_to_the_same_bits(user, capfd):
  flags = (f"--gin.EMA_DECAY={DECAY}", "--gin.EVAL_BEFORE_TRAINING=True")
  train(capfd, "whole", *flags)
  train(capfd, "cut", *flags, steps=3)
  said = train(capfd, "cut", *flags)
  assert "going on from step 3" in said
  for one, two in zip(
    final_state(user / "whole", STEPS), final_state(user / "cut", STEPS)
  ):
    assert_equal_bit_for_bit(one, two)
  rows = lambda name: [
    row
    for row in csv.reader(open(user / name / "metrics.csv"))
    if not row[2].startswith("timing/")
  ]
  # The cut run's third step was its last, and had a row of its own.
  assert [r for r in rows("whole") if r[1] != "train"] == [
    r for r in rows("cut") if r[1] != "train"
  ]
  assert {r[0] for r in rows("whole") if r[1].startswith("inf")} == {
    str(step) for step in range(STEPS + 1)
  }


def test_an_average_begun_later_starts_from_what_there_is(user, capfd):
  """Another optimizer's state is not taken in silence."""
  train(capfd, "run", steps=2)
  text = run(
    capfd,
    "train",
    "--gin_file=text.gin",
    "--gin.MODEL_DIR=run",
    "--gin.TRAIN_STEPS=4",
    "--gin.EMA_DECAY=0.9",
    status=1,
  ).err
  assert "other settings" in text and "EMA_DECAY" in text


# ---- The best step -----------------------------------------------------------

TASK = "text_to_text"
LOSS = "training_eval/{}/loss"


def losses(folder):
  with open(folder / "metrics.csv") as file:
    return {
      int(row["step"]): float(row["value"])
      for row in csv.DictReader(file)
      if row["metric"] == "loss" and row["dataset"].startswith("training_eval")
    }


def names(folder):
  with open(folder / "metrics.csv") as file:
    found = {row["dataset"] for row in csv.DictReader(file)}
  (name,) = [n for n in found if n.startswith("training_eval/")]
  return name


def test_the_best_step_stays_and_the_run_ends_after_patience(user, capfd):
  # So high a rate that the loss soon goes up again.
  flags = ("--gin.LEARNING_RATE=0.3", "--gin.KEEP=1")
  train(capfd, "plain", *flags, steps=2)
  follow = (
    f"--gin.KEEP_BEST={names(user / 'plain')}/loss",
    "--gin.PATIENCE=3",
    "--gin.CHECKPOINT_PERIOD=100",
  )
  said = train(capfd, "run", *flags, *follow, steps=60)
  found = losses(user / "run")
  best = min(found, key=found.get)
  last = max(found)
  assert best < last < 60, "the example has no best step"
  assert last - best == 3
  assert f"stopped at step {last} of 60" in said
  assert f"at step {best}, kept" in said
  assert history.steps(user / "run") == [best, last]
  assert json.loads((user / "run/best.json").read_text())["step"] == best
  # Readers know it by name.
  done = run(
    capfd,
    "eval",
    "--gin_file=text.gin",
    "--gin.MODEL_DIR=run",
    "--gin.CHECKPOINT_PATH=run/best",
  )
  assert f"checkpoint_{best}" in done.err
  # The same command again has nothing to do.
  again = train(capfd, "run", *flags, *follow, steps=60)
  assert f"stopped at step {last} of 60" in again
  assert losses(user / "run") == found


def test_a_metric_that_is_not_there_is_a_line_with_those_that_are(user, capfd):
  text = run(
    capfd,
    "train",
    "--gin_file=text.gin",
    "--gin.MODEL_DIR=run",
    "--gin.EVAL_PERIOD=1",
    "--gin.KEEP_BEST=accuracie",
    status=1,
  ).err
  assert "no evaluation has it" in text and "/accuracy" in text
  assert command(
    "train", "--gin_file=text.gin", "--gin.MODEL_DIR=x", "--gin.PATIENCE=2"
  )
  assert "needs a metric" in capfd.readouterr().err


class Log:
  def __init__(self, values, name="accuracy", dataset="inference_eval/rte"):
    self._rows = [(i, dataset, name, v) for i, v in enumerate(values)]

  def rows(self):
    return self._rows


@pytest.mark.parametrize(
  "metric,mode,values,step,exhausted",
  [
    ("rte/accuracy", None, [1, 3, 2, 2.5], 1, True),
    ("accuracy", None, [1, 3, 2], 1, False),
    # An equal value is no better one.
    ("accuracy", None, [3, 3, 3], 0, True),
    ("accuracy", "min", [1, 3, 0.5], 2, False),
    ("accuracy", None, [np.nan, 3, np.nan, 4], 3, False),
    ("accuracy", None, [np.nan], None, False),
    ("accuracy", None, [np.nan, np.nan], None, True),
    ("accuracy", None, [], None, False),
    ("inference_eval/rte/accuracy", None, [1, 2], 1, False),
  ],
)
def test_best_of_what_was_measured(
  metric, mode, values, step, exhausted, tmp_path
):
  best = Best(metric, 2, mode, str(tmp_path))
  best.look(Log(values))
  assert (best.step, best.exhausted) == (step, exhausted)
  # Seen one after the other it is the same.
  best = Best(metric, 2, mode, str(tmp_path))
  for count in range(len(values) + 1):
    best.look(Log(values[:count]))
  assert (best.step, best.exhausted) == (step, exhausted)


@pytest.mark.parametrize(
  "name,lower",
  [("loss", True), ("bleu", False), ("perplexity", True), ("wer", True)]
  + [("f1", False), ("accuracy", False), ("after", False), ("mse", True)]
  + [("rmse", True), ("bits_per_byte", True), ("lossless_share", False)]
  + [("loss_per_nonpadding_target_token", True), ("wer_score", True)],
)
def test_less_is_better_of_what_is_an_error(name, lower, tmp_path):
  best = Best(name, None, None, str(tmp_path))
  best.look(Log([2.0, 1.0, 3.0], name))
  assert best.step == (1 if lower else 2)


def test_the_name_of_a_task_does_not_say_what_is_better(tmp_path):
  log = Log([0.5, 0.9, 0.7], dataset="inference_eval/error_loss")
  best = Best("error_loss/accuracy", None, None, str(tmp_path))
  best.look(log)
  assert best.step == 1


def test_a_metric_may_have_a_slash_in_its_name(tmp_path):
  best = Best("rte/rouge/1", None, None, str(tmp_path))
  best.look(Log([1, 2, 1.5], "rouge/1"))
  assert best.step == 1


def test_what_is_no_longer_there_is_not_the_best(tmp_path):
  for step in (2, 3):
    (tmp_path / f"checkpoint_{step}").mkdir()
  best = Best("accuracy", None, None, str(tmp_path))
  best.look(Log([9, 8, 1, 2]))
  assert (best.step, best.value) == (3, 2)


def test_a_metric_of_two_tasks_needs_the_task(tmp_path):
  log = Log([1, 2])
  log._rows += [(1, "inference_eval/cb", "accuracy", 0.5)]
  with pytest.raises(UserError, match="rte"):
    Best("accuracy", None, None, str(tmp_path)).look(log)
  best = Best("cb/accuracy", None, None, str(tmp_path))
  best.look(log)
  assert best.value == 0.5
  assert os.path.exists(tmp_path / history.BEST)
  assert jax.process_index() == 0
