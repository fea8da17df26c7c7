"""Formatting, tokens and metrics equal those of the original T5 code.

The golden values were made by running it (golden_t5_text/SOURCE.txt).
"""

import json
import os

import pytest
import seqio

from fat5_jax.data import glue, metrics, preprocessors, sources, squad, tasks


def read_jsonl(path):
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def golden(shared_data):
  return os.path.join(shared_data, "golden_t5_text")


@pytest.fixture(scope="module")
def vocabulary(shared_data):
  return seqio.SentencePieceVocabulary(
    os.path.join(shared_data, "vocab_t5", "spiece.model"), extra_ids=100
  )


ROW_FUNCTIONS = {
  "squad_v010_allanswers": preprocessors.squad,
  "wmt_en_de": preprocessors.translate("en", "de"),
  "wmt_en_fr": preprocessors.translate("en", "fr"),
  "summarize": preprocessors.summarize("article", "highlights"),
  "glue_stsb_v002": preprocessors.stsb,
}
for _name, _task in glue.GLUE.items():
  if _name != "stsb":
    ROW_FUNCTIONS[f"glue_{_name}_v002"] = preprocessors.glue(
      _name, tuple(_task.features), _task.label_names
    )


def test_every_golden_row_is_formatted_and_tokenised_the_same(
  golden, vocabulary
):
  rows = read_jsonl(os.path.join(golden, "text2text.jsonl"))
  assert len(rows) == 523
  for row in rows:
    where = f"{row['task']} {row['row']}"
    features = row["features"]
    if row["task"] == "summarize" and "highlights" not in features:
      features = features | {"highlights": features["summary"]}
    found = ROW_FUNCTIONS[row["task"]](features)
    assert found["inputs"] == row["inputs"], where
    assert found["targets"] == row["targets"], where
    for key, ids in (("inputs", "input_ids"), ("targets", "target_ids")):
      tokens = [*vocabulary.encode(found[key]), 1]
      assert tokens == row[ids], where


@pytest.mark.parametrize(
  "name", ["sst2", "cola", "mrpc", "rte", "qnli", "stsb"]
)
def test_the_task_reads_the_official_files_as_the_golden_rows(
  name, golden, vocabulary, shared_data
):
  """Through SeqIO, from TSV files with BOM, stray quotes and no headers."""
  task = tasks.glue(name, vocabulary, os.path.join(shared_data, "glue"))
  rows = [
    row
    for row in read_jsonl(os.path.join(golden, "text2text.jsonl"))
    if row["task"] == task.name
  ]
  dataset = task.get_dataset(
    sequence_length=None, split="validation", shuffle=False
  )
  examples = {i: e for i, e in enumerate(dataset.as_numpy_iterator())}
  for row in rows:
    example = examples[row["row"]]
    assert example["inputs_pretokenized"].decode() == row["inputs"]
    assert example["inputs"].tolist() == row["input_ids"]
    assert example["targets"].tolist() == row["target_ids"]


@pytest.mark.parametrize(
  "name,split,count",
  [
    ("sst2", "train", 67349),
    ("sst2", "validation", 872),
    ("mrpc", "train", 3668),
    ("mrpc", "validation", 408),
    ("cola", "train", 8551),
    ("rte", "train", 2490),
    ("stsb", "train", 5749),
    ("wnli", "train", 635),
    ("qnli", "validation", 5463),
  ],
)
def test_every_row_of_the_official_files_is_read(
  name, split, count, vocabulary, shared_data
):
  task = tasks.glue(name, vocabulary, os.path.join(shared_data, "glue"))
  assert sum(1 for _ in task.source.examples(split)) == count


def test_tokenizer_equals_seqio(golden, vocabulary):
  for row in read_jsonl(os.path.join(golden, "tokenizer.jsonl")):
    assert vocabulary.encode(row["text"]) == row["ids"]
    assert vocabulary.decode(row["ids"]) == row["decoded"]


@pytest.fixture(scope="module")
def golden_metrics(golden):
  with open(os.path.join(golden, "metrics.json"), encoding="utf-8") as file:
    return json.load(file)


def glue_rows(shared_data, name):
  path = os.path.join(shared_data, "glue", name, "dev.tsv")
  columns = glue.GLUE["cola"].columns if name == "CoLA" else None
  return [row for _, row in sources.read_file(path, columns=columns)]


def jaccard(a, b):
  a, b = set(a.lower().split()), set(b.lower().split())
  return len(a & b) / len(a | b)


def close(found, expected):
  for key, value in found.items():
    assert value == pytest.approx(expected[key], rel=1e-9), key


def test_stsb_correlations(golden_metrics, shared_data):
  rows = glue_rows(shared_data, "STS-B")
  targets = [float(row["score"]) for row in rows]
  predictions = [5 * jaccard(r["sentence1"], r["sentence2"]) for r in rows]
  expected = golden_metrics["stsb_dev_jaccard"]
  close(metrics.pearson_corrcoef(targets, predictions), expected)
  close(metrics.spearman_corrcoef(targets, predictions), expected)


@pytest.mark.parametrize(
  "name",
  ["mrpc_dev_jaccard_gt_0.45", "mrpc_dev_jaccard_with_invalid_every_10th"],
)
def test_mrpc_f1_and_accuracy(name, golden_metrics, shared_data):
  rows = glue_rows(shared_data, "MRPC")
  targets = [int(row["Quality"]) for row in rows]
  predictions = [
    int(jaccard(row["#1 String"], row["#2 String"]) > 0.45) for row in rows
  ]
  if "invalid" in name:
    predictions = [-1 if i % 10 == 0 else p for i, p in enumerate(predictions)]
  close(metrics.f1_with_invalid(targets, predictions), golden_metrics[name])
  close(metrics.accuracy(targets, predictions), golden_metrics[name])


def test_cola_matthews(golden_metrics, shared_data):
  rows = glue_rows(shared_data, "CoLA")
  targets = [int(row["label"]) for row in rows]
  predictions = [int(len(row["sentence"].split()) % 3 != 0) for row in rows]
  close(
    metrics.matthews_corrcoef(targets, predictions),
    golden_metrics["cola_dev_len_mod3"],
  )


def test_squad_exact_match_and_f1(golden_metrics, shared_data):
  path = os.path.join(shared_data, "qa_xquad", "xquad.en.json")
  answers = [row["answers"]["text"] for _, row in squad.read(path)]
  predictions = [" ".join(a[0].split()[:2]) for a in answers]
  close(
    metrics.squad(answers, predictions),
    golden_metrics["xquad_en_first_two_words_of_gold"],
  )


def test_rouge_of_published_systems(golden_metrics, shared_data):
  folder = os.path.join(shared_data, "sum_orangesum_fr")

  def lines(name):
    path = os.path.join(folder, f"abstract_test_{name}.txt.xz")
    return [row["text"] for _, row in sources.read_file(path)]

  found = metrics.rouge(lines("gold"), lines("system_barthez"))
  close(found, golden_metrics["orangesum_abstract_barthez_t5_rouge_mean"])
