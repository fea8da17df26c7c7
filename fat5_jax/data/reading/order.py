"""Which example comes next: a permutation an epoch, and a mixture's turns.

Both are read at any place without what comes before it: an order is a function
of its seed alone, the same on every host. The turns are Grain's. Its shuffle is
not used: two epochs of 2 M rows correlate by 0.04, where chance gives 0.0007,
and a chunk of the epochs of a few rows takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import sys

import grain
import numpy as np

# Places that are looked up at once.
CHUNK = 1024
# Epochs of more are shuffled without a table.
_TABLE = 1 << 22
_ROUNDS = 5


class _Same(grain.MapDataset[int]):
  """One number at every place."""

  def __init__(self, number: int):
    super().__init__()
    self._number = number

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index):
    return self._number


def _as_array(values) -> np.ndarray:
  return np.array(values, np.int64)


class Order:
  """The examples of a store, epoch after epoch.

  Attributes:
    length: examples of an epoch.
  """

  def __init__(self, length: int, seed: int | Sequence[int] | None):
    """`seed` None is the order of the store."""
    self.length, self._seed = length, seed
    self._table = functools.lru_cache(maxsize=2)(self._permutation)

  def chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, examples), int64 (CHUNK,), of the chunk of this number."""
    places = np.arange(number * CHUNK, (number + 1) * CHUNK)
    epochs, places = np.divmod(places, self.length)
    if self._seed is None:
      return epochs, places
    found = np.empty(CHUNK, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
      here = epochs == epoch
      if self.length <= _TABLE:
        found[here] = self._table(epoch)[places[here]]
      else:
        keys = self._seeds(epoch).generate_state(2 * _ROUNDS, np.uint64)
        found[here] = shuffled(places[here], self.length, keys)
    return epochs, found

  def _seeds(self, epoch: int) -> np.random.SeedSequence:
    seeds = np.ravel(self._seed).tolist()
    return np.random.SeedSequence([*seeds, epoch])

  def _permutation(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng(self._seeds(epoch))
    return rng.permutation(np.arange(self.length, dtype=np.uint32))


def shuffled(places: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
  """Where a permutation of [0, length) puts these places.

  A Feistel network over the next power of two, walked until it is within the
  length (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").

  Args:
    places: int64 (N,).
    length: at least 2.
    keys: uint64, one a half round.
  """
  bits = int(length - 1).bit_length()
  low = np.uint64(bits // 2)
  high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
  low_mask = np.uint64((1 << (bits // 2)) - 1)
  found = places.astype(np.uint64)
  outside = np.arange(len(found))
  while len(outside):
    high, rest = found[outside] >> low, found[outside] & low_mask
    for one, other in keys.reshape(-1, 2):
      high ^= _mixed(rest ^ one) & high_mask
      rest ^= _mixed(high ^ other) & low_mask
    found[outside] = high << low | rest
    outside = outside[found[outside] >= length]
  return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
  """uint64 to uint64: SplitMix64's last steps (Steele et al., 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


class Turns:
  """Which of several streams gives the next example, by their rates."""

  def __init__(self, rates: Sequence[float]):
    turns = grain.MapDataset.mix(
      [_Same(number) for number in range(len(rates))], list(rates)
    )
    self._chunks = turns.batch(
      CHUNK, batch_fn=lambda values: np.array(values, np.int64)
    )

  def chunk(self, number: int) -> np.ndarray:
    """int64 (CHUNK,), the numbers of the streams."""
    return self._chunks[number]
