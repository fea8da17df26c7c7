"""Labels meet their tokens: tasks of heads, their features and metrics."""

import json
import os

import numpy as np
import pytest
import seqio

from fat5_jax.data import (
  checks,
  conll,
  features,
  glue,
  head_tasks,
  metrics,
  pipeline,
  sources,
  squad,
)
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

BYTES = seqio.ByteVocabulary(0)
EOS = 1


def rows_source(train, validation=None):
  return sources.Function(
    {"train": lambda: train, "validation": lambda: validation or train}
  )


def examples(task, length=None, split="train"):
  lengths = None if length is None else {"inputs": length}
  return list(
    task.get_dataset(lengths, split, shuffle=False).as_numpy_iterator()
  )


def batch(task, length, rows, split="train"):
  config = pipeline.DatasetConfig(task, {"inputs": length}, split, rows)
  return next(pipeline.eval_batches(config, 384, None))


def text(ids):
  return BYTES.decode([int(i) for i in ids if i > 2])


# ---- Sequences ---------------------------------------------------------------


def test_pairs_keep_both_ends_of_sequence_after_truncation():
  """`A </s> B </s>`; the longer text loses its end."""
  task = head_tasks.classification(
    rows_source([{"a": "a" * 30, "b": "bbbb", "y": "no"}]),
    ("{a}", "{b}"),
    "y",
    BYTES,
    ("yes", "no"),
  )
  (row,) = examples(task, 12)
  assert len(row["inputs"]) == 12 and (row["inputs"] == EOS).sum() == 2
  assert row["inputs"][-1] == EOS
  assert text(row["inputs"]) == "aaaaaabbbb"
  assert row["targets"].tolist() == [1]
  (row,) = examples(task, None)
  assert text(row["inputs"]) == "a" * 30 + "bbbb"


@pytest.mark.parametrize("size_a,size_b", [(30, 3), (3, 30), (30, 30), (2, 2)])
def test_pairs_never_exceed_the_length(size_a, size_b):
  task = head_tasks.classification(
    rows_source([{"a": "a" * size_a, "b": "b" * size_b, "y": 0}]),
    ("{a}", "{b}"),
    "y",
    BYTES,
    ("yes", "no"),
  )
  (row,) = examples(task, 11)
  assert len(row["inputs"]) == min(11, size_a + size_b + 2)
  assert (row["inputs"] == EOS).sum() == 2


@pytest.mark.parametrize(
  "problem,value,expected",
  [
    ("single_label_classification", "b", [1]),
    ("single_label_classification", 2, [2]),
    ("single_label_classification", "-1", [-1]),
    ("multi_label_classification", "a,c", [1.0, 0.0, 1.0]),
    ("multi_label_classification", [2, 1], [0.0, 1.0, 1.0]),
    ("multi_label_classification", "", [0.0, 0.0, 0.0]),
  ],
)
def test_labels_by_name_or_number(problem, value, expected):
  task = head_tasks.classification(
    rows_source([{"x": "text", "y": value}]),
    "{x}",
    "y",
    BYTES,
    ("a", "b", "c"),
    problem,
  )
  found = batch(task, 8, 2)
  assert found["labels"][0].tolist() == expected
  # The row that fills the batch counts for nothing.
  assert found["label_weights"].sum(axis=1).tolist() == [len(expected), 0]


def test_regression_has_numbers():
  task = head_tasks.classification(
    rows_source([{"x": "text", "y": "2.5"}]),
    "{x}",
    "y",
    BYTES,
    problem_type="regression",
  )
  assert batch(task, 8, 1)["labels"].tolist() == [[2.5]]


def test_a_label_that_is_none_names_its_row():
  task = head_tasks.classification(
    rows_source([{"x": "a", "y": "yes"}, {"x": "b", "y": "maybe"}]),
    "{x}",
    "y",
    BYTES,
    ("yes", "no"),
  )
  with pytest.raises(UserError, match="row 2: label 'maybe'"):
    list(task.source.examples("train"))


@pytest.mark.parametrize("name", glue.GLUE)
def test_all_of_glue_from_official_files(name, tmp_path):
  task = glue.GLUE[name]
  folder = tmp_path / task.folder
  folder.mkdir()
  label = task.label_names[-1] if task.label_names else "3.8"
  header = task.columns or [*task.features.values(), task.label_column]
  values = {c: f"some {c}" for c in header} | {task.label_column: label}
  line = "\t".join(values[c] for c in header) + "\n"
  head = "" if task.columns else "\t".join(header) + "\n"
  for file in ("train", task.validation):
    (folder / f"{file}.tsv").write_text(head + line)
  suffix = task.validation.removeprefix("dev")
  test_columns = ["index", *task.features.values()]
  (folder / f"test{suffix}.tsv").write_text(
    "\t".join(test_columns) + "\n" + "\t".join(map(str, test_columns)) + "\n"
  )
  built = head_tasks.BUILTIN_TASKS[f"glue_{name}_classes"](
    vocabulary=BYTES, data_dir=str(tmp_path)
  )
  label_feature = features.label_feature(built)
  assert label_feature.names == tuple(task.label_names)
  (row,) = examples(built, split="validation")
  expected = [len(task.label_names) - 1] if task.label_names else [3.8]
  assert row["targets"].tolist() == pytest.approx(expected)
  assert (row["inputs"] == EOS).sum() == len(task.features)
  (row,) = examples(built, split="test")
  assert row["targets"].tolist() == [-1]


def test_glue_of_the_real_files(shared_data):
  folder = os.path.join(shared_data, "glue")
  task = head_tasks.glue("mrpc", BYTES, folder)
  rows = examples(task, 64, "validation")
  assert len(rows) == 408
  assert sum(int(row["targets"][0]) for row in rows) == 279


# ---- Tags --------------------------------------------------------------------

SENTENCES = [
  {"words": ["New", "York", "is", "big"], "tags": ["B-LOC", "I-LOC", "O", "O"]},
  {"words": ["Hello"], "tags": ["O"]},
]


def test_the_first_piece_of_a_word_has_its_tag():
  task = head_tasks.tagging(rows_source(SENTENCES), BYTES, name="tags")
  names = features.label_feature(task).names
  assert names == ("O", "B-LOC", "I-LOC")
  first = examples(task)[0]
  assert text(first["inputs"]) == "NewYorkisbig"
  labelled = np.flatnonzero(first["targets"] >= 0)
  assert labelled.tolist() == [0, 3, 7, 9]
  assert first["targets"][labelled].tolist() == [1, 2, 0, 0]
  found = batch(task, 16, 3)
  assert found["labels"].shape == (3, 16)
  counted = (found["label_weights"] > 0) & (found["labels"] >= 0)
  assert counted.sum(axis=1).tolist() == [4, 1, 0]


def test_a_long_sentence_is_cut_without_losing_a_tag():
  task = head_tasks.tagging(rows_source(SENTENCES), BYTES, name="tags")
  rows = examples(task, 6)
  assert [int(row["sentence"]) for row in rows] == [0, 0, 0, 1]
  assert all(len(row["inputs"]) <= 6 for row in rows)
  assert sum((row["targets"] >= 0).sum() for row in rows) == 5
  post = task.postprocess_fn
  perfect = [post(row["targets"], example=row) for row in rows]
  assert metrics.entity_f1(perfect, perfect)["entity_f1"] == pytest.approx(100)
  assert metrics.tag_accuracy(perfect, perfect)["tag_accuracy"] == 100
  # The name that lies across the cut is one name.
  joined = metrics._sentences(perfect)[0]
  assert metrics.entities(joined) == [metrics.Entity("LOC", 0, 1)]


def test_a_tag_of_the_validation_split_alone_is_named():
  other = [{"words": ["x"], "tags": ["B-NEW"]}]
  task = head_tasks.tagging(rows_source(SENTENCES, other), BYTES, name="tags")
  with pytest.raises(UserError, match="tag 'B-NEW' of word 'x'"):
    list(task.source.examples("validation"))


@pytest.mark.parametrize(
  "tags,expected",
  [
    # What seqeval.metrics.sequence_labeling.get_entities gives.
    (["B-A", "I-A", "O", "B-B"], [("A", 0, 1), ("B", 3, 3)]),
    (["I-A", "I-A"], [("A", 0, 1)]),
    (["B-A", "B-A"], [("A", 0, 0), ("A", 1, 1)]),
    (["B-A", "I-B"], [("A", 0, 0), ("B", 1, 1)]),
    (["S-A", "I-A"], [("A", 0, 0), ("A", 1, 1)]),
    (["B-A", "E-A", "I-A"], [("A", 0, 1), ("A", 2, 2)]),
    (["O", "O"], []),
  ],
)
def test_entities_are_seqevals(tags, expected):
  assert metrics.entities(tags) == expected


def test_conll_files_of_every_kind(tmp_path):
  (tmp_path / "a.conll").write_text(
    "-DOCSTART- O\n\nNew\tB-LOC\nYork\tI-LOC\n\t\n# tag\tO\n\n"
  )
  (tmp_path / "b.iob2").write_text(
    "# sent_id = 1\n# text = New York\n"
    "1\tNew\tB-LOC\t-\t-\n2\tYork\tI-LOC\t-\t-\n"
  )
  ud = "_\t_\t_\t_\t_\t_"
  (tmp_path / "c.conllu").write_text(
    f"# text = don't\n1-2\tdon't\t_\t_\t{ud}\n1\tdo\tdo\tAUX\t{ud}\n"
    f"2\tn't\tnot\tPART\t{ud}\n2.1\tx\tx\tX\t{ud}\n"
  )
  read = lambda name: [row for _, row in conll.read(str(tmp_path / name))]
  assert read("a.conll") == [
    {"words": ["New", "York"], "tags": ["B-LOC", "I-LOC"]},
    {"words": ["# tag"], "tags": ["O"]},
  ]
  assert read("b.iob2") == [
    {"words": ["New", "York"], "tags": ["B-LOC", "I-LOC"]}
  ]
  assert read("c.conllu") == [{"words": ["do", "n't"], "tags": ["AUX", "PART"]}]
  (tmp_path / "bad.conll").write_text("New\tB-LOC\nYork\n")
  with pytest.raises(UserError, match="bad.conll, row 2: 1 columns"):
    read("bad.conll")


def test_conll_of_the_real_files(shared_data):
  counts = {
    "ner_wnut17/dev.conll": (1009, 15733),
    "pos_ud_ewt/en_ewt-ud-dev.conllu.xz": (2001, 25147),
  }
  for name, (sentences, words) in counts.items():
    rows = [row for _, row in conll.read(os.path.join(shared_data, name))]
    assert len(rows) == sentences, name
    assert sum(len(row["words"]) for row in rows) == words, name


# ---- Spans -------------------------------------------------------------------

CONTEXT = "The tower is 330 metres tall, as a house of 81 storeys."
QUESTION = {
  "id": "q1",
  "question": "How tall?",
  "context": CONTEXT,
  "answers": {"text": ["330 metres", "330"], "answer_start": [13, 13]},
}


@pytest.mark.parametrize("length", [None, 70, 40, 30])
def test_every_answer_is_whole_in_some_window_and_nowhere_wrong(length):
  task = head_tasks.spans(rows_source([QUESTION]), BYTES, stride=14)
  rows = examples(task, length)
  assert (len(rows) > 1) == (length in (40, 30))
  covered = set()
  found = 0
  for row in rows:
    assert length is None or len(row["inputs"]) <= length
    assert row["answerable"][0] == 0 and row["inputs"][-1] == EOS
    first, last = row["targets"]
    inside = np.flatnonzero(row["answerable"])
    covered |= {int(i) - 1 for i in row["end"][inside]}
    if last:
      found += 1
      answer = task.postprocess_fn((first, last, 1.0), example=row)
      assert answer["text"] == "330 metres"
    else:
      assert first == 0
  assert found >= 1
  assert covered == set(range(len(CONTEXT)))


def test_windows_are_joined_to_the_best_answer():
  targets = [{"id": "a", "answers": ["x"]}] * 2 + [
    {"id": "b", "answers": ["y"]}
  ]
  rows = [
    {"id": "a", "text": "z", "score": 1.0},
    {"id": "a", "text": "x", "score": 2.0},
    {"id": "b", "text": "no", "score": -1.0},
  ]
  assert metrics.span_squad(targets, rows) == {"em": 50.0, "f1": 50.0}


def test_offsets_of_sentencepiece_are_those_of_the_text(shared_data):
  path = os.path.join(shared_data, "vocab_t5", "spiece.model")
  vocabulary = seqio.SentencePieceVocabulary(path)
  string = "Hello  wörld, ab.\tthe ﬁne 1,190 m²"
  ids, begins, ends = features.encode_with_offsets(vocabulary, string)
  assert ids == vocabulary.encode(string)
  assert begins == sorted(begins) and ends[-1] == len(string)
  pieces = [string[b:e] for b, e in zip(begins, ends)]
  assert "".join(pieces) == "".join(string.split())
  for row in [r for _, r in squad.read(_xquad(shared_data))][:60]:
    answer = row["answers"]["text"][0]
    start = row["answers"]["answer_start"][0]
    _, begins, ends = features.encode_with_offsets(vocabulary, row["context"])
    stop = start + len(answer)
    inside = [
      i for i in range(len(ends)) if ends[i] > start and begins[i] < stop
    ]
    found = row["context"][begins[inside[0]] : ends[inside[-1]]]
    assert answer in found and len(found) <= len(answer) + 12


def _xquad(shared_data):
  return os.path.join(shared_data, "qa_xquad", "xquad.en.json")


def test_an_answer_that_is_not_in_its_context_names_its_row():
  row = QUESTION | {"answers": ["300 metres"]}
  task = head_tasks.spans(rows_source([QUESTION, row]), BYTES)
  with pytest.raises(UserError, match="row 2: answer '300 metres'"):
    list(task.source.examples("train"))


def test_squad_files(tmp_path):
  qa = {
    "id": "q1",
    "question": "How tall?",
    "answers": [{"text": "330 metres", "answer_start": 13}],
  }
  paragraph = {"context": CONTEXT, "qas": [qa]}
  (tmp_path / "dev-v1.1.json").write_text(
    json.dumps({"data": [{"paragraphs": [paragraph]}]})
  )
  task = head_tasks.squad(BYTES, str(tmp_path))
  (row,) = examples(task, split="validation")
  answer = task.postprocess_fn((*row["targets"], 0.0), example=row)
  assert answer["text"] == "330 metres"
  (tmp_path / "odd.json").write_text("[1]")
  with pytest.raises(UserError, match="not an official SQuAD file"):
    list(squad.read(str(tmp_path / "odd.json")))


# ---- A task and a model that do not fit --------------------------------------


def t5(head):
  return T5Config(vocab_size=384, dtype="float32").with_head(head)


def test_a_task_of_another_head_is_refused():
  labels = head_tasks.classification(
    rows_source([{"x": "a", "y": 0}]), "{x}", "y", BYTES, ("yes", "no")
  )
  config = pipeline.DatasetConfig(labels, {"inputs": 8}, "train", 1)
  checks.check_task(config, t5(HeadConfig("enct5")))
  for head, match in (
    (HeadConfig("token_classification"), "heads/sequence_classification.gin"),
    (None, "heads/sequence_classification.gin"),
    (HeadConfig("enct5", num_labels=3), "has 2 labels"),
    (
      HeadConfig("sequence_classification", label_names=("no", "yes")),
      "names its labels yes, no",
    ),
  ):
    with pytest.raises(UserError, match=match):
      checks.check_task(config, t5(head))
  packed = pipeline.DatasetConfig(labels, {"inputs": 8}, "train", 1, pack=True)
  with pytest.raises(UserError, match="PACK = False"):
    packed.task()
  written = head_tasks.seqio.TaskRegistry.get("classification")
  head = pipeline.head_config(config, "sequence_classification")
  assert head.label_names == ("yes", "no") and written is labels
