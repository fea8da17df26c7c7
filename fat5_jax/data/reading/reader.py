"""Batches from streams, from a position on; read ahead of their use.

Every host plans all batches, from sizes alone, and reads the rows that are its
own: what a batch holds does not depend on the number of hosts, and a position
is a few numbers, from which any number of hosts goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any
import weakref

import grain

from fat5_jax.data.layouts import Example
from fat5_jax.data.reading import workers
from fat5_jax.data.reading.assemble import Batch
from fat5_jax.data.reading.order import CHUNK, Turns
from fat5_jax.data.reading.packing import Place, Plan, Row
from fat5_jax.data.reading.streams import Stream
from fat5_jax.errors import UserError

# Batches that wait for their use.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Share:
  """A host's [first, end) of every `of` rows of a batch; all by default."""

  first: int = 0
  end: int = 1
  of: int = 1

  def __call__(self, rows: int) -> tuple[int, int]:
    return rows * self.first // self.of, rows * self.end // self.of


@dataclasses.dataclass(frozen=True)
class Source:
  """What a reader needs; made again in every worker process.

  Attributes:
    streams: one a task.
    rates: of the tasks in a mixture.
    planner: makes one of packing.py's, new.
    assemble: (rows of examples, lengths of a plan) to arrays.
    check: raises for a batch that the model cannot take.
    own: of so many rows of a batch, this host's [first, end).
  """

  streams: Sequence[Stream]
  rates: Sequence[float]
  planner: Callable[[], Any]
  assemble: Callable[[list[list[Example]], tuple[int, ...]], Batch]
  check: Callable[[Batch], None]
  own: Callable[[int], tuple[int, int]]


class _Plans:
  """Plans without end, and the position after each."""

  def __init__(self, source: Source, position: dict[str, Any] | None):
    self._streams, self._planner = source.streams, source.planner()
    self._turns = Turns(source.rates) if len(source.streams) > 1 else None
    self._turn = 0
    self._cursors = [[0, 0] for _ in source.streams]
    if position is not None:
      self._turn = position["turn"]
      self._cursors = [list(cursor) for cursor in position["cursors"]]
      if position["planner"] is not None:
        self._planner.restore(position["planner"])
    self._sizes: list[list[list[int]] | None] = [None] * len(source.streams)

  def position(self) -> dict[str, Any]:
    return {
      "lengths": [stream.length for stream in self._streams],
      "turn": self._turn,
      "cursors": [list(cursor) for cursor in self._cursors],
      "planner": self._planner.state(),
    }

  def epochs(self) -> dict[str, float]:
    return {
      stream.name: stream.epochs(*cursor)
      for stream, cursor in zip(self._streams, self._cursors)
      if stream.length is not None
    }

  def _next_place(self, number: int) -> tuple[Place, list[int]]:
    """The next example of a stream."""
    cursor, sizes = self._cursors[number], self._sizes[number]
    empty = 0
    while sizes is None or cursor[1] >= len(sizes):
      if sizes is not None:
        cursor[0], cursor[1] = cursor[0] + 1, 0
        empty = empty + 1 if not sizes else 0
        stream = self._streams[number]
        if stream.length is not None and empty * CHUNK > stream.length + CHUNK:
          raise UserError(
            f"task {stream.name!r}: the steps that every epoch does leave none"
            f" of its {stream.length:,} examples"
          )
      sizes = self._streams[number].sizes(cursor[0]).tolist()
      self._sizes[number] = sizes
    place = (number, cursor[0], cursor[1])
    cursor[1] += 1
    return place, sizes[place[2]]

  def __iter__(self) -> Iterator[Plan]:
    turns = None
    while True:
      stream = 0
      if self._turns is not None:
        chunk, inside = divmod(self._turn, CHUNK)
        if turns is None or not inside:
          turns = self._turns.chunk(chunk)
        stream = int(turns[inside])
      self._turn += 1
      self._planner.add(*self._next_place(stream))
      plan = self._planner.take()
      if plan is not None:
        yield plan


def read(source: Source, plan: Plan) -> Batch:
  """The arrays of a plan's rows that are this host's."""
  first, end = source.own(len(plan.rows))
  batch = source.assemble(
    _examples(source.streams, plan.rows[first:end]), plan.lengths
  )
  source.check(batch)
  return batch


def _examples(
  streams: Sequence[Stream], rows: Sequence[Row]
) -> list[list[Example]]:
  """The examples of rows; each stream is asked once."""
  asked: list[list[tuple[int, int]]] = [[] for _ in streams]
  for row in rows:
    for stream, chunk, number, *_ in row:
      asked[stream].append((chunk, number))
  found = [iter(stream.read(places)) for stream, places in zip(streams, asked)]
  return [[next(found[place[0]]) for place in row] for row in rows]


@dataclasses.dataclass(frozen=True)
class _Read:
  """A batch, the rows that it has on all hosts, and where it ends."""

  batch: Batch
  rows: int
  position: dict[str, Any]
  epochs: dict[str, float]


class _Iterator(grain.DatasetIterator):
  """Batches, every `step`-th of them from `first` on."""

  def __init__(self, source, position, first, step):
    super().__init__()
    self._source = source
    self._plans = _Plans(source, position)
    self._iterator = iter(self._plans)
    self._first, self._step, self._count = first, step, 0

  def __next__(self):
    while True:
      plan = next(self._iterator)
      self._count += 1
      if (self._count - 1 - self._first) % self._step == 0:
        break
    batch = read(self._source, plan)
    return _Read(
      batch, len(plan.rows), self._plans.position(), self._plans.epochs()
    )

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


class _Batches(grain.IterDataset):
  """The reader as Grain sees it: worker processes share out its batches."""

  def __init__(self, source: Source, position: dict[str, Any] | None):
    super().__init__()
    self._source, self._position = source, position
    self._first, self._step = 0, 1

  def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
    del sequential_slice
    self._first, self._step = sl.start or 0, sl.step or 1

  def __iter__(self) -> grain.DatasetIterator:
    return _Iterator(self._source, self._position, self._first, self._step)


class BatchStream:
  """Batches without end.

  Attributes:
    position: plain data, after the batch that was given last; another stream
      over the same data goes on from it.
    epochs: passes over the data of each task, up to there; of those that end.
    rows: of that batch, over all hosts.
    about: lines for a person.
  """

  def __init__(
    self,
    source: Source,
    position: dict[str, Any] | None = None,
    num_workers: int = 0,
  ):
    """`num_workers`: processes that read; 0 is a thread of this one."""
    self.position, self.about = position, []
    self.epochs, self.rows = dict[str, float](), 0
    batches: grain.IterDataset = _Batches(source, position)
    if num_workers:
      batches = workers.prefetched(batches, num_workers, _AHEAD)
    else:
      batches = grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_AHEAD
      )
    # Emptied at the latest when the process ends, in which a thread that still
    # reads would make an abort.
    self._open = [iter(batches)]
    self._closing = weakref.finalize(self, _close, self._open)

  def __iter__(self) -> BatchStream:
    return self

  def __next__(self) -> Batch:
    if not self._open:
      raise ValueError("a stream of batches that is closed")
    found = next(self._open[0])
    self.position, self.epochs = found.position, found.epochs
    self.rows = found.rows
    return found.batch

  def close(self) -> None:
    """Stops reading ahead."""
    self._closing()


def _close(iterators: list[Iterator[Any]]) -> None:
  close = getattr(iterators.pop(), "close", None)
  if close is not None:
    close()
