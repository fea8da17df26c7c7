"""Rows from TFRecord, from streams, and of files with weights."""

import gzip
import json
import shutil

import pytest
import seqio
import tensorflow as tf

from fat5_jax.api import data as api_data
from fat5_jax.data import (
  features,
  formats,
  head_tasks,
  mixtures,
  records,
  renamed,
  sources,
  tasks,
)
from fat5_jax.errors import UserError
from fat5_jax.gin_config import cli
import gin

BYTES = seqio.ByteVocabulary(0)


def text_task(source, **options):
  return tasks.text_to_text(source, "{a}", "{b}", BYTES, **options)


# ---- TFRecord ----------------------------------------------------------------


def write_records(path, rows, **options):
  """Rows as tf.train.Example, by TensorFlow's own writer."""

  def feature(value):
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], (str, bytes)):
      values = [v.encode() if isinstance(v, str) else v for v in values]
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if values and isinstance(values[0], float):
      return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

  with tf.io.TFRecordWriter(str(path), **options) as writer:
    for row in rows:
      kinds = {name: feature(value) for name, value in row.items()}
      example = tf.train.Example(features=tf.train.Features(feature=kinds))
      writer.write(example.SerializeToString())


ROWS = [
  {"a": "Ünïcode text", "b": "yes", "n": 3, "x": 0.5, "ids": [4, 5]},
  {"a": "more", "b": "no", "n": -1, "x": 1.5, "ids": [6, 7, 8]},
]


@pytest.mark.parametrize(
  "name, options",
  [
    ("rows.tfrecord", {}),
    ("rows.tfrecords", {}),
    ("rows.tfrecord.gz", {"options": "GZIP"}),
    ("rows.tfrecord-00000-of-00001", {}),
  ],
)
def test_examples_of_tfrecord_are_rows(name, options, tmp_path):
  path = tmp_path / name
  write_records(path, ROWS, **options)
  assert [row for _, row in formats.read_file(str(path))] == ROWS
  assert formats.count_rows(str(path)) == 2
  source = sources.Files({"train": str(tmp_path / "rows.tfrecord*")})
  task = text_task(source)
  assert [r["inputs"] for r in task.source.examples("train")] == [
    "Ünïcode text",
    "more",
  ]
  assert task.num_input_examples("train") == 2


def test_bytes_that_are_no_text_are_told_where_they_are_asked_for(tmp_path):
  path = tmp_path / "rows.tfrecord"
  write_records(path, [{"a": "x", "b": "y", "image": b"\xff\xd8"}])
  source = sources.Files({"train": str(path)})
  assert len(list(text_task(source).source.examples("train"))) == 1
  task = tasks.text_to_text(source, "{image}", "{b}", BYTES)
  with pytest.raises(UserError, match="row 1: column 'image' holds a bytes"):
    list(task.source.examples("train"))


def test_a_damaged_tfrecord_names_its_row(tmp_path):
  path = tmp_path / "rows.tfrecord"
  write_records(path, ROWS)
  whole = path.read_bytes()
  read = lambda: list(formats.read_file(str(path)))
  path.write_bytes(whole[:-3])
  with pytest.raises(UserError, match="row 2: not a whole TFRecord file"):
    read()
  path.write_bytes(whole[:20] + b"\0" + whole[21:])
  with pytest.raises(UserError, match="row 1: not a whole TFRecord file"):
    read()
  with tf.io.TFRecordWriter(str(path)) as writer:
    writer.write(b"no example")
  # The others may be rows: it is left out where bad rows are.
  ((where, row),) = read()
  assert where.endswith("row 1")
  with pytest.raises(UserError, match="no tf.train.Example"):
    row["text"]
  with gzip.open(tmp_path / "rows.tfrecord.gz", "wb") as file:
    file.write(whole)
  shutil.move(tmp_path / "rows.tfrecord.gz", path)
  with pytest.raises(UserError, match="row 1: not a whole TFRecord file"):
    read()


def test_lists_of_a_tfrecord_are_nested_columns(tmp_path):
  """As TFDS writes a data set of questions."""
  path = tmp_path / "train.tfrecord"
  row = {"question": "who?", "answers/text": ["she", "he"]}
  write_records(path, [row])
  source = sources.Files({"train": str(path)})
  task = tasks.text_to_text(source, "{question}", "{answers/text.1}", BYTES)
  (found,) = task.source.examples("train")
  assert found == {"inputs": "who?", "targets": "he"}


# ---- Streams -----------------------------------------------------------------


def saved(folder):
  import datasets

  rows = [{"a": f"text {i}", "b": f"{i}"} for i in range(5)]
  path = str(folder / "saved")
  data = datasets.Dataset.from_list(rows)
  datasets.DatasetDict({"train": data}).save_to_disk(path)
  return path, rows


def test_a_data_set_of_hf_is_streamed_in_order(tmp_path):
  path, rows = saved(tmp_path)
  source = sources.HuggingFace(path, splits={"train": "train"}, streaming=True)
  assert source.is_stream
  assert [row for _, row in source.rows("train")] == rows
  # And once more.
  assert [where[-5:] for where, _ in source.rows("train")][:2] == [
    "row 1",
    "row 2",
  ]
  task = text_task(source)
  # From a record too, and another run than one that is not streamed.
  record = json.loads(json.dumps(records.describe(task)))
  again = records.build(record, BYTES, with_data=True)
  assert again.source.rows_source.is_stream
  assert list(again.source.examples("train")) == list(
    task.source.examples("train")
  )
  kept = sources.HuggingFace(path, splits={"train": "train"})
  assert not kept.is_stream
  assert records.difference(record, records.describe(text_task(kept)))


def test_a_folder_of_files_is_streamed_by_hf(tmp_path):
  (tmp_path / "data").mkdir()
  rows = [{"a": f"text {i}", "b": f"{i}"} for i in range(5)]
  (tmp_path / "data" / "train.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  source = sources.HuggingFace(
    str(tmp_path / "data"), splits={"train": "train"}, streaming=True
  )
  assert [row for _, row in source.rows("train")] == rows
  task = text_task(source)
  assert task.num_input_examples("train") is None
  # Nobody holds it as a whole.
  data = task.get_dataset({"inputs": 16, "targets": 8}, "train", shuffle=True)
  assert len(list(data)) == 5


def test_rows_without_end_are_a_stream():
  def endless():
    number = 0
    while True:
      number += 1
      yield {"a": f"text {number}", "b": "x"}

  source = sources.Function({"train": endless}, is_stream=True)
  task = text_task(source)
  assert task.num_input_examples("train") is None
  data = task.get_dataset({"inputs": 16, "targets": 8}, "train", shuffle=True)
  assert len(list(data.take(3))) == 3
  other = text_task(
    sources.Function({"train": lambda: [{"a": "x", "b": "y"}]}), name="other"
  )
  mixture = tasks.mixture([task, other])
  with pytest.raises(UserError, match="nobody counts the rows of task"):
    mixture.get_rate(task)
  # What would read all of it asks a person instead.
  with pytest.raises(UserError, match="give steps, batch_size"):
    api_data.longest(task)
  with pytest.raises(UserError, match="streams, so the names.*label_names"):
    head_tasks.classification(source, "{a}", "b", BYTES)
  assert tasks.mixture({task: 2.0, other: 1.0}).get_rate(task) == 2
  assert renamed.Renamed(source, {"c": "a"}).is_stream


# ---- Files with weights ------------------------------------------------------


def weighted_files(folder, columns=("a", "b"), **more):
  texts = {"clean": ["x", "y"], "web": ["z"] * 6, "dev": ["v", "w"]}
  for name, values in texts.items():
    lines = "".join(f"{v}\t{name}\n" for v in values)
    (folder / f"{name}.tsv").write_text("\t".join(columns) + "\n" + lines)
  path = lambda name: str(folder / name)
  return {
    "train": {path("clean.tsv"): 3.0, path("w*.tsv"): 1.0},
    "validation": path("dev.tsv"),
    **more,
  }


def test_weights_of_files_are_a_mixture(tmp_path):
  mixture = text_task(sources.Files(weighted_files(tmp_path)), name="said")
  rates = {t.name: mixture.get_rate(t) for t in mixture.tasks}
  assert mixture.name == "said_weighted"
  assert rates == {"said": 1e-9, "said_clean": 3, "said_w": 1}
  splits = {t.name: t.splits for t in mixture.tasks}
  assert splits["said"] == ("validation",)
  assert splits["said_clean"] == splits["said_w"] == ("train",)
  drawn = mixture.get_dataset(
    {"inputs": 8, "targets": 8}, "train", shuffle=True, seed=3
  )
  targets = [row["targets"].numpy().tolist() for row in drawn.take(2000)]
  found = sum(BYTES.decode(ids) == "web" for ids in targets)
  # Five standard deviations of a binomial.
  assert abs(found - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
  held_out = mixture.get_dataset(
    {"inputs": 8, "targets": 8}, "validation", shuffle=False, num_epochs=1
  )
  assert len(list(held_out)) == 2
  record = json.loads(json.dumps(records.describe(mixture)))
  again = records.build(record, BYTES, with_data=True)
  assert not records.difference(record, records.describe(again))
  # In another mixture it has its share.
  rows = sources.Function({"train": lambda: [{"a": "x", "b": "y"}]})
  outer = tasks.mixture({mixture: 1.0, text_task(rows, name="other"): 1.0})
  assert mixtures.describe(outer) == (
    "mixture draws 50 % other, 37.5 % said_clean, 12.5 % said_w"
  )


WEIGHTED = """
from __gin__ import dynamic_registration
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks
import fat5_jax.models.config as config

include 'models/byt5/base.gin'
include 'runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.Files()
  inputs = 'say {a}'
  targets = '{b}'
  vocabulary = %VOCABULARY
sources.Files.splits = {
  'train': {'clean.tsv': 3.0, 'web.tsv': 1.0}, 'validation': 'dev.tsv'}
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}
BATCH_SIZE = 2
TRAIN_STEPS = 2
EVAL_PERIOD = 0
EVAL_STEPS = 1
CHECKPOINT_PERIOD = 2
DTYPE = 'float32'
ATTENTION = 'reference'
config.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_dim = 16
"""


def test_a_run_on_files_with_weights_asks_in_its_words(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(tmp_path)
  weighted_files(tmp_path)
  (tmp_path / "weighted.gin").write_text(WEIGHTED)

  def run(command, *flags):
    gin.clear_config()
    assert cli.main(command, list(flags)) == 0, capfd.readouterr().err
    gin.clear_config()
    return capfd.readouterr()

  run("train", "--gin_file=weighted.gin", "--gin.MODEL_DIR=out")
  # Its name is that of the task, whatever it is trained on.
  path = "inference_eval/text_to_text-metrics.jsonl"
  run("eval", "--gin.MODEL_DIR=out")
  read = lambda folder: (tmp_path / folder / path).read_text()
  assert read("out/eval") == read("out")
  (tmp_path / "lines.txt").write_text("something\n")
  flags = ("--gin.MODEL_DIR=out", "--gin.MAX_OUTPUT_LENGTH=2")
  done = run("infer", *flags, "--gin.INPUT=lines.txt")
  assert json.loads(done.out)["inputs"] == "say something"


def test_labels_are_those_of_all_files_with_weights(tmp_path):
  splits = weighted_files(tmp_path, ("text", "label"))
  (tmp_path / "dev.tsv").write_text("text\tlabel\nv\tweb\n")
  source = renamed.Renamed(sources.Files(splits), {"sentence": "text"})
  mixture = head_tasks.classification(source, "{sentence}", "label", BYTES)
  assert features.label_feature(mixture).names == ("clean", "web")
  (web,) = [t for t in mixture.tasks if t.name.endswith("_w")]
  rows = list(web.source.examples("train"))
  assert len(rows) == 6 and rows[0]["targets"] == [1]


@pytest.mark.parametrize(
  "splits, told",
  [
    ({"train": "a.tsv", "validation": {"a.tsv": 1.0}}, "they are for the rows"),
    ({"train": {"a.tsv": 0}}, "'a.tsv': 0 is no weight"),
    ({"train": {"a.tsv": "2"}}, "is no weight of a file"),
    ({"train": {"gone.tsv": 1.0}}, "gone.tsv: no such data file"),
  ],
)
def test_what_is_no_weight_is_told(splits, told, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.tsv").write_text("a\tb\nx\ty\n")
  with pytest.raises(UserError, match=told):
    sources.Files(splits)


def test_a_task_that_takes_no_weights_says_so(tmp_path):
  source = sources.Files(weighted_files(tmp_path))
  with pytest.raises(UserError, match="takes no weights of files: mix"):
    tasks.summarization("a", "b", BYTES, source=source)
