"""Predicts lines or a task: `python -m fat5_jax.infer --gin.MODEL_DIR=...`."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax import cli

  raise SystemExit(cli.main("infer"))

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from typing import Any

import jax
import numpy as np
import seqio

from fat5_jax import console, hosts, predictions
from fat5_jax.data import pipeline, sources
from fat5_jax.errors import UserError
from fat5_jax.eval import load_model
from fat5_jax.program import prediction
from fat5_jax.sharding import Partitioner


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
  model: Any = None,
  vocabulary: seqio.Vocabulary | None = None,
  partitioner: Partitioner | None = None,
  dry_run: bool = False,
) -> None:
  """Writes a prediction for every line, or every example of a task.

  Args:
    checkpoint_path: run folder, one checkpoint, or HF folder.
    input: a text file with one input a line, a .tsv, .csv or .jsonl file with
      a column `inputs` (a classifier takes a column `second` for pairs,
      question answering columns `question` and `context`), or "-" for lines on
      standard input; None predicts the task of `dataset_cfg`, or reads standard
      input where there is none. A tagger's words are apart by spaces.
    output: a file, or "-" for standard output.
    output_format: "jsonl" or "tsv"; by default what the ending of `output`
      says, else JSONL. Keys are inputs, prediction, and targets for a task.
      Heads also write "glue" (a submission), "squad" and "conll".
    dataset_cfg: the task and split to predict, where there is no input.
    batch_size: rows a batch.
    max_input_length: longer inputs are cut to this many tokens; None cuts none.
    max_output_length: most tokens of a prediction.
    model: overrides the checkpoint's own T5Config (same architecture).
    vocabulary: overrides the checkpoint's own.
    partitioner: the mesh; None puts a part of each batch on every device. Among
      several hosts all read the input, host 0 writes.
    dry_run: stop once everything is built.

  Raises:
    UserError: for a mistake in the checkpoint, the input or the task.
  """
  partitioner = partitioner or Partitioner()
  if input == "-" or (input is None and dataset_cfg is None):
    if hosts.everyone.count > 1:
      raise UserError(
        "standard input reaches one host only: set INPUT to a file that all"
        f" {hosts.everyone.count} hosts see"
      )
  model, params, own_vocabulary, source = load_model(
    checkpoint_path, model, partitioner
  )
  vocabulary = vocabulary or own_vocabulary
  if vocabulary is None:
    raise UserError(f"{source.path} brings no vocabulary; set INFER_VOCABULARY")
  head = model.config.head
  output_format = _choose_format(output, output_format, head)
  from_task = input is None and dataset_cfg is not None
  if from_task and dataset_cfg.vocabulary is None:
    dataset_cfg = dataclasses.replace(dataset_cfg, vocabulary=vocabulary)
  count = itertools.count()
  if model.config.is_language_model:
    rows = _task_rows(dataset_cfg) if from_task else _input_rows(input or "-")
    lines = _generated_lines(
      model,
      params,
      partitioner,
      _counted(rows, count),
      vocabulary,
      output_format,
      batch_size,
      max_input_length,
      max_output_length,
    )
  else:
    records = _head_records(
      model,
      params,
      partitioner,
      dataset_cfg if from_task else None,
      input or "-",
      vocabulary,
      batch_size,
      max_input_length,
    )
    lines = predictions.write(_counted(records, count), output_format, head)
  if dry_run:
    console.say(f"dry run: {source.path} and its vocabulary are fine")
    return
  if (input or "-") == "-" and dataset_cfg is None and sys.stdin.isatty():
    console.say("one input a line, end with Ctrl-D:")
  with _open_output(output) as file:
    for line in lines:
      file.write(line)
      file.flush()
  if output != "-":
    console.say(f"{next(count)} predictions in {output}")


def _counted(rows: Iterable[Any], count: Iterator[int]) -> Iterator[Any]:
  """The rows, each of which moves the count on."""
  for row in rows:
    next(count)
    yield row


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
) -> Iterator[str]:
  """A language model's answer to every row, as lines of the output file."""
  predict = prediction(model, partitioner, max_output_length)
  size = partitioner.round_up(batch_size)
  header = True
  for batch in _batches(rows, batch_size):
    tokens = [
      _encode(vocabulary, row["inputs"], max_input_length, model.config)
      for row in batch
    ]
    padded = _pad(tokens, size, model.config.pad_token_id)
    placed = partitioner.to_devices({"encoder_input_tokens": padded}, 0, size)
    found = np.asarray(predict(params, placed))
    for row, ids in zip(batch, found):
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
) -> Iterator[predictions.Record]:
  """A head's prediction for every row of a task or an input."""
  if dataset_cfg is not None:
    pipeline.check_task(dataset_cfg, model.config)
    task, split = dataset_cfg.task(), dataset_cfg.split
    lengths = dataset_cfg.lengths() or {}
    max_input_length = max_input_length or lengths.get("inputs")
  else:
    head = model.config.head
    pairs = False
    if os.path.splitext(path)[1] not in ("", ".txt"):
      _, first = next(sources.read_file(path), ("", {}))
      pairs = "second" in first
    elif head.kind == "question_answering":
      raise UserError(
        "question answering needs INPUT = a .jsonl, .tsv or .csv file with"
        " columns question and context"
      )
    task = predictions.task_of_rows(
      head, lambda: _input_rows(path, head.kind), vocabulary, pairs
    )
    split = predictions.ROWS
  return predictions.predict_task(
    model, params, partitioner, task, split, batch_size, max_input_length
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


def _input_rows(path: str, kind: str = "") -> Iterator[dict[str, str]]:
  if path == "-":
    located = (
      (f"standard input, row {n}", {"text": line.rstrip("\r\n")})
      for n, line in enumerate(sys.stdin, 1)
    )
  elif os.path.splitext(path)[1] in ("", ".txt"):
    if not os.path.exists(path):
      raise UserError(f"{path}: no such input file")
    located = (
      (f"{path}, row {n}", {"text": line})
      for n, line in sources.read_lines(path, open)
    )
  else:
    located = sources.read_file(path)

  def rows():
    for where, row in located:
      if kind == "question_answering":
        yield row
        continue
      try:
        text = row["text"] if "text" in row else sources.column(row, "inputs")
      except UserError as e:
        raise UserError(f"{where}: {e}") from None
      if not text.strip():
        raise UserError(f"{where}: empty")
      second = {"second": row["second"]} if kind and "second" in row else {}
      yield {"inputs": text} | second

  return rows()


def _task_rows(config: pipeline.DatasetConfig) -> Iterator[dict[str, str]]:
  task = config.task()
  for part in seqio.get_subtasks(task):
    if isinstance(part.source, sources.SeqioSource):
      for example in part.source.examples(config.split):
        yield {k: example[k] for k in ("inputs", "targets")}
      continue
    # A task of the user's own: its text as SeqIO keeps it.
    dataset = part.get_dataset(
      sequence_length=config.task_feature_lengths,
      split=config.split,
      shuffle=False,
    )
    for example in dataset.as_numpy_iterator():
      yield {
        key: pipeline.decode(part.output_features[key], example[key])
        for key in ("inputs", "targets")
      }


def _batches(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
  rows = iter(rows)
  while batch := list(itertools.islice(rows, size)):
    yield batch


def _encode(vocabulary, text: str, max_length: int | None, config) -> list[int]:
  ids = vocabulary.encode(text)
  if max_length is not None:
    ids = ids[: max_length - 1]
  ids = [*ids, config.eos_token_id]
  if max(ids) >= config.vocab_size:
    raise UserError(
      f"{text[:40]!r} holds token id {max(ids)}, beyond the model's embedding"
      f" (vocab_size = {config.vocab_size}); is the vocabulary the model's?"
    )
  return ids


def _pad(tokens: list[list[int]], rows: int, pad_id: int) -> np.ndarray:
  longest = max(map(len, tokens))
  length = -(-longest // predictions.LENGTH_STEP) * predictions.LENGTH_STEP
  padded = np.full((rows, length), pad_id, np.int32)
  for row, ids in zip(padded, tokens):
    row[: len(ids)] = ids
  return padded


def _format(row: dict[str, str], output_format: str, header: bool) -> str:
  if output_format == "jsonl":
    return json.dumps(row, ensure_ascii=False) + "\n"
  clean = lambda text: text.replace("\t", " ").replace("\n", " ")
  lines = ["\t".join(row)] if header else []
  return "\n".join([*lines, "\t".join(map(clean, row.values()))]) + "\n"


@contextlib.contextmanager
def _open_output(path: str):
  """The output file, complete or not there; or standard output."""
  if jax.process_index():
    path = os.devnull
  if path == "-":
    yield sys.stdout
    return
  if path == os.devnull:
    with open(path, "w", encoding="utf-8") as file:
      yield file
    return
  partial = f"{path}.partial"
  try:
    file = open(partial, "w", encoding="utf-8")
  except OSError as e:
    raise UserError(f"OUTPUT {path} cannot be written: {e.strerror}") from None
  try:
    with file:
      yield file
    os.replace(partial, path)
  finally:
    if os.path.exists(partial):
      os.remove(partial)
