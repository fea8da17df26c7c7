"""Data as people have it, and what they are told when it cannot be used."""

import json
import shutil

import hf_models
import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds
import transformers

from fat5_jax import checkpoints
from fat5_jax.checkpoints import reference
from fat5_jax.convert import tokenizers
from fat5_jax.data import (
  checks,
  head_tasks,
  pipeline,
  sources,
  tasks,
  tokenizer_json,
  vocabularies,
)
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

BYTES = seqio.ByteVocabulary()


def rows_of(task, split="train"):
  """What the task's source makes of its rows."""
  return list(task.source.examples(split))


def text_task(rows, inputs="{a}", targets="{b}", **options):
  source = options.pop("source", None) or sources.Function(
    {"train": lambda: rows}
  )
  return tasks.text_to_text(source, inputs, targets, BYTES, "words", **options)


# ---- Templates and columns ---------------------------------------------------


def test_nested_columns_are_templates_too():
  row = {"q": "who?", "answers": {"text": ["she", "he"], "n": 2}, "x.y": "z"}
  (found,) = rows_of(
    text_task([row], "{q} of {answers.n} {x.y}", "{answers.text.0}")
  )
  assert found == {"inputs": "who? of 2 z", "targets": "she"}


@pytest.mark.parametrize(
  "row, told",
  [
    ({"a": ["x"], "b": "y"}, "column 'a' holds a list, not text"),
    (
      {"a": {"text": "x"}, "b": "y"},
      "column 'a' holds a dict, not text; its parts are columns too: {a.text}",
    ),
    ({"a": None, "b": "y"}, "column 'a' is empty"),
    ({"b": "y"}, "no column 'a'"),
  ],
)
def test_what_is_no_text_is_told_with_its_row(tmp_path, row, told):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"a": "x", "b": "y"}\n' + json.dumps(row) + "\n")
  source = sources.Files({"train": str(path)})
  with pytest.raises(UserError) as e:
    rows_of(text_task(None, source=source))
  assert f"{path}, row 2: {told}" in str(e.value)
  assert rows_of(text_task(None, source=source, skip_bad_rows=True)) == [
    {"inputs": "x", "targets": "y"}
  ]


def test_what_is_left_out_is_counted_by_what_is_wrong(caplog):
  rows = [
    {"a": "x", "b": 0},
    *({"a": "", "b": 1} for _ in range(3)),
    *({"a": "x", "b": 10 + i} for i in range(2)),
    {"b": 1},
    {"a": "half \ud800", "b": 1},
    {"a": ["x"], "b": 1},
  ]
  words = {"b": ("no", "yes")}
  task = text_task(rows, label_names=words, skip_bad_rows=True)
  assert len(rows_of(task)) == 1
  (said,) = {record.getMessage() for record in caplog.records}
  assert said == (
    "split train: left out 8 bad rows of 9: 3 x column 'a' is empty (first"
    " split train, row 2); 2 x column 'b': class 10 of 2 (no, yes) (first split"
    " train, row 5); 1 x no column 'a'. Columns: b (first split train, row 7);"
    " 1 x half a character (a lone surrogate) (first split train, row 8); 1"
    " others"
  )


@pytest.mark.parametrize("inputs", ["{a", "{} x", "a}"])
def test_what_is_no_template_is_told(inputs):
  with pytest.raises(UserError, match="template"):
    text_task([], inputs)


def test_literal_braces_and_formats_stay_pythons():
  (found,) = rows_of(
    text_task([{"a": 0.5, "b": 7}], "{{x}} {a:.2f}", "{b:03d}")
  )
  assert found == {"inputs": "{x} 0.50", "targets": "007"}


def test_other_delimiters(tmp_path):
  path = tmp_path / "rows.csv"
  path.write_text('a;b\n"x;1";y\n')
  source = sources.Files({"train": str(path)}, delimiter=";")
  assert rows_of(text_task(None, source=source)) == [
    {"inputs": "x;1", "targets": "y"}
  ]


def test_a_file_whose_name_is_a_pattern_is_itself(tmp_path):
  path = tmp_path / "rows[1].tsv"
  path.write_text("a\tb\nx\ty\n")
  source = sources.Files({"train": str(path)})
  assert len(rows_of(text_task(None, source=source))) == 1


# ---- Labels ------------------------------------------------------------------


def test_class_numbers_have_words_by_column():
  rows = [{"a": "x", "b": 0}, {"a": "y", "b": "1"}, {"a": "z", "b": -1}]
  found = rows_of(text_task(rows, label_names={"b": ("bad", "good")}))
  assert [row["targets"] for row in found] == ["bad", "good", "<unk>"]
  with pytest.raises(UserError, match="class 2 of 2"):
    rows_of(text_task([{"a": "x", "b": 2}], label_names={"b": ("bad", "good")}))


@pytest.fixture(scope="module")
def hf_rows(tmp_path_factory):
  """A data set of HF's on disk with a ClassLabel and a list of them."""
  import datasets

  label = datasets.ClassLabel(names=["negative", "positive"])
  features = datasets.Features(
    {
      "a": datasets.Value("string"),
      "label": label,
      "many": datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"])),
    }
  )
  data = datasets.Dataset.from_dict(
    {"a": ["it", "is"], "label": [1, 0], "many": [[0, 2], []]},
    features=features,
  )
  path = str(tmp_path_factory.mktemp("hf") / "rows")
  datasets.DatasetDict({"train": data}).save_to_disk(path)
  return path


def test_class_labels_of_hf_are_label_names(hf_rows):
  source = sources.HuggingFace(hf_rows, splits={"train": "train"})
  single = head_tasks.classification(source, "{a}", "label", BYTES)
  label = single.output_features["targets"]
  assert label.names == ("negative", "positive")
  assert [list(row["targets"]) for row in rows_of(single)] == [[1], [0]]
  many = head_tasks.classification(
    source,
    "{a}",
    "many",
    BYTES,
    problem_type="multi_label_classification",
    name="many",
  )
  assert many.output_features["targets"].names == ("x", "y", "z")
  assert [list(row["targets"]) for row in rows_of(many)] == [
    [1, 0, 1],
    [0, 0, 0],
  ]
  text = text_task(None, "{a}", "{label}", source=source)
  assert [row["targets"] for row in rows_of(text)] == ["positive", "negative"]


def classes(rows, label="label", **options):
  source = sources.Function({"train": lambda: rows})
  return head_tasks.classification(source, "{a}", label, BYTES, **options)


def test_labels_that_the_data_holds_are_label_names():
  rows = [{"a": "x", "label": name} for name in ("no", "yes", "no", "maybe")]
  names = classes(rows).output_features["targets"].names
  assert names == ("maybe", "no", "yes")
  rows = [{"a": "x", "label": n} for n in (0, 10, 2, -1)]
  names = classes(rows).output_features["targets"].names
  assert names == tuple(map(str, range(11)))
  rows = [{"a": "x", "label": "b, a"}, {"a": "x", "label": ""}]
  many = classes(rows, problem_type="multi_label_classification")
  assert many.output_features["targets"].names == ("a", "b")
  with pytest.raises(UserError, match="no labels in column 'label'"):
    classes([{"a": "x", "label": -1}])
  with pytest.raises(UserError, match="over 1000 different values"):
    classes([{"a": "x", "label": str(i / 7)} for i in range(2000)])


def test_a_column_a_label():
  rows = [
    {"a": "x", "food": 1, "price": "0"},
    {"a": "y", "food": "true", "price": 1.0},
  ]
  task = classes(
    rows, ("food", "price"), problem_type="multi_label_classification"
  )
  assert task.output_features["targets"].names == ("food", "price")
  assert [list(row["targets"]) for row in rows_of(task)] == [[1, 0], [1, 1]]
  rows[0]["food"] = "often"
  with pytest.raises(UserError, match="column 'food': 'often' is neither"):
    rows_of(task)


# ---- Settings that do not fit ------------------------------------------------


def data(task, **options):
  lengths = options.pop("lengths", {"inputs": 16, "targets": 4})
  settings = {"split": "train", "batch_size": 2} | options
  return pipeline.DatasetConfig(task, lengths, **settings)


def test_a_recipe_that_fits_the_task_is_named():
  config = T5Config(vocab_size=384, emb_dim=8)
  labels = classes([{"a": "x", "label": "y"}])
  with pytest.raises(UserError, match="--gin_file=recipes/classify.gin"):
    checks.check_task(data(labels, lengths={"inputs": 8}), config)
  with pytest.raises(UserError, match="--gin_file=recipes/glue.gin"):
    pipeline.head_config(data(text_task([])), "sequence_classification")
  head = config.with_head(HeadConfig("sequence_classification"))
  with pytest.raises(UserError, match="--gin_file=recipes/glue.gin"):
    checks.check_task(data(text_task([])), head)


def test_a_batch_above_the_data_is_told_with_the_number_of_rows():
  task = text_task([{"a": "x", "b": "y"}] * 3)
  pipeline.check_rows(data(task, batch_size=3))
  with pytest.raises(UserError, match="has 3 rows, fewer than BATCH_SIZE = 4"):
    pipeline.check_rows(data(task, batch_size=4))


def test_no_validation_split_is_told_with_what_to_do():
  with pytest.raises(UserError, match="--gin.EVAL_SPLIT=None"):
    data(text_task([]), split="validation").task()


@pytest.mark.parametrize(
  "buckets, distance, layers, fits",
  [
    (2, 128, 1, False),
    (32, 16, 1, False),
    (32, 17, 1, True),
    (32, 9, 0, True),
    (32, 8, 0, False),
    (8, 20, 1, True),
  ],
)
def test_buckets_that_t5_cannot_have(buckets, distance, layers, fits):
  """transformers' own formula gives no number where ours refuses."""
  import torch
  from transformers.models.t5 import modeling_t5

  def make():
    return T5Config(
      vocab_size=8,
      num_decoder_layers=layers,
      relative_attention_num_buckets=buckets,
      relative_attention_max_distance=distance,
    )

  bucket = modeling_t5.T5Attention._relative_position_bucket
  try:
    theirs = True
    for both_ways in (True, False)[: 1 + layers]:
      found = bucket(torch.arange(-40, 41), both_ways, buckets, distance)
      theirs &= bool(((found >= 0) & (found < buckets)).all())
  except (ZeroDivisionError, ValueError, RuntimeError):
    theirs = False
  assert theirs == fits
  if fits:
    make()
  else:
    with pytest.raises(ValueError, match="relative_attention"):
      make()


def test_a_name_of_the_hub_is_told_from_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("google/flan-t5-small", "t5-small"):
    with pytest.raises(UserError, match=f"hf://{name} is fetched"):
      reference.find(name)
  with pytest.raises(UserError) as e:
    reference.find("/no/such/folder")
  assert "hf://" not in str(e.value)


# ---- Vocabularies ------------------------------------------------------------


def test_both_sentences_of_a_pair_are_shown():
  task = head_tasks.classification(
    sources.Function({"train": lambda: [{"a": "x", "b": "y", "label": 1}]}),
    ("{a}", "{b}"),
    "label",
    BYTES,
    ("no", "yes"),
  )
  (row,) = tfds.as_numpy(task.get_dataset(None, "train", shuffle=False))
  feature = task.output_features["inputs"]
  padded = np.pad(row["inputs"], (0, 5))
  assert pipeline.show(feature, padded) == "x </s> y"


TEXTS = (
  "The quick brown fox, and THE other.",
  "  two  spaces\tand\nlines ",
  "Ünïcödé ﬁne ½ 日本語 😀 <extra_id_3> {x}",
  "",
)


def test_a_tokenizer_json_alone_is_the_vocabulary(shared_data, tmp_path):
  """The oracle is the SentencePiece model that the JSON was made from."""
  spiece = f"{shared_data}/vocab_t5/spiece.model"
  shutil.copy(f"{shared_data}/vocab_t5/tokenizer.json", tmp_path)
  found = vocabularies.from_hf(str(tmp_path))
  theirs = seqio.SentencePieceVocabulary(spiece, 100)
  assert found.vocab_size == theirs.vocab_size == 32100
  with open(
    f"{shared_data}/corpus_wikitext2_valtest/test.txt", encoding="utf-8"
  ) as file:
    lines = [line for _, line in zip(range(500), file)]
  for text in [*TEXTS, *lines]:
    assert found.encode(text) == theirs.encode(text), text
    assert found.decode(found.encode(text)) == theirs.decode(
      theirs.encode(text)
    )
  # A run keeps it as the SentencePiece model that it is.
  (tmp_path / "run").mkdir()
  kept = vocabularies.save(found, str(tmp_path / "run"))
  again = vocabularies.load(kept, str(tmp_path / "run"))
  assert again.encode(TEXTS[0]) == theirs.encode(TEXTS[0])


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
  with pytest.raises(UserError, match="'WordPiece'; T5's are 'Unigram'"):
    tokenizer_json.vocabulary(str(path))


def test_a_folder_of_hf_with_tokenizer_json_alone_predicts(tmp_path):
  """A SentencePiece model of the test's own, so that it needs no data."""
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["red green blue round square"] * 50),
    model_prefix=str(tmp_path / "own"),
    vocab_size=30,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  folder = tmp_path / "t5"
  hf_models.make("t5_1_1", folder)
  (tmp_path / "slow").mkdir()
  tokenizers.write(str(tmp_path / "own.model"), str(tmp_path / "slow"))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "slow")
  tokenizer.save_pretrained(folder)
  assert not (folder / "spiece.model").exists()
  found = checkpoints.vocabulary_of(str(folder))
  for text in ("red square", "blue  redround", "unknown zebra"):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert found.encode(text) == ids, text


def test_a_number_that_is_no_label_is_not_taken_for_a_place():
  rows = [{"a": "x", "label": 0}]
  with pytest.raises(UserError, match="label '0' is neither"):
    rows_of(classes(rows, label_names=("1", "2", "3")))
  (row,) = rows_of(classes(rows, label_names=("no", "yes")))
  assert list(row["targets"]) == [0]
  with pytest.raises(UserError, match="is neither"):
    rows_of(classes([{"a": "x", "label": "²"}], label_names=("no", "yes")))


def test_zeros_and_ones_are_no_list_of_labels():
  many = classes(
    [{"a": "x", "label": [1, 1, 0]}],
    label_names=("p", "q", "r"),
    problem_type="multi_label_classification",
  )
  with pytest.raises(UserError, match="a column of 0 and 1 a label"):
    rows_of(many)


@pytest.mark.parametrize("name", ["mrpc", "stsb", "qqp"])
def test_a_question_of_glue_needs_no_label_under_either_name(name, tmp_path):
  from fat5_jax.data import glue

  task = glue.find(name)
  folder = tmp_path / task.folder
  folder.mkdir()
  columns = [*task.features.values(), task.label_column]
  (folder / "train.tsv").write_text("\t".join(columns) + "\n")
  for built in (
    tasks.glue(name, BYTES, str(tmp_path)),
    head_tasks.glue(name, BYTES, str(tmp_path)),
  ):
    official = dict.fromkeys(task.features.values(), "x")
    ours = dict.fromkeys(task.features, "x")
    asked = [
      built.source.question(row)
      for row in (ours, official, official | {task.label_column: "?"})
    ]
    assert asked[0] == asked[1] == asked[2]
    with pytest.raises(UserError, match="holds nothing, not text|is empty"):
      built.source.question(dict.fromkeys(task.features))


def test_an_answer_with_a_format_can_be_asked_for():
  task = text_task([], "{a}", "{b:.1f}")
  assert task.source.question({"a": "x"})["inputs"] == "x"


def test_a_tokenizer_json_that_adds_tokens_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  token = {"id": 3, "content": "[SEP]", "special": True}
  pieces = [["<pad>", 0], ["</s>", 0], ["<unk>", 0]]
  path.write_text(
    json.dumps(
      {
        "added_tokens": [token],
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces},
      }
    )
  )
  with pytest.raises(UserError, match="adds the token"):
    tokenizer_json.vocabulary(str(path))
