"""Predicts lines or a task: `python -m fat5_jax.infer --gin.MODEL_DIR=...`."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax import cli

  raise SystemExit(cli.main("infer"))

from collections.abc import Iterable, Iterator
import itertools
import json
import sys
from typing import Any

import numpy as np
import seqio

from fat5_jax import (
  console,
  hosts,
  infer_settings,
  output_file,
  predictions,
  row_batches,
  run_folder,
)
from fat5_jax.data import (
  features,
  files,
  pipeline,
  records,
  seqio_source,
  sources,
)
from fat5_jax.errors import UserError
from fat5_jax.eval import load_model
from fat5_jax.program import prediction
from fat5_jax.sharding import Partitioner

# Tokens of a question and a part of its context.
_SHORTEST_WINDOW = 16


def infer(
  *,
  checkpoint_path: str,
  input: str | None = None,
  output: str = "-",
  output_format: str | None = None,
  dataset_cfg: pipeline.DatasetConfig | None = None,
  batch_size: int = 32,
  max_input_length: int | None = None,
  max_output_length: int = 256,
  use_template: bool = True,
  model: Any = None,
  vocabulary: seqio.Vocabulary | None = None,
  partitioner: Partitioner | None = None,
  head_module: str | None = None,
  dry_run: bool = False,
) -> None:
  """Writes a prediction for every line, or every example of a task.

  Args:
    checkpoint_path: run folder, one checkpoint, or HF folder.
    input: a text file with one input a line, a .tsv, .csv or .jsonl file, or
      "-" for lines on standard input; None predicts the task of `dataset_cfg`,
      or reads standard input where there is none. Rows have the columns of the
      task that the run folder tells, and are asked about in its words; a line
      is its one column (a tagger's words are apart by spaces). Without such a
      task they have a column `inputs` (and `second` for pairs, or `question`
      and `context`). A column `inputs` where the task has none of that name is
      taken as it is.
    output: a file, or "-" for standard output.
    output_format: "jsonl" or "tsv"; by default what the ending of `output`
      says, else JSONL. Keys are inputs, prediction, and targets for a task.
      Heads also write "glue" (a submission), "squad" and "conll".
    dataset_cfg: the task and split to predict, where there is no input.
    batch_size: rows a batch.
    max_input_length: longer inputs are cut to this many tokens; None cuts none.
    max_output_length: most tokens of a prediction.
    use_template: whether the task's template is filled; False takes a language
      model's lines, and column `inputs`, as they are.
    model: overrides the checkpoint's own T5Config (same architecture).
    vocabulary: overrides the checkpoint's own.
    partitioner: the mesh; None puts a part of each batch on every device. Among
      several hosts all read the input, host 0 writes.
    head_module: see eval.load_model.
    dry_run: stop once everything is built.

  Raises:
    UserError: for a mistake in the checkpoint, the input or the task.
  """
  from_task = input is None and dataset_cfg is not None
  partitioner = partitioner or Partitioner()
  if input == "-" or (input is None and dataset_cfg is None):
    if hosts.everyone.count > 1:
      raise UserError(
        "standard input reaches one host only: set INPUT to a file that all"
        f" {hosts.everyone.count} hosts see"
      )
  infer_settings.check(
    input,
    checkpoint_path=checkpoint_path,
    output=output,
    output_format=output_format,
    infer_batch_size=batch_size,
    max_input_length=max_input_length,
    max_output_length=max_output_length,
    use_template=use_template,
  )
  output_file.check(output, [] if input in (None, "-") else [input])
  model, params, own_vocabulary, source = load_model(
    checkpoint_path, model, partitioner, head_module
  )
  vocabulary = vocabulary or own_vocabulary
  if vocabulary is None:
    raise UserError(f"{source.path} brings no vocabulary; set INFER_VOCABULARY")
  head = model.config.head
  output_format = _choose_format(output, output_format, head)
  output_file.check_beside_run(output, source.run_dir, source.path)
  own = None
  if from_task:
    dataset_cfg = run_folder.with_own_task(dataset_cfg, source, vocabulary)
    output_file.check(output, seqio_source.files_of(dataset_cfg.task()))
  elif use_template:
    own, window = _own_task(source, vocabulary, input or "-")
    max_input_length = max_input_length or window
  count, told = itertools.count(), predictions.Told()
  if output_format == "glue":
    told.index = []
  if model.config.is_language_model:
    rows = (
      _task_rows(dataset_cfg)
      if from_task
      else _texts(_input_rows(input or "-", own, told), own)
    )
    lines = _generated_lines(
      model,
      params,
      partitioner,
      _counted(rows, count, input or "-"),
      vocabulary,
      output_format,
      batch_size,
      max_input_length,
      max_output_length,
      told,
    )
  else:
    found = _head_records(
      model,
      params,
      partitioner,
      dataset_cfg if from_task else None,
      input or "-",
      vocabulary,
      batch_size,
      max_input_length,
      own,
      told,
    )
    found = _counted(found, count, input or "-")
    lines = predictions.write(found, output_format, head, told.index)
  if dry_run:
    console.say(f"dry run: {source.path} and its vocabulary are fine")
    return
  if (input or "-") == "-" and dataset_cfg is None and sys.stdin.isatty():
    console.say("one input a line, end with Ctrl-D:")
  with output_file.opened(output) as file, infer_settings.memory():
    for line in lines:
      file.write(line)
      file.flush()
  for line in told.describe(max_input_length):
    console.say(line)
  if output != "-":
    console.say(f"{next(count)} predictions in {output}")


def _own_task(source, vocabulary, path: str) -> tuple[Any, int | None]:
  """(the task that a run folder tells, the length of its windows).

  None where it tells none, and for rows that hold whole inputs.
  """
  record = run_folder.own_task(source)
  if record is None:
    return None, None
  if "factory" not in record:
    console.say(
      f"task {record['name']} of the run folder is registered by code, so"
      " inputs are taken as they are"
    )
    return None, None
  task = records.build(record, vocabulary)
  task.source.read_like = record["source"].get("arguments", {})
  columns = task.source.columns
  if _is_text(path):
    if len(columns) != 1:
      raise UserError(
        f"task {record['name']} asks about {' and '.join(columns)}, and a line"
        " of text is one of them: set INPUT to a .jsonl, .tsv or .csv file with"
        f" columns {' and '.join(columns)}"
        + " (--gin.USE_TEMPLATE=False takes lines that are whole inputs)"
        * (record["kind"] == "text_to_text")
      )
  else:
    _, first = next(_rows_of_file(path, task), ("", {}))
    if "inputs" in first and not _asks(task, first):
      console.say(
        f"{path} has a column inputs, not {' and '.join(columns)}: its texts"
        " are taken as whole inputs, the task's template is not filled"
      )
      return None, None
  lengths = record["lengths"] if record["kind"] in features.WINDOWED else {}
  return task, lengths.get("inputs")


def _asks(task: seqio.Task, row: sources.Row) -> bool:
  """Whether a row has what the task asks about, under any of its names."""
  if any(sources.has_column(row, name) for name in task.source.columns):
    return True
  try:
    task.source.question(row)
  except UserError:
    return False
  return True


def _rows_of_file(
  path: str, own: seqio.Task | None
) -> Iterator[sources.LocatedRow]:
  """A file's rows, read as the task's own files are."""
  how = {} if own is None else own.source.read_like
  options = {k: how[k] for k in ("quoting", "delimiter") if k in how}
  columns = how.get("columns")
  # A file without header has those of any split that has none.
  if isinstance(columns, dict):
    columns = next((c for c in columns.values() if c), None)
  if columns and own is not None:
    _, first = next(iter(sources.read_file(path, **options)), ("", {}))
    if not _asks(own, first):
      options["columns"] = columns
  return iter(sources.read_file(path, **options))


def _is_text(path: str) -> bool:
  return path == "-" or sources.split_suffix(path)[0] in ("", ".txt")


def _texts(
  rows: Iterable[sources.LocatedRow],
  own: seqio.Task | None,
  pairs: bool = False,
) -> Iterator[sources.LocatedRow]:
  """What a model is asked about each row: `inputs`, and `second` of `pairs`."""
  keys = ("inputs", "second") if pairs else ("inputs",)
  for where, row in rows:
    try:
      if own is not None:
        yield where, {"inputs": own.source.question(row)["inputs"]}
        continue
      for key in keys:
        text = sources.column(row, key)
        if not isinstance(text, str) or not text.strip():
          raise UserError(
            f"column {key!r} is {sources.shown(text)}, not a text"
          )
    except UserError as e:
      raise UserError(f"{where}: {e}") from None
    yield where, {key: row[key] for key in keys}


def _counted(
  rows: Iterable[Any], count: Iterator[int], path: str
) -> Iterator[Any]:
  """The rows, each of which moves the count on; none at all is an error."""
  empty = True
  for row in rows:
    empty = False
    next(count)
    yield row
  if empty:
    name = "standard input" if path == "-" else path
    raise UserError(f"{name}: no rows, nothing to predict")


def _generated_lines(
  model,
  params,
  partitioner,
  rows,
  vocabulary,
  output_format,
  batch_size,
  max_input_length,
  max_output_length,
  told,
) -> Iterator[str]:
  """A language model's answer to every row, as lines of the output file."""
  predict = prediction(model, partitioner, max_output_length)
  header = True

  def encode(where, row):
    try:
      return row, _encode(
        vocabulary, row["inputs"], max_input_length, model.config, told
      )
    except UserError as e:
      raise UserError(f"{where}: {e}") from None

  encoded = itertools.starmap(encode, rows)
  for batch in row_batches.group(encoded, lambda x: len(x[1]), batch_size):
    tokens = [ids for _, ids in batch]
    size, length = row_batches.shape(list(map(len, tokens)), batch_size)
    size = partitioner.round_up(size)
    padded = np.full((size, length), model.config.pad_token_id, np.int32)
    for target, ids in zip(padded, tokens):
      target[: len(ids)] = ids
    placed = partitioner.to_devices({"encoder_input_tokens": padded}, 0, size)
    found = np.asarray(predict(params, placed))
    for (row, _), ids in zip(batch, found):
      row["prediction"] = vocabulary.decode(ids.tolist())
      yield _format(row, output_format, header)
      header = False


def _head_records(
  model,
  params,
  partitioner,
  dataset_cfg,
  path,
  vocabulary,
  batch_size,
  max_input_length,
  own,
  told,
) -> Iterator[predictions.Record]:
  """A head's prediction for every row of a task or an input."""
  if dataset_cfg is not None:
    pipeline.check_task(dataset_cfg, model.config)
    task, split = dataset_cfg.task(), dataset_cfg.split
    lengths = dataset_cfg.lengths() or {}
    max_input_length = max_input_length or lengths.get("inputs")
  else:
    head = model.config.head
    rows = lambda: _input_rows(path, own, told)
    if head.kind == "question_answering":
      rows = lambda: predictions.with_own_ids(_input_rows(path, own, told))
    split = seqio_source.ROWS
    if own is not None and features.label_feature(own) is not None:
      task = records.ask(own, rows)
    elif head.kind == "question_answering":
      if _is_text(path):
        raise UserError(
          "question answering needs INPUT = a .jsonl, .tsv or .csv file with"
          " columns question and context"
        )
      task = predictions.task_of_rows(head, rows, vocabulary)
    else:
      pairs = False
      if own is None and not _is_text(path):
        _, first = next(iter(sources.read_file(path)), ("", {}))
        pairs = "second" in first
      task = predictions.task_of_rows(
        head, lambda: _texts(rows(), own, pairs), vocabulary, pairs
      )
  if model.config.head.kind == "question_answering" and (
    max_input_length is not None and max_input_length < _SHORTEST_WINDOW
  ):
    raise UserError(
      f"MAX_INPUT_LENGTH = {max_input_length} has no room for a question and a"
      f" context; at least {_SHORTEST_WINDOW}"
    )
  return predictions.predict_task(
    model, params, partitioner, task, split, batch_size, max_input_length, told
  )


def _choose_format(output: str, output_format: str | None, head) -> str:
  if output_format is None:
    output_format = "tsv" if output.endswith(".tsv") else "jsonl"
  known = predictions.forms(head)
  if output_format not in known:
    what = "language model" if head is None else f"head of kind {head.kind}"
    raise UserError(
      f"OUTPUT_FORMAT = {output_format!r}: a {what} writes {', '.join(known)}"
    )
  return output_format


def _input_rows(
  path: str, own: seqio.Task | None, told: predictions.Told
) -> Iterator[sources.LocatedRow]:
  """The rows of an input; a line of text is the column that is asked about."""
  if not _is_text(path):
    for where, row in _rows_of_file(path, own):
      if told.index is not None:
        told.index.append(row.get("index"))
      yield where, row
    return
  where = "standard input" if path == "-" else path
  if path == "-":
    lines = files.lines_of(sys.stdin.buffer, where)
  else:
    lines = sources.read_lines(path, sources.split_suffix(path)[1])
  column = "inputs" if own is None else own.source.columns[0]
  for number, line in lines:
    if line.strip():
      yield f"{where}, row {number}", {column: line}
    else:
      told.blank += 1


def _task_rows(config: pipeline.DatasetConfig) -> Iterator[sources.LocatedRow]:
  task = config.task()
  for part in seqio.get_subtasks(task):
    place = f"task {part.name!r}, example"
    if isinstance(part.source, seqio_source.SeqioSource):
      examples = part.source.examples(config.split)
      for number, example in enumerate(examples, 1):
        keys = ("inputs", "targets")
        yield f"{place} {number}", {key: example[key] for key in keys}
      continue
    # A task of the user's own: its text as SeqIO keeps it.
    dataset = part.get_dataset(
      sequence_length=config.task_feature_lengths,
      split=config.split,
      shuffle=False,
    )
    for number, example in enumerate(dataset.as_numpy_iterator(), 1):
      yield (
        f"{place} {number}",
        {
          key: pipeline.decode(part.output_features[key], example[key])
          for key in ("inputs", "targets")
        },
      )


def _encode(
  vocabulary,
  text: str,
  max_length: int | None,
  config,
  told: predictions.Told,
) -> list[int]:
  ids = vocabulary.encode(text)
  if max_length is None and len(ids) >= infer_settings.MOST_TOKENS:
    raise UserError(
      f"{files.shown(text)} has {len(ids):,} tokens, and at most"
      f" {infer_settings.MOST_TOKENS:,} are predicted: MAX_INPUT_LENGTH cuts"
      " longer inputs"
    )
  told.add_tokens(ids, vocabulary.unk_id)
  if max_length is not None and len(ids) >= max_length:
    ids = ids[: max_length - 1]
    told.cut += 1
  ids = [*ids, config.eos_token_id]
  if max(ids) >= config.vocab_size:
    raise UserError(
      f"{text[:40]!r} holds token id {max(ids)}, beyond the model's embedding"
      f" (vocab_size = {config.vocab_size}); is the vocabulary the model's?"
    )
  return ids


def _format(row: dict[str, str], output_format: str, header: bool) -> str:
  if output_format == "jsonl":
    return json.dumps(row, ensure_ascii=False) + "\n"
  lines = ["\t".join(row)] if header else []
  cells = "\t".join(map(predictions.cell, row.values()))
  return "\n".join([*lines, cells]) + "\n"
