"""How the bias of attention follows from key position - query position.

Each class is a small frozen pytree: its arrays are differentiable, and
`lowered()` gives the one form that the implementations read, a `DistanceBias`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.relative_bias import DistanceBias


def _pytree(*arrays: str, static: tuple[str, ...] = ()):
  return functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(arrays),
    meta_fields=list(static),
  )


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


@functools.cache
def near_buckets(
  num_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
  """`distance_buckets` without the distances whose bucket no longer changes.

  T5's 32 buckets up to 128 are constant from 91 on (113 for a decoder), and a
  smaller radius means fewer tiles with a bias of their own.
  """
  buckets = distance_buckets(num_buckets, max_distance, bidirectional)
  changes = np.flatnonzero(np.diff(buckets)) - max_distance
  # A change between d and d + 1 needs both in the vector.
  radius = max(np.abs(changes).max(), np.abs(changes + 1).max())
  return buckets[max_distance - radius : max_distance + radius + 1]


@_pytree("table_HN", static=("bidirectional", "max_distance"))
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

  def lowered(self) -> DistanceBias:
    buckets_R = near_buckets(
      self.table_HN.shape[1], self.max_distance, self.bidirectional
    )
    one_hot_NR = np.arange(self.table_HN.shape[1])[:, None] == buckets_R
    # A product with ones and zeros is exact, and its transpose sums in one
    # order on every device; the transpose of a gather is a scatter.
    spread = lambda x_HN: jnp.dot(
      x_HN,
      one_hot_NR.astype(np.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    table_HN = jnp.asarray(self.table_HN, jnp.float32)
    # 0 * -inf is NaN: what hides a bucket's pairs is spread apart.
    hidden_HN = table_HN == -jnp.inf
    vector_HR = spread(jnp.where(hidden_HN, 0.0, table_HN))
    hidden_HR = spread(hidden_HN.astype(jnp.float32)) > 0
    return DistanceBias(jnp.where(hidden_HR, -jnp.inf, vector_HR))


@_pytree("vector_HR")
@dataclasses.dataclass(frozen=True)
class DistanceVector:
  """Any bias that saturates: `vector_HR[h, R + clip(distance, -R, R)]`.

  Attributes:
    vector_HR: (H, 2 * R + 1), the bias of the distances -R to R; farther keys
      take the end they are nearest to. Differentiable.
  """

  vector_HR: jax.Array

  @property
  def num_heads(self) -> int:
    return self.vector_HR.shape[0]

  def lowered(self) -> DistanceBias:
    if self.vector_HR.shape[1] % 2 == 0:
      raise ValueError(
        f"DistanceVector: vector_HR has shape {self.vector_HR.shape}; an odd "
        "number of distances is needed, -R to R"
      )
    return DistanceBias(jnp.asarray(self.vector_HR, jnp.float32))


@_pytree("slopes_H")
@dataclasses.dataclass(frozen=True)
class Alibi:
  """ALiBi (arXiv:2108.12409): `-slopes_H[h] * |key - query position|`.

  Attributes:
    slopes_H: one slope a head, usually `Alibi.slopes(num_heads)`;
      differentiable.
  """

  slopes_H: jax.Array

  @staticmethod
  def slopes(num_heads: int) -> np.ndarray:
    """float32 (H,): the paper's geometric slopes, for any number of heads."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power, 2) / power)
    return np.concatenate([slopes, between[: num_heads - power]]).astype(
      np.float32
    )

  @property
  def num_heads(self) -> int:
    return self.slopes_H.shape[0]

  def lowered(self) -> DistanceBias:
    slopes_H = jnp.asarray(self.slopes_H, jnp.float32)
    vector_HR = -slopes_H[:, None] * jnp.asarray([1.0, 0.0, 1.0])
    return DistanceBias(vector_HR, jnp.stack([-slopes_H, -slopes_H], axis=1))


@_pytree("bias_BHQK")
@dataclasses.dataclass(frozen=True)
class FullBias:
  """A bias for every pair of query and key: the quadratic compatibility path.

  It holds, and its gradient writes, length x length numbers; everything this
  package is for is lost with it. Only "reference" and "chunked" take it.

  Attributes:
    bias_BHQK: the batch and head axes may be 1; differentiable. Rows and
      columns count from the first query and key, whatever `q_offset` says.
  """

  bias_BHQK: jax.Array

  @property
  def num_heads(self) -> int:
    return self.bias_BHQK.shape[1]

  def lowered(self) -> FullBias:
    return FullBias(jnp.asarray(self.bias_BHQK, jnp.float32))


Position = RelativeBuckets | DistanceVector | Alibi | FullBias
