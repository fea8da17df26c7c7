"""The gradient of queries: one program a block of them."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.flash_attention.blocked import Cotangents, Operands, Plan
from pallas_kernels.flash_attention.gpu_common import (
  key_spans,
  near_then_far,
)
from pallas_kernels.flash_attention.mosaic import call, pipeline, tiles
from pallas_kernels.flash_attention.mosaic.config import (
  COPIES,
  ROWS,
  Config,
  Grid,
)
from pallas_kernels.flash_attention.mosaic.pipeline import Program


def dq(
  x: Operands, y: Cotangents, config: Config, plan: Plan, need_dbias: bool
):
  """(dq, float32 (B, H, 2 or 4, Q): sums over far keys, see bias_gradient)."""
  g = Grid.of(x, config, plan, tiling.mosaic_parts(x.q.shape[3]).dq)
  inputs = {
    **call.backward_inputs(x, y),
    **call.bias_inputs(g, x),
    "ones": jnp.ones((COPIES, g.part), x.q.dtype),
    "spans": key_spans(plan, x.segments, x.shift, g.batch, g.nq, g.nk),
    "k_mean": y.k_mean,
  }
  outputs = {"dq": call.struct(x.q)}
  if need_dbias:
    outputs["far"] = jax.ShapeDtypeStruct(
      (g.batch, g.heads, _sums(g), x.q.shape[1]), jnp.float32
    )
  out = call.call(
    g,
    "flash_attention_dq",
    functools.partial(_kernel, g, need_dbias),
    {"batch": g.batch, "heads": g.heads, "queries": g.nq},
    inputs,
    outputs,
    _scratch(g, x.q.dtype, need_dbias),
  )
  return out["dq"], out.get("far")


def _sums(g: Grid) -> int:
  """Of dS a row: on either side, and where there are tails by distance too."""
  return 4 if g.plan.tails else 2


def _scratch(g: Grid, dtype, need_dbias: bool):
  wgs, stages = g.config.warpgroups, g.config.stages
  far = plgpu.SMEM((wgs, _sums(g), ROWS), jnp.float32)
  return {
    "q_s": call.matrix(dtype, wgs, ROWS, g.dim),
    "do_s": call.matrix(dtype, wgs, ROWS, g.dim),
    "k_s": call.matrix(dtype, stages, g.part, g.dim),
    "v_s": call.matrix(dtype, stages, g.part, g.dim),
    "ones_s": call.matrix(dtype, wgs, COPIES, g.part),
    "far_s": far if need_dbias else None,
    "row_ids_s": call.ids(g, wgs, ROWS),
    "column_ids_s": call.ids(g, stages, g.part),
    "staging": call.staging(g, dtype),
    "rows_ready": call.rows_ready(g, 3 + g.plan.masked),
    "kv_ready": call.arrivals(g, 2 + g.plan.masked),
    "kv_free": call.freed(g),
  }


def _kernel(g: Grid, need_dbias: bool, r) -> None:
  p = Program(g, r, "queries")
  pipeline.by_role(
    g.config,
    functools.partial(_compute, g, need_dbias, r, p),
    functools.partial(_load, g, r, p),
  )


def _load(g: Grid, r, p: Program) -> None:
  def fetch(t, slot):
    *_, rows = p.span.part(t, g.parts)
    ready = r.kv_ready.at[slot]
    plgpu.copy_gmem_to_smem(r.k.at[p.b, rows, p.h], r.k_s.at[slot], ready)
    plgpu.copy_gmem_to_smem(r.v.at[p.b, rows, p.h], r.v_s.at[slot], ready)
    pipeline.copy_ids(r, "kv", p.b, rows, r.column_ids_s, slot, ready)

  pipeline.ring(g, p.total, fetch, r.kv_free)


def _compute(g: Grid, need_dbias: bool, r, p: Program, wg) -> None:
  rows, ready = pipeline.my_rows(g, p.block, wg), r.rows_ready.at[wg]
  plgpu.copy_gmem_to_smem(r.q.at[p.b, rows, p.h], r.q_s.at[wg], ready)
  plgpu.copy_gmem_to_smem(r.do.at[p.b, rows, p.h], r.do_s.at[wg], ready)
  plgpu.copy_gmem_to_smem(r.ones, r.ones_s.at[wg], ready)
  pipeline.copy_ids(r, "q", p.b, rows, r.row_ids_s, wg, ready)
  statistics = tuple(
    tiles.read(r.statistics.at[p.b, p.h, n, rows], tiles.PER_ROW)
    for n in (0, 1)
  )
  sides = tiles.far_sides(r, g.plan, p.h)
  plgpu.barrier_wait(ready)
  sums = (tiles.zeros(ROWS),) * _sums(g) if need_dbias else ()
  carry = tiles.zeros(ROWS, g.dim), tiles.zeros(ROWS, COPIES), sums
  step = functools.partial(_tile, g, r, p, wg, statistics, sides)
  carry = near_then_far(g.plan, p.span, g.parts, step, carry)
  _finish(g, r, p, wg, *carry)


def _tile(g: Grid, r, p: Program, wg, statistics, sides, near, t, carry):
  """(dq, its row sums, sums of dS on either side) with the t-th part."""
  dq, row_sums, sums = carry
  lse, delta = statistics
  slot = pipeline.slot_of(g, t)
  j, within, _ = p.span.part(t, g.parts)
  ids = tiles.ids_of(r, g, p.b, p.block, j, (wg,), slot)
  bias = None
  if near:
    place = tiles.tile_of(r, g.plan, p.h, p.block, j, wg, within)
    bias = tiles.read(place, tiles.TILE)
  plgpu.barrier_wait(r.kv_ready.at[slot])
  k_s, v_s = r.k_s.at[slot], r.v_s.at[slot]
  s, dp = tiles.products((r.q_s.at[wg], k_s), (r.do_s.at[wg], v_s))
  s = tiles.scores(s, g.plan, ids, bias)
  is_before = j < p.span.near
  top = lse
  if g.plan.biased and not near:
    far = tiles.far_side(sides, is_before)
    if g.plan.tails:
      s += tiles.down(far.of_keys(tiles.steps_across(r, g)), ROWS)
    start = tiles.first_distance(r, g, p.block, j) + within.start
    rows = tiles.steps_down(r, g, wg) if g.plan.tails else None
    top = lse - far.of_queries(start, rows)
  prob = tiles.exp(s, tiles.across(top, g.part))
  ds = tiles.ds(prob, dp, tiles.across(delta, g.part))
  if sums and not near:
    found = [ds.sum(axis=1)]
    if g.plan.tails:
      by_key = ds * tiles.down(tiles.steps_across(r, g), ROWS)
      found += [found[0] * tiles.distance(start, rows) + by_key.sum(axis=1)]
    mine = [jnp.where(x, 1.0, 0.0) for x in (is_before, j >= p.span.near)]
    added = (x * side for x in found for side in mine)
    sums = tuple(map(jnp.add, sums, added))
  ds = tiles.scaled(ds, g.plan).astype(r.q.dtype)
  rights = k_s, r.ones_s.at[wg].T
  staging = call.of(r.staging, wg)
  dq, row_sums = tiles.add_products((dq, row_sums), ds, rights, staging)
  plgpu.barrier_arrive(r.kv_free.at[slot])
  return dq, row_sums, sums


def _finish(g: Grid, r, p: Program, wg, dq, row_sums, sums) -> None:
  """Writes the rows of a warpgroup."""
  rows, dq_s = pipeline.my_rows(g, p.block, wg), r.q_s.at[wg]
  # See blocked.mean_key; all copies of a row's sum are the same.
  row_sums = row_sums.sum(axis=1) * (1 / COPIES)
  k_mean = tiles.read(r.k_mean.at[p.b, p.h], tiles.PER_COLUMN)
  dq -= tiles.across(row_sums, g.dim) * tiles.down(k_mean, ROWS)
  dq_s[...] = dq.astype(r.q.dtype)
  for side, x in enumerate(sums):
    r.far_s.at[wg, side][...] = x
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(dq_s, r.dq.at[p.b, rows, p.h])
  for side in range(len(sums)):
    plgpu.copy_smem_to_gmem(
      r.far_s.at[wg, side], r.far.at[p.b, p.h, side, rows]
    )
  plgpu.wait_smem_to_gmem(0)
