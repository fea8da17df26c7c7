"""Rows of unequal length as batches of a few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# The shortest that rows are padded to.
_SHORTEST = 16
# A batch of longer rows holds fewer of them, down to one alone.
_TOKENS_A_ROW = 512


def padded_length(length: int) -> int:
  """The length that rows are padded to: two in an octave (16, 24, 32, 48, 64,
  96, ...), so that few programs are compiled."""
  power = 1 << max(length - 1, _SHORTEST - 1).bit_length()
  shorter = power * 3 // 4
  return shorter if _SHORTEST < length <= shorter else power


def most_rows(length: int, batch_size: int) -> int:
  """Rows of a whole batch: a power of two where they are long."""
  room = batch_size * _TOKENS_A_ROW // padded_length(length)
  if room >= batch_size:
    return batch_size
  return 1 << (max(room, 1).bit_length() - 1)


def group(
  rows: Iterable[T], length: Callable[[T], int], batch_size: int
) -> Iterator[list[T]]:
  """Rows together: at most `batch_size`, and 512 times as many tokens.

  A row of more tokens than that is alone.
  """
  batch: list[T] = []
  longest = 0
  for row in rows:
    size = length(row)
    if batch and len(batch) >= most_rows(max(longest, size), batch_size):
      yield batch
      batch, longest = [], 0
    batch.append(row)
    longest = max(longest, size)
  if batch:
    yield batch


def padded(
  values: Iterable[Sequence[int]], shape: tuple[int, int], fill: int
) -> np.ndarray:
  """Rows of numbers as an int32 array, filled up to its shape."""
  array = np.full(shape, fill, np.int32)
  for target, row in zip(array, values):
    target[: len(row)] = row
  return array


class Shapes:
  """The shapes of batches, those that were there before them first.

  Attributes:
    seen: (rows, length) of each, every one compiled once.
  """

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self.seen: set[tuple[int, int]] = set()

  def of(self, lengths: Sequence[int]) -> tuple[int, int]:
    """(rows, length) of the array that a group of rows goes into.

    A whole batch's where that was there before, or the rows nearly fill it;
    else the next power of two: few rows alone do not cost what a batch does.
    """
    length = padded_length(max(lengths))
    whole = most_rows(length, self._batch_size)
    fewer = min(whole, 1 << (len(lengths) - 1).bit_length())
    shape = (whole if (whole, length) in self.seen else fewer), length
    self.seen.add(shape)
    return shape
