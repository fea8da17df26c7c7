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
  first: int = 0,
) -> Iterator[str]:
  """A text for each record, of a file in one of `forms(head)`.

  glue is a submission. Its rows are named by `index`, which fills while the
  records come; where there is none, or None throughout, they are numbered.
  `first` is the number of the first record, which has the header before it if
  it is 0.

  Raises:
    UserError: if some of `index` are None.
  """
  if form == "jsonl":
    for record in records:
      yield json.dumps(record, ensure_ascii=False) + "\n"
  elif form == "conll":
    for record in records:
      yield "".join(conll.write([(record["words"], record["tags"])]))
  elif form == "squad":
    answers = {record["id"]: record["text"] for record in records}
    yield json.dumps(answers, ensure_ascii=False) + "\n"
  elif form == "glue":
    header = "index\tprediction\n"
    # GLUE's server wants names where the labels are not 0 and 1.
    named = "entailment" in head.label_names
    for i, record in enumerate(records, first):
      value = record["prediction"]
      number = index[i] if index else None
      if index and (number is None) != (index[0] is None):
        raise UserError(f"row {i + 1}: some rows have a column index, not all")
      if not named and "label" in record:
        value = record["label"]
      text = f"{value:.3f}" if isinstance(value, float) else value
      line = f"{i if number is None else cell(number)}\t{cell(text)}\n"
      yield header * (i == 0) + line
  else:
    for i, record in enumerate(records, first):
      header = "\t".join(record) + "\n"
      yield header * (i == 0) + "\t".join(map(cell, record.values())) + "\n"


def whole_records(data: bytes, form: str, is_first: bool) -> tuple[int, int]:
  """(records, bytes) of what `write` had written whole when it was cut short.

  `is_first`: whether the first record, and so a header, is in it.
  """
  if form == "squad":  # One text, written at its end.
    return 0, 0
  mark = b"\n\n" if form == "conll" else b"\n"
  size = data.rfind(mark) + len(mark)
  if size < len(mark):
    return 0, 0
  count = data[:size].count(mark)
  if form in ("tsv", "glue") and is_first:
    count -= 1
  return (count, size) if count > 0 else (0, 0)
