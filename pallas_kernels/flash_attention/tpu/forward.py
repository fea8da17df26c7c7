"""The forward kernel: an online softmax over the keys of a query block."""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked
from pallas_kernels.flash_attention.blocked import Operands, Plan
from pallas_kernels.flash_attention.tpu import tiles
from pallas_kernels.flash_attention.tpu.call import Call, Grid
from pallas_kernels.flash_attention.tpu.tiles import LANES, head_lanes
from pallas_kernels.flash_attention.tpu.visits import (
  Tile,
  read_visit,
  run_visit,
)

# The running maximum starts here rather than at -inf, so that a row that has
# seen no key yet subtracts a finite number from -inf.
_LOWEST = -1e30


def forward(x: Operands, plan: Plan, for_gradient: bool):
  """(o, rest, lse) as blocked.Kernels wants them."""
  grid = Grid.of(x, plan, keys_stay=False)
  call = Call(grid, x)
  flat = tiles.wide(x.q)
  call.inputs |= {
    "q": (flat, call.of_queries()),
    "k": (tiles.wide(x.k), call.of_keys()),
    "v": (tiles.wide(x.v), call.of_keys()),
  }
  struct = jax.ShapeDtypeStruct
  call.outputs["o"] = struct(flat.shape, flat.dtype), call.of_queries()
  if for_gradient:
    if x.q.dtype != jnp.float32:
      call.outputs["rest"] = call.outputs["o"]
    lse = struct((grid.batch, grid.heads, 1, flat.shape[1]), jnp.float32)
    call.outputs["lse"] = lse, call.rows()
  statistics = pltpu.VMEM((grid.group, plan.bq, LANES), jnp.float32)
  call.scratch["m"] = statistics
  call.scratch["sum"] = pltpu.VMEM(
    (grid.group, plan.bq, grid.width), jnp.float32
  )
  if grid.group == 1:
    call.scratch["l"] = statistics
  out = call.run(
    "flash_attention_forward",
    functools.partial(_kernel, grid, call.visits.numbering, for_gradient),
  )
  if for_gradient:
    out["lse"] = out["lse"][:, :, 0]
  for name in {"o", "rest"} & set(out):
    out[name] = out[name].reshape(x.q.shape)
  return out["o"], out.get("rest"), out.get("lse")


def _kernel(grid: Grid, numbering, for_gradient: bool, r) -> None:
  h, n = pl.program_id(0), pl.program_id(1)
  plan = grid.plan
  visit = read_visit(r.visits, n, numbering)
  if plan.biased:
    pl.when(n == 0)(
      lambda: tiles.expand_all(r, grid.group, plan, plan.bq, plan.bk)
    )

  @pl.when(visit.first_of_row)
  def _():
    r.m[...] = jnp.full(r.m.shape, _LOWEST, jnp.float32)
    r.sum[...] = jnp.zeros(r.sum.shape, jnp.float32)
    if grid.group == 1:
      r.l[...] = jnp.zeros(r.l.shape, jnp.float32)
    if plan.masked:
      r.ids_down[...] = tiles.column(r.down[0])

  _, i, j = visit.place
  run_visit(visit, i, j, r.offset, plan, functools.partial(_tile, grid, r, h))
  pl.when(visit.last_of_row)(lambda: _finish(grid, for_gradient, r))


def _tile(grid: Grid, r, h, t: Tile) -> None:
  plan, dim = grid.plan, grid.dim
  v = r.v[0]
  if t.masked:
    v = tiles.real_values(v, r.ids_across[0])
  for a in range(grid.group):
    lanes = head_lanes(a, dim)
    q_a, k_a = r.q[0, :, lanes], r.k[0, :, lanes]
    s = tiles.scores(r, a, q_a, k_a, h * grid.group + a, t, plan)
    m_old = r.m[a]
    m_new = jnp.maximum(m_old, jnp.max(s, axis=1)[:, None])
    p = tiles.exp(s - tiles.lanes(m_new, plan.bk))
    shrink = tiles.exp(m_old - m_new)
    r.m[a] = m_new
    if grid.group == 1:
      v_a = v
      r.l[a] = r.l[a] * shrink + jnp.sum(p, axis=1)[:, None]
    else:
      # The lanes of the other head hold ones, and so the sum of P.
      v_a = tiles.sum_beside(v, a, dim)
    pv = tiles.dot(p.astype(v.dtype), v_a, tiles.NN)
    r.sum[a] = r.sum[a] * tiles.lanes(shrink, grid.width) + pv


def _finish(grid: Grid, for_gradient: bool, r) -> None:
  """Writes the rows of a query block, all of whose keys were seen."""
  dim = grid.dim
  for a in range(grid.group):
    lanes = head_lanes(a, dim)
    sums = r.sum[a, :, lanes]
    if grid.group == 1:
      l = r.l[a]
    else:
      other = (1 - a) * dim
      l = r.sum[a, :, other : other + 1]
      l = jnp.broadcast_to(l, (l.shape[0], LANES))
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    o, rest = blocked.rounded(sums / tiles.lanes(l, dim), r.o.dtype)
    r.o[0, :, lanes] = o
    if for_gradient:
      if rest is not None:
        r.rest[0, :, lanes] = rest
      lse = jnp.where(seen, r.m[a] + jnp.log(l), 0.0)
      r.lse[0, a] = jnp.transpose(lse)[:1]
