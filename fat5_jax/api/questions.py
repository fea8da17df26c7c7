"""What Python asks a model about, as rows that know their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fat5_jax.data.files import LocatedRow, shown
from fat5_jax.errors import UserError


def listed(values: Any, name: str) -> list[Any]:
  """The values as a list; `name` is the argument's.

  Raises:
    UserError: for one text instead of a list, and for what is no list.
  """
  if isinstance(values, str):
    raise UserError(
      f"{name} is one text, and a list of them is wanted: [{shown(values)}]"
    )
  if isinstance(values, Mapping):
    raise UserError(
      f"{name} is one row, and a list of them is wanted: [{{..}}]"
    )
  try:
    return list(values)
  except TypeError:
    raise UserError(
      f"{name} is a {type(values).__name__}, and must be a list"
    ) from None


def same_length(**lists: list[Any]) -> None:
  """Raises UserError unless all lists are of one length."""
  sizes = {name: len(values) for name, values in lists.items()}
  if len(set(sizes.values())) > 1:
    told = " and ".join(f"{n} {name}" for name, n in sizes.items())
    raise UserError(f"{told}: they belong together one by one")


def rows(
  values: list[Any], name: str, columns: Sequence[str]
) -> Callable[[], Iterator[LocatedRow]]:
  """Reads the rows: a dictionary is one; a text, or a pair, fills `columns`.

  Args:
    values: dictionaries, texts, or pairs of texts.
    name: the argument's, for messages.
    columns: what the task asks about.

  Raises:
    UserError: for anything else, with its place.
  """
  made = [
    (f"{name}[{i}]", _row(value, f"{name}[{i}]", columns))
    for i, value in enumerate(values)
  ]
  return lambda: iter(made)


def _row(value: Any, where: str, columns: Sequence[str]) -> dict[str, Any]:
  if isinstance(value, Mapping):
    return dict(value)
  parts = [value] if isinstance(value, str) else value
  if not isinstance(parts, (list, tuple)) or not all(
    isinstance(part, str) for part in parts
  ):
    raise UserError(
      f"{where} is {shown(value)}, and must be a text, a pair of texts, or a"
      " row: {'column': text}"
    )
  if len(parts) != len(columns):
    what = "a text" if isinstance(value, str) else f"{len(parts)} texts"
    raise UserError(
      f"{where} is {what}, and the model is asked about"
      f" {' and '.join(columns)}: give {_form(columns)}"
    )
  return dict(zip(columns, parts))


def _form(columns: Sequence[str]) -> str:
  if len(columns) == 1:
    return "one text a row"
  fields = ", ".join(f"{column!r}: text" for column in columns)
  return f"({', '.join(columns)}) or {{{fields}}}"


def sentences(words: list[Any]) -> list[str | list[str]]:
  """Sentences to tag, each a list of words, or a text with spaces between.

  Raises:
    UserError: for a sentence without words, or whose words are no texts.
  """
  for i, sentence in enumerate(words):
    found = sentence.split() if isinstance(sentence, str) else sentence
    if not isinstance(found, (list, tuple)) or not all(
      isinstance(word, str) for word in found
    ):
      raise UserError(
        f"words[{i}] is {shown(sentence)}, and must be a list of words, or a"
        " text with spaces between them"
      )
    if not found or not all(word.strip() for word in found):
      raise UserError(f"words[{i}] is {shown(sentence)}: a word is empty")
  return words
