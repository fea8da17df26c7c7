"""The one signature of attention, its checks, and the choice of a backend."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import checks, tiling
from pallas_kernels.flash_attention.positions import (
  AtPositions,
  Fire,
  Position,
)
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
  "mosaic_gpu": "mosaic",
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

  Row i of q stands at position `q_offset + i`, key j at position j, unless
  `AtPositions` says otherwise. The bias, where a position is given, is a
  function of `j - (q_offset + i)` a head, and of `q_offset + i` with `Fire`.
  Differentiable in q, k, v and the arrays of `position`.

  Args:
    q_BQHD: queries.
    k_BKHD: keys; their head count may divide that of the queries (grouped).
    v_BKHD: values, shaped as the keys.
    position: how the bias follows from positions; None for no bias.
    causal: a query sees only keys at its own position or before.
    q_segment_ids: integers (B, Q); a query sees only keys of its own segment.
      Segment 0 is padding: it sees nothing and is seen by nothing. None is all
      ones. The three least numbers of 32 bits are one segment.
    kv_segment_ids: integers (B, K), likewise.
    scale: multiplies q k^T. T5 uses 1 (no 1/sqrt(D)).
    implementation: "reference" (dense, float32), "chunked" (plain XLA, memory
      linear in length), or a kernel: "mosaic_tpu", "mosaic_gpu" (Hopper, jax
      0.11 and later), "triton" (Ampere and later). None picks the best that
      compiles for this chip, and logs once which; with a warning that says why
      if it is not the one that the chip prefers.
    q_offset: position of the first query, a number or a traced scalar: the
      cache index in decoding.

  Returns:
    Array (B, Q, H, D) in q's dtype. A query that sees no key, or keys of bias
    -inf alone, gives 0, and no gradient flows through it; nor through a bias of
    -inf. Where there is no query or no key, the result is zeros.

  Raises:
    ValueError: if an argument is not what it must be or the shapes do not fit
      together, naming the argument.
    NotImplementedError: if the named implementation does not exist or cannot
      take these arguments, with the reason.
  """
  q_BQHD, k_BKHD, v_BKHD = map(jnp.asarray, (q_BQHD, k_BKHD, v_BKHD))
  q_segment_ids = checks.segment_ids("q_segment_ids", q_segment_ids)
  kv_segment_ids = checks.segment_ids("kv_segment_ids", kv_segment_ids)
  scale = checks.scale(scale)
  q_offset = checks.offset(q_offset)
  checks.position(position)
  checks.shapes(q_BQHD, k_BKHD, v_BKHD, position, q_segment_ids, kv_segment_ids)
  if implementation is not None and implementation not in list(_MODULES):
    raise NotImplementedError(
      f"attention implementation {implementation!r} does not exist; there "
      f"are: {', '.join(_MODULES)}"
    )
  if 0 in (*q_BQHD.shape, *k_BKHD.shape):
    # No pair: nothing is seen, and no gradient flows.
    return jnp.zeros_like(q_BQHD)
  if isinstance(position, Fire):
    rows = jnp.arange(q_BQHD.shape[1])[None] + q_offset
    position = AtPositions(position, rows, jnp.arange(k_BKHD.shape[1])[None])
  bias = None if position is None else position.lowered()
  module = _choose(implementation, q_BQHD, k_BKHD, bias)
  groups = q_BQHD.shape[2] // k_BKHD.shape[2]
  if groups > 1:
    k_BKHD = jnp.repeat(k_BKHD, groups, axis=2)
    v_BKHD = jnp.repeat(v_BKHD, groups, axis=2)
  operands = (q_BQHD, k_BKHD, v_BKHD, bias, q_segment_ids, kv_segment_ids)
  return module.attention(
    *vary_together(operands), q_offset, causal=causal, scale=scale
  )


def _module(name: str):
  return importlib.import_module(
    f"pallas_kernels.flash_attention.{_MODULES[name]}"
  )


def _choose(implementation: str | None, q, k, bias):
  """The module that computes; the named one, or the best that runs."""
  if implementation is None:
    name, reasons = best(q, k, bias)
    _say_once(name, "; ".join(reasons))
    return _module(name)
  reason = _unsupported(implementation, q, k, bias)
  if reason:
    raise NotImplementedError(
      f"attention implementation {implementation!r} cannot run: {reason}"
    )
  return _module(implementation)


def best(q_BQHD, k_BKHD, bias) -> tuple[Implementation, list[str]]:
  """(what None picks on this chip, why it is none that the chip prefers).

  Args:
    q_BQHD: queries, or their shape and dtype.
    k_BKHD: keys, likewise.
    bias: `position.lowered()`, or None.
  """
  reasons = []
  for name in tiling.preferred(q_BQHD.shape[1]):
    reason = _unsupported(name, q_BQHD, k_BKHD, bias)
    if not reason:
      return name, reasons
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
  log = logging.getLogger("pallas_kernels")
  if reasons:
    # Slower than what this chip is rented for: not for a debug log.
    log.warning("attention: %s (%s)", name, reasons)
  else:
    log.info("attention: %s", name)
