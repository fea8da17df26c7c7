"""The gradients of keys and values: one program a block of them.

Transposed, keys down and queries across, so that P^T and dS^T are the left
operands that registers may hold.
"""

from __future__ import annotations

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.flash_attention.blocked import Cotangents, Operands, Plan
from pallas_kernels.flash_attention.gpu_common import (
  near_then_far,
  query_spans,
)
from pallas_kernels.flash_attention.mosaic import call, pipeline, tiles
from pallas_kernels.flash_attention.mosaic.config import ROWS, Config, Grid
from pallas_kernels.flash_attention.mosaic.pipeline import Program


def dkv(x: Operands, y: Cotangents, config: Config, plan: Plan):
  """(dk, dv), in the dtype of k."""
  g = Grid.of(x, config, plan, tiling.mosaic_parts(x.q.shape[3]).dkv)
  inputs = {
    **call.backward_inputs(x, y),
    **call.bias_inputs(g, x, transposed=True),
    "spans": query_spans(plan, x.segments, x.shift, g.batch, g.nq, g.nk),
  }
  out = call.call(
    g,
    "flash_attention_dkv",
    functools.partial(_kernel, g),
    {"batch": g.batch, "heads": g.heads, "keys": g.nk},
    inputs,
    {"dk": call.struct(x.k), "dv": call.struct(x.v)},
    _scratch(g, x.q.dtype),
  )
  return out["dk"], out["dv"]


def _scratch(g: Grid, dtype):
  wgs, stages = g.config.warpgroups, g.config.stages
  return {
    "k_s": call.matrix(dtype, wgs, ROWS, g.dim),
    "v_s": call.matrix(dtype, wgs, ROWS, g.dim),
    "q_s": call.matrix(dtype, stages, g.part, g.dim),
    "do_s": call.matrix(dtype, stages, g.part, g.dim),
    "statistics_s": plgpu.SMEM((stages, 2, g.part), jnp.float32),
    "row_ids_s": call.ids(g, wgs, ROWS),
    "column_ids_s": call.ids(g, stages, g.part),
    "staging": call.staging(g, dtype),
    "rows_ready": call.rows_ready(g, 2 + g.plan.masked),
    "q_ready": call.arrivals(g, 3 + g.plan.masked),
    "q_free": call.freed(g),
  }


def _kernel(g: Grid, r) -> None:
  p = Program(g, r, "keys")
  pipeline.by_role(
    g.config,
    functools.partial(_compute, g, r, p),
    functools.partial(_load, g, r, p),
  )


def _load(g: Grid, r, p: Program) -> None:
  def fetch(t, slot):
    *_, rows = p.span.part(t, g.parts)
    ready = r.q_ready.at[slot]
    plgpu.copy_gmem_to_smem(r.q.at[p.b, rows, p.h], r.q_s.at[slot], ready)
    plgpu.copy_gmem_to_smem(r.do.at[p.b, rows, p.h], r.do_s.at[slot], ready)
    plgpu.copy_gmem_to_smem(
      r.statistics.at[p.b, p.h, :, rows], r.statistics_s.at[slot], ready
    )
    pipeline.copy_ids(r, "q", p.b, rows, r.column_ids_s, slot, ready)

  pipeline.ring(g, p.total, fetch, r.q_free)


def _compute(g: Grid, r, p: Program, wg) -> None:
  rows, ready = pipeline.my_rows(g, p.block, wg), r.rows_ready.at[wg]
  k_s, v_s = r.k_s.at[wg], r.v_s.at[wg]
  plgpu.copy_gmem_to_smem(r.k.at[p.b, rows, p.h], k_s, ready)
  plgpu.copy_gmem_to_smem(r.v.at[p.b, rows, p.h], v_s, ready)
  pipeline.copy_ids(r, "kv", p.b, rows, r.row_ids_s, wg, ready)
  plgpu.barrier_wait(ready)
  carry = tiles.zeros(ROWS, g.dim), tiles.zeros(ROWS, g.dim)
  step = functools.partial(_tile, g, r, p, wg)
  dk, dv = near_then_far(g.plan, p.span, g.parts, step, carry)
  k_s[...] = dk.astype(r.k.dtype)
  v_s[...] = dv.astype(r.k.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(k_s, r.dk.at[p.b, rows, p.h])
  plgpu.copy_smem_to_gmem(v_s, r.dv.at[p.b, rows, p.h])
  plgpu.wait_smem_to_gmem(0)


def _tile(g: Grid, r, p: Program, wg, near: bool, t, carry):
  """(dk, dv) with the t-th part of a block of queries."""
  dk, dv = carry
  slot, j = pipeline.slot_of(g, t), p.block
  i, within, _ = p.span.part(t, g.parts)
  # S and dP wait for each other's product once, where both fit registers.
  together = g.dim <= 64
  plgpu.barrier_wait(r.q_ready.at[slot])
  q_s, do_s = r.q_s.at[slot], r.do_s.at[slot]
  for_s, for_dp = (r.k_s.at[wg], q_s), (r.v_s.at[wg], do_s)
  if together:
    s_KQ, dp_KQ = tiles.products(for_s, for_dp)
  else:
    (s_KQ,) = tiles.products(for_s)
  # Nothing is read ahead: dk and dv leave no registers to hold it.
  ids = tiles.ids_of(r, g, p.b, i, j, (wg,), slot)
  s_KQ = tiles.scores(s_KQ, g.plan, ids)
  top = plgpu.load(r.statistics_s.at[slot, 0], layout=tiles.PER_COLUMN)
  if near:
    place = tiles.tile_of(r, g.plan, p.h, i, j, wg, within)
    s_KQ += tiles.read(place, tiles.TILE)
  elif g.plan.biased:
    # Queries before the near ones see these keys after themselves.
    sides = tiles.far_sides(r, g.plan, p.h)
    far = tiles.far_side(sides, i >= p.span.near)
    queries = None
    if g.plan.tails:
      s_KQ += tiles.across(far.of_keys(tiles.steps_down(r, g, wg)), g.part)
      queries = tiles.steps_across(r, g)
    start = tiles.first_distance(r, g, i, j) - within.start
    top = top - far.of_queries(start, queries)
  p_KQ = tiles.exp(s_KQ, tiles.down(top, ROWS))
  staging = call.of(r.staging, wg)
  dv = tiles.add_product(dv, p_KQ.astype(r.q.dtype), do_s, staging)
  if not together:
    (dp_KQ,) = tiles.products(for_dp)
  delta = plgpu.load(r.statistics_s.at[slot, 1], layout=tiles.PER_COLUMN)
  ds_KQ = tiles.scaled(tiles.ds(p_KQ, dp_KQ, tiles.down(delta, ROWS)), g.plan)
  dk = tiles.add_product(dk, ds_KQ.astype(r.q.dtype), q_s, staging)
  plgpu.barrier_arrive(r.q_free.at[slot])
  return dk, dv
