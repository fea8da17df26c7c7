"""Examples without end, in chunks that are read at any place.

A stream gives the sizes of a chunk's examples at once, cheaply, so that it is
known which go together in a row before any of them is read, and reads those
that this host needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
import itertools
from typing import Protocol

import numpy as np
import seqio

from fat5_jax.data import examples, seqio_tasks
from fat5_jax.data.denoising import Segments
from fat5_jax.data.layouts import Example, Limits
from fat5_jax.data.reading.order import CHUNK, Order
from fat5_jax.data.reading.store import Store
from fat5_jax.errors import UserError

# Chunks whose examples are kept, for what is still open of them.
_KEPT = 8
# Rows of a stream that are shuffled among themselves.
_SHUFFLED_ROWS = 10_000


class Stream(Protocol):
  """Examples without end, in chunks.

  Attributes:
    name: of the task.
    length: examples of an epoch, None where nobody knows.
  """

  name: str
  length: int | None

  def sizes(self, chunk: int) -> np.ndarray:
    """int64 (n, features): tokens of every example of a chunk, as cut."""

  def read(self, places: Sequence[tuple[int, int]]) -> list[Example]:
    """The examples at these (chunk, number in it)."""

  def longest(self) -> list[int]:
    """Of each feature, tokens that no example has more of, as cut."""

  def epochs(self, chunk: int, number: int) -> float:
    """Passes over the data up to a place, where it has a length."""

  def describe(self) -> str:
    """For a person."""


class _Portable:
  """Made again of its arguments in another process."""

  def __new__(cls, *args):
    made = super().__new__(cls)
    made._arguments = args
    return made

  def __reduce__(self):
    return type(self), self._arguments


class Stored(_Portable):
  """A store, in a new order every epoch."""

  def __init__(
    self,
    task: seqio.Task,
    store: Store,
    limits: dict[str, int],
    seed: Sequence[int] | None,
  ):
    self.name, self.length = task.name, len(store)
    self._task, self.store, self._limits = task, store, limits
    self._order = Order(len(store), seed)
    self._chunk = functools.lru_cache(maxsize=64)(self._order.chunk)
    self._names = [*task.output_features, "first_size"]

  def sizes(self, chunk: int) -> np.ndarray:
    _, numbers = self._chunk(chunk)
    return np.stack(
      [
        np.minimum(self.store.lengths[name][numbers], limit)
        for name, limit in self._limits.items()
      ],
      axis=1,
    ).astype(np.int64)

  def longest(self) -> list[int]:
    return [
      min(int(self.store.lengths[name].max()), limit)
      for name, limit in self._limits.items()
    ]

  def read(self, places: Sequence[tuple[int, int]]) -> list[Example]:
    numbers = [int(self._chunk(k)[1][j]) for k, j in places]
    found = self.store.read(numbers, self._names)
    return [cut(self._task, example, self._limits) for example in found]

  def epochs(self, chunk: int, number: int) -> float:
    return (chunk * CHUNK + number) / self.length

  def describe(self) -> str:
    return describe(self.store, self._limits)


def describe(
  store: Store, limits: dict[str, int], what: str = "examples"
) -> str:
  """What a person should know of a store."""
  facts = store.facts
  parts = [f"{len(store):,} {what}, {facts['tokens']:,} tokens of inputs"]
  if facts["skipped"]:
    parts.append(f"{facts['skipped']:,} bad rows left out")
  if facts["unknown"]:
    share = facts["unknown"] / max(facts["tokens"], 1)
    parts.append(
      f"{facts['unknown']:,} tokens ({share:.2%}) unknown to the vocabulary"
    )
  cuts = []
  for name, limit in limits.items():
    lengths = store.lengths.get(name)
    count = 0 if lengths is None else int(np.count_nonzero(lengths > limit))
    if count:
      cuts.append(f"{count:,} of {name} (longest {lengths.max():,} tokens)")
  if cuts:
    parts.append(f"cut to TASK_FEATURE_LENGTHS: {', '.join(cuts)}")
  return "; ".join(parts)


def cut(task: seqio.Task, example: Example, limits: Limits) -> Example:
  """A stored example, cut to lengths."""
  layout = getattr(task.source, "layout", None)
  if layout is None:
    return seqio_tasks.cut(task, example, limits)
  return layout.cut(example, limits)


class _Blocks(_Portable):
  """Chunks that must be made whole before anything of them is known."""

  def __init__(self, limits: dict[str, int]):
    self._limits = limits
    self._block = functools.lru_cache(maxsize=_KEPT)(self._make)

  def _make(self, chunk: int) -> list[Example]:
    raise NotImplementedError

  def sizes(self, chunk: int) -> np.ndarray:
    found = [
      [min(len(example[name]), limit) for name, limit in self._limits.items()]
      for example in self._block(chunk)
    ]
    return np.array(found, np.int64).reshape(len(found), len(self._limits))

  def longest(self) -> list[int]:
    return list(self._limits.values())

  def read(self, places: Sequence[tuple[int, int]]) -> list[Example]:
    return [self._block(k)[j] for k, j in places]


def _shuffled(
  block: list[Example], seed: Sequence[int], chunk: int
) -> list[Example]:
  rng = np.random.default_rng([*seed, chunk])
  return [block[i] for i in rng.permutation(len(block))]


def _epochs(chunk: int, number: int, count: int, length: int) -> float:
  """Passes over a store up to one of the `count` examples of a chunk."""
  return (chunk + number / max(count, 1)) * CHUNK / length


class Remade(_Blocks):
  """A store whose examples SeqIO's own steps change in every epoch.

  Every host makes the whole of a chunk: what comes out of it, and how long it
  is, is known only then.
  """

  def __init__(
    self,
    task: seqio.Task,
    store: Store,
    limits: dict[str, int],
    seed: Sequence[int] | None,
  ):
    super().__init__(limits)
    self.name, self.length = task.name, len(store)
    self._task, self.store, self._seed = task, store, seed
    self._order = Order(len(store), seed)

  def _make(self, chunk: int) -> list[Example]:
    _, numbers = self._order.chunk(chunk)
    # SeqIO counts up from a seed.
    seed = np.random.SeedSequence([*(self._seed or [0]), chunk])
    found = seqio_tasks.again(
      self._task,
      self.store.read(numbers),
      self._limits,
      int(seed.generate_state(1)[0] >> 1),
    )
    if self._seed is not None and len(found) != len(numbers):
      # The parts of a row are not to stay together.
      found = _shuffled(found, self._seed, chunk)
    return found

  def describe(self) -> str:
    return describe(self.store, {})

  def epochs(self, chunk: int, number: int) -> float:
    return _epochs(chunk, number, len(self._block(chunk)), self.length)


class Denoised(_Portable):
  """A store of texts, in other pieces with other noise in every epoch.

  What is cut where, and how long both sides are, is drawn a chunk of texts at a
  time, before any of them is read.
  """

  def __init__(
    self,
    task: seqio.Task,
    store: Store,
    limits: dict[str, int],
    seed: Sequence[int] | None,
  ):
    self.name, self.length = task.name, len(store)
    self.store, self._limits = store, limits
    self._shuffles, self._seed = seed is not None, list(seed or [0])
    self._order = Order(len(store), seed)
    self._objective = examples.objective(task, limits)
    self._chunk = functools.lru_cache(maxsize=_KEPT)(self._segments)

  def _segments(self, chunk: int) -> tuple[np.ndarray, Segments]:
    """(numbers of texts, what is cut out of them)."""
    epochs, numbers = self._order.chunk(chunk)
    lengths = self.store.lengths["inputs"][numbers]
    seed = [*self._seed, chunk]
    return numbers, self._objective.cut(
      lengths, seed, epochs if self._shuffles else None
    )

  def sizes(self, chunk: int) -> np.ndarray:
    return self._chunk(chunk)[1].sizes_N2

  def longest(self) -> list[int]:
    return list(self._limits.values())

  def read(self, places: Sequence[tuple[int, int]]) -> list[Example]:
    texts = [
      int(self._chunk(k)[0][self._chunk(k)[1].texts[j]]) for k, j in places
    ]
    unique, which = np.unique(texts, return_inverse=True)
    found = self.store.read(unique, ["inputs"])
    return [
      self._objective.example(
        found[text]["inputs"], self._chunk(k)[1], j, [*self._seed, k]
      )
      for text, (k, j) in zip(which, places)
    ]

  def epochs(self, chunk: int, number: int) -> float:
    return _epochs(chunk, number, len(self._chunk(chunk)[1]), self.length)

  def describe(self) -> str:
    told = describe(self.store, {}, "texts")
    return f"{told}; {self._objective.describe()}"


class Endless(_Blocks):
  """Rows that are only read one after the other, and never prepared.

  A chunk is shuffled in itself alone. To go on from a place, the rows before it
  are read again, or skipped where the source can; every host reads them all.
  """

  length = None

  def __init__(
    self,
    task: seqio.Task,
    split: str,
    limits: dict[str, int],
    seed: Sequence[int] | None,
  ):
    super().__init__(limits)
    self.name = task.name
    self._task, self._split, self._seed = task, split, seed
    self._rows: Iterator[Example] | None = None
    self._next = 0
    self._objective = None
    if examples.is_denoised(task):
      self._objective = examples.objective(task, limits)

  def _read(self) -> Iterator[Example]:
    while True:
      count = 0
      for example in examples.whole(self._task, self._split, self._limits):
        count += 1
        yield cut(self._task, example, self._limits)
      if not count:
        raise UserError(f"task {self.name!r}, split {self._split!r}: no rows")

  def _make(self, chunk: int) -> list[Example]:
    if self._rows is None or chunk < self._next:
      self._rows, self._next = self._read(), 0
    skipped = (chunk - self._next) * _SHUFFLED_ROWS
    next(itertools.islice(self._rows, skipped, skipped), None)
    found = list(itertools.islice(self._rows, _SHUFFLED_ROWS))
    self._next = chunk + 1
    if self._objective is not None:
      return self._denoised(found, chunk)
    if self._seed is None:
      return found
    return _shuffled(found, self._seed, chunk)

  def _denoised(self, texts: list[Example], chunk: int) -> list[Example]:
    return self._objective.examples(
      [text["inputs"] for text in texts],
      [*(self._seed or [0]), chunk],
      self._seed is not None,
    )

  def describe(self) -> str:
    return (
      f"read as it comes, {_SHUFFLED_ROWS:,} rows shuffled at a time; to go on,"
      " a run reads again what it has seen"
    )
