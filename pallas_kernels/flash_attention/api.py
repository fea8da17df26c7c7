"""The one signature of attention, its checks, and the choice of a backend."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.flash_attention.positions import FullBias, Position
from pallas_kernels.manual_axes import vary_together

Implementation = Literal[
  "reference", "chunked", "mosaic_tpu", "mosaic_gpu", "triton"
]

# A module each, imported when first asked for: a kernel's needs a jax that has
# its compiler.
_MODULES = {
  "reference": "reference",
  "chunked": "chunked",
  "mosaic_tpu": "tpu",
  "mosaic_gpu": "gpu_mosaic",
  "triton": "gpu_triton",
}


def flash_attention(
  q_BQHD: jax.Array,
  k_BKHD: jax.Array,
  v_BKHD: jax.Array,
  *,
  position: Position | None = None,
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
    implementation: "reference" (dense, float32), "chunked" (plain XLA, memory
      linear in length), or a kernel: "mosaic_tpu", "mosaic_gpu" (Hopper, jax
      0.11 and later), "triton" (Ampere and later). None picks the best that
      runs, and logs once which.
    q_offset: position of the first query, a number or a traced scalar: the
      cache index in decoding.

  Returns:
    Array (B, Q, H, D) in q's dtype. A query that sees no key gives 0, and no
    gradient flows through it.

  Raises:
    ValueError: if the shapes do not fit together, naming the argument.
    NotImplementedError: if the named implementation does not exist or cannot
      take these arguments, with the reason.
  """
  q_BQHD, k_BKHD, v_BKHD = map(jnp.asarray, (q_BQHD, k_BKHD, v_BKHD))
  _check_shapes(q_BQHD, k_BKHD, v_BKHD, position, q_segment_ids, kv_segment_ids)
  bias = None if position is None else position.lowered()
  module = _choose(implementation, q_BQHD, k_BKHD, bias)
  groups = q_BQHD.shape[2] // k_BKHD.shape[2]
  if groups > 1:
    k_BKHD = jnp.repeat(k_BKHD, groups, axis=2)
    v_BKHD = jnp.repeat(v_BKHD, groups, axis=2)
  # Padding may hold anything, NaN too, and 0 * NaN is NaN: it is emptied here,
  # and by the transpose of these lines in the backward pass.
  q_BQHD = _without_padding(q_BQHD, q_segment_ids)
  k_BKHD = _without_padding(k_BKHD, kv_segment_ids)
  v_BKHD = _without_padding(v_BKHD, kv_segment_ids)
  operands = (q_BQHD, k_BKHD, v_BKHD, bias, q_segment_ids, kv_segment_ids)
  o_BQHD = module.attention(
    *vary_together(operands), q_offset, causal=causal, scale=scale
  )
  return _without_padding(o_BQHD, q_segment_ids)


def _without_padding(x_BLHD, segment_ids_BL):
  if segment_ids_BL is None:
    return x_BLHD
  real_BL11 = (segment_ids_BL != 0)[:, :, None, None]
  return jnp.where(real_BL11, x_BLHD, 0)


def _module(name: str):
  return importlib.import_module(
    f"pallas_kernels.flash_attention.{_MODULES[name]}"
  )


def _choose(implementation: str | None, q, k, bias):
  """The module that computes; the named one, or the best that runs."""
  if implementation is not None:
    if implementation not in _MODULES:
      raise NotImplementedError(
        f"attention implementation {implementation!r} does not exist; there "
        f"are: {', '.join(_MODULES)}"
      )
    reason = _unsupported(implementation, q, k, bias)
    if reason:
      raise NotImplementedError(
        f"attention implementation {implementation!r} cannot run: {reason}"
      )
    return _module(implementation)
  reasons = []
  for name in tiling.preferred(q.shape[1]):
    reason = _unsupported(name, q, k, bias)
    if not reason:
      _say_once(name, "; ".join(reasons))
      return _module(name)
    reasons.append(f"not {name}: {reason}")
  raise AssertionError("chunked takes everything")


def _unsupported(name: str, q, k, bias) -> str | None:
  try:
    module = _module(name)
  except ImportError as error:
    return str(error)
  check = getattr(module, "unsupported", None)
  return check(q, k, bias) if check else None


@functools.cache
def _say_once(name: str, reasons: str) -> None:
  logging.getLogger("pallas_kernels").info(
    "attention: %s%s", name, f" ({reasons})" if reasons else ""
  )


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
  if isinstance(position, FullBias):
    sizes = ((1, batch), (1, heads), (queries,), (k.shape[1],))
    shape = position.bias_BHQK.shape
    if len(shape) != 4 or any(a not in b for a, b in zip(shape, sizes)):
      fail(
        "FullBias.bias_BHQK",
        position.bias_BHQK,
        f"(1 or {batch}, 1 or {heads}, {queries}, {k.shape[1]})",
      )
  elif position is not None and position.num_heads != heads:
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
