"""Dense float32 attention: the specification that every backend is judged by.

Quadratic in length on purpose. For tests and for tiny shapes only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import relative_bias
from pallas_kernels.flash_attention.padding import without_padding
from pallas_kernels.flash_attention.positions import AtPositions, FullBias


def attention_mask(
  queries: int,
  keys: int,
  *,
  causal: bool,
  q_offset,
  q_segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
) -> jax.Array | None:
  """Boolean, broadcastable to (B, 1, Q, K): which key each query may see.

  None where everything is visible. Segment 0 is padding: no query sees it and
  it sees nothing. A missing side is all ones.
  """
  mask = None
  if causal:
    q_position = jnp.arange(queries) + q_offset
    mask = (jnp.arange(keys) <= q_position[:, None])[None, None]
  if q_segment_ids is not None or kv_segment_ids is not None:
    one = jnp.ones((1, 1), jnp.int32)
    q_BQ = one if q_segment_ids is None else q_segment_ids
    kv_BK = one if kv_segment_ids is None else kv_segment_ids
    same = (q_BQ[:, :, None] == kv_BK[:, None, :]) & (kv_BK[:, None, :] != 0)
    mask = same[:, None] if mask is None else mask & same[:, None]
  return mask


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
  """softmax(scale * q k^T + bias, masked) v in float32; cast to q's dtype."""
  queries, keys = q_BQHD.shape[1], k_BKHD.shape[1]
  highest = jax.lax.Precision.HIGHEST
  q = without_padding(q_BQHD.astype(jnp.float32), q_segment_ids)
  k, v = (
    without_padding(x.astype(jnp.float32), kv_segment_ids)
    for x in (k_BKHD, v_BKHD)
  )
  s_BHQK = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=highest)
  if isinstance(bias, FullBias):
    s_BHQK += bias.bias_BHQK
  elif isinstance(bias, AtPositions):
    s_BHQK += bias.tile()
  elif bias is not None:
    first_distance = -(queries - 1) - q_offset
    diagonals_HR = bias.window(first_distance, queries + keys - 1)
    s_BHQK += relative_bias.toeplitz(diagonals_HR, queries, keys)
  mask = attention_mask(
    queries,
    keys,
    causal=causal,
    q_offset=q_offset,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
  )
  if mask is not None:
    s_BHQK = jnp.where(mask, s_BHQK, -jnp.inf)
  # A row that sees nothing, by masks or a bias of -inf, gives 0, and no
  # gradient, instead of 0 / 0.
  top_BHQ1 = jax.lax.stop_gradient(s_BHQK.max(axis=-1, keepdims=True))
  e_BHQK = jnp.exp(s_BHQK - jnp.where(top_BHQ1 > -jnp.inf, top_BHQ1, 0.0))
  sum_BHQ1 = e_BHQK.sum(axis=-1, keepdims=True)
  p_BHQK = e_BHQK / jnp.where(sum_BHQ1 > 0, sum_BHQ1, 1.0)
  o_BQHD = jnp.einsum("bhqk,bkhd->bqhd", p_BHQK, v, precision=highest)
  return without_padding(o_BQHD.astype(q_BQHD.dtype), q_segment_ids)
