"""What is done with one tile in registers: products, scores, dS."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention.blocked import LOG2E, Plan
from pallas_kernels.flash_attention.mosaic.config import ROWS, Grid

TILE = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = TILE.reduce(1), TILE.reduce(0)


def across(x_R, columns: int):
  """A value a row, for a whole tile."""
  return lax.broadcast_in_dim(x_R, (x_R.shape[0], columns), [0])


def down(x_C, rows: int):
  """A value a column, for a whole tile."""
  return lax.broadcast_in_dim(x_C, (rows, x_C.shape[0]), [1])


def scaled(x, plan: Plan):
  return x if plan.scale == 1.0 else x * plan.scale


def exp(s, top):
  """e^(s - top): a multiply-add of each s, and top rounded once a row."""
  return jnp.exp2(s * LOG2E - top * LOG2E)


def filled(value: float, *shape):
  layout = TILE if len(shape) == 2 else PER_ROW
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(*shape):
  return filled(0.0, *shape)


def read(ref, layout):
  """Straight from global memory; the few values a warpgroup needs a tile."""
  return plgpu.load(ref, layout=layout, optimized=False)


def products(*pairs):
  """a b^T of each pair of refs in shared memory, float32, waited for once."""

  def run(*accumulators):
    for accumulator, (a, b) in zip(accumulators, pairs):
      plgpu.wgmma(accumulator, a, b.T)
    return tuple(accumulator[...] for accumulator in accumulators)

  shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
  return pl.run_scoped(run, *(plgpu.ACC(s, jnp.float32) for s in shapes))


def add_products(totals, left, rights, staging=None, then=lambda: None):
  """Each total + left @ right, left in registers; `then` runs meanwhile.

  With `staging`, shared memory, it is what the interpreter knows.
  """
  if staging is not None:
    staging[...] = left
    plgpu.commit_smem()

    def run(*accumulators):
      for accumulator, right in zip(accumulators, rights):
        plgpu.wgmma(accumulator, staging, right)
      then()
      return tuple(accumulator[...] for accumulator in accumulators)

    scopes = (plgpu.ACC(x.shape, jnp.float32) for x in totals)
    return tuple(map(jnp.add, totals, pl.run_scoped(run, *scopes)))

  def run(accumulators):
    for accumulator, right in zip(accumulators, rights):
      plgpu.wgmma(accumulator, left, right)
    then()

  return pl.run_state(run)(tuple(map(plgpu.ACC.init, totals)))


def add_product(total, left, right, staging=None):
  return add_products((total,), left, (right,), staging)[0]


def tile_of(r, plan: Plan, h, i, j, wg, within):
  """A ref: the bias of this warpgroup's rows of near tile (i, j)."""
  index = j - i - r.shift[0] - plan.first
  return r.tiles.at[h, index, pl.ds(wg * ROWS, ROWS), within]


class Far(NamedTuple):
  """What the far tiles of one side add to scores.

  Attributes:
    constant: to every score.
    slope: to each, times key position - query position; None without tails.
  """

  constant: jax.Array
  slope: jax.Array | None

  def of_queries(self, first_distance, steps):
    """Of queries `steps` after the first: a number a query, or one for all.

    Args:
      first_distance: from the first query to the first key, an integer.
      steps: float32.
    """
    if self.slope is None:
      return self.constant
    return self.constant + self.slope * distance(first_distance, steps)

  def of_keys(self, steps):
    """Of keys `steps` after the first, added to that of their query."""
    return self.slope * steps


def distance(first_distance, steps):
  """From queries `steps` after the first to the first key."""
  return first_distance.astype(jnp.float32) - steps


def far_sides(r, plan: Plan, h) -> tuple[Far, Far] | None:
  """Of the keys before and after; None without a bias."""
  if not plan.biased:
    return None
  slopes = [r.slopes[h, n] if plan.tails else None for n in (0, 1)]
  return tuple(Far(r.constants[h, n], slopes[n]) for n in (0, 1))


def far_side(sides: tuple[Far, Far], is_before) -> Far:
  return jax.tree.map(lambda a, b: jnp.where(is_before, a, b), *sides)


def steps_down(r, g: Grid, wg):
  """float32 (ROWS,): places of a warpgroup's rows in their block."""
  return read(r.places.at[pl.ds(wg * ROWS, ROWS)], PER_ROW)


def steps_across(r, g: Grid):
  """float32 (part,): places of a tile's columns from its first one."""
  return read(r.places.at[pl.ds(0, g.part)], PER_COLUMN)


def first_distance(r, g: Grid, i, j):
  """From the first query of a block to the first key of another."""
  return (j - i - r.shift[0]) * g.config.block


class Ids(NamedTuple):
  """The segment ids of a tile.

  Attributes:
    whole: whether the tile is all of one id, as most are.
    down, across: ids of its rows and columns: refs in shared memory, where
      they came with the operands, read unless the tile is whole.
  """

  whole: jax.Array
  down: object
  across: object


def ids_of(r, g: Grid, b, i, j, rows, columns) -> Ids | None:
  """The Ids of tile (i, j); None where the call is not masked.

  Better asked for before a product is issued, where registers are left: nobody
  then waits for `whole` after it.

  Args:
    r: refs; row_ids_s and column_ids_s are in shared memory.
    g: the sizes.
    b, i, j: batch row and blocks.
    rows: index of r.row_ids_s, a tuple.
    columns: of r.column_ids_s.
  """
  if not g.plan.masked:
    return None
  whole = r.q_only[b, i] == r.kv_only[b, j]
  return Ids(whole, r.row_ids_s.at[*rows], r.column_ids_s.at[columns])


def scores(s, plan: Plan, ids: Ids | None, bias=None):
  """Of a product: -inf where ids differ, scaled, with the bias of the tile.

  Args:
    s: float32, queries down and keys across or transposed.
    plan: the geometry of tiles.
    ids: None where the call is not masked.
    bias: of a near tile, shaped as s; None of a far one.
  """
  if ids is not None:
    s = _masked(s, ids)
  s = scaled(s, plan)
  return s if bias is None else s + bias


def _masked(s, ids: Ids):
  def mask(s):
    rows = plgpu.load(ids.down, layout=PER_ROW)
    columns = plgpu.load(ids.across, layout=PER_COLUMN)
    same = across(rows, s.shape[1]) == down(columns, s.shape[0])
    return jnp.where(same, s, -jnp.inf)

  return lax.cond(ids.whole, lambda s: s, mask, s)


def ds(p, dp, delta):
  """dS, the gradient of the scores of a tile; delta for the whole tile."""
  return p * (dp - delta)
