"""Heads: from rows, or a task, to a record for each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import itertools
from typing import Any

import seqio

from fat5_jax.data import examples as data_examples
from fat5_jax.data import (
  features,
  head_tasks,
  labels,
  metrics,
  records,
  seqio_source,
  sources,
)
from fat5_jax.data.preprocessors import as_text
from fat5_jax.data.seqio_source import ROWS
from fat5_jax.errors import UserError
from fat5_jax.inference.predictor import Predictor
from fat5_jax.inference.rows import Told, check_tokens, texts
from fat5_jax.inference.thresholds import Decisions
from fat5_jax.inference.writers import Record
from fat5_jax.models.config import HeadConfig


def describe(value: Any, head: HeadConfig) -> str:
  """A target or a prediction of an evaluation, for a person."""
  names = head.label_names
  if isinstance(value, dict):
    if "tags" in value:
      return " ".join(value["tags"])
    if "value" in value:
      return describe(value["value"], head)
    answers = [value["text"]] if "text" in value else value["answers"]
    return str(answers[0] if answers else "(no answer)")
  if isinstance(value, list) and names:
    return ", ".join(n for n, on in zip(names, value) if on) or "(none)"
  if isinstance(value, int) and names:
    return names[value] if value >= 0 else "(no label)"
  return str(value)


def task_of_rows(
  head: HeadConfig,
  rows: Callable[[], Iterable[sources.LocatedRow]],
  vocabulary: seqio.Vocabulary,
  pairs: bool = False,
) -> seqio.Task:
  """A task (its split is `ROWS`) of rows without labels, for a head to predict.

  Rows have `inputs`, where they are `pairs` also `second`; for spans `id`,
  `question` and `context`; for tags words in `inputs`, a list or apart by
  spaces.
  """
  name = "predict_rows"

  def source(make):
    return seqio_source.Located(
      lambda: ((where, make(row)) for where, row in rows())
    )

  if head.kind == "question_answering":
    make = lambda row: row | {"answers": []}
    return head_tasks.spans(source(make), vocabulary, name)
  if head.kind == "token_classification":

    def tagged(row):
      words = labels.items(row, "inputs")
      return {"words": words, "tags": [0] * len(words)}

    names = head.label_names or tuple(map(str, range(head.num_labels)))
    return head_tasks.tagging(
      source(tagged), vocabulary, tag_names=names, name=name
    )
  unknown: Any = -1
  if head.problem_type == "multi_label_classification":
    unknown = []
  elif head.problem_type == "regression":
    unknown = [0] * head.num_labels if head.num_labels > 1 else 0

  def classed(row):
    return {**row, "label": unknown}

  inputs = ["{inputs}", "{second}"] if pairs else "{inputs}"
  return head_tasks.classification(
    source(classed),
    inputs,
    "label",
    vocabulary,
    head.label_names or tuple(map(str, range(head.num_labels))),
    head.problem_type,
    name,
    num_labels=head.num_labels,
  )


def asked(
  head: HeadConfig,
  own: seqio.Task | None,
  read: Callable[[], Iterable[sources.LocatedRow]],
  vocabulary: seqio.Vocabulary,
  pairs: bool = False,
) -> seqio.Task:
  """The task (its split is `ROWS`) that asks a head about rows.

  In the words of the run's `own` task where that is one for the head; else rows
  are those of `task_of_rows`.
  """
  is_spans = head.kind == "question_answering"
  rows = (lambda: with_own_ids(read())) if is_spans else read
  if own is not None and features.label_feature(own) is not None:
    return records.ask(own, rows)
  if is_spans:
    return task_of_rows(head, rows, vocabulary)
  return task_of_rows(
    head, lambda: texts(rows(), own, pairs), vocabulary, pairs
  )


def with_own_ids(
  rows: Iterable[sources.LocatedRow],
) -> Iterator[sources.LocatedRow]:
  """The rows, each with an `id`: its own, or its number.

  Raises:
    UserError: for one that an earlier row has: their answers would be one.
  """
  seen: set[str] = set()
  for number, (where, row) in enumerate(rows):
    name = number if row.get("id") is None else row["id"]
    if str(name) in seen:
      raise UserError(
        f"{where}: an earlier row has id {sources.shown(name)} too; give each"
        " its own, or leave the column out"
      )
    seen.add(str(name))
    yield where, {**row, "id": name}


def predict_task(
  predictor: Predictor,
  params: Any,
  task: seqio.Task,
  split: str,
  max_input_length: int | None,
  told: Told,
  part: slice = slice(None),
  decisions: Decisions = Decisions(),
) -> Iterator[Record]:
  """A record for every row of a task, in order.

  A sentence or context that came in several windows is one record again. `told`
  counts what a person should know. Of the rows, those of `part` are predicted.
  `decisions` are where labels are told apart, and answers from none.
  """
  lengths = None
  if max_input_length is not None:
    lengths = features.complete_lengths({"inputs": max_input_length}, task)
  config = predictor.model.config
  unknown = task.output_features["inputs"].vocabulary.unk_id
  cuts = features.Cuts()

  def examples():
    for example in data_examples.cut_to(task, split, lengths, cuts):
      ids = example["inputs"].tolist()
      check_tokens(ids, _question(example), config.vocab_size)
      told.add_tokens(ids, unknown)
      yield example

  def asked_about():
    """The windows of the rows of `part`."""
    grouped = itertools.groupby(examples(), _row_of(config.head))
    for _, windows in itertools.islice(grouped, part.start, part.stop):
      yield from windows

  windows = predictor(params, asked_about(), part.start or 0)
  with seqio_source.reraise():
    if config.head.kind == "embedding":
      for example, values in windows:
        text = as_text(example["inputs_pretokenized"])
        yield {"inputs": text, "embedding": values.tolist()}
    else:
      yield from _records(windows, task, config.head, split != ROWS, decisions)
  told.cut += cuts.by_feature["inputs"]


def _records(
  windows, task, head: HeadConfig, with_targets: bool, decisions: Decisions
) -> Iterator[Record]:
  postprocess = task.postprocess_fn
  has_tags = head.kind == "token_classification"
  row_of = _row_of(head)

  def read(window):
    """(prediction, target) of a window."""
    example, values = window
    classes = values[:, 0] if has_tags else decisions.of_labels(values)
    found = postprocess(classes, example=example, is_target=False)
    if isinstance(found, dict) and "value" in found:
      found = found["value"]  # Of a group, which only metrics want.
    if has_tags:
      found["probabilities"] = _of_words(values[:, 1], example["targets"])
    elif head.kind == "question_answering":
      found["probability"] = round(float(values[3]), 6)
    wanted = postprocess(example["targets"], example=example, is_target=True)
    return found, wanted

  for _, parts in itertools.groupby(windows, lambda found: row_of(found[0])):
    example, values = first = next(parts)
    # One window after the other: each holds the whole text.
    found, wanted = read(first)
    targets: Any = describe(wanted, head)
    if head.kind == "question_answering":
      for other, _ in map(read, parts):
        found = metrics.best_span(found, other)
      found = metrics.decide_answer(found, decisions.no_answer)
      # What NO_ANSWER_THRESHOLD is held against.
      found["no_answer"] = round(found["no_answer"] - found["score"], 6)
      record = {**found, "question": _question(example)}
      targets = wanted["answers"]
    elif head.kind == "token_classification":
      tags, targets = found["tags"], wanted["tags"]
      probabilities = found["probabilities"]
      for more, wanted in map(read, parts):
        tags, targets = tags + more["tags"], targets + wanted["tags"]
        probabilities = probabilities + more["probabilities"]
      words = [as_text(word) for word in example["words"]]
      record = {"words": words, "tags": tags, "probabilities": probabilities}
    else:
      text = as_text(example["inputs_pretokenized"])
      record = {"inputs": text} | _labels(found, values, head)
    yield record | ({"targets": targets} if with_targets else {})


def _row_of(head: HeadConfig) -> Callable[[Any], Any]:
  """What tells the windows of a row from those of the next."""
  key = {"question_answering": "id", "token_classification": "sentence"}
  name = key.get(head.kind)
  if name is not None:
    return lambda window: window[name]
  # A row of classes is one window.
  numbers = itertools.count()
  return lambda window: next(numbers)


def _of_words(values, targets) -> list[float]:
  """The values of the tokens that words begin with."""
  return [
    round(float(value), 6)
    for value, label in zip(values, targets)
    if label != features.IGNORED
  ]


def _question(example) -> str:
  """The first of a row's texts."""
  text = as_text(example["inputs_pretokenized"])
  return text.split(" </s> ", 1)[0]


def _labels(found, values, head: HeadConfig) -> Record:
  if head.problem_type == "regression":
    return {"prediction": found}
  by_name = probabilities(values, head)
  names = [*by_name]
  if head.problem_type == "multi_label_classification":
    return {
      "prediction": [name for name, on in zip(names, found) if on],
      "probabilities": by_name,
    }
  return {
    "prediction": names[found],
    "label": found,
    "probability": by_name[names[found]],
    "probabilities": by_name,
  }


def probabilities(values: Any, head: HeadConfig) -> dict[str, float]:
  """Of each class by its name, from what a head says of a sequence; none of a
  regression."""
  if head.problem_type == "regression":
    return {}
  if head.problem_type == "single_label_classification":
    values = values[1:]
  names = head.label_names or tuple(map(str, range(head.num_labels)))
  return {name: round(float(v), 6) for name, v in zip(names, values)}
