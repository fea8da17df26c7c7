"""Rows of unequal length as batches to predict, in order, of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Lengths are rounded up to a multiple, so that few programs are compiled.
_LENGTH_STEP = 64
# A batch of longer rows holds fewer of them, down to one alone.
_TOKENS_A_ROW = 512


def padded_length(length: int) -> int:
  """The length that rows are padded to: at most a quarter is padding, and of
  long ones there are four in an octave."""
  step = max(_LENGTH_STEP, 1 << max(length - 1, 1).bit_length() >> 3)
  return -(-max(length, 1) // step) * step


def _fits(count: int, longest: int, batch_size: int) -> bool:
  return count * padded_length(longest) <= batch_size * _TOKENS_A_ROW


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
    if batch and not (
      len(batch) < batch_size
      and _fits(len(batch) + 1, max(longest, size), batch_size)
    ):
      yield batch
      batch, longest = [], 0
    batch.append(row)
    longest = max(longest, size)
  if batch:
    yield batch


def shape(lengths: Sequence[int], batch_size: int) -> tuple[int, int]:
  """(rows, length) of the array that a group of rows goes into.

  Short rows always fill up a whole batch, others the next power of two, so that
  few programs are compiled.
  """
  length = padded_length(max(lengths))
  if _fits(batch_size, length, batch_size):
    return batch_size, length
  return 1 << (len(lengths) - 1).bit_length(), length


def padded(
  values: Iterable[Sequence[int]], shape: tuple[int, int], fill: int
) -> np.ndarray:
  """Rows of numbers as an int32 array, filled up to its shape."""
  array = np.full(shape, fill, np.int32)
  for target, row in zip(array, values):
    target[: len(row)] = row
  return array
