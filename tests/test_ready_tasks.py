"""Tasks that are ready under a name, from files as they are published."""

import json
import lzma
import os

import pytest
import seqio

from fat5_jax.data import (
  features,
  folders,
  memory,
  nli,
  ready,
  records,
  renamed,
  sources,
  tasks,
)
from fat5_jax.errors import UserError

BYTES = seqio.ByteVocabulary(0)


def pairs_of(name, folder, split="train"):
  task = tasks.resolve(name, BYTES, str(folder))
  rows = task.source.examples(split)
  return [(row["inputs"], row["targets"]) for row in rows]


# ---- Summaries and translations ----------------------------------------------


@pytest.mark.parametrize(
  "name, columns",
  [
    ("xsum", ("document", "summary")),
    ("cnn_dailymail_v002", ("article", "highlights")),
    ("orangesum_title", ("text", "summary")),
  ],
)
def test_summaries_come_as_rows_or_as_aligned_lines(name, columns, tmp_path):
  texts = [("A long story.", "A story."), ("Deux mots.", "Un mot.")]
  expected = [(f"summarize: {long}", short) for long, short in texts]
  rows, lines = tmp_path / "rows", tmp_path / "lines"
  for folder in (rows, lines):
    folder.mkdir()
  (rows / "train.jsonl").write_text(
    "".join(json.dumps(dict(zip(columns, pair))) + "\n" for pair in texts)
  )
  # The layout that fairseq and BARThez have.
  for stem in ("train", "val"):
    for ending, column in zip(("source", "target"), zip(*texts)):
      (lines / f"{stem}.{ending}").write_text("\n".join(column) + "\n")
  assert pairs_of(name, rows) == pairs_of(name, lines) == expected
  assert pairs_of(name, lines, "validation") == expected


def test_orangesum_of_the_real_articles(shared_data, tmp_path):
  """Its first test rows: published abstracts, in the order of the paper."""
  folder = os.path.join(shared_data, "sum_orangesum_fr")
  with lzma.open(f"{folder}/splits/abstract.test.txt.xz", "rt") as file:
    wanted = file.read().split()[:20]
  found = {}
  with lzma.open(f"{folder}/docs.jsonl.xz", "rt", encoding="utf-8") as file:
    for line in file:
      document = json.loads(line)
      if document["id"] in wanted:
        found[document["id"]] = document
  (tmp_path / "test.jsonl").write_text(
    "".join(json.dumps(found[number]) + "\n" for number in wanted)
  )
  task = tasks.summarization(
    "text",
    "summary",
    BYTES,
    name="orangesum_abstract",
    source=renamed.Renamed(
      folders.named_splits(str(tmp_path), "", None),
      {"text": "article", "summary": "heading"},
    ),
  )
  gold = [
    row["text"]
    for _, row in sources.read_file(f"{folder}/abstract_test_gold.txt.xz")
  ]
  summaries = [row["targets"] for row in task.source.examples("test")]
  assert [s.split() for s in summaries] == [s.split() for s in gold[:20]]


@pytest.mark.parametrize(
  "name, languages",
  [
    ("multi30k_en_de", "English to German"),
    ("multi30k_cs_en", "Czech to English"),
    ("multi30k_en_fr", "English to French"),
  ],
)
def test_multi30k_of_the_real_files(name, languages, shared_data):
  folder = os.path.join(shared_data, "mt_multi30k")
  task = tasks.resolve(name, BYTES, folder)
  counts = {split: task.num_input_examples(split) for split in task.splits}
  assert counts == {"train": 29000, "validation": 1014, "test": 1000}
  row = next(iter(task.source.examples("train")))
  assert row["inputs"].startswith(f"translate {languages}: ")
  if name == "multi30k_en_de":
    assert row["inputs"].endswith(
      "Two young, White males are outside near many bushes."
    )
    assert row["targets"].startswith("Zwei junge weiße Männer")


def test_wmt19_has_t5s_prefix(tmp_path):
  (tmp_path / "train.en").write_text("Good.\n")
  (tmp_path / "train.de").write_text("Gut.\n")
  expected = [("translate English to German: Good.", "Gut.")]
  assert pairs_of("wmt19_ende_v003", tmp_path) == expected


# ---- Pairs of sentences ------------------------------------------------------

MNLI = (
  "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label\n"
  "0\ta\tIt rains.\tIt is wet.\tneutral\tentailment\n"
  "1\tb\tIt rains.\tIt is dry.\tneutral\t-\n"
)
SNLI = [
  {
    "gold_label": "entailment",
    "sentence1": "It rains.",
    "sentence2": "It is wet.",
  },
  {"gold_label": "-", "sentence1": "A", "sentence2": "B"},
]
ANLI = [{"context": "It rains.", "hypothesis": "It is wet.", "label": "e"}]
# HF's numbers; -1 is no label.
HF = [
  {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
  {"premise": "A", "hypothesis": "B", "label": -1},
]


@pytest.mark.parametrize("rows", [MNLI, SNLI, ANLI, HF])
def test_pairs_are_read_as_they_are_published(rows, tmp_path):
  if isinstance(rows, str):
    (tmp_path / "train.tsv").write_text(rows)
  else:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(lines)
  # T5's text of MNLI.
  assert pairs_of("nli", tmp_path) == [
    ("mnli hypothesis: It is wet. premise: It rains.", "entailment")
  ]
  task = tasks.resolve("nli_classes", BYTES, str(tmp_path))
  (row,) = task.source.examples("train")
  assert row["inputs_pretokenized"] == "It rains. </s> It is wet."
  assert row["targets"] == [0]
  assert features.label_feature(task).names == nli.LABELS
  assert task.num_input_examples("train") == 1


def test_pairs_without_labels_are_a_test_set(tmp_path):
  (tmp_path / "train.tsv").write_text(MNLI)
  (tmp_path / "test.tsv").write_text("sentence1\tsentence2\nA\tB\n")
  assert pairs_of("nli", tmp_path, "test") == [
    ("mnli hypothesis: B premise: A", "<unk>")
  ]
  task = tasks.resolve("nli", BYTES, str(tmp_path))
  for row in (
    {"premise": "A", "hypothesis": "B"},
    dict(sentence1="A", sentence2="B"),
  ):
    assert task.source.question(row)["inputs"].endswith("premise: A")


def test_pairs_without_agreement_are_not_evaluated(tmp_path):
  lines = "".join(json.dumps(row) + "\n" for row in HF)
  (tmp_path / "validation.jsonl").write_text(lines)
  assert len(pairs_of("nli", tmp_path, "validation")) == 1


def test_pairs_left_out_are_told(tmp_path, caplog):
  (tmp_path / "train.tsv").write_text(MNLI)
  pairs_of("nli", tmp_path)
  assert "left out 1 pairs without an agreed label" in caplog.text


# ---- Names -------------------------------------------------------------------

TEXTS = [n for n in ready.TASKS if not n.endswith(("_classes", "_spans"))]


@pytest.mark.parametrize("name", ready.TASKS)
def test_a_ready_task_has_its_name_and_a_record(name):
  """From the hub: nothing is asked of it before the rows are."""
  task = tasks.resolve(name, BYTES)
  assert task.name == name
  label = features.label_feature(task)
  assert (label is None) == (name in TEXTS)
  assert json.loads(json.dumps(records.describe(task)))["name"] == name


# ---- Columns under other names -----------------------------------------------


ROWS = [
  {"doc": {"body": "one", "tags": ["a", "b"]}, "y": 1},
  {"doc": {"body": "two", "tags": ["c"]}, "y": 0},
]


def test_columns_have_the_names_that_a_task_asks_for():
  source = renamed.Renamed(
    memory.Rows(ROWS, "train"),
    {"text": "doc.body", "first": "doc.tags.0", "label": ("z", "y")},
  )
  rows = [row for _, row in source.rows("train")]
  assert [(r["text"], r["first"], r["label"]) for r in rows] == [
    ("one", "a", 1),
    ("two", "c", 0),
  ]
  # The others stay.
  assert rows[0]["y"] == 1 and source.num_rows("train") == 2
  wrong = renamed.Renamed(memory.Rows(ROWS, "train"), {"text": "doc.boddy"})
  with pytest.raises(UserError, match="no column 'doc.boddy'"):
    next(wrong.rows("train"))[1]["text"]
  for columns in ({}, {"a": 3}, "text", {"a": []}, {"a": ["", "b"]}):
    with pytest.raises(UserError, match="must give the columns of names"):
      renamed.Renamed(memory.Rows(ROWS, "train"), columns)


@pytest.mark.parametrize("skips", [True, False])
def test_a_row_under_none_of_the_names_is_a_bad_row(skips):
  rows = [{"text": "one"}, {"id": 3}, {"body": "two"}]
  source = renamed.Renamed(
    memory.Rows(rows, "train"), {"text": ("text", "body")}
  )
  task = tasks.text_to_text(
    source,
    "{text}",
    "{text}",
    seqio.ByteVocabulary(0),
    name="two_names",
    skip_bad_rows=skips,
  )
  examples = task.source.examples("train")
  if skips:
    assert [row["inputs"] for row in examples] == ["one", "two"]
    return
  with pytest.raises(UserError, match="row 2: no column 'text'.*skip_bad_rows"):
    list(examples)


def test_renamed_columns_are_recorded_and_asked_about(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  source = renamed.Renamed(
    sources.Files({"train": str(path)}), {"text": "doc.body"}
  )
  task = tasks.text_to_text(source, "say {text}", "{y}", BYTES)
  record = json.loads(json.dumps(records.describe(task)))
  again = records.build(record, BYTES, with_data=True)
  assert list(again.source.examples("train")) == list(
    task.source.examples("train")
  )
  # In either words, from the run folder alone; and with another file's place.
  alone = records.build(record, BYTES)
  for row in ({"text": "one"}, {"doc": {"body": "one"}}):
    assert alone.source.question(row)["inputs"] == "say one"
  with pytest.raises(UserError, match="no column 'text'"):
    alone.source.question({"txt": "one"})
  path.rename(tmp_path / "moved.jsonl")
  moved = renamed.Renamed(
    sources.Files({"train": str(tmp_path / "moved.jsonl")}),
    {"text": "doc.body"},
  )
  now = records.describe(tasks.text_to_text(moved, "say {text}", "{y}", BYTES))
  assert not records.difference(record, now)
  other = renamed.Renamed(moved, {"text": "doc.tags.0"})
  now = records.describe(tasks.text_to_text(other, "say {text}", "{y}", BYTES))
  assert records.difference(record, now)


def test_class_names_of_a_renamed_column_are_found():
  import datasets

  label = datasets.ClassLabel(names=["bad", "good"])
  data = datasets.Dataset.from_dict(
    {"x": ["it"], "mark": [1]},
    features=datasets.Features({"x": datasets.Value("string"), "mark": label}),
  )
  source = renamed.Renamed(memory.Rows(data, "train"), {"label": "mark"})
  task = tasks.text_to_text(source, "{x}", "{label}", BYTES)
  assert [r["targets"] for r in task.source.examples("train")] == ["good"]
