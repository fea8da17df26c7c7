"""What an evaluation tells of classes, names and how sure it was."""

import json

import numpy as np
import pytest
import sklearn.metrics

from fat5_jax import console
from fat5_jax.data import metrics
from fat5_jax.evaluation import classes, details, report
from fat5_jax.models.config import HeadConfig


def classifier(count, **more):
  names = tuple(f"class {i}" for i in range(count))
  return HeadConfig("sequence_classification", count, label_names=names, **more)


def rows_of(targets, probabilities_NC):
  """Rows as an evaluation writes them."""
  for number, (target, p_C) in enumerate(zip(targets, probabilities_NC)):
    best = int(np.argmax(p_C))
    yield {
      "input": {"inputs_pretokenized": f"row {number}"},
      "target": int(target),
      "output": [float(best), *map(float, p_C)],
      "prediction": best,
    }


def found(head, rows):
  told = details.Details(head)
  for row in rows:
    told.add(row)
  return json.loads(json.dumps(told.found(), allow_nan=False))


def drawn(count, rows=800, seed=0):
  rng = np.random.default_rng(seed)
  # The last class is never the target.
  targets = rng.integers(max(count - 1, 1), size=rows)
  logits = rng.normal(size=(rows, count))
  logits[np.arange(rows), targets] += 1.5
  p_NC = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  return targets, p_NC


def close_to_report(table, averages, wanted):
  """scikit-learn's, or seqeval's, report as a dictionary."""
  for name, precision, recall, f1, targets, _ in table:
    line = wanted[name]
    for ours, theirs in zip(
      (precision, recall, f1), ("precision", "recall", "f1-score")
    ):
      assert (0 if ours is None else ours) == pytest.approx(line[theirs])
    assert targets == line["support"]
  for kind, values in averages.items():
    line = wanted[f"{kind} avg"]
    theirs = [line[key] for key in ("precision", "recall", "f1-score")]
    assert values == pytest.approx(theirs), kind


@pytest.mark.parametrize("count", [2, 3, 150])
def test_classes_are_told_as_by_scikit_learn(count):
  targets, p_NC = drawn(count)
  told = found(classifier(count), rows_of(targets, p_NC))
  predicted, names = p_NC.argmax(1), [f"class {i}" for i in range(count)]
  wanted = sklearn.metrics.classification_report(
    targets,
    predicted,
    labels=range(count),
    target_names=names,
    output_dict=True,
    zero_division=0,
  )
  close_to_report(told["classes"], told["averages"], wanted)
  np.testing.assert_array_equal(
    told["confusion"]["counts"],
    sklearn.metrics.confusion_matrix(targets, predicted, labels=range(count)),
  )
  assert told["confusion"]["classes"] == names


def test_several_labels_are_told_as_by_scikit_learn():
  rng = np.random.default_rng(1)
  targets = rng.integers(2, size=(300, 5))
  p_NK = np.clip(0.3 * targets + rng.random((300, 5)) * 0.7, 0, 1)
  head = classifier(5, problem_type="multi_label_classification")
  rows = [
    {
      "input": {},
      "target": t.tolist(),
      "output": p.tolist(),
      "prediction": (p > 0.5).astype(int).tolist(),
    }
    for t, p in zip(targets, p_NK)
  ]
  told = found(head, rows)
  wanted = sklearn.metrics.classification_report(
    targets,
    p_NK > 0.5,
    target_names=head.label_names,
    output_dict=True,
    zero_division=0,
  )
  close_to_report(told["classes"], told["averages"], wanted)
  assert set(told["averages"]) == {"micro", "macro", "weighted"}


@pytest.mark.parametrize("numbers", [False, True], ids=["texts", "numbers"])
def test_answers_in_words_are_classes_too(numbers):
  """Averages are over the targets' classes, whatever else is answered."""
  words = ["entailment", "neutral", "contradiction"]
  rng = np.random.default_rng(2)
  targets, answers = rng.integers(3, size=200), rng.integers(4, size=200)
  rows = []
  for target, answer in zip(targets, answers):
    said = [*words, "banana"][answer]
    row = {"input": {"targets_pretokenized": words[target]}, "output": said}
    if numbers:
      # What GLUE's metrics compare.
      row |= {"target": int(target), "prediction": [0, 1, 2, -1][answer]}
    else:
      row |= {"target": words[target], "prediction": said}
    rows.append(row)
  told = found(None, rows)
  other = "(invalid)" if numbers else "banana"
  assert told["confusion"]["classes"] == [*sorted(words), other]
  wanted = sklearn.metrics.classification_report(
    [words[t] for t in targets],
    [[*words, other][a] for a in answers],
    labels=sorted(words),
    output_dict=True,
  )
  close_to_report(told["classes"][:3], told["averages"], wanted)


def test_texts_and_numbers_are_no_classes():
  texts = [
    {"input": {}, "target": f"{i}", "output": "", "prediction": f"{i}"}
    for i in range(50)
  ]
  assert found(None, texts) == {}
  numbers = [t | {"target": 0.5, "prediction": 0.5} for t in texts]
  assert found(None, numbers) == {}
  head = HeadConfig("sequence_classification", 1, problem_type="regression")
  assert found(head, numbers) == {}


def test_what_has_no_label_is_in_no_class_and_no_error():
  targets, p_NC = drawn(3, rows=30)
  targets[:10] = -1
  told = found(classifier(3), rows_of(targets, p_NC))
  assert sum(row[4] for row in told["classes"]) == 20
  assert told["calibration"]["accuracy"] == np.mean(
    targets[10:] == p_NC[10:].argmax(1)
  )


def test_calibration_is_the_sum_of_the_paper():
  """Guo et al. 2017, equations 2 to 5, with 15 bins."""
  targets, p_NC = drawn(4, rows=1500, seed=5)
  told = found(classifier(4), rows_of(targets, p_NC))["calibration"]
  sure, right = p_NC.max(1), p_NC.argmax(1) == targets
  error = 0.0
  for m in range(1, 16):
    inside = (sure > (m - 1) / 15) & (sure <= m / 15)
    if inside.any():
      gap = abs(right[inside].mean() - sure[inside].mean())
      error += inside.sum() / len(sure) * gap
  assert told["error"] == pytest.approx(error, abs=2e-6)
  assert told["confidence"] == pytest.approx(sure.mean(), abs=2e-6)
  assert told["accuracy"] == right.mean()
  assert sum(row[2] for row in told["bins"]) == 1500


def test_calibration_is_that_of_torchmetrics():
  functional = pytest.importorskip("torchmetrics.functional.classification")
  torch = pytest.importorskip("torch")
  targets, p_NC = drawn(4, rows=1500, seed=6)
  told = found(classifier(4), rows_of(targets, p_NC))["calibration"]
  wanted = functional.multiclass_calibration_error(
    torch.tensor(p_NC), torch.tensor(targets), 4, n_bins=15, norm="l1"
  )
  assert told["error"] == pytest.approx(float(wanted), abs=1e-5)


def test_a_probability_at_an_edge_is_in_the_lower_bin():
  sure = classes.Calibration()
  for probability in (0.0, 1 / 15, 1.0):
    sure.add(probability, True)
  bins = sure.describe()["bins"]
  assert [(round(row[0] * 15), row[2]) for row in bins] == [(0, 2), (14, 1)]


# ---- Names -------------------------------------------------------------------

TAGS = ["O", *(f"{p}-{kind}" for p in "BI" for kind in ("PER", "LOC", "ORG"))]


def tagged(sentences=120, seed=3):
  """Tags that are often right, and at times no sound IOB."""
  rng = np.random.default_rng(seed)
  targets, given = [], []
  for _ in range(sentences):
    tags = rng.choice(TAGS, size=rng.integers(1, 25))
    targets.append(tags.tolist())
    wrong = rng.random(len(tags)) < 0.2
    given.append(np.where(wrong, rng.choice(TAGS, len(tags)), tags).tolist())
  return targets, given


def windows(targets, given, size):
  """Rows as an evaluation writes them: a sentence in windows."""
  for number, (wanted, said) in enumerate(zip(targets, given)):
    for start in range(0, len(wanted), size):
      part = slice(start, start + size)
      yield {
        "input": {},
        "target": {"sentence": number, "tags": wanted[part]},
        "prediction": {"sentence": number, "tags": said[part]},
        "output": [],
      }


GOLDEN = {
  "LOC": [0.8544, 0.8474, 0.8509, 367],
  "ORG": [0.8123, 0.8393, 0.8256, 361],
  "PER": [0.7922, 0.8199, 0.8058, 372],
  "micro": [0.8191, 0.8355, 0.8272],
  "macro": [0.8196, 0.8355, 0.8274],
  "weighted": [0.8196, 0.8355, 0.8273],
}
TAGGER = HeadConfig("token_classification", len(TAGS), label_names=tuple(TAGS))


@pytest.mark.parametrize("size", [7, 100])
def test_names_are_told_as_by_seqeval(size):
  seqeval = pytest.importorskip("seqeval.metrics")
  targets, given = tagged()
  told = found(TAGGER, windows(targets, given, size))["entities"]
  wanted = seqeval.classification_report(targets, given, output_dict=True)
  assert set(told["averages"]) == {"micro", "macro", "weighted"}
  close_to_report(told["classes"], told["averages"], wanted)


def test_names_are_those_that_seqeval_once_told():
  """classification_report(tagged(), digits=4) of seqeval 1.2.2."""
  told = found(TAGGER, windows(*tagged(), 9))["entities"]
  assert [row[0] for row in told["classes"]] == ["LOC", "ORG", "PER"]
  for row in told["classes"]:
    assert [*(round(x, 4) for x in row[1:4]), row[4]] == GOLDEN[row[0]]
  for kind, values in told["averages"].items():
    assert [round(x, 4) for x in values] == GOLDEN[kind], kind


def test_sentences_of_one_number_that_are_apart_are_told_apart():
  """As processes that prepare data number theirs."""
  targets, given = tagged()
  rows = list(windows(targets, given, 9))
  told = found(TAGGER, rows)["entities"]
  for row in rows:
    for side in ("target", "prediction"):
      row[side]["sentence"] %= 7
  assert found(TAGGER, rows)["entities"] == told
  sides = [[row[side] for row in rows] for side in ("target", "prediction")]
  micro = [value / 100 for value in metrics.entity_f1(*sides).values()]
  assert micro == pytest.approx(told["averages"]["micro"])


def test_tags_that_mark_no_names_are_told_by_tag():
  targets, given = [["NOUN", "VERB"], ["NOUN"]], [["NOUN", "NOUN"], ["VERB"]]
  head = HeadConfig("token_classification", 2, label_names=("NOUN", "VERB"))
  told = found(head, windows(targets, given, 9))
  assert "entities" not in told
  wanted = sklearn.metrics.classification_report(
    sum(targets, []), sum(given, []), output_dict=True, zero_division=0
  )
  close_to_report(told["classes"], told["averages"], wanted)


# ---- Where it is shown -------------------------------------------------------


def test_the_page_has_the_same_numbers(tmp_path):
  targets, p_NC = drawn(3)
  rows = list(rows_of(targets, p_NC))
  folder = tmp_path / "inference_eval"
  folder.mkdir()
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "own-000009.jsonl").write_text(text)
  head = classifier(3)
  (task,) = report.collect(str(tmp_path), head)["tasks"]
  told = found(head, rows)
  for key in ("classes", "averages", "confusion", "calibration"):
    assert json.loads(json.dumps(task[key])) == told[key]


def test_the_surest_errors_come_first():
  targets, p_NC = drawn(3, rows=900)
  rows = list(rows_of(targets, p_NC))
  errors = found(classifier(3), rows)["errors"]
  wrong = [
    (max(r["output"][1:]), r) for r in rows if r["target"] != r["prediction"]
  ]
  wrong.sort(key=lambda pair: -pair[0])
  assert len(errors) == 50 < len(wrong)
  for error, (probability, row) in zip(errors, wrong):
    assert error["probability"] == round(probability, 6)
    assert error["input"] == row["input"]["inputs_pretokenized"]
    assert error["target"] == f"class {row['target']}"


@pytest.mark.parametrize("count", [3, 40])
def test_the_terminal_shows_the_worst_and_the_averages(count, monkeypatch):
  monkeypatch.setattr(console.console, "quiet", False)
  targets, p_NC = drawn(count, rows=4000)
  told = found(classifier(count), rows_of(targets, p_NC))
  with console.console.capture() as capture:
    monkeypatch.setattr(
      console,
      "plain_table",
      lambda title, header, rows, show_header=True: console.say(
        f"{title} {header} {list(rows)}"
      ),
    )
    details.tell("own at step 9", told)
  text = capture.get()
  assert f"{told['averages']['macro'][2]:.4f}" in text
  assert f"calibration error {told['calibration']['error']:.4f}" in text
  assert "the surest errors" in text
  by_f1 = sorted(told["classes"], key=lambda row: row[3] or 0)
  table = next(line for line in text.splitlines() if "by class" in line)
  shown = [row[0] for row in by_f1 if f"('{row[0]}'," in table]
  if count == 40:
    assert "the worst 10 of 40" in table and len(shown) == 10
    assert {row[0] for row in by_f1[:9]} <= set(shown)
    assert "most often confused" in text
  else:
    assert len(shown) == 3 and "targets (lines)" in text


def test_long_answers_that_begin_alike_are_no_classes():
  told = details.Details(None)
  for i in range(20):
    target = "x" * 80 + "-yes" if i % 2 else "y"
    row = {"target": target, "prediction": "x" * 80 + "-no"}
    told.add(row | {"input": {}, "output": ""})
  assert "classes" not in told.found()


def test_a_probability_that_is_no_number_is_not_calibrated():
  head = HeadConfig("sequence_classification", label_names=("a", "b"))
  told = details.Details(head)
  for p in (0.75, float("nan")):
    told.add(
      {"target": 0, "prediction": 0, "output": [0, p, 1 - p], "input": {}}
    )
  assert told.found()["calibration"]["bins"][0][2] == 1
  row = {"output": [0, float("nan"), 1.0]}
  assert details.probability(row, head) is None
