"""Columns under other names: those that a task asks for, of any source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fat5_jax.data.files import LocatedRow, Row, Unread, shown
from fat5_jax.data.sources import column, has_column
from fat5_jax.errors import UserError


class Renamed:
  """The rows of a source with columns under the names of a task.

  `Renamed(source, {'sentence': 'text.body'})` adds a column `sentence` that
  holds the field `body` of column `text`. The others stay.

  Attributes:
    splits, is_stream, weights: those of the source.
  """

  def __init__(self, source: Any, columns: Mapping[str, str | Sequence[str]]):
    """`columns`: of each name the column's; of several, the first there is.

    Raises:
      UserError: for what names no columns.
    """
    if (
      not isinstance(columns, Mapping)
      or not columns
      or not all(_names(theirs) for theirs in columns.values())
    ):
      raise UserError(
        f"Renamed: columns = {shown(columns)} must give the columns of names:"
        " {'sentence': 'text.body'}"
      )
    self._source = source
    self._columns = {ours: _names(theirs) for ours, theirs in columns.items()}
    self.splits = source.splits
    self.is_stream = getattr(source, "is_stream", False)
    self.weights = getattr(source, "weights", {})

  def only(self, splits: Mapping[str, str | Sequence[str]]) -> Renamed:
    """Other files, read as these are."""
    return Renamed(self._source.only(splits), self._columns)

  def rows(self, split: str) -> Iterator[LocatedRow]:
    for where, row in self._source.rows(split):
      try:
        found = row if isinstance(row, Unread) else self.rename(row)
      except UserError as e:
        # Whoever leaves bad rows out leaves it out.
        found = Unread(str(e))
      yield where, found

  def rename(self, row: Row, whole: bool = True) -> Row:
    """A row with the names beside its own.

    Raises:
      UserError: if `whole`, for a column that it has under none of its names.
    """
    found = {}
    for ours, names in self._columns.items():
      there = [name for name in names if has_column(row, name)]
      if there:
        found[ours] = column(row, there[0])
      elif whole and ours not in row:
        column(row, names[0])
    return {**row, **found}

  def num_rows(self, split: str) -> int | None:
    if hasattr(self._source, "num_rows"):
      return self._source.num_rows(split)
    return None if self.is_stream else sum(1 for _ in self._source.rows(split))

  def label_names(self, name: str) -> tuple[str, ...]:
    """The names of a column of class numbers; () if it is none."""
    if not hasattr(self._source, "label_names"):
      return ()
    for theirs in self._columns.get(name, (name,)):
      if found := self._source.label_names(theirs):
        return found
    return ()

  def record(self) -> dict[str, Any]:
    return self._source.record() | {"renamed": self._columns}

  def describe(self, split: str) -> str:
    return self._source.describe(split)

  def size_bytes(self, split: str) -> int:
    return self._source.size_bytes(split)


def _names(value: Any) -> list[str]:
  """One name or several; [] for what is none."""
  names = [value] if isinstance(value, str) else value
  if not isinstance(names, (list, tuple)):
    return []
  return list(names) if all(isinstance(x, str) and x for x in names) else []
