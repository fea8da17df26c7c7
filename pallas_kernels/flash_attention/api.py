"""The one signature of attention, its checks, and the choice of a backend."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import chunked, reference
from pallas_kernels.flash_attention.relative_bias import RelativeBuckets

Implementation = Literal["reference", "chunked"]

_IMPLEMENTATIONS = {
  "reference": reference.attention,
  "chunked": chunked.attention,
}


def flash_attention(
  q_BQHD: jax.Array,
  k_BKHD: jax.Array,
  v_BKHD: jax.Array,
  *,
  position: RelativeBuckets | None = None,
  causal: bool = False,
  q_segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  scale: float = 1.0,
  implementation: Implementation | None = None,
  q_offset: int | jax.Array = 0,
) -> jax.Array:
  """softmax(scale * q k^T + bias(position), masked) v.

  Row i of q stands at position `q_offset + i`, key j at position j. The bias,
  where a position is given, is a function of `j - (q_offset + i)` a head.
  Differentiable in q, k, v and the arrays of `position`.

  Args:
    q_BQHD: queries.
    k_BKHD: keys; their head count may divide that of the queries (grouped).
    v_BKHD: values, shaped as the keys.
    position: how the bias follows from the distance; None for no bias.
    causal: a query sees only keys at its own position or before.
    q_segment_ids: integers (B, Q); a query sees only keys of its own segment.
      Segment 0 is padding: it sees nothing and is seen by nothing. None is all
      ones.
    kv_segment_ids: integers (B, K), likewise.
    scale: multiplies q k^T. T5 uses 1 (no 1/sqrt(D)).
    implementation: "reference" (dense, float32) or "chunked" (memory linear in
      length); None picks one that runs.
    q_offset: position of the first query, a number or a traced scalar: the
      cache index in decoding.

  Returns:
    Array (B, Q, H, D) in q's dtype. A query that sees no key gives 0, and no
    gradient flows through it.

  Raises:
    ValueError: if the shapes do not fit together, naming the argument.
    NotImplementedError: if the named implementation does not exist.
  """
  q_BQHD, k_BKHD, v_BKHD = map(jnp.asarray, (q_BQHD, k_BKHD, v_BKHD))
  _check_shapes(q_BQHD, k_BKHD, v_BKHD, position, q_segment_ids, kv_segment_ids)
  name = _choose(implementation)
  groups = q_BQHD.shape[2] // k_BKHD.shape[2]
  if groups > 1:
    k_BKHD = jnp.repeat(k_BKHD, groups, axis=2)
    v_BKHD = jnp.repeat(v_BKHD, groups, axis=2)
  return _IMPLEMENTATIONS[name](
    q_BQHD,
    k_BKHD,
    v_BKHD,
    None if position is None else position.distance_vector(),
    q_segment_ids,
    kv_segment_ids,
    q_offset,
    causal=causal,
    scale=scale,
  )


def _choose(implementation: str | None) -> str:
  if implementation is None:
    _say_once("chunked")
    return "chunked"
  if implementation not in _IMPLEMENTATIONS:
    raise NotImplementedError(
      f"attention implementation {implementation!r} does not exist; there "
      f"are: {', '.join(_IMPLEMENTATIONS)}"
    )
  return implementation


@functools.cache
def _say_once(name: str) -> None:
  logging.getLogger("pallas_kernels").info("attention: %s", name)


def _check_shapes(q, k, v, position, q_segment_ids, kv_segment_ids) -> None:
  def fail(name, array, expected):
    raise ValueError(
      f"flash_attention: {name} has shape {array.shape}, expected {expected}"
    )

  if q.ndim != 4:
    fail("q_BQHD", q, "(batch, queries, heads, head_dim)")
  batch, queries, heads, head_dim = q.shape
  if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
    fail("k_BKHD", k, f"({batch}, keys, heads, {head_dim})")
  if heads % k.shape[2]:
    fail("k_BKHD", k, f"a number of heads that divides {heads}")
  if v.shape != k.shape:
    fail("v_BKHD", v, f"that of k_BKHD, {k.shape}")
  if position is not None and position.num_heads != heads:
    raise ValueError(
      f"flash_attention: position has {position.num_heads} heads, "
      f"q_BQHD has {heads}"
    )
  for name, ids, length in (
    ("q_segment_ids", q_segment_ids, queries),
    ("kv_segment_ids", kv_segment_ids, k.shape[1]),
  ):
    if ids is not None and ids.shape != (batch, length):
      fail(name, ids, f"({batch}, {length})")
