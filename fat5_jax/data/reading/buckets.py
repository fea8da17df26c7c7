"""A few shapes for rows of many lengths, chosen from the lengths themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fat5_jax.errors import UserError

# Examples that are looked at, and shapes that come into question.
_SAMPLE, _CANDIDATES = 20_000, 576
_MOST = 64

Shape = tuple[tuple[int, ...], int]


def check(given: Any, limits: Sequence[int]) -> list[tuple[int, ...]] | int:
  """How many shapes, or which, the last of them that of all lengths.

  Args:
    given: BUCKETS.
    limits: TASK_FEATURE_LENGTHS, of the features that have lengths.

  Raises:
    UserError: for what is neither, or fits no row.
  """
  is_length = lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0
  if is_length(given) and given <= _MOST:
    return given
  if not isinstance(given, (list, tuple)) or not given:
    raise UserError(
      f"BUCKETS = {given!r} must be a number of lengths from 1 to {_MOST}, or a"
      " list of them: [64, 128]"
    )
  limits, found = tuple(limits), set()
  for shape in given:
    lengths = (
      shape if isinstance(shape, (list, tuple)) else (shape, *limits[1:])
    )
    if not all(map(is_length, lengths)) or len(lengths) != len(limits):
      raise UserError(
        f"BUCKETS: {shape!r} must be a number of tokens"
        + (" or a pair, of inputs and targets" if len(limits) > 1 else "")
      )
    if any(length > limit for length, limit in zip(lengths, limits)):
      raise UserError(
        f"BUCKETS: {shape!r} is more than TASK_FEATURE_LENGTHS, {limits}, to"
        " which rows are cut"
      )
    found.add(tuple(lengths))
  return [*sorted(found - {limits}), limits]


def rounded(
  lengths: np.ndarray, limits: np.ndarray | Sequence[int]
) -> np.ndarray:
  """Up to a multiple of 8 (4, 2 or 1 where that were much), or to the limit."""
  lengths = np.maximum(lengths, 1)
  steps = np.select([lengths <= 16, lengths <= 32, lengths <= 64], [1, 2, 4], 8)
  return np.minimum(-(-lengths // steps) * steps, limits)


def _candidates(sizes: np.ndarray, limits: Sequence[int]) -> list[np.ndarray]:
  """The lengths of each feature that come into question, the limit included."""
  columns = rounded(sizes, limits).T
  axes = [np.unique([*c, limit]) for c, limit in zip(columns, limits)]
  room = _CANDIDATES
  # Few lengths of one feature, those of labels in words, leave more of another.
  order = sorted(range(len(axes)), key=lambda i: len(axes[i]))
  for done, i in enumerate(order):
    most = int(room ** (1 / (len(order) - done)))
    if len(axes[i]) > most:
      shares = np.linspace(0, 1, most + 1)[1:]
      found = np.quantile(columns[i], shares, method="higher")
      axes[i] = np.unique([*found, limits[i]]).astype(np.int64)
    room //= len(axes[i])
  return axes


def choose(
  sizes: np.ndarray, limits: Sequence[int], count: int
) -> list[tuple[int, ...]]:
  """At most `count` lengths that leave little padding; the last one fits all.

  Greedy: each time the shape that saves most, then each in turn is moved to
  where it saves more, until none does.

  Args:
    sizes: (N, features), tokens of examples, as cut.
    limits: the greatest length of each feature, that of the last shape.
    count: shapes.
  """
  sizes = np.asarray(sizes)
  if len(sizes) > _SAMPLE:
    rng = np.random.default_rng(0)
    sizes = sizes[rng.choice(len(sizes), _SAMPLE, replace=False)]
  axes = _candidates(sizes, limits)
  grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
  whole = np.asarray(limits, np.int64)
  grid = grid[(grid != whole).any(axis=1)]
  cost = grid.sum(axis=1)
  # Equal sizes count together.
  sizes, weights = np.unique(sizes, axis=0, return_counts=True)
  # (candidates, sizes): what an example costs in a shape; the whole's where it
  # does not fit.
  most = int(whole.sum())
  table = np.where(
    (grid[:, None] >= sizes[None]).all(axis=2), cost[:, None], most
  ).astype(np.float32)

  def best_with(chosen):
    rest = np.full(len(sizes), most, np.float32)
    if chosen:
      rest = table[chosen].min(axis=0)
    totals = np.minimum(table, rest) @ weights
    return int(totals.argmin()), float(totals.min())

  chosen: list[int] = []
  total = float(most * weights.sum())
  while len(chosen) < min(count - 1, len(grid)):
    number, found = best_with(chosen)
    if found >= total:
      break
    chosen.append(number)
    total = found
  improved = bool(chosen)
  while improved:
    improved = False
    for place in range(len(chosen)):
      others = chosen[:place] + chosen[place + 1 :]
      number, found = best_with(others)
      if found < total - 0.5:
        chosen, total, improved = [*others, number], found, True
  shapes = {tuple(map(int, grid[number])) for number in chosen}
  return [*sorted(shapes), tuple(map(int, limits))]


def with_rows(
  lengths: Sequence[tuple[int, ...]], tokens: int, multiple: int
) -> list[Shape]:
  """(lengths, rows) of batches of about so many tokens.

  Args:
    lengths: of the shapes.
    tokens: of a batch.
    multiple: that the rows of a batch must be one of.

  Raises:
    UserError: if the longest rows are more than that.
  """
  found = []
  for shape in lengths:
    rows = tokens // sum(shape) // multiple * multiple
    if rows < multiple:
      raise UserError(
        f"BUCKETS: {tokens:,} tokens a batch are less than {multiple} rows"
        f" of {sum(shape):,}: raise BATCH_SIZE"
      )
    found.append((shape, rows))
  return found
