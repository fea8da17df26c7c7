"""The forward kernel: an online softmax over the keys of a query block.

FlashAttention-3: the warpgroups that compute take turns, so that one does
softmax while the other multiplies.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked, tiling
from pallas_kernels.flash_attention.blocked import LOG2E, Operands, Plan
from pallas_kernels.flash_attention.gpu_common import (
  id_operands,
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

# The running maximum starts here rather than at -inf, so that a row that has
# seen no key yet subtracts a finite number from -inf.
_LOWEST = -1e30


def forward(x: Operands, *, config: Config, plan: Plan, for_gradient: bool):
  """(o, rest, lse) as blocked.Kernels wants them."""
  g = Grid.of(x, config, plan, tiling.mosaic_parts(x.q.shape[3]).forward)
  inputs = {
    "q": x.q,
    "k": x.k,
    "v": x.v,
    "ones": jnp.ones((COPIES, g.part), x.q.dtype),
    "spans": key_spans(plan, x.segments, x.shift, g.batch, g.nq, g.nk),
    "shift": x.shift[None],
    **call.bias_inputs(g, x),
    **id_operands(x.segments),
  }
  if plan.masked:
    blocks = x.segments.kv_BK.reshape(g.batch, g.nk, plan.bk)
    inputs["kv_padded"] = (blocks == 0).any(axis=2).astype(jnp.int32)
  outputs = {"o": call.struct(x.q)}
  if for_gradient:
    outputs["rest"] = outputs["o"]
    outputs["lse"] = jax.ShapeDtypeStruct(
      (g.batch, g.heads, x.q.shape[1]), jnp.float32
    )
  out = call.call(
    g,
    "flash_attention_forward",
    functools.partial(_kernel, g, for_gradient),
    {"batch": g.batch, "heads": g.heads, "queries": g.nq},
    inputs,
    outputs,
    _scratch(g, x.q.dtype, for_gradient),
  )
  return out["o"], out.get("rest"), out.get("lse")


def _scratch(g: Grid, dtype, for_gradient: bool):
  wgs, stages = g.config.warpgroups, g.config.stages
  return {
    "q_s": call.matrix(dtype, wgs, ROWS, g.dim),
    "k_s": call.matrix(dtype, stages, g.part, g.dim),
    "v_s": call.matrix(dtype, stages, g.part, g.dim),
    "ones_s": call.matrix(dtype, wgs, COPIES, g.part),
    "lse_s": plgpu.SMEM((wgs, ROWS), jnp.float32) if for_gradient else None,
    "row_ids_s": call.ids(g, wgs, ROWS),
    "column_ids_s": call.ids(g, stages, g.part),
    "staging": call.staging(g, dtype),
    "q_ready": call.rows_ready(g, 2 + g.plan.masked),
    "k_ready": call.arrivals(g, 1 + g.plan.masked),
    "v_ready": call.arrivals(g, 1),
    "v_loaded": plgpu.Barrier() if g.plan.masked else None,
    "k_free": call.freed(g),
    "v_free": call.freed(g),
    "turn": plgpu.Barrier(num_arrivals=wgs),
  }


def _kernel(g: Grid, for_gradient: bool, r) -> None:
  p = Program(g, r, "queries")
  config = g.config
  if g.plan.masked:
    # Emptying padding takes the loading threads more than they have.
    config = dataclasses.replace(config, registers=(232, 40))
  pipeline.by_role(
    config,
    functools.partial(_compute, g, for_gradient, r, p),
    functools.partial(_load, g, r, p),
  )


def _load(g: Grid, r, p: Program) -> None:
  def fetch_keys(t, slot):
    *_, rows = p.span.part(t, g.parts)
    ready = r.k_ready.at[slot]
    plgpu.copy_gmem_to_smem(r.k.at[p.b, rows, p.h], r.k_s.at[slot], ready)
    pipeline.copy_ids(r, "kv", p.b, rows, r.column_ids_s, slot, ready)

  def fetch_values(t, slot):
    j, _, rows = p.span.part(t, g.parts)
    v, v_s, ready = r.v.at[p.b, rows, p.h], r.v_s.at[slot], r.v_ready.at[slot]
    if not g.plan.masked:
      plgpu.copy_gmem_to_smem(v, v_s, ready)
      return
    padded = r.kv_padded[p.b, j] != 0

    @pl.when(jnp.logical_not(padded))
    def _():
      plgpu.copy_gmem_to_smem(v, v_s, ready)

    @pl.when(padded)
    def _():
      plgpu.copy_gmem_to_smem(v, v_s, r.v_loaded)
      plgpu.barrier_wait(r.v_loaded)
      _empty_padding(g, v_s, r.kv_ids.at[p.b, rows])
      plgpu.commit_smem()
      plgpu.barrier_arrive(ready)

  loads, frees = [fetch_keys, fetch_values], [r.k_free, r.v_free]
  pipeline.ring(g, p.total, loads, frees)


def _empty_padding(g: Grid, v_s, ids) -> None:
  """Zeros in values' rows of id 0, by one warpgroup.

  Padding may hold anything, and 0 * NaN is NaN: wgmma reads shared memory as it
  is.
  """
  for start, lane in itertools.product(
    range(0, g.part, ROWS), range(0, g.dim, 64)
  ):
    piece = v_s.at[pl.ds(start, ROWS), pl.ds(lane, 64)]
    real = tiles.read(ids.at[pl.ds(start, ROWS)], tiles.PER_ROW) != 0
    v = plgpu.load(piece, layout=tiles.TILE)
    piece[...] = jnp.where(tiles.across(real, 64), v, jnp.zeros((), v.dtype))


def _in_turn(r) -> None:
  plgpu.barrier_arrive(r.turn)
  plgpu.barrier_wait(r.turn)


def _compute(g: Grid, for_gradient: bool, r, p: Program, wg) -> None:
  q_s, ready = r.q_s.at[wg], r.q_ready.at[wg]
  rows = pipeline.my_rows(g, p.block, wg)
  plgpu.copy_gmem_to_smem(r.q.at[p.b, rows, p.h], q_s, ready)
  plgpu.copy_gmem_to_smem(r.ones, r.ones_s.at[wg], ready)
  pipeline.copy_ids(r, "q", p.b, rows, r.row_ids_s, wg, ready)
  plgpu.barrier_wait(ready)
  sides = tiles.far_sides(r, g.plan, p.h)
  pl.when(p.total > 0)(lambda: plgpu.barrier_wait(r.k_ready.at[0]))
  pl.when(wg == 1)(lambda: _in_turn(r))
  carry = (
    tiles.zeros(ROWS, g.dim),
    tiles.filled(_LOWEST, ROWS),
    tiles.zeros(ROWS, COPIES),
  )
  step = functools.partial(_tile, g, r, p, wg, sides)
  o, m, l = near_then_far(g.plan, p.span, g.parts, step, carry)
  pl.when(wg == 0)(lambda: _in_turn(r))
  _finish(g, for_gradient, r, p, wg, o, m, l)


def _tile(g: Grid, r, p: Program, wg, sides, near: bool, t, carry):
  """The t-th part of a block of keys: (o, m, l) with it."""
  o, m, l = carry
  slot = pipeline.slot_of(g, t)
  j, within, _ = p.span.part(t, g.parts)
  ids = tiles.ids_of(r, g, p.b, p.block, j, (wg,), slot)
  s, bias = _product(g, r, p, wg, near, slot, j, within)
  s = tiles.scores(s, g.plan, ids, bias)
  # Keys' slot holds their ids too.
  plgpu.barrier_arrive(r.k_free.at[slot])
  s, constant = _far(g, r, p, wg, sides, near, j, within, s)
  m_new, prob = _probabilities(s, m, constant)
  shrink = jnp.exp2((m - m_new) * LOG2E)
  prob = prob.astype(r.q.dtype)
  l = l * tiles.across(shrink, COPIES)
  o = o * tiles.across(shrink, g.dim)
  # Keeps the compiler from moving softmax into the other's turn.
  o, l, m_new, prob = lax.optimization_barrier((o, l, m_new, prob))
  plgpu.barrier_arrive(r.turn)
  plgpu.barrier_wait(r.v_ready.at[slot])
  plgpu.barrier_wait(r.turn)

  def next_keys():
    following = r.k_ready.at[pipeline.slot_of(g, t + 1)]
    pl.when(t + 1 < p.total)(lambda: plgpu.barrier_wait(following))

  # The sum of what is multiplied: a key that takes all gives o = v.
  rights = r.v_s.at[slot], r.ones_s.at[wg].T
  staging = call.of(r.staging, wg)
  o, l = tiles.add_products((o, l), prob, rights, staging, next_keys)
  plgpu.barrier_arrive(r.v_free.at[slot])
  return o, m_new, l


def _product(g: Grid, r, p: Program, wg, near: bool, slot, j, within):
  """(q k^T, the tile of the bias or None); the other's turn begins."""

  def run(accumulator):
    plgpu.wgmma(accumulator, r.q_s.at[wg], r.k_s.at[slot].T)
    bias = None
    if near:
      place = tiles.tile_of(r, g.plan, p.h, p.block, j, wg, within)
      bias = tiles.read(place, tiles.TILE)
    _in_turn(r)
    return accumulator[...], bias

  return pl.run_scoped(run, plgpu.ACC((ROWS, g.part), jnp.float32))


def _far(g: Grid, r, p: Program, wg, sides, near: bool, j, within, s):
  """(s with what its keys add, what a far tile adds to rows, or None)."""
  if near:
    return s, None
  if sides is None:
    return s, 0.0
  far = tiles.far_side(sides, j < p.span.near)
  if not g.plan.tails:
    return s, far.constant
  by_key = far.of_keys(tiles.steps_across(r, g))
  start = tiles.first_distance(r, g, p.block, j) + within.start
  constant = far.of_queries(start, tiles.steps_down(r, g, wg))
  return s + tiles.down(by_key, ROWS), constant


def _probabilities(s, m, constant):
  """(the new maximum of each row, e^(score - it)) of a tile's scores.

  Softmax does not see what a row adds to all: it moves the maximum instead.
  """
  if constant is None:
    m_new = jnp.maximum(m, s.max(axis=1))
    return m_new, tiles.exp(s, tiles.across(m_new, s.shape[1]))
  top = s.max(axis=1)
  # Not m_new - constant, which is not top where that wins. And a constant of
  # -inf hides the tile: m stays, and base is inf, so that every p is 0.
  base, m_new = jnp.maximum(m - constant, top), jnp.maximum(m, top + constant)
  return m_new, tiles.exp(s, tiles.across(base, s.shape[1]))


def _finish(g: Grid, for_gradient: bool, r, p: Program, wg, o, m, l) -> None:
  """Writes the rows of a warpgroup, all of whose keys were seen."""
  rows, o_s = pipeline.my_rows(g, p.block, wg), r.q_s.at[wg]
  l = l.max(axis=1)  # All the same.
  seen = l > 0
  l = jnp.where(seen, l, 1.0)
  o, rest = blocked.rounded(o * tiles.across(1.0 / l, g.dim), r.q.dtype)
  o_s[...] = o
  if for_gradient:
    lse = jnp.where(seen, m + jnp.log(l), 0.0)
    r.lse_s.at[wg][...] = lse
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(o_s, r.o.at[p.b, rows, p.h])
  if for_gradient:
    plgpu.copy_smem_to_gmem(r.lse_s.at[wg], r.lse.at[p.b, p.h, rows])
    # The same memory again, once it is read.
    plgpu.wait_smem_to_gmem(0)
    o_s[...] = rest
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_s, r.rest.at[p.b, rows, p.h])
  plgpu.wait_smem_to_gmem(0)
