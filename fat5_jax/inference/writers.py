"""Predictions as lines of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import json
import re
from typing import Any

from fat5_jax.data import conll
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig

Record = dict[str, Any]


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


def choose(
  output: str, output_format: str | None, head: HeadConfig | None
) -> str:
  """The format of OUTPUT.

  Raises:
    UserError: for one that predictions of the head do not have.
  """
  if output_format is None:
    output_format = "tsv" if output.endswith(".tsv") else "jsonl"
  known = forms(head)
  if output_format not in known:
    what = "language model" if head is None else f"head of kind {head.kind}"
    raise UserError(
      f"OUTPUT_FORMAT = {output_format!r}: a {what} writes {', '.join(known)}"
    )
  return output_format


def cell(value: Any) -> str:
  """A value as a cell of a TSV file; what is no text or number as JSON."""
  if isinstance(value, (list, dict)):
    value = json.dumps(value, ensure_ascii=False)
  return re.sub("[\t\n\r]", " ", str(value))


def write(
  records: Iterable[Record],
  form: str,
  head: HeadConfig | None,
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
