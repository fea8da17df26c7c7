"""Attention in plain XLA whose memory is linear in length, on any device.

Forward: online softmax over key blocks for one query block at a time
(FlashAttention, arXiv:2205.14135). Backward: recomputes each tile from the
saved log-sum-exp, one key block at a time. The bias is cut tile by tile from
the distance vector, and its gradient is summed along diagonals. A few queries
against many keys (decoding) are one tile, without a loop.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.bfloat16_product import laid_out, lays_out
from pallas_kernels.flash_attention import relative_bias, tiling
from pallas_kernels.flash_attention.blocked import (
  mean_key,
  row_delta,
  saveable,
)
from pallas_kernels.flash_attention.padding import pad_to, without_padding
from pallas_kernels.flash_attention.positions import AtPositions, FullBias
from pallas_kernels.manual_axes import vary_together

# Tiles of 512 x 512 keep the working set at 1 MiB a head in float32 while the
# matrix products stay large enough to run at speed.
BLOCK = 512
# Beyond this, a CPU takes tiles of one batch row at a time: they stay in its
# cache.
_CACHE_BYTES = 2**22
_MASKED = -1e30


def _tile_scores(q, k, bias_HQK, mask, scale):
  """float32 (B, H, q, k) masked scores of one tile."""
  precision = _precision(q.dtype)
  s = jnp.einsum(
    "bhqd,bhkd->bhqk",
    q,
    k,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  if scale != 1.0:
    s = s * scale
  if bias_HQK is not None:
    s = s + bias_HQK
  return s if mask is None else jnp.where(mask, s, _MASKED)


def _precision(dtype):
  # float32 inputs ask for float32 products; TPUs default to bfloat16 passes.
  if dtype == jnp.float32:
    return jax.lax.Precision.HIGHEST
  return jax.lax.Precision.DEFAULT


def _round(x, dtype):
  """float32 x with the precision of `dtype`.

  A cast there and back could be dropped by XLA, which may keep more precision
  than it is asked for.
  """
  if dtype == jnp.float32:
    return x
  if dtype == jnp.bfloat16:
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
  # reduce_precision has no subnormals, and float16 needs its own.
  return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def _with_rest(x, dtype):
  """blocked.rounded, for XLA."""
  if dtype == jnp.float32:
    return x, None
  high = _round(x, dtype)
  return high.astype(dtype), (x - high).astype(dtype)


def _tile_mask(causal, q_start, k_start, bq, bk, q_seg, kv_seg):
  """Boolean (B or 1, 1, bq, bk), or None where the whole tile is visible."""
  mask = None
  if causal:
    q_position = q_start + jnp.arange(bq)
    k_position = k_start + jnp.arange(bk)
    mask = (k_position <= q_position[:, None])[None, None]
  if kv_seg is not None:
    same = (q_seg[:, :, None] == kv_seg[:, None]) & (kv_seg[:, None] != 0)
    mask = same[:, None] if mask is None else mask & same[:, None]
  return mask


def _tile_bias(bias, i, j, bq, bk, q_offset):
  """float32 (H, bq, bk), or (B or 1, H or 1, bq, bk) of a full bias."""
  if bias is None:
    return None
  if isinstance(bias, FullBias):
    return _full_tile(bias.bias_BHQK, i, j, bq, bk)
  if isinstance(bias, AtPositions):
    return _positions_of_tile(bias, i, j, bq, bk).tile()
  diagonals = lambda: _diagonals(bias, i, j, bq, bk, q_offset)
  near = lambda: relative_bias.toeplitz(diagonals(), bq, bk)
  if bias.slopes_H2 is not None:
    return near()

  def far():
    # All of it is one end of the vector: nothing to expand.
    end_H = jnp.where(before, bias.vector_HR[:, 0], bias.vector_HR[:, -1])
    return jnp.broadcast_to(end_H[:, None, None], (end_H.shape[0], bq, bk))

  is_near, before = _place(bias, i, j, bq, bk, q_offset)
  return jax.lax.cond(is_near, near, far)


def _place(bias, i, j, bq, bk, q_offset):
  """(whether the bias varies within the tile, whether its keys are before)."""
  offset = j * bk - i * bq - q_offset
  is_near = (offset + bk > -bias.radius) & (offset - bq < bias.radius)
  return is_near, offset < 0


def _diagonals(bias, i, j, bq, bk, q_offset):
  first_distance = j * bk - (i * bq + bq - 1) - q_offset
  return bias.window(first_distance, bq + bk - 1)


def _positions_of_tile(bias, i, j, bq, bk):
  return AtPositions(
    bias.bias,
    _block(bias.q_positions_BQ, i, bq, 1),
    _block(bias.kv_positions_BK, j, bk, 1),
  )


def _full_tile(x_BHQK, i, j, bq, bk):
  return jax.lax.dynamic_slice(
    x_BHQK, (0, 0, i * bq, j * bk), (*x_BHQK.shape[:2], bq, bk)
  )


def _add_bias_gradient(dbias, bias, ds_BHQK, i, j, bq, bk, q_offset):
  """`dbias` plus what this tile contributes to it."""
  if dbias is None:
    return None
  if isinstance(bias, AtPositions):
    place = _positions_of_tile(bias, i, j, bq, bk)
    _, transpose = jax.vjp(
      lambda x: dataclasses.replace(place, bias=x).tile(), bias.bias
    )
    # Positions that all rows share have one tile for them.
    if place.q_positions_BQ.shape[0] == 1:
      ds_BHQK = ds_BHQK.sum(axis=0, keepdims=True)
    return jax.tree.map(jnp.add, dbias, transpose(ds_BHQK)[0])
  if isinstance(dbias, FullBias):
    x_BHQK = dbias.bias_BHQK
    shared = tuple(a for a in (0, 1) if x_BHQK.shape[a] == 1)
    tile = _full_tile(x_BHQK, i, j, bq, bk) + ds_BHQK.sum(shared, keepdims=True)
    return FullBias(
      jax.lax.dynamic_update_slice(x_BHQK, tile, (0, 0, i * bq, j * bk))
    )
  tile_HQK = ds_BHQK.sum(axis=0)

  def near():
    _, transpose = jax.vjp(
      lambda b: _diagonals(b, i, j, bq, bk, q_offset), dbias
    )
    return transpose(relative_bias.diagonal_sums(tile_HQK))[0]

  def far():
    end = jnp.where(before, 0, dbias.vector_HR.shape[1] - 1)
    is_end_R = jnp.arange(dbias.vector_HR.shape[1]) == end
    total_H1 = tile_HQK.sum(axis=(1, 2))[:, None]
    return dbias._replace(vector_HR=jnp.where(is_end_R, total_H1, 0.0))

  if dbias.slopes_H2 is not None:
    gradient = near()
  else:
    is_near, before = _place(dbias, i, j, bq, bk, q_offset)
    gradient = jax.lax.cond(is_near, near, far)
  return jax.tree.map(jnp.add, dbias, gradient)


def _block(x, index, size, axis):
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _last_key_block(causal, q_offset, i, bq, bk, nk):
  """One past the last key block that query block i can see."""
  if not causal:
    return nk
  return jnp.clip((q_offset + (i + 1) * bq + bk - 1) // bk, 0, nk)


def _first_query_block(causal, q_offset, j, bq, bk, nq):
  """The first query block that can see key block j."""
  if not causal:
    return 0
  return jnp.clip((j * bk - q_offset) // bq, 0, nq)


def _loop(start, stop, most, body, carry, like):
  """fori_loop; a single iteration is run in line, without a `while`."""
  if most == 1:
    return body(0, carry)
  carry = vary_together(carry, like)
  return jax.lax.fori_loop(start, stop, body, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attention(q, k, v, bias, q_seg, kv_seg, q_offset, causal, scale, bq, bk):
  """Blocked attention on (B, H, L, D) arrays whose lengths divide by blocks."""
  return _forward(
    q, k, v, bias, q_seg, kv_seg, q_offset, causal, scale, bq, bk
  )[0]


def _forward(q, k, v, bias, q_seg, kv_seg, q_offset, causal, scale, bq, bk):
  residuals = (q, k, v, bias, q_seg, kv_seg, q_offset)
  # Masks keep what padding holds out of scores; 0 * NaN is left.
  v = without_padding(v, kv_seg, axis=2)
  batch, heads, queries, head_dim = q.shape
  nq, nk = queries // bq, k.shape[2] // bk

  def query_block(i):
    q_i = _block(q, i, bq, 2)
    q_seg_i = None if kv_seg is None else _block(q_seg, i, bq, 1)

    def key_block(j, carry):
      o, m, l = carry
      mask = _tile_mask(
        causal,
        q_offset + i * bq,
        j * bk,
        bq,
        bk,
        q_seg_i,
        None if kv_seg is None else _block(kv_seg, j, bk, 1),
      )
      tile = _tile_bias(bias, i, j, bq, bk, q_offset)
      s = _tile_scores(q_i, _block(k, j, bk, 2), tile, mask, scale)
      m_next = jnp.maximum(m, s.max(axis=-1))
      p = jnp.exp(s - m_next[..., None])
      if mask is not None:
        # A row with no visible key yet has s == m_next == _MASKED.
        p = jnp.where(mask, p, 0.0)
      # What is summed is what is multiplied, so that o is a mean of values.
      p = _round(p, v.dtype)
      correction = jnp.exp(m - m_next)
      o = o * correction[..., None] + jnp.einsum(
        "bhqk,bhkd->bhqd",
        p.astype(v.dtype),
        _block(v, j, bk, 2),
        precision=_precision(v.dtype),
        preferred_element_type=jnp.float32,
      )
      return o, m_next, l * correction + p.sum(axis=-1)

    o, m, l = _loop(
      0,
      _last_key_block(causal, q_offset, i, bq, bk, nk),
      nk,
      key_block,
      (
        jnp.zeros((batch, heads, bq, head_dim), jnp.float32),
        jnp.full((batch, heads, bq), _MASKED, jnp.float32),
        jnp.zeros((batch, heads, bq), jnp.float32),
      ),
      like=q,
    )
    visible = l > 0
    safe_l = jnp.where(visible, l, 1.0)
    o, rest = _with_rest(o / safe_l[..., None], q.dtype)
    # Apart: their sum would be rounded, by 5e-4 at scores of 10,000.
    return o, rest, (jnp.where(visible, m, 0.0), jnp.log(safe_l))

  def joined(x_NBHQ):
    x_BHNQ = jnp.moveaxis(x_NBHQ, 0, 2)
    return x_BHNQ.reshape(batch, heads, queries, *x_BHNQ.shape[4:])

  if nq == 1:
    found = query_block(0)
  else:
    blocks = jax.lax.map(query_block, jnp.arange(nq))
    found = jax.tree.map(joined, blocks)
  o, rest, lse = saveable(found)
  return o, (*residuals, o, rest, lse)


def _backward(causal, scale, bq, bk, residuals, do):
  q, k, v, bias, q_seg, kv_seg, q_offset, o, rest, lse = residuals
  nq, nk = q.shape[2] // bq, k.shape[2] // bk
  q, do = (without_padding(x, q_seg, axis=2) for x in (q, do))
  k, v = (without_padding(x, kv_seg, axis=2) for x in (k, v))
  delta = row_delta(do, o, rest)
  k_mean = None if k.dtype == jnp.float32 else mean_key(k, kv_seg, 2)

  def product(expression, a, b):
    return jnp.einsum(
      expression,
      a,
      b,
      precision=_precision(q.dtype),
      preferred_element_type=jnp.float32,
    )

  def of_keys(a_BHQK, b_BHQD):
    if lays_out(a_BHQK.dtype):
      a_BHKQ = laid_out(jnp.swapaxes(a_BHQK, 2, 3))
      return product("bhkq,bhqd->bhkd", a_BHKQ, b_BHQD)
    # XLA's CPU products want the first operand as it lies: this transposes the
    # narrow ones, q or do and the result, and not the whole tile.
    x_BHDK = product("bhqd,bhqk->bhdk", b_BHQD, a_BHQK)
    return jnp.swapaxes(x_BHDK, 2, 3)

  def key_block(carry, j):
    k_j, v_j = _block(k, j, bk, 2), _block(v, j, bk, 2)
    kv_seg_j = None if kv_seg is None else _block(kv_seg, j, bk, 1)

    def query_block(i, carry):
      dq, dbias, dk_j, dv_j = carry
      q_i, do_i = _block(q, i, bq, 2), _block(do, i, bq, 2)
      mask = _tile_mask(
        causal,
        q_offset + i * bq,
        j * bk,
        bq,
        bk,
        None if kv_seg is None else _block(q_seg, i, bq, 1),
        kv_seg_j,
      )
      tile = _tile_bias(bias, i, j, bq, bk, q_offset)
      s = _tile_scores(q_i, k_j, tile, mask, scale)
      top, log_sum = (_block(x, i, bq, 2)[..., None] for x in lse)
      p = jnp.exp(s - top - log_sum)
      if mask is not None:
        p = jnp.where(mask, p, 0.0)
      dv_j += of_keys(p.astype(do.dtype), do_i)
      dp = product("bhqd,bhkd->bhqk", do_i, v_j)
      ds = p * (dp - _block(delta, i, bq, 2)[..., None])
      dbias = _add_bias_gradient(dbias, bias, ds, i, j, bq, bk, q_offset)
      ds = _round(ds * scale, q.dtype)
      ds_low = ds.astype(q.dtype)
      dk_j += of_keys(ds_low, q_i)
      dq_i = _block(dq, i, bq, 2) + product("bhqk,bhkd->bhqd", ds_low, k_j)
      if k_mean is not None:
        dq_i -= ds.sum(axis=-1)[..., None] * k_mean[:, :, None]
      dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * bq, 2)
      return dq, dbias, dk_j, dv_j

    dq, dbias = carry
    zero = jnp.zeros(k_j.shape, jnp.float32)
    dq, dbias, dk_j, dv_j = _loop(
      _first_query_block(causal, q_offset, j, bq, bk, nq),
      nq,
      nq,
      query_block,
      (dq, dbias, zero, zero),
      like=q,
    )
    return (dq, dbias), (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

  at_positions = isinstance(bias, AtPositions)
  dbias = jax.tree.map(jnp.zeros_like, bias.bias if at_positions else bias)
  start = vary_together((jnp.zeros(q.shape, jnp.float32), dbias), like=q)
  (dq, dbias), (dk_blocks, dv_blocks) = jax.lax.scan(
    key_block, start, jnp.arange(nk)
  )
  if at_positions:
    dbias = AtPositions(dbias, None, None)
  dk = jnp.moveaxis(dk_blocks, 0, 2).reshape(k.shape)
  dv = jnp.moveaxis(dv_blocks, 0, 2).reshape(v.shape)
  return dq.astype(q.dtype), dk, dv, dbias, None, None, None


_attention.defvjp(_forward, _backward)


def attention(
  q_BQHD,
  k_BKHD,
  v_BKHD,
  bias,
  q_segment_ids,
  kv_segment_ids,
  q_offset,
  *,
  causal: bool,
  scale: float,
) -> jax.Array:
  """Same function as reference.attention, in memory linear in Q + K."""
  batch, queries, heads, _ = q_BQHD.shape
  keys = k_BKHD.shape[1]
  bq = min(BLOCK, queries)
  # Fewer queries leave room for more keys in a tile of the same size.
  bk = min(BLOCK * BLOCK // bq, keys)
  on_cpu = tiling.device_kind() == "cpu"
  too_large = on_cpu and batch * heads * bq * bk * 4 > _CACHE_BYTES
  # A tile of FIRE has a hidden layer a pair: one row's at a time is enough.
  own_tiles = isinstance(bias, AtPositions) and len(bias.q_positions_BQ) > 1
  if batch > 1 and (too_large or own_tiles):
    settings = dict(causal=causal, scale=scale)
    ids = (q_segment_ids, kv_segment_ids)
    return _row_by_row(q_BQHD, k_BKHD, v_BKHD, bias, *ids, q_offset, settings)
  # Padding rows are told apart by segment 0, so a padded side needs ids.
  if q_segment_ids is not None or kv_segment_ids is not None or keys % bk:
    if q_segment_ids is None:
      q_segment_ids = jnp.ones((batch, queries), jnp.int32)
    if kv_segment_ids is None:
      kv_segment_ids = jnp.ones((batch, keys), jnp.int32)
    q_segment_ids = pad_to(q_segment_ids, bq, 1)
    kv_segment_ids = pad_to(kv_segment_ids, bk, 1)
  q, k, v = (
    pad_to(jnp.swapaxes(x, 1, 2), b, 2)
    for x, b in ((q_BQHD, bq), (k_BKHD, bk), (v_BKHD, bk))
  )
  if isinstance(bias, FullBias):
    bias = FullBias(pad_to(pad_to(bias.bias_BHQK, bq, 2), bk, 3))
  if isinstance(bias, AtPositions):
    bias = AtPositions(
      bias.bias,
      pad_to(bias.q_positions_BQ, bq, 1),
      pad_to(bias.kv_positions_BK, bk, 1),
    )
  o = _attention(
    q,
    k,
    v,
    bias,
    q_segment_ids,
    kv_segment_ids,
    jnp.asarray(q_offset, jnp.int32),
    causal,
    scale,
    bq,
    bk,
  )
  return jnp.swapaxes(o[:, :, :queries], 1, 2)


def _row_by_row(q, k, v, bias, q_seg, kv_seg, q_offset, settings):
  """`attention` of one batch row after the other: a tile stays in the cache."""
  of_rows, bias_of = _bias_by_row(bias)
  rows = dict(q=q, k=k, v=v, q_seg=q_seg, kv_seg=kv_seg, bias=of_rows)

  def one(row):
    row = jax.tree.map(lambda x: x[None], row)
    o = attention(
      row["q"],
      row["k"],
      row["v"],
      bias_of(row["bias"]),
      row["q_seg"],
      row["kv_seg"],
      q_offset,
      **settings,
    )
    return o[0]

  return jax.lax.map(one, rows)


def _bias_by_row(bias):
  """(its arrays that each batch row has its own of, a bias from a row's)."""
  if isinstance(bias, FullBias) and len(bias.bias_BHQK) > 1:
    return bias.bias_BHQK, FullBias
  if isinstance(bias, AtPositions) and len(bias.q_positions_BQ) > 1:
    positions = bias.q_positions_BQ, bias.kv_positions_BK
    return positions, lambda row: AtPositions(bias.bias, *row)
  return None, lambda row: bias
