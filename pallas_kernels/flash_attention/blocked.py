"""What every kernel shares: the geometry of tiles, padding, and the gradient.

A kernel visits tiles of `bq` queries x `bk` keys. The bias of a tile depends on
its offset alone, (position of first key - position of first query), and is
constant where the tile lies wholly beyond the radius of the bias. So the tiles
of a head are of three sorts: a few *near* ones, each a Toeplitz matrix, and the
*far* ones on either side, a number each. Causality is part of the bias: minus
infinity at positive distances. All of this is decided here, once; a kernel
gets diagonals and constants and returns their gradients. README.md has the
mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import sequential_vmap
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.padding import pad_to, without_padding
from pallas_kernels.flash_attention.positions import AtPositions, FullBias
from pallas_kernels.flash_attention.relative_bias import DistanceBias

LOG2E = math.log2(math.e)
MAX_RADIUS = 1024
MAX_HEAD_DIM = 256
# Segment 0 is padding on both sides and must match nothing.
# Ids start above these two.
PADDING_QUERY = np.iinfo(np.int32).min
_NO_ID = np.iinfo(np.int32).min + 1
LEAST_ID = _NO_ID + 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known about the tiles when the kernel is compiled.

  The offset of tile (i, j) is `j * bk - i * bq - q_offset`. With
  `q_offset = unit * shift + phase` it is `unit * step - phase`, where
  `step = j * bk / unit - i * bq / unit - shift`; q_offset may be traced.

  Attributes:
    bq: queries in a tile.
    bk: keys in a tile.
    causal: whether tiles beyond `last` are invisible.
    biased: whether there are near tiles or constants at all.
    tails: whether far tiles grow with distance (ALiBi) instead of being one
      constant; they then have two tiles of their own after the near ones.
    masked: whether segment ids are given.
    scale: multiplies q k^T.
    first: the first step whose tile is near.
    last: the last one; less than `first` where there is none.
  """

  bq: int
  bk: int
  causal: bool
  biased: bool
  tails: bool
  masked: bool
  scale: float
  first: int
  last: int

  @property
  def unit(self) -> int:
    return math.gcd(self.bq, self.bk)

  @property
  def near(self) -> int:
    """Number of near tiles."""
    return self.last - self.first + 1

  @property
  def tiles(self) -> int:
    return self.near + 2 * self.tails

  def step(self, i, j, shift):
    return j * (self.bk // self.unit) - i * (self.bq // self.unit) - shift

  def tile_index(self, step):
    """Which tile belongs to a step; only a near one has one without tails."""
    index = jnp.clip(step, self.first, self.last) - self.first
    if not self.tails:
      return index
    index = jnp.where(step < self.first, self.near, index)
    return jnp.where(step > self.last, self.near + 1, index)

  def key_blocks(self, i, shift, nk: int):
    """One past the last key block that query block i sees, at most nk."""
    if not self.causal:
      return nk
    # step(i, j) <= last  <=>  j <= (last + shift + i * bq / unit) * unit / bk.
    steps = self.last + shift + i * (self.bq // self.unit)
    return jnp.clip(steps // (self.bk // self.unit) + 1, 0, nk)

  def first_query_block(self, j, shift, nq: int):
    """The first query block that sees key block j, at most nq."""
    if not self.causal:
      return 0
    steps = j * (self.bk // self.unit) - shift - self.last
    return jnp.clip(-(-steps // (self.bq // self.unit)), 0, nq)


def make_plan(
  bias: DistanceBias | None,
  q_offset,
  *,
  queries: int,
  keys: int,
  bq: int,
  bk: int,
  causal: bool,
  masked: bool,
  scale: float,
) -> Plan:
  """The Plan for these block sizes; see Plan."""
  unit = math.gcd(bq, bk)
  static = isinstance(q_offset, (int, np.integer))
  # offset = unit * step - phase, with phase = q_offset modulo unit.
  max_phase = q_offset % unit if static else unit - 1
  min_phase = max_phase if static else 0
  first, last = 0, -1
  if bias is not None:
    # Near: some distance in (offset - bq, offset + bk) is within the radius.
    first = -(-(2 - bias.radius - bk + min_phase) // unit)
    last = (bias.radius + bq - 2 + max_phase) // unit
  if causal:
    # The last tile with a distance <= 0; the diagonal is always near.
    first = min(first, -(-(2 - bk + min_phase) // unit))
    last = (bq - 1 + max_phase) // unit
  if static and first <= last:
    # Short inputs do not meet all near tiles.
    shift, nq, nk = q_offset // unit, -(-queries // bq), -(-keys // bk)
    lowest = -shift - (nq - 1) * (bq // unit)
    highest = -shift + (nk - 1) * (bk // unit)
    first, last = max(first, min(lowest, last)), min(last, max(highest, first))
  return Plan(
    bq=bq,
    bk=bk,
    causal=causal,
    biased=bias is not None or causal,
    tails=bias is not None and bias.slopes_H2 is not None,
    masked=masked,
    scale=scale,
    first=first,
    last=last,
  )


class Bias(NamedTuple):
  """A DistanceBias cut for a Plan, in natural units.

  Attributes:
    diagonals_HTL: float32 (H, tiles, bq + bk - 1): the diagonals of each tile,
      ascending in distance (see relative_bias.toeplitz), -inf where causality
      forbids.
    constants_H22: float32 (H, side, 2): a far tile at `offset` adds
      `c[0] + c[1] * offset`; side 0 holds the keys before.
  """

  diagonals_HTL: jax.Array
  constants_H22: jax.Array


def cut_bias(bias: DistanceBias, phase, plan: Plan) -> Bias:
  """The tiles and constants of a bias; linear in it."""
  length = plan.bq + plan.bk - 1
  start = plan.first * plan.unit - phase - (plan.bq - 1)
  whole = length + (plan.near - 1) * plan.unit
  window_HL = bias.window(start, whole)
  if plan.causal:
    visible_L = start + jnp.arange(whole) <= 0
    window_HL = jnp.where(visible_L, window_HL, -jnp.inf)
  diagonals = [
    window_HL[:, t * plan.unit : t * plan.unit + length]
    for t in range(plan.near)
  ]
  ends_H2 = jnp.stack([bias.vector_HR[:, 0], bias.vector_HR[:, -1]], axis=1)
  slopes_H2 = jnp.zeros_like(ends_H2)
  if plan.tails:
    local_L = jnp.arange(length, dtype=jnp.float32) - (plan.bq - 1)
    # Beyond the radius the bias is end + slope * (side * distance - radius).
    slopes_H2 = bias.slopes_H2 * jnp.asarray([-1.0, 1.0])
    diagonals += [slopes_H2[:, side, None] * local_L for side in (0, 1)]
    ends_H2 = ends_H2 - bias.slopes_H2 * bias.radius
  return Bias(
    jnp.stack(diagonals, axis=1), jnp.stack([ends_H2, slopes_H2], axis=2)
  )


class Segments(NamedTuple):
  """Segment ids, made so that visible means equal, and their extent a block.

  Attributes:
    q_BQ, kv_BK: int32 ids; padding has become an id that the other side lacks.
    q_range_BI3, kv_range_BJ3: int32 (B, blocks, 3): least and greatest id of
      the block, padding left out, and the id if it is the block's only one.
  """

  q_BQ: jax.Array
  kv_BK: jax.Array
  q_range_BI3: jax.Array
  kv_range_BJ3: jax.Array


def make_segments(q_BQ, kv_BK, plan: Plan) -> Segments:
  def extent(ids_BL, block, mixed):
    ids_BIL = ids_BL.reshape(ids_BL.shape[0], -1, block)
    real = ids_BIL != 0
    limit = np.iinfo(np.int32)
    low = jnp.where(real, ids_BIL, limit.max).min(axis=-1)
    high = jnp.where(real, ids_BIL, limit.min).max(axis=-1)
    only = jnp.where((low == high) & real.all(axis=-1), low, mixed)
    return jnp.stack([low, high, only], axis=-1)

  return Segments(
    jnp.where(q_BQ == 0, PADDING_QUERY, q_BQ),
    kv_BK,
    extent(q_BQ, plan.bq, PADDING_QUERY),
    extent(kv_BK, plan.bk, _NO_ID),
  )


class Operands(NamedTuple):
  """What a kernel reads; the lengths divide by the blocks.

  Attributes:
    q, k, v: (B, Q or K, H, D).
    bias: cut for the Plan, or None where it is not biased.
    segments: None where it is not masked.
    shift, phase: int32 scalars, see Plan.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  bias: Bias | None
  segments: Segments | None
  shift: jax.Array
  phase: jax.Array


class Cotangents(NamedTuple):
  """What the backward kernels read beside it.

  Attributes:
    do: (B, Q, H, D), in the dtype of q.
    lse: float32 (B, H, Q), as the forward kernel gave it.
    delta: float32 (B, H, Q): see row_delta.
    k_mean: float32 (B, H, D): see mean_key; None for float32 inputs.
  """

  do: jax.Array
  lse: jax.Array
  delta: jax.Array
  k_mean: jax.Array | None


class Kernels(NamedTuple):
  """One implementation; under vmap its calls run one after the other.

  forward(Operands, plan=, for_gradient=) gives (o_BQHD, rest_BQHD, lse_BHQ):
  rest is what rounding took from a 16-bit o, lse the logarithm of the sum of
  e^score, 0 for a row that sees nothing; both are None unless `for_gradient`.
  Its q, k and v hold anything in padding, and o is 0 there.
  backward(Operands, Cotangents, plan=, need_dbias=) gives (dq, dk, dv, Bias or
  None); its padding is empty.
  """

  forward: Callable
  backward: Callable

  def run_forward(self, operands: Operands, **static):
    return _run(self.forward, tuple(static.items()), operands)

  def run_backward(self, operands: Operands, cotangents: Cotangents, **static):
    return _run(self.backward, tuple(static.items()), operands, cotangents)


# A function of its own in the program: layers of one shape share it, and it is
# traced and lowered once. A kernel of Mosaic GPU takes seconds.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(kernel: Callable, static: tuple, *arrays):
  return sequential_vmap(functools.partial(kernel, **dict(static)))(*arrays)


def _operands(plan, q, k, v, bias, segments, q_offset) -> Operands:
  shift, phase = jnp.divmod(q_offset, plan.unit)
  cut = cut_bias(bias, phase, plan) if plan.biased else None
  return Operands(q, k, v, cut, segments, shift, phase)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernels, plan, *operands):
  x = _operands(plan, *operands)
  return kernels.run_forward(x, plan=plan, for_gradient=False)[0]


def _attention_forward(kernels, plan, *operands):
  # Whether the bias is differentiated is known here alone; an empty tuple in
  # the residuals tells the backward pass.
  need_dbias = any(x.perturbed for x in jax.tree.leaves(operands[3]))
  operands = jax.tree.map(lambda x: x.value, operands)
  x = _operands(plan, *operands)
  o, rest, lse = saveable(kernels.run_forward(x, plan=plan, for_gradient=True))
  return o, (operands, o, rest, lse, () if need_dbias else None)


def _attention_backward(kernels, plan, residuals, do):
  (q, k, v, bias, segments, q_offset), o, rest, lse, mark = residuals
  if isinstance(do, jax.custom_derivatives.SymbolicZero):
    do = jnp.zeros_like(o)
  if segments is not None:
    real_queries = segments.q_BQ != PADDING_QUERY
    q, do = (without_padding(x, real_queries) for x in (q, do))
    k, v = (without_padding(x, segments.kv_BK) for x in (k, v))
  x = _operands(plan, q, k, v, bias, segments, q_offset)
  k_mean = None
  if k.dtype != jnp.float32:
    k_mean = mean_key(k, None if segments is None else segments.kv_BK, 1)
  delta = jnp.swapaxes(row_delta(do, o, rest), 1, 2)
  dq, dk, dv, dcut = kernels.run_backward(
    x,
    Cotangents(do.astype(q.dtype), lse, delta, k_mean),
    plan=plan,
    need_dbias=mark is not None and plan.biased,
  )
  if dcut is None:
    dbias = jax.tree.map(jnp.zeros_like, bias)
  else:
    _, transpose = jax.vjp(lambda b: cut_bias(b, x.phase, plan), bias)
    [dbias] = transpose(dcut)
  return dq, dk, dv, dbias, None, None


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def saveable(results):
  """All named "attention", for a policy of jax.checkpoint that saves them.

  The backward pass then needs no second forward pass; `o` and what rounding
  took from it are as large as the queries each.
  """
  return jax.tree.map(lambda x: checkpoint_name(x, "attention"), results)


def rounded(x, dtype):
  """(float32 x in `dtype`, what rounding took from it or None, likewise).

  T5's scores reach thousands, where one key takes nearly all of the softmax.
  There dP and its mean, delta, all but cancel in dS = P (dP - delta), and a
  delta from a bfloat16 o would leave its rounding in their place.
  """
  if dtype == jnp.float32:
    return x, None
  high = x.astype(dtype)
  return high, (x - high.astype(jnp.float32)).astype(dtype)


def row_delta(do, o, rest):
  """float32 sum_k p dp, one number a row (FlashAttention, algorithm 4)."""
  o = o.astype(jnp.float32)
  if rest is not None:
    o += rest.astype(jnp.float32)
  return jnp.sum(do.astype(jnp.float32) * o, axis=-1)


def mean_key(k, kv_segment_ids_BK, axis: int):
  """float32: the mean of the keys that are no padding, along `axis`.

  A row of dS sums to zero, so dq = dS k = dS (k - any one vector). In 16 bits
  that sum is not quite zero, and keys that share a direction, as those of T5
  with all scores near -5,000, would multiply what is left.
  """
  k = k.astype(jnp.float32)
  if kv_segment_ids_BK is None:
    return k.mean(axis=axis)
  real_BK = (kv_segment_ids_BK != 0).astype(jnp.float32)
  count_B = jnp.maximum(real_BK.sum(axis=1), 1.0)
  real = jnp.expand_dims(real_BK, [a for a in (1, 2, 3) if a != axis])
  return (k * real).sum(axis=axis) / count_B[:, None, None]


def unsupported(q_BQHD, k_BKHD, bias) -> str | None:
  """Why no kernel can take these arguments, or None."""
  if isinstance(bias, FullBias):
    return "a FullBias is dense; use implementation='chunked'"
  if isinstance(bias, AtPositions):
    return (
      "the bias (FIRE's, or of positions that do not count up by one) is no"
      " function of the distance in the row; use implementation='chunked'"
    )
  if q_BQHD.dtype != k_BKHD.dtype:
    return f"queries are {q_BQHD.dtype}, keys {k_BKHD.dtype}"
  if q_BQHD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"it computes in bfloat16, float16 and float32, not {q_BQHD.dtype}"
  if bias is not None and bias.radius > MAX_RADIUS:
    return (
      f"the bias changes up to distance {bias.radius}; the kernels keep its "
      f"near tiles at hand and stop at {MAX_RADIUS}; use 'chunked'"
    )
  if q_BQHD.shape[-1] > MAX_HEAD_DIM:
    return f"head dimension {q_BQHD.shape[-1]} exceeds {MAX_HEAD_DIM}"
  return None


def attention(
  kernels: Kernels,
  q_BQHD,
  k_BKHD,
  v_BKHD,
  bias: DistanceBias | None,
  q_segment_ids,
  kv_segment_ids,
  q_offset,
  *,
  causal: bool,
  scale: float,
  bq: int,
  bk: int,
  head_dim: int,
) -> jax.Array:
  """reference.attention by these kernels, in blocks of bq x bk.

  Lengths are padded to the blocks and the head dimension to `head_dim`; keys
  that were added are told apart by segment 0.
  """
  batch, queries, heads, dim = q_BQHD.shape
  keys = k_BKHD.shape[1]
  if q_segment_ids is not None or kv_segment_ids is not None or keys % bk:
    if q_segment_ids is None:
      q_segment_ids = jnp.ones((batch, queries), jnp.int32)
    if kv_segment_ids is None:
      kv_segment_ids = jnp.ones((batch, keys), jnp.int32)
  masked = kv_segment_ids is not None
  plan = make_plan(
    bias,
    q_offset,
    queries=queries,
    keys=keys,
    bq=bq,
    bk=bk,
    causal=causal,
    masked=masked,
    scale=scale,
  )
  if plan.biased and bias is None:
    bias = DistanceBias(jnp.zeros((heads, 3), jnp.float32))
  segments = None
  if masked:
    segments = make_segments(
      pad_to(q_segment_ids.astype(jnp.int32), bq, 1),
      pad_to(kv_segment_ids.astype(jnp.int32), bk, 1),
      plan,
    )
  q, k, v = (
    pad_to(pad_to(x, block, 1), head_dim, 3)
    for x, block in ((q_BQHD, bq), (k_BKHD, bk), (v_BKHD, bk))
  )
  operands = (q, k, v, bias, segments, jnp.asarray(q_offset, jnp.int32))
  o = _attention(kernels, plan, *operands)
  return o[:, :queries, :, :dim]
