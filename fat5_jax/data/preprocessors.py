"""Rows to `inputs` and `targets` text, as the T5 paper formats them.

Plain Python: a function here takes a row and returns the task's features. The
results equal those of the original code (tests/test_golden_text.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import datetime
import decimal
import math
import re
import string
from typing import Any

import numpy as np

from fat5_jax.data.sources import Row, RowFn, column, listed, shown
from fat5_jax.errors import UserError


class Unanswered(str):
  """Stands for an answer that is not known, in whatever format."""

  def __new__(cls):
    return super().__new__(cls, "?")

  def __format__(self, form: str) -> str:
    return "?"


def fields(text: str) -> list[str]:
  """The columns that a template names.

  Raises:
    UserError: if it is no template.
  """
  try:
    parts = list(string.Formatter().parse(text))
  except (ValueError, TypeError) as e:
    raise UserError(f"template {text!r}: {e}") from None
  names = [name for _, name, _, _ in parts if name is not None]
  if "" in names:
    raise UserError(f"template {text!r}: a field needs a column's name")
  return names


def fill(
  text: str, names: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Row], str]:
  """Fills `{column}` fields of a row; `{a.b}` is the field b of column a.

  Args:
    text: the template.
    names: of the classes of columns that hold their numbers.

  Raises:
    UserError: for what is no template; and, when it fills, for a column that is
      empty or holds no text.
  """
  fields(text)
  parts = list(string.Formatter().parse(text))
  names = names or {}

  def filled(row: Row) -> str:
    found = []
    for literal, name, form, conversion in parts:
      found.append(literal)
      if name is None:
        continue
      value = _value_of(row, name, names.get(name))
      if conversion == "r":
        value = repr(value)
      try:
        found.append(format(value, form or ""))
      except (ValueError, TypeError, OverflowError) as e:
        raise UserError(
          f"column {name!r}: {shown(value)} does not fit {{{name}:{form}}}: {e}"
        ) from None
    return "".join(found)

  return filled


def _value_of(row: Row, name: str, names: Sequence[str] | None) -> Any:
  value = column(row, name)
  if names and isinstance(value, (bool, np.bool_)):
    value = int(value)
  if value is None or (isinstance(value, str) and not value.strip()):
    raise UserError(f"column {name!r} is empty")
  _check_text(value, name, template=True)
  if names and re.fullmatch(r"-?[0-9]{1,9}", str(value)):
    if int(value) == -1:
      return "<unk>"  # T5's text for the label of a test set.
    if not 0 <= int(value) < len(names):
      raise UserError(
        f"column {name!r}: class {value} of {len(names)} ({listed(names)})"
      )
    return names[int(value)]
  return value


# What text may be made of; anything else would be as Python shows it.
_TEXT = (
  *(str, int, float, np.integer, np.floating, decimal.Decimal),
  *(datetime.date, datetime.time),
)


def _check_text(value: Any, name: str, template: bool = False) -> None:
  """Raises UserError for a cell that holds neither text nor a number.

  What a `template` can do about it is told too.
  """
  mend = ""
  if value is None:
    what = "nothing"
  elif isinstance(value, (bool, np.bool_)):
    what = str(value).lower()
    mend = f"; its words are label_names = {{{name!r}: ('no', 'yes')}}"
  elif not isinstance(value, _TEXT):
    what = f"a {type(value).__name__}"
    if isinstance(value, (Mapping, list, tuple, np.ndarray)):
      inside = next(iter(value), "field") if isinstance(value, Mapping) else 0
      mend = f"; its parts are columns too: {{{name}.{listed([inside])}}}"
  elif isinstance(
    value, (float, np.floating, decimal.Decimal)
  ) and not math.isfinite(value):
    what = str(value)
  else:
    return
  mend = mend if template else ""
  raise UserError(f"column {name!r} holds {what}, not text{mend}")


def number_of(value: Any, what: str) -> float:
  """A number that float32 holds.

  Raises:
    UserError: for anything else; `what` it is.
  """
  try:
    found = float(value)
  except (TypeError, ValueError, OverflowError):
    found = math.nan
  spelled = isinstance(value, str) and "_" in value
  if isinstance(value, (bool, bytes)) or spelled or not abs(found) < 3e38:
    raise UserError(f"{what} {shown(value)} is not a number")
  return found


def text_of(row: Row, name: str) -> str:
  """A column that holds text, or a number; it may be empty.

  Raises:
    UserError: for anything else, which would be asked about as Python shows it.
  """
  value = column(row, name)
  _check_text(value, name)
  return str(value)


def template(
  inputs: str,
  targets: str,
  names: Mapping[str, Sequence[str]] | None = None,
) -> RowFn:
  """Fills `{column}` fields: template("say: {text}", "{label}"); see `fill`."""
  fill_inputs, fill_targets = fill(inputs, names), fill(targets, names)

  def format_row(row: Row) -> Row:
    return {"inputs": fill_inputs(row), "targets": fill_targets(row)}

  return format_row


def label_reader(
  names: Sequence[str], problem_type: str, size: int, separator: str
) -> Callable[[Any], list[float]]:
  """A function from a column's value to a row's labels, as a list.

  See head_tasks.classification.
  """

  def as_list(value):
    if not isinstance(value, (list, tuple, np.ndarray)):
      raise UserError(f"label {shown(value)} is no list")
    return list(value)

  def class_of(value):
    text = str(value).strip()
    if text in names:
      return names.index(text)
    if text in ("-1", "-100"):
      return -1
    # Where the names are numbers themselves, another number is no label.
    numbered = any(name.lstrip("-").isdecimal() for name in names)
    if re.fullmatch("[0-9]{1,9}", text) and int(text) < size and not numbered:
      return int(text)
    raise UserError(
      f"label {shown(text)} is neither one of {listed(names)} nor a class"
      " number"
    )

  def many(value):
    if isinstance(value, str):
      return [part for part in value.split(separator) if part.strip()]
    return as_list(value)

  def read(value):
    if problem_type == "single_label_classification":
      return [class_of(value)]
    if problem_type == "multi_label_classification":
      parts = many(value)
      if len(parts) > 1 and len(set(map(str, parts))) < len(parts):
        raise UserError(
          f"labels {shown(value)} repeat: name each label that holds once (a"
          " column of 0 and 1 a label: label = ('first', 'second'))"
        )
      found = {class_of(part) for part in parts}
      return [float(i in found) for i in range(size)]
    numbers = [value] if size == 1 else many(value)
    if len(numbers) != size:
      raise UserError(f"{len(numbers)} numbers, expected {size}")
    return [number_of(part, "label") for part in numbers]

  return read


def glue(
  name: str,
  features: Sequence[str],
  label_names: Sequence[str],
  in_order: bool = False,
) -> RowFn:
  """`sst2 sentence: ...` to a label word (T5 paper, appendix D).

  Features come in alphabetical order, or `in_order` as they are; label -1 (a
  test set) is `<unk>`. The label may be a class number or its name.
  """
  keys = tuple(features) if in_order else sorted(features)
  classes = {label: label for label in label_names}
  classes |= {str(i): label for i, label in enumerate(label_names)}
  classes["-1"] = "<unk>"

  def format_row(row: Row) -> Row:
    label = str(column(row, "label"))
    if label not in classes:
      raise UserError(
        f"label {shown(label)} is neither one of {listed(label_names)} nor a"
        " class number"
      )
    parts = [f"{key}: {text_of(row, key)}" for key in keys]
    return {"inputs": " ".join([name, *parts]), "targets": classes[label]}

  return format_row


def stsb(row: Row) -> Row:
  """STS-B as text: the similarity rounded to the nearest 0.2."""
  score = np.float32(number_of(column(row, "label"), "label"))
  rounded = np.round(score * np.float32(5)) / np.float32(5)
  return {
    "inputs": (
      f"stsb sentence1: {text_of(row, 'sentence1')}"
      f" sentence2: {text_of(row, 'sentence2')}"
    ),
    "targets": f"{rounded:.1f}",
  }


def _collapse_spaces(text: str) -> str:
  """Runs of ASCII white space as one space."""
  return re.sub("[\t\n\f\r ]+", " ", text)


def pad_punctuation(text: str) -> str:
  """A space around each ASCII punctuation mark."""
  return _collapse_spaces(
    re.sub(f"([{re.escape(string.punctuation)}])", r" \1 ", text)
  )


def answer_texts(row: Row) -> list[str]:
  """The accepted answers of a SQuAD row, as HF and TFDS or as a flat list."""
  answers = column(row, "answers")
  texts = answers.get("text") if isinstance(answers, Mapping) else answers
  texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
  if not isinstance(texts, (list, tuple)) or not all(
    isinstance(text, str) for text in texts
  ):
    raise UserError(
      f"column 'answers' holds {shown(answers)}; expected a list of texts, or"
      ' {"text": [...], "answer_start": [...]}'
    )
  return list(texts)


def first_answer(row: Row, context: str) -> tuple[int, int] | None:
  """Characters [begin, end) of the first answer; None where there is none.

  Raises:
    UserError: if it is not in the context.
  """
  texts = answer_texts(row)
  if not texts:
    return None
  text, answers = texts[0], row["answers"]
  begin = -1
  starts = ()
  if isinstance(answers, Mapping) and answers.get("answer_start") is not None:
    starts = answers["answer_start"]
    if not isinstance(starts, (list, tuple, np.ndarray)):
      raise UserError(f"answer_start holds {shown(starts)}, not a list")
  if len(starts):
    begin = int(number_of(starts[0], "answer_start"))
    if begin < -1 or begin > len(context):
      raise UserError(
        f"answer_start {begin} is outside of its context of {len(context)}"
        " characters"
      )
  if begin < 0 or context[begin : begin + len(text)] != text:
    begin = context.find(text)
  if begin < 0 or not text.strip():
    raise UserError(f"answer {shown(text)} is not in its context")
  return begin, begin + len(text)


def squad(row: Row) -> Row:
  """`question: ... context: ...` to the first answer.

  Reads HF's and TFDS's row (`answers: {"text": [...]}`) or a flat list.
  """
  answers = answer_texts(row)
  if not answers:
    raise UserError("no answer")
  answers = [pad_punctuation(answer) for answer in answers]
  question = pad_punctuation(text_of(row, "question"))
  context = pad_punctuation(text_of(row, "context"))
  return {
    "inputs": _collapse_spaces(f"question: {question} context: {context}"),
    "targets": answers[0],
    "answers": answers,
    "id": "" if row.get("id") is None else text_of(row, "id"),
  }


_LANGUAGES = {
  "en": "English",
  "de": "German",
  "fr": "French",
  "ro": "Romanian",
  "cs": "Czech",
}


def translate(source: str, target: str) -> RowFn:
  """`translate English to German: ...`, for language codes source and target.

  Reads flat columns named by language, or HF's `translation` dictionary.
  """
  names = [_LANGUAGES.get(code, code) for code in (source, target)]

  def format_row(row: Row) -> Row:
    pair = row.get("translation", row)
    if not isinstance(pair, Mapping):
      raise UserError(
        f"column 'translation' holds {shown(pair)}, not a text a language"
      )
    return {
      "inputs": f"translate {names[0]} to {names[1]}: {text_of(pair, source)}",
      "targets": text_of(pair, target),
    }

  return format_row


def summarize(article: str, summary: str) -> RowFn:
  """`summarize: ...` to the summary, given the two column names."""

  def format_row(row: Row) -> Row:
    return {
      "inputs": f"summarize: {text_of(row, article)}",
      "targets": text_of(row, summary),
    }

  return format_row


# ---- What metrics compare: decoded text to a value. --------------------------


def label_to_class(label_names: Sequence[str]) -> Callable[..., int]:
  """The class number of a label word; -1 for any other text."""

  def postprocess(text: str, **unused: Any) -> int:
    return label_names.index(text) if text in label_names else -1

  return postprocess


def to_float(text: str, **unused: Any) -> float:
  """The number a text holds; -1 for any other text."""
  try:
    return float(text)
  except ValueError:
    return -1.0


def all_answers(text: str, example=None, is_target: bool = False, **unused):
  """Every accepted answer of a target; a prediction as it is."""
  if not is_target:
    return text
  return [as_text(answer) for answer in example["answers"]]


def as_text(value: Any) -> str:
  """Text as SeqIO has it, bytes, or as we do."""
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)
