"""The rows that are predicted: of a file, of standard input, of a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import sys
from typing import Any

import seqio

from fat5_jax import console
from fat5_jax.data import (
  features,
  files,
  pipeline,
  records,
  seqio_source,
  sources,
)
from fat5_jax.errors import UserError
from fat5_jax.inference import own_task, settings


@dataclasses.dataclass
class Told:
  """What a person should know of the rows that were predicted."""

  blank: int = 0
  cut: int = 0
  tokens: int = 0
  unknown: int = 0
  # Sums of what was scored: log-likelihood, and tokens of targets.
  likelihood: float = 0.0
  targets: int = 0
  # Whether there were rows of a command that was cut short before them.
  is_part: bool = False
  # Whether those were answers to choose from.
  ranked: bool = False
  # Column `index` of a file's rows, where somebody wants it; None where a row
  # has none.
  index: list[Any] | None = None

  def forget(self) -> None:
    """Counts anew; rows were only counted."""
    self.blank = self.cut = self.tokens = self.unknown = 0
    if self.index is not None:
      self.index.clear()

  def add_tokens(self, ids: Sequence[int], unknown_id: int | None) -> None:
    self.tokens += len(ids)
    self.unknown += sum(int(i) == unknown_id for i in ids)

  def describe(self, max_input_length: int | None) -> list[str]:
    """A line for each that is not 0."""
    found = []
    if self.blank:
      found.append(f"{self.blank:,} blank lines left out")
    if self.cut:
      found.append(
        f"{self.cut:,} inputs cut to MAX_INPUT_LENGTH = {max_input_length}"
      )
    if self.unknown:
      found.append(
        f"{self.unknown:,} of {self.tokens:,} tokens are unknown to the"
        " vocabulary"
      )
    if self.targets and not self.ranked:
      mean = self.likelihood / self.targets
      found.append(
        f"log-likelihood {mean:.4f} a token, perplexity"
        f" {math.exp(min(-mean, 700)):.4g}, of {self.targets:,} tokens"
        + (" (of the rows that were not there already)" if self.is_part else "")
      )
    return found


def check_tokens(ids: Sequence[int], text: str, vocab_size: int) -> None:
  """Raises UserError for a row that no model, or not this one, can read."""
  if len(ids) > settings.MOST_TOKENS:
    raise UserError(
      f"{files.shown(text)} has {len(ids):,} tokens, and at most"
      f" {settings.MOST_TOKENS:,} are predicted: MAX_INPUT_LENGTH cuts longer"
      " inputs"
    )
  if max(ids) >= vocab_size:
    raise UserError(
      f"{text[:40]!r} holds token id {max(ids)}, beyond the model's embedding"
      f" (vocab_size = {vocab_size}); is the vocabulary the model's?"
    )


def task_of_run(source, vocabulary, path: str) -> tuple[Any, int | None]:
  """(the task that a run folder tells, the length of its windows).

  None where it tells none, and for rows that hold whole inputs.
  """
  record = own_task.record_of(source)
  task, window = recorded_task(record, vocabulary)
  if task is None:
    return None, None
  record = records.question_of(record)
  task.source.read_like = record["source"].get("arguments", {})
  columns = task.source.columns
  if is_text(path):
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
  return task, window


def recorded_task(
  record: Mapping[str, Any] | None, vocabulary: seqio.Vocabulary
) -> tuple[Any, int | None]:
  """(the task of a record, without its data; the length of its windows)."""
  if record is None:
    return None, None
  question = records.question_of(record)
  if question is None:
    console.say(
      f"the run mixed {files.listed(record['mixture'])}: inputs are taken as"
      " they are, written as these tasks write them"
    )
    return None, None
  record = question
  if "factory" not in record:
    console.say(
      f"task {record['name']} of the run folder is registered by code, so"
      " inputs are taken as they are"
    )
    return None, None
  task = records.build(record, vocabulary)
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


def is_text(path: str) -> bool:
  return path == "-" or sources.split_suffix(path)[0] in ("", ".txt")


def texts(
  rows: Iterable[sources.LocatedRow],
  own: seqio.Task | None,
  pairs: bool = False,
  answered: bool = False,
) -> Iterator[sources.LocatedRow]:
  """What a model is asked about each row: `inputs`, and `second` of `pairs`;
  where they are `answered`, `targets` too."""
  keys = ("inputs", *["second"] * pairs, *["targets"] * answered)
  for where, row in rows:
    try:
      if own is not None and answered:
        found = own.source.answered(row)
        yield where, {key: found[key] for key in keys}
        continue
      if own is not None:
        yield where, {"inputs": own.source.question(row)["inputs"]}
        continue
      for key in keys:
        text = sources.column(row, key)
        if not isinstance(text, str) or not text.strip():
          is_empty = isinstance(text, str)
          raise UserError(
            f"column {key!r} is"
            + (" empty" if is_empty else f" {sources.shown(text)}, not a text")
          )
    except UserError as e:
      raise UserError(f"{where}: {e}") from None
    yield where, {key: row[key] for key in keys}


def has_pairs(path: str) -> bool:
  """Whether a file has a column `second`: pairs of texts."""
  if is_text(path):
    return False
  _, first = next(iter(sources.read_file(path)), ("", {}))
  return "second" in first


def of_input(
  path: str, own: seqio.Task | None, told: Told
) -> Iterator[sources.LocatedRow]:
  """The rows of an input; a line of text is the column that is asked about."""
  if not is_text(path):
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


def of_task(config: pipeline.DatasetConfig) -> Iterator[sources.LocatedRow]:
  task = config.task()
  for part in seqio.get_subtasks(task):
    if config.split not in part.splits:
      continue
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
