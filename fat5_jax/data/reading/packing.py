"""Which examples share a row, and which rows a batch, known from sizes alone.

A planner takes examples one by one and gives batches of places. Its state is
plain data: a run goes on from it exactly, and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

# (stream, chunk, number in it), and the tokens of each feature.
Place = tuple[int, ...]
Row = list[Place]

# Rows that wait for an example that fits.
_OPEN_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
  """A batch before it is read.

  Attributes:
    lengths: of its rows, by feature.
    rows: the examples of each.
  """

  lengths: tuple[int, ...]
  rows: list[Row]


class Padding:
  """An example a row; the last batch of all may be smaller."""

  def __init__(self, lengths: Sequence[int], rows: int):
    self._lengths, self._count = tuple(lengths), rows
    self._ready: list[Row] = []

  def add(self, place: Place, sizes: Sequence[int]) -> None:
    self._ready.append([(*place, *sizes)])

  def take(self) -> Plan | None:
    """A batch, where one is full."""
    if len(self._ready) < self._count:
      return None
    rows = self._ready[: self._count]
    self._ready = self._ready[self._count :]
    return Plan(self._lengths, rows)

  def rest(self) -> list[Plan]:
    """What is left at the end of the data."""
    rows, self._ready = self._ready, []
    return [
      Plan(self._lengths, rows[i : i + self._count])
      for i in range(0, len(rows), self._count)
    ]

  def state(self) -> dict[str, Any]:
    return {"ready": list(self._ready)}

  def restore(self, state: dict[str, Any]) -> None:
    self._ready = [list(map(tuple, row)) for row in state["ready"]]


class Packing(Padding):
  """Best fit: an example goes into the open row that it fills most.

  Where it fits in none, a new row is opened, and of too many the fullest is
  closed; so is one that has waited for `patience` examples.
  """

  def __init__(
    self, lengths: Sequence[int], rows: int, patience: int = 1 << 13
  ):
    super().__init__(lengths, rows)
    self._patience = patience
    self._open: list[Row] = []
    self._opened: list[int] = []
    self._seen = 0
    # The room of each open row, in shares of a row that are whole numbers: what
    # is scarcest decides.
    self._whole = math.lcm(*self._lengths)
    self._shares = [self._whole // length for length in self._lengths]
    self._room = np.zeros((len(self._lengths), _OPEN_ROWS + 1), np.int64)

  def add(self, place: Place, sizes: Sequence[int]) -> None:
    self._seen += 1
    if self._open and self._seen - self._opened[0] > self._patience:
      self._close(0)
    count = len(self._open)
    taken = [size * share for size, share in zip(sizes, self._shares)]
    best = self._tightest(taken, count)
    if best is None:
      self._open.append([(*place, *sizes)])
      self._opened.append(self._seen)
      self._room[:, count] = [self._whole - part for part in taken]
      if count == _OPEN_ROWS:
        self._close(int(self._room.min(axis=0).argmin()))
      return
    self._open[best].append((*place, *sizes))
    room = self._room[:, best]
    room -= taken
    if not room.all():
      self._close(best)

  def _tightest(self, taken: Sequence[int], count: int) -> int | None:
    """The open row that has least room when it has taken so much too."""
    if not count:
      return None
    left = None
    for room, part in zip(self._room, taken):
      rest = room[:count] - part
      left = rest if left is None else np.minimum(left, rest)
    # As unsigned numbers, those below 0 are the largest.
    best = int(left.view(np.uint64).argmin())
    return best if left[best] >= 0 else None

  def rest(self) -> list[Plan]:
    while self._open:
      self._close(0)
    return super().rest()

  def _close(self, number: int) -> None:
    self._ready.append(self._open.pop(number))
    self._opened.pop(number)
    self._room[:, number:-1] = self._room[:, number + 1 :]

  def state(self) -> dict[str, Any]:
    return super().state() | {
      "open": [list(row) for row in self._open],
      "ages": [self._seen - opened for opened in self._opened],
    }

  def restore(self, state: dict[str, Any]) -> None:
    super().restore(state)
    self._open = [list(map(tuple, row)) for row in state["open"]]
    self._opened = [-age for age in state["ages"]]
    for number, row in enumerate(self._open):
      used = np.sum([place[3:] for place in row], axis=0)
      self._room[:, number] = self._whole - used * self._shares


class Buckets:
  """An example a row, beside others of about its lengths.

  Every batch holds about as many tokens: the shorter its rows, the more.
  """

  def __init__(self, shapes: Sequence[tuple[tuple[int, ...], int]]):
    """`shapes`: (lengths, rows) of the batches; the last one fits all."""
    self._shapes = [(tuple(lengths), rows) for lengths, rows in shapes]
    self._lengths = np.array([lengths for lengths, _ in self._shapes])
    self._cost = self._lengths.sum(axis=1)
    self._waiting: list[list[Row]] = [[] for _ in self._shapes]

  def add(self, place: Place, sizes: Sequence[int]) -> None:
    fits = (self._lengths >= np.asarray(sizes)).all(axis=1)
    best = int(np.where(fits, self._cost, np.iinfo(np.int64).max).argmin())
    self._waiting[best].append([(*place, *sizes)])

  def take(self) -> Plan | None:
    for number, (lengths, count) in enumerate(self._shapes):
      waiting = self._waiting[number]
      # More, where a run goes on with another number of rows a batch.
      if len(waiting) >= count:
        self._waiting[number] = waiting[count:]
        return Plan(lengths, waiting[:count])
    return None

  def rest(self) -> list[Plan]:
    waiting, self._waiting = self._waiting, [[] for _ in self._shapes]
    return [
      Plan(lengths, rows)
      for (lengths, _), rows in zip(self._shapes, waiting)
      if rows
    ]

  def state(self) -> dict[str, Any]:
    return {"waiting": [list(rows) for rows in self._waiting]}

  def restore(self, state: dict[str, Any]) -> None:
    self._waiting = [
      [list(map(tuple, row)) for row in rows] for rows in state["waiting"]
    ]
