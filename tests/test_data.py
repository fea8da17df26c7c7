"""Sources, tasks and batches; a mistake in a file is told with its place."""

import gzip
import json

import numpy as np
import pytest
import seqio

from fat5_jax.data import (
  checks,
  folders,
  pipeline,
  sources,
  spoken_values,
  tasks,
  vocabularies,
)
from fat5_jax.data.renamed import Renamed
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

BYTES = seqio.ByteVocabulary(0)
ROWS = [{"text": f"number {i}", "label": str(i)} for i in range(12)]


def write(path, text):
  path.write_text(text, encoding="utf-8")
  return str(path)


def write_rows(folder, kind, rows=ROWS):
  path = folder / f"rows.{kind}"
  if kind == "parquet":
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
  if kind == "jsonl":
    text = "".join(json.dumps(row) + "\n" for row in rows)
  else:
    sign = {"tsv": "\t", "csv": ","}[kind]
    lines = [sign.join(rows[0]), *(sign.join(r.values()) for r in rows)]
    text = "\n".join(lines) + "\n"
  return write(path, text)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
  path = write_rows(tmp_path, kind)
  assert [row for _, row in sources.read_file(path)] == ROWS


def test_compressed_files_and_globs(tmp_path):
  for i in range(2):
    with gzip.open(tmp_path / f"part{i}.jsonl.gz", "wt") as file:
      file.write(json.dumps({"n": i}) + "\n")
  source = sources.Files({"train": str(tmp_path / "part*.jsonl.gz")})
  assert [row["n"] for _, row in source.rows("train")] == [0, 1]


def test_csv_quotes_and_tsv_does_not(tmp_path):
  csv = write(tmp_path / "a.csv", 'text,label\n"a, ""b""\nc",1\n')
  assert next(iter(sources.read_file(csv)))[1]["text"] == 'a, "b"\nc'
  tsv = write(tmp_path / "a.tsv", 'text\tlabel\nsay "hi\t1\n')
  assert next(iter(sources.read_file(tsv)))[1]["text"] == 'say "hi'


@pytest.mark.parametrize(
  "name,text,message",
  [
    ("a.tsv", "x\ty\n1\t2\n3\n", r"a.tsv, row 3: 1 columns, expected 2"),
    ("a.tsv", "x\ty\n1\t2\n\n3\t4\n", r"a.tsv, row 3: empty line"),
    ("a.csv", "x,y\n1,2\n1,2,3\n", r"a.csv, row 3: 3 columns"),
    ("a.jsonl", '{"x": 1}\n{"x": \n', r"a.jsonl, row 2: not valid JSON"),
    ("a.jsonl", '{"x": 1}\n[1]\n', r"a.jsonl, row 2: expected a JSON object"),
    ("a.jsonl", '{"x": 1}\n\n{"x": 2}\n', r"a.jsonl, row 2: empty line"),
    ("a.parquet", "no", r"a.parquet: not a complete Parquet"),
    ("a.docx", "no", r"unknown format '.docx'"),
  ],
)
def test_bad_files_name_the_place(name, text, message, tmp_path):
  path = write(tmp_path / name, text)
  task = tasks.text_to_text(
    sources.Files({"train": path}),
    "{x}",
    "{x}",
    seqio.ByteVocabulary(0),
    name="bad_file",
  )
  with pytest.raises(UserError, match=message):
    list(task.source.examples("train"))


@pytest.mark.parametrize(
  "name,text",
  [
    ("a.jsonl", '{"x": 1}\n{"x": \n\n[1]\n{"x": "\\ud800"}\n{"x": 2}\n'),
    ("a.tsv", "x\ty\n1\t2\n3\n\n4\t5\t6\n2\t7\n"),
  ],
)
@pytest.mark.parametrize(
  "wrap", [lambda s: s, lambda s: Renamed(s, {"z": "x"})]
)
def test_lines_that_are_no_rows_are_left_out_and_counted(
  name, text, wrap, tmp_path, caplog
):
  path = write(tmp_path / name, text)
  source = wrap(sources.Files({"train": path}))
  task = tasks.text_to_text(
    source,
    "{x}",
    "{x}",
    seqio.ByteVocabulary(0),
    name="bad_file",
    skip_bad_rows=True,
  )
  found = [row["inputs"] for row in task.source.examples("train")]
  assert found == ["1", "2"]
  bad = text.count("\n") - len(found) - name.endswith("tsv")
  assert f"left out {bad} bad rows" in caplog.text
  assert "empty line" in caplog.text


def test_bytes_that_are_not_utf8_name_the_row(tmp_path):
  path = tmp_path / "a.tsv"
  path.write_bytes(b"x\ny\n\xff\n")
  with pytest.raises(UserError, match="row 3: not valid UTF-8"):
    list(sources.read_file(str(path)))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match="gone.tsv: no such data file"):
    sources.Files({"train": str(tmp_path / "gone.tsv")})


def make_task(folder, rows=ROWS, name="a_task", **options):
  path = write_rows(folder, "jsonl", rows)
  return tasks.text_to_text(
    sources.Files({"train": path, "validation": path}),
    "say: {text}",
    "{label}",
    BYTES,
    name=name,
    **options,
  )


def make_config(task, **changes):
  settings = dict(
    mixture_or_task_name=task,
    task_feature_lengths={"inputs": 24, "targets": 8},
    split="train",
    batch_size=4,
    shuffle=True,
    pack=True,
  )
  return pipeline.DatasetConfig(**{**settings, **changes})


def take(config, count, position=None):
  batches = pipeline.train_batches(config, 384, position)
  return [next(batches) for _ in range(count)]


def test_the_seed_fixes_the_order_and_changes_it(tmp_path):
  task = make_task(tmp_path)
  first = lambda seed: take(make_config(task, seed=seed), 1)[0]
  key = "encoder_input_tokens"
  assert np.array_equal(first(1)[key], first(1)[key])
  assert not np.array_equal(first(1)[key], first(2)[key])


def test_packed_rows_hold_several_examples(tmp_path):
  batch = take(
    make_config(
      make_task(tmp_path), task_feature_lengths={"inputs": 64, "targets": 12}
    ),
    1,
  )[0]
  assert batch["encoder_segment_ids"].max() >= 3
  ids = batch["encoder_segment_ids"]
  assert ((ids > 0) == (batch["encoder_input_tokens"] > 0)).all()


def test_an_empty_data_set_is_an_error(tmp_path):
  path = write(tmp_path / "a.tsv", "text\tlabel\n")
  task = tasks.text_to_text(
    sources.Files({"train": path}), "{text}", "{label}", BYTES, name="empty"
  )
  with pytest.raises(UserError, match="a.tsv: no rows"):
    take(make_config(task), 1)


def test_a_bad_row_reaches_the_person_through_tensorflow(tmp_path):
  task = make_task(tmp_path, [*ROWS, {"text": "x", "label": ""}])
  with pytest.raises(
    UserError, match="rows.jsonl, row 13: column 'label' is em"
  ):
    take(make_config(task, shuffle=False, pack=False), 9)
  lenient = make_task(
    tmp_path, [*ROWS, {"text": "x", "label": ""}], skip_bad_rows=True
  )
  take(make_config(lenient), 2)


def test_lines_that_are_no_text_are_left_out_where_bad_rows_are(tmp_path):
  path = tmp_path / "rows.jsonl"
  lines = [json.dumps(row).encode() for row in ROWS]
  lines[3] = b'{"text": "\xff", "label": "x"}'
  lines[5] = b'{"text": "a\0b", "label": "x"}'
  path.write_bytes(b"\n".join(lines))

  def config(**more):
    source = sources.Files({"train": str(path)})
    task = tasks.text_to_text(
      source, "{text}", "{label}", BYTES, name="bytes", **more
    )
    return make_config(task, shuffle=False, pack=False)

  with pytest.raises(UserError, match="rows.jsonl, row 4: not valid UTF-8"):
    take(config(), 9)
  found = list(pipeline.one_pass(config(skip_bad_rows=True)))
  assert len(found) == len(ROWS) - 2


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path, capsys):
  for name in ("train1.jsonl", "train2.csv", "dev.jsonl", "notes.md"):
    (tmp_path / name).write_text('{"text": "a"}\n')
  found = folders.named_splits(str(tmp_path), "none", None)
  assert [len(found.splits[s]) for s in ("train", "validation")] == [1, 1]
  said = capsys.readouterr().err
  assert "not read" in said and said.rstrip().endswith("one kind: train2.csv")


def test_a_column_that_is_not_there_names_the_nearest(tmp_path):
  path = write_rows(tmp_path, "jsonl")
  task = tasks.text_to_text(
    sources.Files({"train": path}), "{txt}", "{label}", BYTES, name="wrong"
  )
  with pytest.raises(UserError, match="no column 'txt'. Did you mean 'text'"):
    take(make_config(task), 1)


def test_a_token_beyond_the_embedding_is_an_error(tmp_path):
  config = make_config(make_task(tmp_path))
  with pytest.raises(UserError, match="vocab_size = 100"):
    next(pipeline.train_batches(config, 100))
  with pytest.raises(UserError, match="259 ids"):
    checks.check_task(config, T5Config(vocab_size=100))


def test_a_model_that_pads_with_another_id_is_refused(tmp_path):
  model = T5Config(vocab_size=384, pad_token_id=1)
  with pytest.raises(UserError, match="pad_token_id = 1"):
    checks.check_task(make_config(make_task(tmp_path)), model)


def test_an_unknown_task_names_the_nearest():
  with pytest.raises(UserError, match="Did you mean 'glue_sst2_v002'"):
    tasks.resolve("glue_sst_v002")


def test_an_unknown_split_or_metric_names_what_there_is(tmp_path):
  with pytest.raises(UserError, match="has no split 'valid'.*'validation'"):
    make_config(make_task(tmp_path), split="valid").task()
  with pytest.raises(UserError, match="Did you mean 'rouge'"):
    make_task(tmp_path, metrics=("rogue",))


def test_a_glue_label_that_is_none_is_an_error(tmp_path):
  (tmp_path / "SST-2").mkdir()
  write(tmp_path / "SST-2" / "train.tsv", "sentence\tlabel\nfine \t1\nhm\t7\n")
  task = tasks.glue("sst2", BYTES, str(tmp_path))
  with pytest.raises(UserError, match="train.tsv, row 3: label '7'"):
    list(task.source.examples("train"))


def test_parallel_files_must_align(tmp_path):
  write(tmp_path / "train.en", "a\nb\n")
  write(tmp_path / "train.de", "A\n")
  task = tasks.translation("en", "de", BYTES, str(tmp_path))
  with pytest.raises(UserError, match="train.de: ends after 1 rows"):
    list(task.source.examples("train"))


def test_tasks_read_hf_datasets(tmp_path):
  datasets = pytest.importorskip("datasets")
  rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
  datasets.DatasetDict(
    {"train": datasets.Dataset.from_list(rows)}
  ).save_to_disk(str(tmp_path / "saved"))
  task = tasks.text_to_text(
    sources.HuggingFace(str(tmp_path / "saved"), splits={"train": "train"}),
    "{text}",
    "{label}",
    BYTES,
    name="from_hf",
  )
  found = list(task.source.examples("train"))
  assert [r["targets"] for r in found] == ["1", "0"]


def test_eval_batches_cover_the_split_once_and_fill_the_last(tmp_path):
  config = make_config(make_task(tmp_path), pack=False, batch_size=5)
  batches = list(pipeline.eval_batches(config, 384, None))
  assert [len(b["encoder_input_tokens"]) for b in batches] == [5, 5, 5]
  real = sum((b["decoder_loss_weights"].max(axis=1) > 0).sum() for b in batches)
  assert real == 12


def test_vocabularies_travel_with_a_checkpoint(tmp_path):
  description = vocabularies.save(seqio.ByteVocabulary(5), str(tmp_path))
  again = vocabularies.load(description, str(tmp_path))
  assert again == seqio.ByteVocabulary(5)


def test_spoken_values_are_right_and_held_out():
  train = list(spoken_values.rows(20000, 300, 0, "train"))
  held_out = list(spoken_values.rows(20000, 300, 0, "validation"))
  assert len(train) == 20000 and len(held_out) == 300
  assert not {r["text"] for r in train} & {r["text"] for r in held_out}
  values = {r["text"]: r["value"] for r in train}
  amounts = [t for t in values if t.startswith("forty-two euros and ")]
  assert amounts and all(values[t].startswith("42.") for t in amounts)
  dates = [t for t in values if "the twenty-third of May" in t]
  assert dates and all(values[t].endswith("-05-23") for t in dates)
  assert spoken_values.ordinal(31) == "thirty-first"
  assert spoken_values.ordinal(12) == "twelfth"
