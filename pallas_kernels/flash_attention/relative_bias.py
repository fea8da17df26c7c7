"""A bias over distances as a short vector, and the tiles cut from it.

The bias of T5 depends on `key position - query position` alone and is constant
beyond a radius R. So a table (heads, buckets) is the same thing as a vector
(heads, 2 R + 1) with saturated ends, and a tile of the bias is a Toeplitz
matrix cut from that vector. Nothing of size length x length exists.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DistanceBias(NamedTuple):
  """A value for every distance d = key position - query position.

  `vector_HR[h, R + clip(d, -R, R)]`, and beyond R, where slopes are given,
  `slopes_H2[h, side] * (|d| - R)` more; side 0 holds the keys before.

  Attributes:
    vector_HR: float32 (H, 2 * R + 1).
    slopes_H2: float32 (H, 2), or None for saturated ends.
  """

  vector_HR: jax.Array
  slopes_H2: jax.Array | None = None

  @property
  def radius(self) -> int:
    return self.vector_HR.shape[1] // 2

  def window(self, first_distance, length: int) -> jax.Array:
    """float32 (H, length): the bias at `first_distance` and those after it.

    A slice instead of a gather, so that its transpose is a sum in one order on
    every device, not a scatter.
    """
    heads, size = self.vector_HR.shape
    left, right = (
      jnp.broadcast_to(end, (heads, length))
      for end in (self.vector_HR[:, :1], self.vector_HR[:, -1:])
    )
    padded = jnp.concatenate([left, self.vector_HR, right], axis=1)
    start = jnp.clip(first_distance + self.radius + length, 0, size + length)
    values_HL = jax.lax.dynamic_slice_in_dim(padded, start, length, 1)
    return values_HL + self._tails(first_distance + jnp.arange(length))

  def _tails(self, distances_L):
    if self.slopes_H2 is None:
      return 0.0
    both_2L = jnp.stack([-distances_L, distances_L]) - self.radius
    beyond_2L = jnp.maximum(both_2L, 0).astype(jnp.float32)
    return jnp.dot(
      self.slopes_H2, beyond_2L, precision=jax.lax.Precision.HIGHEST
    )


def toeplitz(diagonals_HR: jax.Array, queries: int, keys: int) -> jax.Array:
  """Expands (H, queries + keys - 1) diagonals to an (H, queries, keys) tile.

  Entry [i, j] is `diagonals[j - i + queries - 1]`: the diagonals of a tile
  ascend in distance, from its last query and first key on. Rows of length R
  laid out one element short shift by one each, so this is a copy, no gather.
  """
  heads, length = diagonals_HR.shape
  rows = jnp.broadcast_to(diagonals_HR[:, None], (heads, queries, length))
  flat = jnp.pad(rows, ((0, 0), (0, 0), (0, 1))).reshape(heads, -1)
  # Row i starts at i * (length + 1) in `flat`; reading rows of `length` from
  # offset queries - 1 gives element i * length + queries - 1 + j, which is
  # row i shifted left by i.
  start = queries - 1
  flat = jnp.pad(flat, ((0, 0), (0, queries * length)))
  flat = flat[:, start : start + queries * length]
  return flat.reshape(heads, queries, length)[:, :, :keys]


def diagonal_sums(tile_HQK: jax.Array) -> jax.Array:
  """(H, Q + K - 1): the sum of each diagonal; the transpose of `toeplitz`."""
  heads, queries, keys = tile_HQK.shape
  length = queries + keys - 1
  # Row i must move right by queries - 1 - i: pad each row to length + 1 and
  # read the flat buffer in rows of `length`, last row first.
  rows = jnp.pad(tile_HQK[:, ::-1], ((0, 0), (0, 0), (0, length + 1 - keys)))
  flat = rows.reshape(heads, -1)[:, : queries * length]
  return flat.reshape(heads, queries, length).sum(axis=1)
