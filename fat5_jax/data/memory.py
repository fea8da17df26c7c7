"""Rows that Python holds: dictionaries, a pandas frame, a data set of HF's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import functools
import hashlib
import json
from typing import Any

import numpy as np

from fat5_jax.data.files import LocatedRow, listed, shown
from fat5_jax.errors import UserError


class Rows:
  """Rows in memory, in one split.

  Attributes:
    splits: its name, to what gives the rows.
  """

  def __init__(self, rows: Any, split: str, name: str = "rows"):
    """`name` is the caller's word for `rows`.

    Raises:
      UserError: for what are no rows, or none at all.
    """
    self._name, self._rows = name, _plain_rows(rows, name)
    self._features = getattr(rows, "features", None)
    self.splits = {split: lambda: self._rows}

  def rows(self, split: str) -> Iterator[LocatedRow]:
    del split
    for number, row in enumerate(self._rows, 1):
      yield f"{self._name}, row {number}", row

  def num_rows(self, split: str) -> int:
    del split
    return len(self._rows)

  def label_names(self, column: str) -> tuple[str, ...]:
    """The names of a column of class numbers (ClassLabel); () if it is none."""
    found = (self._features or {}).get(column)
    found = getattr(found, "feature", found)
    return tuple(getattr(found, "names", None) or ())

  @functools.cached_property
  def _content(self) -> str:
    """A hash of all rows: a run goes on with the data that it began with."""
    digest = hashlib.sha256()
    for row in self._rows:
      text = json.dumps(row, sort_keys=True, default=_as_json)
      digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]

  def record(self) -> dict[str, Any]:
    return {"kind": "Rows", "rows": len(self._rows), "content": self._content}

  def describe(self, split: str) -> str:
    del split
    return self._name

  def size_bytes(self, split: str) -> int:
    """They are in memory already, and may be shuffled as a whole."""
    del split
    return 0


class Joined:
  """Splits of several sources as one.

  Attributes:
    splits: their names, to what gives their rows.
  """

  def __init__(self, parts: Sequence[Any]):
    """`parts`: sources, each with splits of its own."""
    self._parts = {split: part for part in parts for split in part.splits}
    self.splits = {
      split: functools.partial(part.rows, split)
      for split, part in self._parts.items()
    }

  def rows(self, split: str) -> Iterator[LocatedRow]:
    return iter(self._parts[split].rows(split))

  def num_rows(self, split: str) -> int:
    return self._parts[split].num_rows(split)

  def label_names(self, column: str) -> tuple[str, ...]:
    """Those of the first split that has some."""
    for part in self._parts.values():
      if hasattr(part, "label_names") and (names := part.label_names(column)):
        return names
    return ()

  def record(self) -> dict[str, Any]:
    return {
      "kind": "Joined",
      "parts": {split: part.record() for split, part in self._parts.items()},
    }

  def describe(self, split: str) -> str:
    return self._parts[split].describe(split)

  def size_bytes(self, split: str) -> int:
    return self._parts[split].size_bytes(split)


def _plain_rows(rows: Any, name: str) -> Sequence[Mapping[str, Any]]:
  """A sequence of dictionaries that can be read more than once."""
  if type(rows).__module__.split(".")[0] == "pandas":
    if not hasattr(rows, "columns"):
      raise UserError(f"{name} is a pandas {type(rows).__name__}, no frame")
    # A missing cell is None, as in a file; numbers are Python's.
    cells = rows.astype(object).where(rows.notna(), None)
    cells.columns = list(map(str, cells.columns))
    rows = cells.to_dict("records")
  elif isinstance(rows, Mapping):
    known = ", ".join(f"{name}[{key!r}]" for key in list(rows)[:3])
    raise UserError(
      f"{name} is a {type(rows).__name__} of {listed(rows)}: give one of its"
      f" splits ({known}), or a list of dictionaries"
    )
  elif hasattr(rows, "features") and hasattr(rows, "column_names"):
    if not hasattr(rows, "__len__"):
      raise UserError(
        f"{name} streams, and rows are read more than once: load the data set"
        " without streaming, or give its files"
      )
  elif isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
    hint = f": list({name})" if hasattr(rows, "__iter__") else ""
    raise UserError(
      f"{name} is a {type(rows).__name__}, and must be a list of dictionaries,"
      " a pandas frame, a data set of Hugging Face's, a file or a SeqIO"
      f" task{hint}"
    )
  else:
    for number, row in enumerate(rows, 1):
      if not isinstance(row, Mapping):
        raise UserError(
          f"{name}, row {number}: {shown(row)} is a {type(row).__name__}, and"
          " a row is a dictionary: {'column': value}"
        )
  if not len(rows):
    raise UserError(f"{name} is empty")
  return rows


def _as_json(value: Any) -> Any:
  if isinstance(value, (np.generic, np.ndarray)):
    return value.tolist()
  return f"{type(value).__qualname__} {value}"
