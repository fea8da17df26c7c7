"""The rows that Python trains on, as the task that gin would name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
from typing import Any

import numpy as np
import seqio

from fat5_jax.data import (
  conll,
  examples,
  head_tasks,
  memory,
  preprocessors,
  sources,
  squad,
  tasks,
)
from fat5_jax.data.files import listed, shown
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

# A length that nobody gives is that of the longest text, at most this.
MOST_TOKENS = 512
# Files of tagged words that have a row a sentence; others are CoNLL's.
_ROWS_OF_WORDS = (".jsonl", ".json", ".parquet")


def is_task(rows: Any) -> bool:
  return isinstance(rows, (seqio.Task, seqio.Mixture))


def _is_path(rows: Any) -> bool:
  many = isinstance(rows, (list, tuple)) and len(rows) > 0
  parts = rows if many else [rows]
  return all(isinstance(part, (str, os.PathLike)) for part in parts)


def _paths(rows: Any) -> list[str]:
  parts = rows if isinstance(rows, (list, tuple)) else [rows]
  return list(map(os.fspath, parts))


def _source(rows: Any, validation: Any, kind: str) -> Any:
  """A source with the splits train and, where there is any, validation."""
  given = {"train": (rows, "rows"), "validation": (validation, "validation")}
  given = {split: x for split, x in given.items() if x[0] is not None}
  paths = {s: _paths(x) for s, (x, _) in given.items() if _is_path(x)}
  files = _files(kind, paths) if paths else None
  if len(paths) == len(given):
    return files
  parts = [] if files is None else [files]
  for split, (value, name) in given.items():
    if split not in paths:
      if is_task(value):
        raise UserError(
          f"{name} is a SeqIO task, and must be rows, as those of the other"
          " split are; of a task, validation is the name of a split"
        )
      parts.append(memory.Rows(value, split, name))
  return memory.Joined(parts)


def _files(kind: str, paths: dict[str, list[str]]) -> Any:
  if kind == "question_answering":
    return squad.SquadFiles(paths)
  if kind == "token_classification":
    endings = {sources.split_suffix(p)[0] for ps in paths.values() for p in ps}
    if not endings <= set(_ROWS_OF_WORDS):
      return conll.Conll(paths)
  return sources.Files(paths)


def task_of(
  rows: Any,
  validation: Any,
  config: T5Config,
  vocabulary: seqio.Vocabulary,
  inputs: Any = None,
  targets: Any = None,
  metrics: Sequence[str | Callable[..., Any]] | None = None,
  skip_bad_rows: bool = False,
) -> tuple[seqio.Task | seqio.Mixture, str | None]:
  """(the task of a model's kind, its split to evaluate on or None).

  Arguments are those of Model.fine_tune.

  Raises:
    UserError: for what are no rows, and columns or metrics that do not fit.
  """
  if is_task(rows):
    given = {"inputs": inputs, "targets": targets, "metrics": metrics}
    for name, value in given.items():
      if value is not None:
        raise UserError(f"{name} is the task's own: leave it out")
    if skip_bad_rows:
      raise UserError("skip_bad_rows is the task's own: leave it out")
    if not isinstance(validation, (str, type(None))):
      raise UserError(
        f"validation = {shown(validation)} must be the name of a split of task"
        f" {rows.name!r}: {listed(rows.splits)}"
      )
    return rows, validation
  if rows is None:
    raise UserError("rows is None: there is nothing to train on")
  metrics = _metrics(metrics)
  if not isinstance(skip_bad_rows, bool):
    raise UserError(f"skip_bad_rows = {skip_bad_rows!r} must be True or False")
  kind = "language_model" if config.head is None else config.head.kind
  source = _source(rows, validation, kind)
  split = None if validation is None else "validation"
  if kind == "question_answering":
    if inputs is not None or targets is not None or metrics is not None:
      raise UserError(
        "inputs, targets and metrics: an answer's columns are id, question,"
        " context and answers, its metrics SQuAD's; leave all three out"
      )
    source = _numbered(source)
    task = head_tasks.spans(source, vocabulary, skip_bad_rows=skip_bad_rows)
    return task, split
  more: dict[str, Any] = {"skip_bad_rows": skip_bad_rows}
  if metrics is not None:
    more["metrics"] = metrics
  if kind == "token_classification":
    return head_tasks.tagging(
      source,
      vocabulary,
      words=_column(inputs or "words", "inputs"),
      tags=_column(targets or "tags", "targets"),
      tag_names=config.head.label_names or None,
      **more,
    ), split
  for name, value in (("inputs", inputs), ("targets", targets)):
    if value is None:
      raise UserError(f"{name} is missing: {_columns(source)}")
  if kind in ("language_model", "embedding"):
    if kind == "embedding":
      if metrics is not None:
        raise UserError("metrics: an embedding has none but its loss")
      more["name"] = "pairs"
    return tasks.text_to_text(
      source,
      _template(inputs, "inputs"),
      _template(targets, "targets"),
      vocabulary,
      **more,
    ), split
  pair = isinstance(inputs, (list, tuple))
  templates = [_template(x, "inputs") for x in (inputs if pair else [inputs])]
  label = (
    [_column(x, "targets") for x in targets]
    if isinstance(targets, (list, tuple))
    else _column(targets, "targets")
  )
  return head_tasks.classification(
    source,
    templates if pair else templates[0],
    label,
    vocabulary,
    config.head.label_names,
    config.head.problem_type,
    num_labels=config.head.num_labels,
    **more,
  ), split


def _metrics(metrics: Any) -> Any:
  if metrics is None:
    return None
  if isinstance(metrics, str) or callable(metrics):
    raise UserError(f"metrics is a list: [{shown(metrics)}]")
  for metric in metrics:
    if not isinstance(metric, str) and not callable(metric):
      raise UserError(
        f"metrics holds {shown(metric)}: give names, or functions of (targets,"
        " predictions) that return {name: value}"
      )
  return tuple(metrics)


def _columns(source: Any) -> str:
  """What a caller can name."""
  _, first = next(iter(source.rows("train")), ("", {}))
  return (
    "name a column, or write a template, 'summarize: {text}'. Columns:"
    f" {listed(first)}"
  )


def _template(text: Any, name: str) -> str:
  """A template; a text without fields is the name of a column."""
  if not isinstance(text, str) or not text.strip():
    raise UserError(
      f"{name} = {shown(text)} must be a column's name, or a template:"
      " 'summarize: {text}'"
    )
  return text if preprocessors.fields(text) else f"{{{text}}}"


def _column(text: Any, name: str) -> str:
  """The name of a column, also written as a template of it alone."""
  template = _template(text, name)
  found = preprocessors.fields(template)
  if template != f"{{{found[0]}}}":
    raise UserError(
      f"{name} = {shown(text)}: labels and words are a column each; give its"
      " name"
    )
  return found[0]


class _Numbered:
  """Questions, each with an `id`: its own, or its number."""

  def __init__(self, source: Any):
    self._source = source
    self.splits = source.splits
    for name in ("record", "describe", "size_bytes", "num_rows"):
      setattr(self, name, getattr(source, name))

  def rows(self, split: str):
    for number, (where, row) in enumerate(self._source.rows(split), 1):
      has_id = row.get("id") is not None
      yield where, row if has_id else {**row, "id": f"{split}-{number}"}


def _numbered(source: Any) -> Any:
  return source if isinstance(source, squad.SquadFiles) else _Numbered(source)


def longest(task: seqio.Task | seqio.Mixture) -> tuple[int, dict[str, int]]:
  """(training rows, the most tokens of each feature), in one pass.

  Raises:
    UserError: for a mixture and a stream, which have no end.
  """
  rows = getattr(getattr(task, "source", None), "rows_source", None)
  if getattr(rows, "is_stream", False):
    raise UserError(
      f"{task.name!r} streams, and may have no end: give steps, batch_size,"
      " max_input_tokens and max_target_tokens"
    )
  if isinstance(task, seqio.Mixture):
    raise UserError(
      f"{task.name!r} is a mixture, without an end: give steps, batch_size,"
      " max_input_tokens and max_target_tokens"
    )
  count, most = 0, {"inputs": 1, "targets": 1}
  for example in examples.whole(task, "train"):
    count += 1
    for name in most:
      most[name] = max(most[name], int(np.size(example[name])))
  return count, most
