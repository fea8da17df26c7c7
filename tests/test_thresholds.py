# ruff: noqa: F811 (fixtures are imported)
"""Thresholds: the best on rows that are known, and decisions by them."""

import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
from test_run_folder import run, train_each, user  # noqa: F401

from fat5_jax.data import metrics, thresholds
from fat5_jax.objectives import heads as objectives_heads

pytestmark = pytest.mark.xdist_group("thresholds")

# ---- Labels ------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_no_other_threshold_has_a_higher_f1(digits):
  """Against scikit-learn's F1 at every threshold there is."""
  rng = np.random.default_rng(digits)
  targets = rng.integers(2, size=200)
  p = np.round(np.clip(0.2 * targets + 0.8 * rng.random(200), 0, 1), digits)
  found, f1 = thresholds.best_f1(targets, p)
  at = lambda t: sklearn.metrics.f1_score(targets, p > t, zero_division=0)
  assert at(found) == pytest.approx(f1)
  assert f1 == pytest.approx(max(map(at, [0.0, *p])))
  curve = sklearn.metrics.precision_recall_curve(targets, p)
  with np.errstate(invalid="ignore"):
    best = np.nanmax(2 * curve[0] * curve[1] / (curve[0] + curve[1]))
  assert f1 == pytest.approx(best)


def test_of_thresholds_that_are_as_good_the_middle_one_is_taken():
  assert thresholds.best_f1([1, 0], [0.9, 0.3]) == (pytest.approx(0.6), 1.0)
  assert thresholds.best_f1([1, 1], [0.9, 0.9]) == (pytest.approx(0.45), 1.0)
  assert thresholds.best_f1([0, 0], [0.9, 0.3])[1] == 0.0
  assert thresholds.best_f1([], []) == (0.5, 0.0)


# ---- No answer ---------------------------------------------------------------


def questions(count=150, seed=0):
  """(targets, predictions) of windows, as an evaluation has them."""
  rng = np.random.default_rng(seed)
  words = "red fox saw The- dog cat".split()
  targets, predictions = [], []
  for number in range(count):
    answers = (
      [" ".join(["a", "dog", *rng.choice(words, 2)])]
      if rng.random() < 0.6
      else []
    )
    for _ in range(rng.integers(1, 4)):
      right = bool(answers) and rng.random() < 0.5
      text = answers[0] if right else " ".join(["fox", *rng.choice(words, 2)])
      name = f"q{number}"
      targets.append({"id": name, "answers": answers})
      predictions.append(
        {
          "id": name,
          "text": text,
          "score": float(rng.normal() + 2 * right),
          "no_answer": float(np.round(rng.normal() + (not answers), 1)),
        }
      )
  return targets, predictions


def joined(targets, predictions):
  """{id: (answers, text, how much better no answer scores)}, of all windows."""
  found = {}
  for target, prediction in zip(targets, predictions):
    found.setdefault(target["id"], (target["answers"], []))[1].append(
      prediction
    )
  return {
    name: (
      answers,
      max(rows, key=lambda row: row["score"])["text"],
      min(row["no_answer"] for row in rows) - max(row["score"] for row in rows),
    )
    for name, (answers, rows) in found.items()
  }


@pytest.mark.parametrize("seed", range(3))
def test_no_other_no_answer_threshold_scores_higher(seed):
  targets, predictions = questions(seed=seed)
  found = metrics.span_squad(targets, predictions)
  levels = [odds for _, _, odds in joined(targets, predictions).values()]
  at = lambda t: metrics.span_squad(targets, predictions, t)
  every = [at(t) for t in [*levels, min(levels) - 1]]
  for name, plain in (("exact", "em"), ("f1", "f1")):
    best = found[f"best_{name}"]
    assert best == pytest.approx(max(values[plain] for values in every))
    assert at(found[f"best_{name}_thresh"])[plain] == pytest.approx(best)
  assert found["best_f1"] > found["f1"], "nothing is gained"


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_are_those_of_evaluate_v2(seed):
  """As transformers 4 has SQuAD's own evaluate-v2.0.py."""
  theirs = pytest.importorskip("transformers.data.metrics.squad_metrics")
  processors = pytest.importorskip("transformers.data.processors.squad")
  targets, predictions = questions(seed=seed)
  rows = joined(targets, predictions)
  examples = [
    processors.SquadExample(
      qas_id=name,
      question_text="",
      context_text="",
      answer_text=None,
      start_position_character=None,
      title="",
      answers=[{"text": text} for text in answers],
      is_impossible=not answers,
    )
    for name, (answers, _, _) in rows.items()
  ]
  texts = {name: text for name, (_, text, _) in rows.items()}
  odds = {name: odds for name, (_, _, odds) in rows.items()}
  # Its threshold for plain scores is one that none exceeds.
  wanted = theirs.squad_evaluate(examples, texts, odds, 1e9)
  found = metrics.span_squad(targets, predictions)
  assert found["em"] == pytest.approx(wanted["exact"])
  assert found["f1"] == pytest.approx(wanted["f1"])
  for name in ("HasAns_f1", "NoAns_f1", "best_exact", "best_f1"):
    assert found[name] == pytest.approx(wanted[name]), name
  for name in ("best_exact_thresh", "best_f1_thresh"):
    assert found[name] == pytest.approx(wanted[name]), name


def test_where_no_answer_is_ever_right_none_is_given():
  """The official script tells the threshold 0, which may answer."""
  targets = [{"id": i, "answers": []} for i in "ab"]
  predictions = [
    {"id": i, "text": "x", "score": 3.0, "no_answer": 1.0} for i in "ab"
  ]
  found = metrics.span_squad(targets, predictions)
  assert found["f1"] == 0.0 and found["best_f1"] == 100.0
  again = metrics.span_squad(targets, predictions, found["best_f1_thresh"])
  assert again["em"] == 100.0


def test_questions_that_all_have_answers_have_plain_scores():
  targets, predictions = questions()
  kept = [i for i, row in enumerate(targets) if row["answers"]]
  found = metrics.span_squad(
    [targets[i] for i in kept], [predictions[i] for i in kept]
  )
  assert set(found) == {"em", "f1"}


def test_no_answer_scores_as_the_first_token_of_the_row():
  rng = np.random.default_rng(4)
  logits_BL2 = rng.normal(size=(5, 9, 2)).astype(np.float32)
  answerable_BL = np.zeros((5, 9), np.int32)
  answerable_BL[:, 3:8] = 1
  found = np.asarray(objectives_heads._best_spans(logits_BL2, answerable_BL, 3))
  np.testing.assert_allclose(found[:, 4], logits_BL2[:, 0].sum(-1), rtol=1e-6)
  assert (found[:, 0] >= 3).all()


# ---- The commands ------------------------------------------------------------

TOPICS = """
import fat5_jax.data.head_tasks as head_tasks
import fat5_jax.data.sources as sources

include 'heads/sequence_classification.gin'

MIXTURE_OR_TASK_NAME = @head_tasks.classification()
head_tasks.classification:
  source = @sources.Files()
  inputs = '{text}'
  label = 'topics'
  label_names = ('red', 'green', 'blue')
  problem_type = 'multi_label_classification'
  vocabulary = %VOCABULARY
  name = 'topics'
sources.Files.splits = {'train': 'rows.jsonl', 'validation': 'rows.jsonl',
                        'test': 'test.jsonl'}
TASK_FEATURE_LENGTHS = {'inputs': 48}
TRAIN_STEPS = 6
"""
ASKED = """
import fat5_jax.data.head_tasks as head_tasks
import fat5_jax.data.squad as squad

include 'heads/question_answering.gin'

MIXTURE_OR_TASK_NAME = @head_tasks.spans()
head_tasks.spans:
  source = @squad.SquadFiles()
  vocabulary = %VOCABULARY
  stride = 8
  name = 'asked'
squad.SquadFiles.splits = {'train': 'asked.jsonl', 'validation': 'asked.jsonl'}
TASK_FEATURE_LENGTHS = {'inputs': 48}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A working folder with two finished runs."""
  folder = tmp_path_factory.mktemp("thresholds")
  rng = np.random.default_rng(0)
  for name in ("rows", "test"):
    with open(folder / f"{name}.jsonl", "w") as file:
      for i in range(24):
        topics = [t for t in ("red", "green", "blue") if rng.random() < 0.3]
        text = f"{i} {' '.join(topics)}"
        file.write(json.dumps({"text": text, "topics": topics}) + "\n")
  with open(folder / "asked.jsonl", "w") as file:
    for i in range(16):
      row = {
        "id": f"q{i}",
        "question": "which?",
        "context": f"there are {i} foxes and many more dogs over here",
        "answers": [f"{i}"] if i % 2 else [],
      }
      file.write(json.dumps(row) + "\n")
  return train_each(folder, {"topics": TOPICS, "asked": ASKED})


def read(path):
  return [json.loads(line) for line in open(path, encoding="utf-8")]


def predicted(capfd, *flags, model="topics", rows="rows.jsonl"):
  run(
    capfd,
    "infer",
    f"--gin.MODEL_DIR={model}",
    f"--gin.INPUT={rows}",
    "--gin.OUTPUT=out.jsonl",
    *flags,
  )
  return read("out.jsonl")


def test_the_threshold_of_dev_is_found_and_used(user, capfd):
  (path,) = (user / "topics/inference_eval").glob("*-details-validation.json")
  details = json.loads(path.read_text())
  assert (details["task"], details["step"]) == ("topics", 6)
  best = details["threshold"]
  names = ["red", "green", "blue"]
  wanted = np.array(
    [[n in row["topics"] for n in names] for row in read("rows.jsonl")]
  )
  at_half = predicted(capfd)
  by_dev = predicted(capfd, "--gin.THRESHOLD='dev'")
  by_number = predicted(capfd, f"--gin.THRESHOLD={best['value']!r}")
  by_class = predicted(capfd, "--gin.THRESHOLD='dev_by_class'")
  assert by_dev == by_number
  probabilities = np.array(
    [[row["probabilities"][n] for n in names] for row in at_half]
  )
  levels = [best["by_class"][n] for n in names]
  for rows, threshold, f1 in (
    (at_half, 0.5, "f1_micro_at_half"),
    (by_dev, best["value"], "f1_micro"),
    (by_class, levels, "f1_micro_by_class"),
  ):
    said = np.array([[n in row["prediction"] for n in names] for row in rows])
    np.testing.assert_array_equal(said, probabilities > threshold)
    found = sklearn.metrics.f1_score(
      wanted, said, average="micro", zero_division=0
    )
    assert found == pytest.approx(best[f1])
  assert best["f1_micro"] > best["f1_micro_at_half"], "nothing is gained"


def test_a_test_split_is_scored_by_the_threshold_of_dev(user, capfd):
  flags = ("--gin.MODEL_DIR=topics", "--gin.EVAL_SPLIT=test")
  said = run(capfd, "eval", *flags, "--gin.THRESHOLD='dev'").err
  assert "by class" in said and "THRESHOLD = 0.5" in said
  folder = user / "topics/eval/inference_eval"
  rows = read(folder / "topics-000006.jsonl")
  (path,) = (user / "topics/inference_eval").glob("*-details-validation.json")
  best = json.loads(path.read_text())["threshold"]["value"]
  for row in rows:
    probabilities = row["probabilities"]
    assert [*probabilities] == ["red", "green", "blue"]
    assert row["prediction"] == [
      int(value > best) for value in probabilities.values()
    ]
  values = json.loads(
    (folder / "topics-metrics.jsonl").read_text().splitlines()[-1]
  )
  targets = np.array([row["target"] for row in rows])
  found = np.array([row["prediction"] for row in rows])
  wanted = 100 * sklearn.metrics.f1_score(targets, found, average="micro")
  assert values["f1_micro"] == pytest.approx(wanted)
  # The test split's own best is nobody's dev.
  shutil.rmtree("topics/inference_eval")
  said = run(
    capfd, "infer", "--gin.MODEL_DIR=topics", "--gin.INPUT=rows.jsonl",
    "--gin.THRESHOLD='dev'", status=1,
  ).err  # fmt: skip
  assert "run fat5_jax.eval on split 'validation'" in said
  run(capfd, "eval", "--gin.MODEL_DIR=topics")
  assert len(predicted(capfd, "--gin.THRESHOLD='dev'")) == 24


def test_a_threshold_for_another_head_is_a_line(user, capfd):
  for command_flags, text in (
    (("asked", "--gin.THRESHOLD=0.3"), "THRESHOLD = 0.3 is for multi-label"),
    (("topics", "--gin.NO_ANSWER_THRESHOLD=1"), "is for question answering"),
    (("topics", "--gin.THRESHOLD='test'"), "'dev' or 'dev_by_class'"),
    (("topics", "--gin.THRESHOLD=1"), "less than 1"),
  ):
    model, flag = command_flags
    flags = (f"--gin.MODEL_DIR={model}", flag)
    for name in ("infer", "eval"):
      said = run(capfd, name, *flags, status=1).err
      assert text in said and "Traceback" not in said


def test_questions_are_left_without_an_answer(user, capfd):
  values = json.loads(
    (user / "asked/inference_eval/asked-metrics.jsonl").read_text()
  )
  threshold = values["best_f1_thresh"]
  assert values["NoAns_f1"] == 0.0 and values["best_f1"] >= 50.0
  ask = lambda *flags: predicted(
    capfd, *flags, model="asked", rows="asked.jsonl"
  )
  always = ask()
  assert all(row["text"] for row in always)
  for level in (threshold, float(np.median([r["no_answer"] for r in always]))):
    rows = ask(f"--gin.NO_ANSWER_THRESHOLD={level!r}")
    for before, row in zip(always, rows, strict=True):
      if abs(row["no_answer"] - level) > 1e-5:
        empty = row["no_answer"] > level
        assert row["text"] == ("" if empty else before["text"])
  run(
    capfd,
    "eval",
    "--gin.MODEL_DIR=asked",
    f"--gin.NO_ANSWER_THRESHOLD={threshold!r}",
  )
  path = user / "asked/eval/inference_eval/asked-metrics.jsonl"
  again = json.loads(path.read_text())
  assert again["f1"] == pytest.approx(values["best_f1"])
