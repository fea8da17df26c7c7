"""What is done with one tile: products, the bias and its gradient, masks."""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention.blocked import LOG2E, Plan
from pallas_kernels.flash_attention.tpu.visits import Tile

LANES = 128
NT = (((1,), (1,)), ((), ()))  # a b^T
NN = (((1,), (0,)), ((), ()))  # a b
TN = (((0,), (0,)), ((), ()))  # a^T b


def dot(a, b, dimensions):
  # float32 inputs ask for float32 products; the default is one bfloat16 pass.
  full = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    dimensions,
    precision=lax.Precision.HIGHEST if full else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def head_group(heads: int, head_dim: int) -> int:
  """Heads a program: two of 64 share the lanes where they pair up."""
  return 2 if head_dim == 64 and heads % 2 == 0 else 1


def padded_head_dim(heads: int, head_dim: int) -> int:
  if head_dim <= 64 and heads % 2 == 0:
    return 64
  return -(-head_dim // LANES) * LANES


def head_lanes(a: int, head_dim: int) -> slice:
  """The lanes of the a-th head of a group."""
  return slice(a * head_dim, (a + 1) * head_dim)


def exp(x):
  return jnp.exp2(x * LOG2E)


def scaled(x, scale: float):
  return x if scale == 1.0 else x * scale


def lanes(x_RL, count: int):
  """A column held in all 128 lanes, `count` wide."""
  if count <= LANES:
    return x_RL[:, :count]
  return jnp.tile(x_RL, (1, count // LANES))


def column(ids_1L):
  """(L, 128): a row of ids turned into a column, held in all lanes."""
  wide = jnp.broadcast_to(ids_1L, (LANES, ids_1L.shape[1]))
  return jnp.transpose(wide)


def scores(r, a: int, left, right, head, t: Tile, plan: Plan):
  """float32 scores of a tile with its bias, -inf where ids differ.

  `left` and `right` are queries and keys, or the reverse where the tile is
  transposed; r.ids_down holds a column of the ids of left, r.ids_across a row
  of those of right.
  """
  s = scaled(dot(left, right, NT), plan.scale)
  if t.has_tile:
    s += r.tiles[a, plan.tile_index(t.step)]
  if t.has_constant:
    s += _constant(r.constants, head, t, plan)
  if t.masked:
    same = lanes(r.ids_down[...], s.shape[1]) == r.ids_across[0]
    s = jnp.where(same, s, -jnp.inf)
  return s


def _constant(constants, head, t: Tile, plan: Plan):
  """The number a far tile adds to every score of a head."""
  side = jnp.where(t.step < plan.first, 0, 1)
  value = constants[head, side, 0]
  if plan.tails:
    value += constants[head, side, 1] * t.offset.astype(jnp.float32)
    value = jnp.where(t.near, 0.0, value)
  return value


def add_bias_gradient(r, a: int, ds_KQ, t: Tile, plan: Plan) -> None:
  """Adds dS to its tile's sum, or its far side's."""
  if t.has_tile:
    r.dtiles[a, plan.tile_index(t.step)] += ds_KQ
  if t.has_constant:
    side = jnp.where(t.step < plan.first, 0, 1)
    # Sublane groups only: the rest is summed outside.
    ds_8Q = ds_KQ.reshape(plan.bk // 8, 8, plan.bq).sum(axis=0)
    if plan.tails:
      ds_8Q = jnp.where(t.near, 0.0, ds_8Q)
      r.dfar[a, side, 1] += ds_8Q * t.offset.astype(jnp.float32)
    r.dfar[a, side, 0] += ds_8Q


def compact_diagonals(diagonals_HTL, plan: Plan, *, transposed: bool):
  """Diagonals as `expand` takes them: (H, tiles, 8, lanes).

  Entry [i, j] of a tile is x[(j - i) % lanes]: lane m of x holds local distance
  m of a tile's first row and, from the end backwards, -1, -2, ... Row r of the
  eight is x rotated right by r.
  """
  rows, columns = plan.bq, plan.bk
  if transposed:
    diagonals_HTL = diagonals_HTL[..., ::-1]
    rows, columns = columns, rows
  width = -(-(rows + columns) // LANES) * LANES
  missing = width - diagonals_HTL.shape[-1]
  x = jnp.pad(diagonals_HTL, ((0, 0), (0, 0), (0, missing)))
  return jnp.stack(
    [jnp.roll(x, r - (rows - 1), axis=-1) for r in range(8)], axis=2
  )


def expand_all(r, group: int, plan: Plan, rows: int, columns: int) -> None:
  """r.tiles from r.diagonals."""
  for a in range(group):
    for t in range(plan.tiles):
      r.tiles[a, t] = _expand(r.diagonals[a, t], rows, columns)


def _expand(x_8L, rows: int, columns: int):
  """The (rows, columns) Toeplitz tile, doubling its rows from eight."""
  size = 8
  while size < rows:
    x_8L = jnp.concatenate([x_8L, pltpu.roll(x_8L, size, axis=1)], axis=0)
    size *= 2
  return x_8L[:rows, :columns]


def collapse(tile, width: int):
  """The transpose of expanding: (8, width) sums along diagonals."""
  rows, columns = tile.shape
  size = 8
  while size < rows:
    size *= 2
  x = jnp.pad(tile, ((0, size - rows), (0, width - columns)))
  while size > 8:
    size //= 2
    x = x[:size] + pltpu.roll(x[size:], width - size, axis=1)
  return x


def real_values(v_KL, kv_ids_1K):
  """Values with zeros in padding, which may hold anything."""
  real = lanes(column(kv_ids_1K), v_KL.shape[1]) != 0
  return jnp.where(real, v_KL, jnp.zeros((), v_KL.dtype))


def sum_beside(v_KL, a: int, head_dim: int):
  """Values of a pair of heads, ones in the lanes of the head that is not a."""
  rows_KL = lax.broadcasted_iota(jnp.int32, v_KL.shape, 1)
  return jnp.where(rows_KL // head_dim == a, v_KL, jnp.ones((), v_KL.dtype))


def wide(x: jax.Array):
  """(B, L, H, D) as (B, L, H * D)."""
  return x.reshape(*x.shape[:2], -1)
