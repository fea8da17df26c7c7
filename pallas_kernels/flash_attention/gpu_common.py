"""What both GPU backends share: the blocks a program visits, bias tiles.

Both cut queries and keys into blocks of one size, so a step of the Plan is a
number of blocks, and a program visits its near blocks first: the order of an
online softmax is free, and a loop over near blocks and one over far ones need
no branch inside.
"""

from __future__ import annotations

import functools

from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked
from pallas_kernels.flash_attention.blocked import Operands, Plan
from pallas_kernels.flash_attention.relative_bias import diagonal_sums, toeplitz


class Span:
  """The blocks one program visits: near ones, those before, those after."""

  def __init__(self, ref, block: int):
    self.block_size = block
    self.near, self.near_count, self.start, self.count = (
      ref[n] for n in range(4)
    )

  def part(self, t, parts: int):
    """(block, slice within it, slice of positions) of the t-th visit."""
    if parts == 1:
      j, part = self._block(t), 0
    else:
      j, part = self._block(t // parts), lax.rem(t, parts)
    size = self.block_size // parts
    start = j * self.block_size + part * size
    return j, pl.ds(part * size, size), pl.ds(start, size)

  def _block(self, t):
    far = t + self.start
    far += jnp.where(far < self.near, 0, self.near_count)
    return jnp.where(t < self.near_count, self.near + t, far)


def longest_first(plan: Plan, n, nq: int):
  """The query block of the n-th program of a head: the last sees most keys.

  Programs start in order; those that take long had better not start last. The
  first key blocks are seen by most queries: they need no such turn.
  """
  return nq - 1 - n if plan.causal else n


def near_then_far(plan: Plan, span: Span, parts: int, step, carry):
  """carry after step(near, t, carry) of every part of a span's blocks."""
  start = 0
  if plan.biased:
    start = span.near_count * parts
    carry = lax.fori_loop(0, start, functools.partial(step, True), carry)
  return lax.fori_loop(
    start, span.count * parts, functools.partial(step, False), carry
  )


def _span(start, near, far, stop):
  """int32 (..., 4): a Span, each bound clipped into the ones around it."""
  stop = jnp.maximum(start, stop)
  near, far = (jnp.clip(x, start, stop) for x in (near, far))
  near_count = jnp.maximum(far - near, 0)
  # Visit t after the near ones is block t - near_count + start, or later.
  numbers = near, near_count, start - near_count, stop - start
  return jnp.stack(numbers, axis=-1).astype(jnp.int32)


def key_spans(plan: Plan, segments, shift, batch, nq, nk):
  """int32 (B, nq, 4): the key blocks that each query block visits."""
  i = jnp.arange(nq)[None]
  start = jnp.zeros((batch, nq), jnp.int32)
  stop = jnp.broadcast_to(plan.key_blocks(i, shift, nk), start.shape)
  if plan.masked:
    seen = _overlap(segments).swapaxes(1, 2)
    start, stop = _extent(seen, start, stop)
  near = plan.first + shift + i
  return _span(start, near, near + plan.near, stop)


def query_spans(plan: Plan, segments, shift, batch, nq, nk):
  """int32 (B, nk, 4): the query blocks that visit each key block."""
  j = jnp.arange(nk)[None]
  stop = jnp.full((batch, nk), nq, jnp.int32)
  start = jnp.broadcast_to(plan.first_query_block(j, shift, nq), stop.shape)
  if plan.masked:
    start, stop = _extent(_overlap(segments), start, stop)
  near = j - shift - plan.last
  return _span(start, near, near + plan.near, stop)


def _overlap(segments):
  """Boolean (B, nq, nk), for a reduction that fuses it away."""
  q, kv = segments.q_range_BI3[:, :, None], segments.kv_range_BJ3[:, None]
  return (q[..., 0] <= kv[..., 1]) & (kv[..., 0] <= q[..., 1])


def _extent(seen_BXY, start_BY, stop_BY):
  """From the first to one past the last X that is seen, within the bounds."""
  x = jnp.arange(seen_BXY.shape[1])[None, :, None]
  first = jnp.where(seen_BXY, x, seen_BXY.shape[1]).min(axis=1)
  last = jnp.where(seen_BXY, x, -1).max(axis=1)
  return jnp.maximum(start_BY, first), jnp.minimum(stop_BY, last + 1)


def bias_operands(x: Operands, plan: Plan, *, transposed=False):
  """Near tiles (H, T, bq, bk) or transposed, and what far ones add, by side.

  A far pair adds `constants[h, side]` and, where there are tails,
  `slopes[h, side]` times its distance, as if q_offset were a whole number of
  blocks: the query's share of that is a number a row, and the key's an addition
  a pair. The two tiles that a Plan has for tails are not read.
  """
  if not plan.biased:
    return {}
  diagonals_HTL = x.bias.diagonals_HTL[:, : plan.near]
  heads, tiles, length = diagonals_HTL.shape
  flat = diagonals_HTL.reshape(-1, length)
  if transposed:
    flat = toeplitz(flat[:, ::-1], plan.bk, plan.bq)
  else:
    flat = toeplitz(flat, plan.bq, plan.bk)
  found = {
    "tiles": flat.reshape(heads, tiles, *flat.shape[1:]),
    "constants": x.bias.constants_H22[:, :, 0],
  }
  if plan.tails:
    found["slopes"] = x.bias.constants_H22[:, :, 1]
    found["constants"] -= found["slopes"] * x.phase.astype(jnp.float32)
  return found


def id_operands(segments):
  if segments is None:
    return {}
  return {
    "q_ids": segments.q_BQ,
    "kv_ids": segments.kv_BK,
    "q_only": segments.q_range_BI3[:, :, 2],
    "kv_only": segments.kv_range_BJ3[:, :, 2],
  }


def dbias_splits(heads: int, plan: Plan, pairs: int) -> int:
  """Programs a near tile: enough for every multiprocessor, still few."""
  return min(-(-132 // (heads * plan.near)), pairs)


def bias_gradient(
  x: Operands, plan: Plan, dtiles_HTSQK, far_BHNQ
) -> blocked.Bias:
  """From sums of dS: of near tiles, in splits, and of far keys, a row each.

  Args:
    x: what the gradient is of.
    plan: the geometry of tiles.
    dtiles_HTSQK: of the near tiles.
    far_BHNQ: of the keys before and after; where there are tails, then those of
      dS times the distance that `bias_operands` speaks of.
  """
  heads, near, _, bq, bk = dtiles_HTSQK.shape
  tiles = dtiles_HTSQK.sum(axis=2).reshape(-1, bq, bk)
  diagonals_HTL = diagonal_sums(tiles).reshape(heads, near, -1)
  far_HN = far_BHNQ.sum(axis=(0, 3))
  sums_H2, slopes_H2 = far_HN[:, :2], jnp.zeros_like(far_HN[:, :2])
  if plan.tails:
    slopes_H2 = far_HN[:, 2:] - sums_H2 * x.phase.astype(jnp.float32)
    diagonals_HTL = jnp.pad(diagonals_HTL, ((0, 0), (0, 2), (0, 0)))
  return blocked.Bias(diagonals_HTL, jnp.stack([sums_H2, slopes_H2], axis=2))


def pairs_of_tile(n, shift, plan: Plan, batch: int, nq: int, nk: int):
  """The (batch, query block, key block) whose tile is the n-th near one.

  Returns:
    (how many there are, t -> the t-th of them).
  """
  offset = n + plan.first + shift
  first = jnp.maximum(0, -offset)
  per_row = jnp.maximum(jnp.minimum(nq, nk - offset) - first, 0)

  def place(t):
    i = lax.rem(t, per_row) + first
    return lax.div(t, per_row), i, i + offset

  return batch * per_row, place
