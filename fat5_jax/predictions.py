"""Predictions of heads: from rows or a task to records, and those to files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import seqio
import tensorflow_datasets as tfds

from fat5_jax import infer_settings, row_batches
from fat5_jax.data import (
  conll,
  features,
  head_tasks,
  seqio_source,
  sources,
)
from fat5_jax.data.seqio_source import ROWS
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig
from fat5_jax.program import prediction
from fat5_jax.sharding import Partitioner

Record = dict[str, Any]


@dataclasses.dataclass
class Told:
  """What a person should know of the rows that were predicted."""

  blank: int = 0
  cut: int = 0
  tokens: int = 0
  unknown: int = 0
  # Column `index` of a file's rows, where somebody wants it; None where a row
  # has none.
  index: list[Any] | None = None

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
    return found


def describe(value: Any, head: HeadConfig) -> str:
  """A target or a prediction of an evaluation, for a person."""
  names = head.label_names
  if isinstance(value, dict):
    if "tags" in value:
      return " ".join(value["tags"])
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
  `question` and `context`; for tags words apart by spaces in `inputs`.
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
      words = sources.column(row, "inputs").split()
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
  model,
  params: Any,
  partitioner: Partitioner,
  task: seqio.Task,
  split: str,
  batch_size: int,
  max_input_length: int | None,
  told: Told | None = None,
) -> Iterator[Record]:
  """A record for every row of a task, in order.

  A sentence or context that came in several windows is one record again. `told`
  counts what a person should know.
  """
  lengths = None
  if max_input_length is not None:
    lengths = features.complete_lengths({"inputs": max_input_length}, task)
  predict = prediction(model, partitioner, None)
  head = model.config.head
  unknown = task.output_features["inputs"].vocabulary.unk_id

  def windows():
    examples = tfds.as_numpy(task.get_dataset(lengths, split, shuffle=False))
    size = lambda example: len(example["inputs"])
    for batch in row_batches.group(examples, size, batch_size):
      rows, length = row_batches.shape(list(map(size, batch)), batch_size)
      rows = partitioner.round_up(rows)
      placed = partitioner.to_devices(_arrays(batch, rows, length), 0, rows)
      yield from zip(batch, np.asarray(predict(params, placed)))

  def _arrays(batch, rows, length):
    longest = max(len(example["inputs"]) for example in batch)
    if longest > infer_settings.MOST_TOKENS:
      text = next(x for x in batch if len(x["inputs"]) == longest)
      raise UserError(
        f"{sources.shown(_question(text))} has {longest:,} tokens, and at most"
        f" {infer_settings.MOST_TOKENS:,} are predicted: MAX_INPUT_LENGTH cuts"
        " longer inputs"
      )
    keys = ["inputs"] + ["answerable"] * (head.kind == "question_answering")
    fill = {"inputs": model.config.pad_token_id, "answerable": 0}
    arrays = {key: np.full((rows, length), fill[key], np.int32) for key in keys}
    for key, array in arrays.items():
      for row, example in zip(array, batch):
        row[: len(example[key])] = example[key]
    if told is not None:
      for example in batch:
        told.add_tokens(example["inputs"], unknown)
    largest = int(arrays["inputs"].max())
    if largest >= model.config.vocab_size:
      raise UserError(
        f"an input holds token id {largest}, beyond the model's embedding"
        f" (vocab_size = {model.config.vocab_size}); is the vocabulary the"
        " model's?"
      )
    names = {"inputs": "encoder_input_tokens"}
    return {names.get(key, key): array for key, array in arrays.items()}

  with seqio_source.reraise():
    if head.kind == "embedding":
      for example, values in windows():
        text = example["inputs_pretokenized"].decode("utf-8")
        yield {"inputs": text, "embedding": values.tolist()}
    else:
      yield from _records(windows(), task, head, split != ROWS)
  if told is not None:
    cuts = features.cuts_of(task, lengths).values()
    told.cut += sum(cut.by_feature["inputs"] for cut in cuts)


def _records(
  windows, task, head: HeadConfig, with_targets: bool
) -> Iterator[Record]:
  postprocess = task.postprocess_fn
  key = {"question_answering": "id", "token_classification": "sentence"}
  numbers = itertools.count()

  def group(window):
    # A row of classes is a group of its own.
    name = key.get(head.kind)
    return next(numbers) if name is None else window[0][name]

  def read(window):
    """(prediction, target) of a window."""
    example, values = window
    return (
      postprocess(values, example=example, is_target=False),
      postprocess(example["targets"], example=example, is_target=True),
    )

  for _, parts in itertools.groupby(windows, group):
    example, values = first = next(parts)
    # One window after the other: each holds the whole text.
    found, wanted = read(first)
    targets: Any = describe(wanted, head)
    if head.kind == "question_answering":
      for other, _ in map(read, parts):
        found = max(found, other, key=lambda part: part["score"])
      record = {**found, "question": _question(example)}
      targets = wanted["answers"]
    elif head.kind == "token_classification":
      tags, targets = found["tags"], wanted["tags"]
      for more, wanted in map(read, parts):
        tags, targets = tags + more["tags"], targets + wanted["tags"]
      words = [word.decode("utf-8") for word in example["words"]]
      record = {"words": words, "tags": tags}
    else:
      text = example["inputs_pretokenized"].decode("utf-8")
      record = {"inputs": text} | _labels(found, values, head)
    yield record | ({"targets": targets} if with_targets else {})


def _question(example) -> str:
  """The first of a row's texts."""
  text = example["inputs_pretokenized"].decode("utf-8")
  return text.split(" </s> ", 1)[0]


def _labels(found, values, head: HeadConfig) -> Record:
  if head.problem_type == "regression":
    return {"prediction": found}
  names = head.label_names or tuple(map(str, range(head.num_labels)))
  if head.problem_type == "multi_label_classification":
    return {
      "prediction": [name for name, on in zip(names, found) if on],
      "probabilities": dict(zip(names, (round(float(v), 6) for v in values))),
    }
  return {
    "prediction": names[found],
    "label": found,
    "probability": round(float(values[1]), 6),
  }


# ---- Files -------------------------------------------------------------------


def forms(head: HeadConfig | None) -> tuple[str, ...]:
  """The formats that the predictions of a head, or a language model, have."""
  if head is not None and head.kind == "embedding":
    return ("jsonl",)
  own = {
    "token_classification": ("conll",),
    "question_answering": ("squad",),
    "sequence_classification": ("glue",),
    "enct5": ("glue",),
  }
  return ("jsonl", "tsv", *own.get(head.kind if head else "", ()))


def cell(value: Any) -> str:
  """A value as a cell of a TSV file; what is no text or number as JSON."""
  if isinstance(value, (list, dict)):
    value = json.dumps(value, ensure_ascii=False)
  return re.sub("[\t\n\r]", " ", str(value))


def write(
  records: Iterable[Record],
  form: str,
  head: HeadConfig,
  index: Sequence[Any] | None = None,
) -> Iterator[str]:
  """Lines of a file in one of `forms(head)`; glue is a submission.

  Its rows are named by `index`, which fills while the records come; where there
  is none, or None throughout, they are numbered.

  Raises:
    UserError: if some of `index` are None.
  """
  if form == "jsonl":
    for record in records:
      yield json.dumps(record, ensure_ascii=False) + "\n"
  elif form == "conll":
    for record in records:
      yield from conll.write([(record["words"], record["tags"])])
  elif form == "squad":
    answers = {record["id"]: record["text"] for record in records}
    yield json.dumps(answers, ensure_ascii=False) + "\n"
  elif form == "glue":
    yield "index\tprediction\n"
    # GLUE's server wants names where the labels are not 0 and 1.
    named = "entailment" in head.label_names
    for i, record in enumerate(records):
      value = record["prediction"]
      number = index[i] if index else None
      if index and (number is None) != (index[0] is None):
        raise UserError(f"row {i + 1}: some rows have a column index, not all")
      if not named and "label" in record:
        value = record["label"]
      text = f"{value:.3f}" if isinstance(value, float) else value
      yield f"{i if number is None else cell(number)}\t{cell(text)}\n"
  else:
    for i, record in enumerate(records):
      if i == 0:
        yield "\t".join(record) + "\n"
      yield "\t".join(map(cell, record.values())) + "\n"
