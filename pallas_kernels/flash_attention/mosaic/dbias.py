"""The gradient of the bias: dS of its near tiles, summed.

One program a head, near tile and split of the (batch, query block) pairs: it
recomputes their dS and keeps the sum in registers. No atomics.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.flash_attention.blocked import Cotangents, Operands, Plan
from pallas_kernels.flash_attention.gpu_common import (
  pairs_of_tile,
)
from pallas_kernels.flash_attention.mosaic import call, pipeline, tiles
from pallas_kernels.flash_attention.mosaic.config import ROWS, Config, Grid


def dbias(
  x: Operands, y: Cotangents, config: Config, plan: Plan, splits: int
) -> jax.Array:
  """float32 (H, near, splits, bq, bk)."""
  g = Grid.of(x, config, plan, tiling.mosaic_parts(x.q.shape[3]).dbias)
  shape = g.heads, plan.near, splits, plan.bq, plan.bk
  out = call.call(
    g,
    "flash_attention_dbias",
    functools.partial(_kernel, g, splits),
    {"heads": g.heads, "tiles": plan.near * g.parts, "splits": splits},
    {**call.backward_inputs(x, y), **call.bias_inputs(g, x)},
    {"dtiles": jax.ShapeDtypeStruct(shape, jnp.float32)},
    _scratch(g, x.q.dtype),
  )
  return out["dtiles"]


def _scratch(g: Grid, dtype):
  stages, block = g.config.stages, g.config.block
  return {
    "q_s": call.matrix(dtype, stages, block, g.dim),
    "do_s": call.matrix(dtype, stages, block, g.dim),
    "k_s": call.matrix(dtype, stages, g.part, g.dim),
    "v_s": call.matrix(dtype, stages, g.part, g.dim),
    "row_ids_s": call.ids(g, stages, block),
    "column_ids_s": call.ids(g, stages, g.part),
    "ready": call.arrivals(g, 4 + 2 * g.plan.masked),
    "free": call.freed(g),
  }


class _Share:
  """A program: part of a near tile, and its share of the pairs that have it.

  Attributes:
    h, n, split: head, near tile and split.
    within: the slice of the tile's columns.
    total: pairs of blocks in this share.
  """

  def __init__(self, g: Grid, splits: int, r):
    self.h, n, self.split = (
      lax.axis_index(name) for name in ("heads", "tiles", "splits")
    )
    self.n = n // g.parts
    self._first = lax.rem(n, g.parts) * g.part
    self.within = pl.ds(self._first, g.part)
    pairs, self._place = pairs_of_tile(
      self.n, r.shift[0], g.plan, g.batch, g.nq, g.nk
    )
    share = (pairs + splits - 1) // splits
    self._start = self.split * share
    self.total = jnp.clip(pairs - self._start, 0, share)

  def place(self, g: Grid, t):
    """(batch row, query block, key block, columns) of the t-th pair."""
    b, i, j = self._place(self._start + t)
    return b, i, j, pl.ds(j * g.config.block + self._first, g.part)


def _kernel(g: Grid, splits: int, r) -> None:
  share = _Share(g, splits, r)
  pipeline.by_role(
    g.config,
    functools.partial(_compute, g, r, share),
    functools.partial(_load, g, r, share),
  )


def _load(g: Grid, r, share: _Share) -> None:
  def fetch(t, slot):
    b, i, _, columns = share.place(g, t)
    rows = pl.ds(i * g.config.block, g.config.block)
    for name, span in (
      ("q", rows),
      ("k", columns),
      ("do", rows),
      ("v", columns),
    ):
      plgpu.copy_gmem_to_smem(
        getattr(r, name).at[b, span, share.h],
        getattr(r, f"{name}_s").at[slot],
        r.ready.at[slot],
      )

    if g.plan.masked:
      for ids, span, ids_s in (
        (r.q_ids, rows, r.row_ids_s),
        (r.kv_ids, columns, r.column_ids_s),
      ):
        plgpu.copy_gmem_to_smem(
          ids.at[b, span], ids_s.at[slot], r.ready.at[slot]
        )

  pipeline.ring(g, share.total, fetch, r.free)


def _compute(g: Grid, r, share: _Share, wg) -> None:
  mine = pl.ds(wg * ROWS, ROWS)
  r.dtiles[share.h, share.n, share.split, mine, share.within] = lax.fori_loop(
    0,
    share.total,
    functools.partial(_tile, g, r, share, wg),
    tiles.zeros(ROWS, g.part),
  )


def _tile(g: Grid, r, share: _Share, wg, t, dtile):
  """dtile with the dS of the t-th pair of blocks."""
  mine, slot = pl.ds(wg * ROWS, ROWS), pipeline.slot_of(g, t)
  b, i, j, _ = share.place(g, t)
  rows = pipeline.my_rows(g, i, wg)
  ids = tiles.ids_of(r, g, b, i, j, (slot, mine), slot)
  lse, delta = (
    tiles.read(r.statistics.at[b, share.h, n, rows], tiles.PER_ROW)
    for n in (0, 1)
  )
  plgpu.barrier_wait(r.ready.at[slot])
  s, dp = tiles.products(
    (r.q_s.at[slot, mine], r.k_s.at[slot]),
    (r.do_s.at[slot, mine], r.v_s.at[slot]),
  )
  # Read again a step: kept in registers, it would make others spill.
  bias = tiles.read(
    r.tiles.at[share.h, share.n, mine, share.within], tiles.TILE
  )
  s = tiles.scores(s, g.plan, ids, bias)
  # The slot holds ids too.
  plgpu.barrier_arrive(r.free.at[slot])
  prob = tiles.exp(s, tiles.across(lse, g.part))
  return dtile + tiles.ds(prob, dp, tiles.across(delta, g.part))
