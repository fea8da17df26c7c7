"""SuperGLUE from its official files: T5's texts, metrics, and heads."""

import json

import numpy as np
import pytest
import seqio
import super_glue_rows
import tensorflow_datasets as tfds

from fat5_jax.data import (
  features,
  memory,
  metrics,
  mixtures,
  pronouns,
  records,
  seqio_source,
  super_glue,
  super_glue_tasks,
  tasks,
)
from fat5_jax.errors import UserError
from fat5_jax.inference import heads
from fat5_jax.inference.thresholds import Decisions
from fat5_jax.models.config import HeadConfig

BYTES = seqio.ByteVocabulary(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return super_glue_rows.write(tmp_path_factory.mktemp("super_glue"))


@pytest.mark.parametrize("where", super_glue_rows.TEXTS)
def test_texts_are_t5s(where, folder):
  name, split = where.split("/")
  task = tasks.resolve(name, BYTES, folder)
  found = [
    {key: row[key] for key in ("inputs", "targets")}
    for row in task.source.examples(split)
  ]
  expected = super_glue_rows.TEXTS[where]
  if where == "super_glue_record_v102/validation":
    # One row a question, with its first answer; the metric knows all.
    first = {}
    for row in expected:
      first.setdefault(row["inputs"], row)
    expected = list(first.values())
  assert found == expected
  assert task.num_input_examples(split) == len(expected)


HF_TASKS = [n for n in super_glue.SUPER_GLUE if n != "wsc"]


@pytest.mark.parametrize("name", [*HF_TASKS, "wsc_train", "wsc_eval"])
def test_rows_of_tfds_and_hf_give_the_same_texts(name, folder, tmp_path):
  """TFDS's own reader of the official files; labels are class numbers."""
  from tensorflow_datasets.text.super_glue import SuperGlue

  task = super_glue.find(name.partition("_")[0])
  builder = SuperGlue(config=task.config or name, data_dir=str(tmp_path))
  split = "train" if name != "wsc_eval" else "validation"
  file = (
    f"{folder}/{task.folder}/{'train' if split == 'train' else 'val'}.jsonl"
  )
  rows = []
  for _, row in builder._generate_examples(file, split):
    if "label" in row:
      number = builder.info.features["label"]
      names = number.names if task.label_names[0] in number.names else None
      words = names or task.label_names
      row = row | {"label": list(words).index(row["label"])}
    rows.append(row)
  given = super_glue_tasks.text(name, BYTES, source=memory.Rows(rows, split))
  local = super_glue_tasks.text(name, BYTES, folder)
  keys = ("inputs", "targets")
  texts = lambda task: [
    [row[key] for key in keys] for row in task.source.examples(split)
  ]
  assert texts(given) == texts(local)


def scored(task, predictions, split="validation"):
  """Metrics of predicted texts, as SeqIO's evaluator makes them."""
  dataset = task.get_dataset(None, split, shuffle=False)
  rows = list(tfds.as_numpy(dataset))
  post = task.postprocess_fn or (lambda text, **_: text)
  targets = [
    post(row["targets_pretokenized"].decode(), example=row, is_target=True)
    for row in rows
  ]
  found = [
    post(text, example=row, is_target=False)
    for text, row in zip(predictions, rows, strict=True)
  ]
  values = {}
  for metric in task.metric_fns:
    values |= metric(targets, found)
  return values


def test_multirc_is_scored_by_answers_and_by_questions(folder):
  task = tasks.resolve("super_glue_multirc_v102", BYTES, folder)
  # Two answers of the first question, one of the second.
  assert scored(task, ["True", "False", "True"]) == {
    "f1": 100,
    "exact_match": 100,
  }
  found = scored(task, ["True", "True", "True"])
  assert found == {"f1": pytest.approx(80), "exact_match": 50}
  found = scored(task, ["no", "False", "True"])
  assert found == {"f1": pytest.approx(200 / 3), "exact_match": 50}


def test_multirc_is_the_papers_definition():
  """Khashabi et al. (2018): F1a over all answers, EM a question."""
  rng = np.random.default_rng(0)
  values, guesses = rng.integers(0, 2, 400), rng.integers(-1, 2, 400)
  groups = np.sort(rng.integers(0, 90, 400))
  found = metrics.multirc(
    [{"value": v, "group": f"{g}"} for v, g in zip(values, groups)],
    [{"value": v} for v in guesses],
  )
  guesses = np.where(guesses < 0, 1 - values, guesses)
  hits = ((values == 1) & (guesses == 1)).sum()
  f1 = 2 * hits / ((values == 1).sum() + (guesses == 1).sum())
  exact = [
    (values[groups == g] == guesses[groups == g]).all()
    for g in np.unique(groups)
  ]
  assert found["f1"] == pytest.approx(100 * f1)
  assert found["exact_match"] == pytest.approx(100 * np.mean(exact))


def test_cb_is_scored_by_the_mean_f1_of_its_classes():
  targets, found = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, -1, 0]
  per_class = []
  for c in range(3):
    hits = sum(t == p == c for t, p in zip(targets, found))
    per_class.append(2 * hits / (targets.count(c) + found.count(c)))
  value = metrics.mean_3class_f1(targets, found)
  assert value == {"mean_3class_f1": pytest.approx(100 * np.mean(per_class))}


def test_record_counts_the_best_of_all_answers(folder):
  task = tasks.resolve("super_glue_record_v102", BYTES, folder)
  assert scored(task, ["rome", "Lee"]) == {
    "em": 50,
    "f1": pytest.approx(100 * (1 + 2 / 3) / 2),
  }


@pytest.mark.parametrize(
  "noun, answer, same",
  [
    ("turnip", "potato", 0),
    ("cat", "the cat", 1),
    ("Bob", "Bob's hat", 0),
    ("Bob's hat", "Bob's hat", 1),
    ("Potato", "potato", 1),
    ("my potato", "a potato", 1),
    ("fuzzy hungry bunny", "fuzzy bunny", 1),
    ("bunny", "the", -1),
    ("bunny", "", -1),
  ],
)
def test_wsc_compares_nouns_as_t5_does(noun, answer, same):
  """The cases of T5's own test."""
  example = {"targets_pretokenized": noun.encode(), "label": -1}
  assert super_glue.same_referent(answer, example) == same
  assert super_glue.same_referent("", example, is_target=True) == -1


def test_wsc_asks_for_the_noun_whether_it_is_right_or_not(folder):
  task = tasks.resolve("super_glue_wsc_v102_simple_eval", BYTES, folder)
  # Labels are false, true, true, false.
  answers = ["Mark", "the trophy", "an iron safe", "Farley"]
  assert scored(task, answers) == {"accuracy": 50}
  train = tasks.resolve("super_glue_wsc_v102_simple_train", BYTES, folder)
  assert train.splits == ("train",) and not train.metric_fns


# ---- Heads -------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, inputs, labels",
  [
    ("boolq", "is a pronoun a word </s> Pronoun -- ", [1, 0]),
    ("cb", "It was a complex language. Not written down. </s> ", [0, 2, 1]),
    ("copa", "cause: My body cast a shadow over the grass. </s> ", [0, 1]),
    ("multirc", "Who ate <b>pie</b>? Joey </s> ", [1, 0, 1]),
    ("rte", "No Weapons of Mass Destruction Found in Iraq Yet. </s> ", [1, 0]),
    ("wic", "place: Do you want to come over to my place later? </s> ", [0, 1]),
    ("wsc", "Mark told Pete many lies about himself, ", [0, 1, 1, 0]),
  ],
)
def test_what_is_a_classification_has_a_task_of_classes(
  name, inputs, labels, folder
):
  full = f"super_glue_{name}_classes"
  task = tasks.resolve(full, BYTES, folder)
  rows = list(task.source.examples("validation"))
  assert rows[0]["inputs_pretokenized"].startswith(inputs)
  assert [row["targets"][0] for row in rows] == labels
  blind = task.source.examples("test")
  assert {row["targets"][0] for row in blind} == {-1}
  assert features.label_feature(task).names == tuple(
    super_glue.find(name).label_names
  )
  # Its own text and metric, from a record too.
  record = json.loads(json.dumps(records.describe(task)))
  again = records.build(record, BYTES, with_data=True)
  assert not records.difference(record, records.describe(again))
  row = json.loads(
    json.dumps(super_glue_rows.ROWS[super_glue.find(name).folder][0])
  )
  if name not in ("multirc", "wsc"):
    asked = again.source.question(row)["inputs_pretokenized"]
    assert asked == rows[0]["inputs_pretokenized"]


def test_classes_of_multirc_are_scored_by_question(folder):
  task = super_glue_tasks.classes("multirc", BYTES, folder)
  dataset = task.get_dataset({"inputs": 64}, "validation", shuffle=False)
  rows = list(tfds.as_numpy(dataset))
  values = lambda classes: [
    task.postprocess_fn([c], example=row) for c, row in zip(classes, rows)
  ]
  (metric,) = task.metric_fns
  assert metric(values([1, 0, 1]), values([1, 1, 1]))["exact_match"] == 50


def test_classes_of_multirc_are_predicted_like_others(folder):
  task = super_glue_tasks.classes("multirc", BYTES, folder)
  dataset = task.get_dataset({"inputs": 64}, "validation", shuffle=False)
  # A class, and the probability of each.
  values = [np.array([1, 0.2, 0.8]), np.array([0, 0.9, 0.1])]
  head = HeadConfig(
    "sequence_classification", label_names=("False", "True"), num_labels=2
  )
  found = list(
    heads._records(
      zip(tfds.as_numpy(dataset), values), task, head, True, Decisions()
    )
  )
  assert [(r["prediction"], r["targets"]) for r in found] == [
    ("True", "True"),
    ("False", "False"),
  ]
  assert found[0]["probability"] == 0.8
  assert heads.describe({"value": 1, "group": "0-0"}, head) == "True"


def test_record_has_no_classes():
  with pytest.raises(UserError, match="texts as answers, no classes"):
    super_glue_tasks.classes("record", BYTES)


# ---- Mistakes, questions, mixture --------------------------------------------


def test_a_row_that_is_not_superglues_is_told(tmp_path):
  (tmp_path / "MultiRC").mkdir()
  path = tmp_path / "MultiRC" / "train.jsonl"
  path.write_text('{"idx": 0, "passage": {"text": "x"}}\n')
  task = super_glue_tasks.text("multirc", BYTES, str(tmp_path))
  with pytest.raises(UserError, match="train.jsonl, row 1: .*no key 'question"):
    list(task.source.examples("train"))
  (tmp_path / "BoolQ").mkdir()
  row = {"question": "a", "passage": "b", "label": "perhaps"}
  (tmp_path / "BoolQ" / "val.jsonl").write_text(json.dumps(row) + "\n")
  task = super_glue_tasks.text("boolq", BYTES, str(tmp_path))
  with pytest.raises(UserError, match="row 1: label 'perhaps' is neither"):
    list(task.source.examples("validation"))
  with pytest.raises(UserError, match="CB: none of the data files train.jsonl"):
    super_glue_tasks.text("cb", BYTES, str(tmp_path))
  with pytest.raises(UserError, match="wsc is two tasks"):
    super_glue_tasks.text("wsc", BYTES, str(tmp_path))
  with pytest.raises(UserError, match="Did you mean 'boolq'"):
    super_glue_tasks.text("bool", BYTES, str(tmp_path))


def test_a_question_of_superglue_needs_no_answer(folder):
  task = super_glue_tasks.text("wsc_eval", BYTES, folder)
  row = {"text": "Ann saw Bob and he ran .", "span2_text": "he"}
  found = task.source.question(row | {"span2_index": 4})
  assert found["inputs"] == "wsc: Ann saw Bob and *he* ran ."
  task = super_glue_tasks.text("record", BYTES, folder)
  row = {"query": "@placeholder ran.", "entities": ["Bob"], "passage": "Bob."}
  assert task.source.question(row)["inputs"] == (
    "record query: @placeholder ran. entities: Bob passage: Bob."
  )


def test_a_pronoun_that_is_not_in_its_text_is_told():
  row = {"text": "Ann ran .", "span2_text": "he", "span2_index": 1}
  with pytest.raises(UserError, match="span2_text 'he' is not in its text"):
    super_glue.marked_pronoun(row)
  with pytest.raises(UserError, match="span2_index 9 is outside of 3 words"):
    super_glue.marked_pronoun(row | {"span2_index": 9})


def test_a_block_of_dpr_that_is_none_is_told(tmp_path):
  path = tmp_path / "train.c.txt"
  path.write_text("A saw B .\nhe\nA,B\nA\n\nA saw B .\nhe\nA,B\n")
  source = pronouns.PronounFiles({"train": str(path)})
  with pytest.raises(UserError, match="train.c.txt, row 6: 3 lines, expected"):
    list(source.rows("train"))


def test_superglue_is_mixed_as_t5_does(folder):
  mixture = tasks.resolve("super_glue_v102_proportional", BYTES, folder)
  rates = {t.name: mixture.get_rate(t) for t in seqio.get_subtasks(mixture)}
  assert rates == mixtures.SUPER_GLUE_RATES
  with seqio_source.reraise():
    data = mixture.get_dataset(
      {"inputs": 64, "targets": 16}, "train", shuffle=True, seed=0
    )
    assert len(list(data.take(40))) == 40
  record = json.loads(json.dumps(records.describe(mixture)))
  again = records.build(record, BYTES, with_data=True)
  assert not records.difference(record, records.describe(again))
