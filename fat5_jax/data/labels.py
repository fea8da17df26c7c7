"""The labels and tags that data holds, where nobody names them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fat5_jax.data import sources
from fat5_jax.errors import UserError

# More labels than this are numbers or text, not classes.
_MOST_LABELS = 1000


def found_labels(
  source, label: str, problem_type: str, separator: str, name: str
) -> tuple[str, ...]:
  """The labels that the data names, or those of its training split, sorted.

  Raises:
    UserError: for what names no class, with its row.
  """
  if hasattr(source, "label_names"):
    names = source.label_names(label)
    if names:
      return names
  if "train" not in source.splits:
    raise UserError(f"task {name!r} needs label_names: it has no split 'train'")
  many = problem_type == "multi_label_classification"

  def names_of(row):
    value = sources.column(row, label)
    values = [value]
    if many:
      values = value.split(separator) if isinstance(value, str) else value
      if not isinstance(values, (list, tuple, np.ndarray)):
        raise UserError(f"label {sources.shown(value)} is no list")
    return map(_name, values)

  found = _gather(
    source,
    names_of,
    f"task {name!r}: over {_MOST_LABELS} different values in column {label!r}:"
    " give label_names, or problem_type = 'regression'",
  )
  found -= {"", "-1", "-100", "None"}
  if not found:
    raise UserError(
      f"task {name!r}: no labels in column {label!r} of"
      f" {source.describe('train')}"
    )
  whole = all(re.fullmatch("[0-9]+", text) for text in found)
  for text in sorted(found):
    if _NO_CLASS.fullmatch(text) or (
      whole and (len(text) > 9 or int(text) > _MOST_LABELS)
    ):
      raise UserError(
        f"{source.describe('train')}: {sources.shown(text)} in column"
        f" {label!r} is a number, not a class: give label_names, or"
        " problem_type = 'regression'"
      )
  if whole:
    # Class numbers, of which some may not occur.
    return tuple(map(str, range(max(map(int, found)) + 1)))
  return tuple(sorted(found))


# Fractions; 1.0 may be a class.
_NO_CLASS = re.compile(
  r"(?i)[-+]?([0-9]*\.[0-9]*[1-9][0-9]*(e[-+]?[0-9]+)?|nan|inf)"
)


def _name(value: Any) -> str:
  if value is not None and not isinstance(
    value, (str, int, float, np.integer, np.floating, np.bool_)
  ):
    raise UserError(f"label {sources.shown(value)} is no name of a class")
  return str(value).strip()


def found_tags(source, column: str, name: str) -> set[str]:
  """The tags of the training split.

  Raises:
    UserError: for what is no name of a tag, with its row.
  """
  if "train" not in source.splits:
    raise UserError(f"task {name!r} needs tag_names: it has no split 'train'")

  def tags_of(row):
    tags = items(row, column)
    for tag in tags:
      if isinstance(tag, (int, np.integer)) and not isinstance(tag, bool):
        raise UserError(f"task {name!r}: tags are numbers; give tag_names")
      if not isinstance(tag, str) or not tag.strip():
        raise UserError(f"tag {sources.shown(tag)} is no name")
    return tags

  return _gather(
    source,
    tags_of,
    f"task {name!r}: over {_MOST_LABELS} different tags in column {column!r}:"
    " name the right column, or give tag_names",
  )


def items(row: sources.Row, name: str) -> list[Any]:
  """A column that holds a list; the parts of a text are apart by spaces."""
  found = sources.column(row, name)
  if isinstance(found, str):
    return found.split()
  if not isinstance(found, (list, tuple, np.ndarray)):
    raise UserError(f"column {name!r} holds {sources.shown(found)}, not a list")
  return list(found)


def _gather(source, names_of, too_many: str) -> set[str]:
  """What `names_of` finds in all training rows; an error says in which."""
  if getattr(source, "is_stream", False):
    raise UserError(
      f"{source.describe('train')} streams, so the names of its labels are not"
      " looked for: give label_names (of tags: tag_names)"
    )
  found: set[str] = set()
  for where, row in source.rows("train"):
    try:
      found.update(names_of(row))
    except UserError as e:
      raise UserError(f"{where}: {e}") from None
    if len(found) > _MOST_LABELS:
      raise UserError(too_many)
  return found
