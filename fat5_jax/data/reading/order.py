"""Which example comes next: a permutation an epoch, and a mixture's turns.

Both are Grain's, read at any place without what comes before it: an order is a
function of its seed alone, the same on every host.
"""

from __future__ import annotations

from collections.abc import Sequence
import sys

import grain
import numpy as np

# Places that are looked up at once.
CHUNK = 1024


class _Places(grain.MapDataset[int]):
  """Its places themselves, those of later epochs too."""

  def __init__(self, length: int):
    super().__init__()
    self._length = length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index):
    return index


class _Same(_Places):
  """One number at every place."""

  def __init__(self, number: int):
    super().__init__(sys.maxsize)
    self._number = number

  def __getitem__(self, index):
    return self._number


def _as_array(values) -> np.ndarray:
  return np.array(values, np.int64)


class Order:
  """The examples of a store, epoch after epoch.

  Attributes:
    length: examples of an epoch.
  """

  def __init__(self, length: int, seed: int | None):
    """`seed` None is the order of the store."""
    self.length = length
    places: grain.MapDataset = _Places(length)
    if seed is not None:
      places = places.seed(seed).shuffle()
    self._chunks = places.repeat().batch(CHUNK, batch_fn=_as_array)

  def chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, examples), int64 (CHUNK,), of the chunk of this number."""
    return np.divmod(self._chunks[number], self.length)


class Turns:
  """Which of several streams gives the next example, by their rates."""

  def __init__(self, rates: Sequence[float]):
    turns = grain.MapDataset.mix(
      [_Same(number) for number in range(len(rates))], list(rates)
    )
    self._chunks = turns.batch(CHUNK, batch_fn=_as_array)

  def chunk(self, number: int) -> np.ndarray:
    """int64 (CHUNK,), the numbers of the streams."""
    return self._chunks[number]
