"""T5's relative position bias as a short vector over distances.

The bias of T5 depends on `key position - query position` alone and is constant
beyond `max_distance`. So a table (heads, buckets) is the same thing as a vector
(heads, 2 * max_distance + 1) with saturated ends, and a tile of the bias is a
Toeplitz matrix cut from that vector. Nothing of size length x length exists.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def distance_buckets(
  num_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
  """The bucket of every distance from -max_distance to +max_distance.

  Follows section 2.1 of the T5 paper (arXiv:1910.10683) and Mesh TensorFlow:
  half of the buckets hold one exact distance each, the others grow
  logarithmically up to `max_distance`, and everything farther shares the last.
  It runs in numpy at trace time: the float32 logarithm of an accelerator may
  put an exact power of two one bucket low.

  Args:
    num_buckets: number of buckets N; a bidirectional table splits them between
      earlier and later keys.
    max_distance: the distance from which on all keys share a bucket.
    bidirectional: whether later keys have buckets of their own (encoder) or
      all fall in bucket 0 (decoder).

  Returns:
    int32 (2 * max_distance + 1,); entry `max_distance + d` belongs to
    `key position - query position == d`.

  Raises:
    ValueError: if the numbers leave no room for logarithmic buckets.
  """
  side_buckets = num_buckets // 2 if bidirectional else num_buckets
  max_exact = side_buckets // 2
  if max_exact < 1 or max_distance <= max_exact:
    raise ValueError(
      f"num_buckets={num_buckets} and max_distance={max_distance} leave no "
      f"room for logarithmic buckets: max_distance must exceed {max_exact}, "
      "and a side needs at least 2 buckets"
    )
  distance = np.arange(-max_distance, max_distance + 1)
  offset = 0
  if bidirectional:
    offset = np.where(distance > 0, side_buckets, 0)
    behind = np.abs(distance)
  else:
    behind = np.maximum(-distance, 0)
  ratio = np.log(
    np.maximum(behind, 1).astype(np.float32) / np.float32(max_exact)
  ) / np.float32(math.log(max_distance / max_exact))
  far = max_exact + (ratio * np.float32(side_buckets - max_exact)).astype(int)
  bucket = np.where(
    behind < max_exact, behind, np.minimum(far, side_buckets - 1)
  )
  return (offset + bucket).astype(np.int32)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["table_HN"],
  meta_fields=["bidirectional", "max_distance"],
)
@dataclasses.dataclass(frozen=True)
class RelativeBuckets:
  """T5's learned bias: `table_HN[h, bucket(key position - query position)]`.

  Attributes:
    table_HN: one bias value a head and bucket; differentiable.
    bidirectional: encoder buckets (both directions) or decoder buckets.
    max_distance: distance at which the buckets saturate.
  """

  table_HN: jax.Array
  bidirectional: bool
  max_distance: int = 128

  @property
  def num_heads(self) -> int:
    return self.table_HN.shape[0]

  def distance_vector(self) -> jax.Array:
    """float32 (H, 2 * max_distance + 1): the bias of every distance."""
    buckets_R = distance_buckets(
      self.table_HN.shape[1], self.max_distance, self.bidirectional
    )
    return jnp.asarray(self.table_HN, jnp.float32)[:, buckets_R]


def tile_distances(first_distance, queries: int, keys: int) -> jax.Array:
  """int32 (queries + keys - 1,): the distances met in a tile, ascending.

  `first_distance` is (position of the tile's first key) - (position of its
  first query); the diagonal of local distance `j - i` has index
  `j - i + queries - 1`.
  """
  return first_distance - (queries - 1) + jnp.arange(queries + keys - 1)


def distance_index(distances: jax.Array, radius: int) -> jax.Array:
  """Where each distance lies in a vector of 2 * radius + 1 entries."""
  return jnp.clip(distances, -radius, radius) + radius


def toeplitz(diagonals_HR: jax.Array, queries: int, keys: int) -> jax.Array:
  """Expands (H, queries + keys - 1) diagonals to an (H, queries, keys) tile.

  Entry [i, j] is `diagonals[j - i + queries - 1]`. Rows of length R laid out
  one element short shift by one each, so this is a copy, not a gather.
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


def gather_distances(vector_HR: jax.Array, distances: jax.Array) -> jax.Array:
  """(H, len(distances)): the saturating vector read at those distances."""
  radius = vector_HR.shape[1] // 2
  return vector_HR[:, distance_index(distances, radius)]


def scatter_distances(
  values: jax.Array, distances: jax.Array, radius: int
) -> jax.Array:
  """(H, 2 * radius + 1): values summed by saturated distance.

  The transpose of `gather_distances`, as a product with a one-hot matrix
  instead of a scatter, so that the sum has one order on every backend.
  """
  one_hot = jax.nn.one_hot(
    distance_index(distances, radius), 2 * radius + 1, dtype=values.dtype
  )
  return jnp.dot(values, one_hot, precision=jax.lax.Precision.HIGHEST)
