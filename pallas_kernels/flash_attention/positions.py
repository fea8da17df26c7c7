"""How the bias of attention follows from the positions of query and key.

Each class is a small frozen pytree: its arrays are differentiable, and
`lowered()` gives the form that the implementations read: a `DistanceBias`
where key position - query position says all, the class itself where not. The
capitals that end an array's name are its axes; `axes` reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

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


def axes(field: str) -> str:
  """The axes of an array by its name: "HN" of table_HN, "" of a scalar."""
  suffix = field.rpartition("_")[2]
  return suffix if suffix.isupper() else ""


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
    return DistanceBias(self._spread(self._buckets()))

  def between(self, q_BQ: jax.Array, kv_BK: jax.Array) -> jax.Array:
    """float32 (B, H, Q, K): the bias of positions, dense."""
    buckets_R = self._buckets()
    distance_BQK = _distances(q_BQ, kv_BK)
    radius = len(buckets_R) // 2
    nearest_BQK = jnp.clip(distance_BQK, -radius, radius) + radius
    buckets_BQK = jnp.asarray(buckets_R)[nearest_BQK]
    bias_HX = self._spread(buckets_BQK.reshape(-1))
    bias_HBQK = bias_HX.reshape(-1, *distance_BQK.shape)
    return jnp.swapaxes(bias_HBQK, 0, 1)

  def _buckets(self) -> np.ndarray:
    return near_buckets(
      self.table_HN.shape[1], self.max_distance, self.bidirectional
    )

  def _spread(self, buckets_R) -> jax.Array:
    """float32 (H, R): the table's entries at these buckets."""
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
    return jnp.where(hidden_HR, -jnp.inf, vector_HR)


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


def _distances(q_BQ, kv_BK):
  """(B, Q, K): key position - query position."""
  return kv_BK[:, None, :] - q_BQ[:, :, None]


@_pytree("slopes_H2")
@dataclasses.dataclass(frozen=True)
class Alibi:
  """ALiBi (arXiv:2108.12409): `-slopes_H2[h, side] * |distance|`.

  Attributes:
    slopes_H2: of the keys before, and of those after; an infinite one hides its
      side from its head. Usually `Alibi.of(num_heads).slopes_H2`;
      differentiable.
  """

  slopes_H2: jax.Array

  @classmethod
  def of(
    cls,
    num_heads: int,
    mode: Literal["symmetric", "asymmetric"] = "symmetric",
  ) -> Alibi:
    """The paper's slopes; of an even number of heads where asymmetric.

    Symmetric: both sides alike. Asymmetric, as in FAT5: the first half of the
    heads sees no later key, the second no earlier one, and each half has the
    slopes of as many heads.
    """
    if mode == "symmetric":
      slopes_H = cls.slopes(num_heads)
      return cls(jnp.asarray(np.stack([slopes_H, slopes_H], axis=1)))
    slopes_H = cls.slopes(num_heads // 2)
    hides = np.full_like(slopes_H, np.inf)
    before, after = np.stack([slopes_H, hides]), np.stack([hides, slopes_H])
    return cls(jnp.asarray(np.concatenate([before, after], axis=1).T))

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
    return self.slopes_H2.shape[0]

  def _sides(self) -> tuple[jax.Array, jax.Array]:
    """(slopes without the infinite ones, which are those), (H, 2)."""
    slopes_H2 = jnp.asarray(self.slopes_H2, jnp.float32)
    hides_H2 = slopes_H2 == jnp.inf
    return jnp.where(hides_H2, 0.0, slopes_H2), hides_H2

  def lowered(self) -> DistanceBias:
    slopes_H2, hides_H2 = self._sides()
    ends_H2 = jnp.where(hides_H2, -jnp.inf, -slopes_H2)
    vector_HR = jnp.insert(ends_H2, 1, 0.0, axis=1)
    return DistanceBias(vector_HR, -slopes_H2)

  def between(self, q_BQ: jax.Array, kv_BK: jax.Array) -> jax.Array:
    """float32 (B, H, Q, K): the bias of positions, dense."""
    slopes_H2, hides_H2 = self._sides()
    distance_B1QK = _distances(q_BQ, kv_BK)[:, None]
    of_side = lambda x_H2: jnp.where(
      distance_B1QK < 0, x_H2[:, :1, None], x_H2[:, 1:, None]
    )
    bias_BHQK = -of_side(slopes_H2) * jnp.abs(distance_B1QK)
    hidden_BHQK = of_side(hides_H2) & (distance_B1QK != 0)
    return jnp.where(hidden_BHQK, -jnp.inf, bias_BHQK)


# Keeps the least normaliser of FIRE from 0, as in FAT5.
_FIRE_EPSILON = 1e-6


@_pytree("hidden_W", "hidden_bias_W", "out_HW", "out_bias_H", "c", "threshold")
@dataclasses.dataclass(frozen=True)
class Fire:
  """FIRE (arXiv:2310.04418): a network of one hidden layer, of one number.

  With d = query position - key position and f(x) = log(|c x| + 1), the number
  is `sign(d) f(d) / f(max(query position, |threshold|))`: how far back, as a
  part of how far back one can look. It depends on the query's position too, so
  no table of distances holds it; where it is computed a tile at a time, nothing
  of size length x length exists.

  Attributes:
    hidden_W, hidden_bias_W: of the hidden layer, whose activation is ReLU.
    out_HW, out_bias_H: of the output, one a head.
    c: scalar, how soon distances are compressed.
    threshold: scalar, in tokens; queries before it are normalised as if there.
  """

  hidden_W: jax.Array
  hidden_bias_W: jax.Array
  out_HW: jax.Array
  out_bias_H: jax.Array
  c: jax.Array
  threshold: jax.Array

  @property
  def num_heads(self) -> int:
    return self.out_HW.shape[0]

  def between(self, q_BQ: jax.Array, kv_BK: jax.Array) -> jax.Array:
    """float32 (B, H, Q, K): the bias of positions, dense."""
    compressed = lambda x: jnp.log(jnp.abs(self.c * x) + 1)
    back_BQK = -_distances(q_BQ, kv_BK).astype(jnp.float32)
    most_BQ = jnp.maximum(q_BQ.astype(jnp.float32), jnp.abs(self.threshold))
    normaliser_BQ = compressed(most_BQ) + _FIRE_EPSILON
    part_BQK = jnp.sign(back_BQK) * compressed(back_BQK)
    part_BQK = part_BQK / normaliser_BQ[:, :, None]
    across = lambda x_W: x_W[:, None, None]
    hidden_BWQK = jax.nn.relu(
      across(self.hidden_W) * part_BQK[:, None] + across(self.hidden_bias_W)
    )
    bias_BHQK = jnp.einsum(
      "bwqk,hw->bhqk",
      hidden_BWQK,
      self.out_HW,
      precision=jax.lax.Precision.HIGHEST,
    )
    return bias_BHQK + across(self.out_bias_H)


@_pytree("bias", "q_positions_BQ", "kv_positions_BK")
@dataclasses.dataclass(frozen=True)
class AtPositions:
  """A bias between tokens that do not stand where their row says.

  For positions drawn at random, and for FIRE in packed rows. The bias is no
  function of the distance in the row, so only "reference" and "chunked" take
  it; they compute it a tile at a time.

  Attributes:
    bias: what it is; differentiable.
    q_positions_BQ: integers, the batch axis may be 1; `q_offset` is not added.
    kv_positions_BK: likewise; a batch axis of the same size.
  """

  bias: RelativeBuckets | Alibi | Fire
  q_positions_BQ: jax.Array
  kv_positions_BK: jax.Array

  @property
  def num_heads(self) -> int:
    return self.bias.num_heads

  def lowered(self) -> AtPositions:
    return self

  def tile(self) -> jax.Array:
    """float32 (B, H, Q, K)."""
    return self.bias.between(self.q_positions_BQ, self.kv_positions_BK)


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


Position = (
  RelativeBuckets | DistanceVector | Alibi | Fire | AtPositions | FullBias
)
