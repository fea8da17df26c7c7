"""The decoder's key/value cache.

An explicit pytree, in and out, so that decoding is a pure function. One entry a
layer (stacked where layers are scanned): `{"self": {key, value}, "cross": {key,
value}}`, each (B, H, L, D), so that no step transposes what the steps before
have written. Where several rows of the decoder answer one of the encoder (the
beams of a search), those are next to each other, and `cross` has the encoder's
rows: it is read once for all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def heads_first(memory):
  """(B, L, H, D) keys and values as (B, H, L, D), or back."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), memory)


def write(cache, new, index, length):
  """`new` keys and values written at `index`; an empty cache where None."""

  def one(rows_BHLD, new_BHQD):
    return jax.lax.dynamic_update_slice_in_dim(rows_BHLD, new_BHQD, index, 2)

  if cache is None:
    cache = jax.tree.map(
      lambda x: jnp.zeros((*x.shape[:2], length, x.shape[3]), x.dtype), new
    )
  return jax.tree.map(one, cache, new)


def reorder(cache: Any, rows_B: jax.Array) -> Any:
  """The cache whose rows of the decoder are those that `rows_B` names."""

  def reordered(layer, axis):
    # No row is beyond the cache; unchecked, a CPU takes half the time.
    rows = (slice(None),) * axis + (rows_B,)
    take = lambda x: x.at[rows].get(mode="promise_in_bounds")
    return layer | {"self": jax.tree.map(take, layer["self"])}

  if isinstance(cache, dict):
    return reordered(cache, 1)
  return [reordered(layer, 0) for layer in cache]
