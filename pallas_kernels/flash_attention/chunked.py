"""Attention in plain XLA whose memory is linear in length, on any device.

Forward: online softmax over key blocks for one query block at a time
(FlashAttention, arXiv:2205.14135). Backward: recomputes each tile from the
saved log-sum-exp, one key block at a time. The bias is cut tile by tile from
the distance vector, and its gradient is summed along diagonals.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import relative_bias

# Tiles of 512 x 512 keep the working set at 1 MiB a head in float32 while the
# matrix products stay large enough to run at speed.
BLOCK = 512
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


def _tile_bias(vector_HR, first_distance, bq, bk):
  if vector_HR is None:
    return None
  distances = relative_bias.tile_distances(first_distance, bq, bk)
  diagonals = relative_bias.gather_distances(vector_HR, distances)
  return relative_bias.toeplitz(diagonals, bq, bk)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _attention(
  q, k, v, vector_HR, q_seg, kv_seg, q_offset, causal, scale, bq, bk
):
  """Blocked attention on (B, H, L, D) arrays whose lengths divide by blocks."""
  return _forward(
    q, k, v, vector_HR, q_seg, kv_seg, q_offset, causal, scale, bq, bk
  )[0]


def _forward(
  q, k, v, vector_HR, q_seg, kv_seg, q_offset, causal, scale, bq, bk
):
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
      bias = _tile_bias(vector_HR, j * bk - i * bq - q_offset, bq, bk)
      s = _tile_scores(q_i, _block(k, j, bk, 2), bias, mask, scale)
      m_next = jnp.maximum(m, s.max(axis=-1))
      p = jnp.exp(s - m_next[..., None])
      if mask is not None:
        # A row with no visible key yet has s == m_next == _MASKED.
        p = jnp.where(mask, p, 0.0)
      correction = jnp.exp(m - m_next)
      o = o * correction[..., None] + jnp.einsum(
        "bhqk,bhkd->bhqd",
        p.astype(v.dtype),
        _block(v, j, bk, 2),
        precision=_precision(v.dtype),
        preferred_element_type=jnp.float32,
      )
      return o, m_next, l * correction + p.sum(axis=-1)

    o, m, l = jax.lax.fori_loop(
      0,
      _last_key_block(causal, q_offset, i, bq, bk, nk),
      key_block,
      (
        jnp.zeros((batch, heads, bq, head_dim), jnp.float32),
        jnp.full((batch, heads, bq), _MASKED, jnp.float32),
        jnp.zeros((batch, heads, bq), jnp.float32),
      ),
    )
    visible = l > 0
    safe_l = jnp.where(visible, l, 1.0)
    o = (o / safe_l[..., None]).astype(q.dtype)
    return o, jnp.where(visible, m + jnp.log(safe_l), 0.0)

  o_blocks, lse_blocks = jax.lax.map(query_block, jnp.arange(nq))
  o = jnp.moveaxis(o_blocks, 0, 2).reshape(q.shape)
  lse = jnp.moveaxis(lse_blocks, 0, 2).reshape(batch, heads, queries)
  return o, (q, k, v, vector_HR, q_seg, kv_seg, q_offset, o, lse)


def _backward(causal, scale, bq, bk, residuals, do):
  q, k, v, vector_HR, q_seg, kv_seg, q_offset, o, lse = residuals
  nq, nk = q.shape[2] // bq, k.shape[2] // bk
  # sum_k p dp, one number a row (FlashAttention, algorithm 4).
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)

  def product(expression, a, b):
    return jnp.einsum(
      expression,
      a,
      b,
      precision=_precision(q.dtype),
      preferred_element_type=jnp.float32,
    )

  def key_block(carry, j):
    k_j, v_j = _block(k, j, bk, 2), _block(v, j, bk, 2)
    kv_seg_j = None if kv_seg is None else _block(kv_seg, j, bk, 1)

    def query_block(i, carry):
      dq, dvector, dk_j, dv_j = carry
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
      first_distance = j * bk - i * bq - q_offset
      bias = _tile_bias(vector_HR, first_distance, bq, bk)
      s = _tile_scores(q_i, k_j, bias, mask, scale)
      p = jnp.exp(s - _block(lse, i, bq, 2)[..., None])
      if mask is not None:
        p = jnp.where(mask, p, 0.0)
      dv_j += product("bhqk,bhqd->bhkd", p.astype(do.dtype), do_i)
      dp = product("bhqd,bhkd->bhqk", do_i, v_j)
      ds = p * (dp - _block(delta, i, bq, 2)[..., None])
      if dvector is not None:
        dvector += relative_bias.scatter_distances(
          relative_bias.diagonal_sums(ds.sum(axis=0)),
          relative_bias.tile_distances(first_distance, bq, bk),
          dvector.shape[1] // 2,
        )
      ds_low = (ds * scale).astype(q.dtype)
      dk_j += product("bhqk,bhqd->bhkd", ds_low, q_i)
      dq_i = _block(dq, i, bq, 2) + product("bhqk,bhkd->bhqd", ds_low, k_j)
      dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * bq, 2)
      return dq, dvector, dk_j, dv_j

    dq, dvector = carry
    zero = jnp.zeros(k_j.shape, jnp.float32)
    dq, dvector, dk_j, dv_j = jax.lax.fori_loop(
      _first_query_block(causal, q_offset, j, bq, bk, nq),
      nq,
      query_block,
      (dq, dvector, zero, zero),
    )
    return (dq, dvector), (dk_j.astype(k.dtype), dv_j.astype(v.dtype))

  dvector = None if vector_HR is None else jnp.zeros_like(vector_HR)
  (dq, dvector), (dk_blocks, dv_blocks) = jax.lax.scan(
    key_block, (jnp.zeros(q.shape, jnp.float32), dvector), jnp.arange(nk)
  )
  dk = jnp.moveaxis(dk_blocks, 0, 2).reshape(k.shape)
  dv = jnp.moveaxis(dv_blocks, 0, 2).reshape(v.shape)
  return dq.astype(q.dtype), dk, dv, dvector, None, None, None


_attention.defvjp(_forward, _backward)


def _pad_to(x, multiple, axis):
  """Appends zeros so that the axis divides by `multiple`."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths)


def attention(
  q_BQHD,
  k_BKHD,
  v_BKHD,
  vector_HR,
  q_segment_ids,
  kv_segment_ids,
  q_offset,
  *,
  causal: bool,
  scale: float,
  block: int = BLOCK,
) -> jax.Array:
  """Same function as reference.attention, in memory linear in Q + K."""
  batch, queries = q_BQHD.shape[:2]
  keys = k_BKHD.shape[1]
  bq, bk = min(block, queries), min(block, keys)
  # Padding rows are told apart by segment 0, so a padded side needs ids.
  if q_segment_ids is not None or kv_segment_ids is not None or keys % bk:
    if q_segment_ids is None:
      q_segment_ids = jnp.ones((batch, queries), jnp.int32)
    if kv_segment_ids is None:
      kv_segment_ids = jnp.ones((batch, keys), jnp.int32)
    q_segment_ids = _pad_to(q_segment_ids, bq, 1)
    kv_segment_ids = _pad_to(kv_segment_ids, bk, 1)
  q, k, v = (
    _pad_to(jnp.swapaxes(x, 1, 2), b, 2)
    for x, b in ((q_BQHD, bq), (k_BKHD, bk), (v_BKHD, bk))
  )
  o = _attention(
    q,
    k,
    v,
    vector_HR,
    q_segment_ids,
    kv_segment_ids,
    jnp.asarray(q_offset, jnp.int32),
    causal,
    scale,
    bq,
    bk,
  )
  return jnp.swapaxes(o[:, :, :queries], 1, 2)
