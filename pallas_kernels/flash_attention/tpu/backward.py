"""The backward kernel: five products a tile, keys down and queries across."""

from __future__ import annotations

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked
from pallas_kernels.flash_attention.blocked import Cotangents, Operands, Plan
from pallas_kernels.flash_attention.tpu import tiles
from pallas_kernels.flash_attention.tpu.call import Call, Grid
from pallas_kernels.flash_attention.tpu.tiles import head_lanes
from pallas_kernels.flash_attention.tpu.visits import (
  Tile,
  read_visit,
  run_visit,
)


def backward(
  x: Operands, y: Cotangents, plan: Plan, need_dbias: bool, start=None
):
  """(dq, dk, dv, dbias) as blocked.Kernels wants them, from these queries.

  Args:
    x: what the forward pass read.
    y: what the backward pass reads beside it.
    plan: the geometry of tiles.
    need_dbias: whether the bias has a gradient.
    start: None, or the float32 (dk, dv) (B, K, H * D) of other queries, to
      which these add theirs in place; dk and dv are then of that shape.
  """
  grid = Grid.of(x, plan, keys_stay=True)
  call = Call(grid, x)
  q, k = tiles.wide(x.q), tiles.wide(x.k)
  of_queries, of_keys = call.of_queries(), call.of_keys()
  call.inputs |= {
    "q": (q, of_queries),
    "k": (k, of_keys),
    "v": (tiles.wide(x.v), of_keys),
    "do": (tiles.wide(y.do), of_queries),
    "lse": (y.lse[:, :, None], call.rows()),
    "delta": (y.delta[:, :, None], call.rows()),
  }
  f32, struct = jnp.float32, jax.ShapeDtypeStruct
  if y.k_mean is not None:
    call.inputs["k_mean"] = (
      y.k_mean.reshape(grid.batch, 1, -1),
      call.block((1, 1, grid.width), "b0h"),
    )
    call.scratch["k_centred"] = pltpu.VMEM((plan.bk, grid.width), k.dtype)
  aliases, dtype = {}, k.dtype
  if start is not None:
    call.inputs["dk_start"], call.inputs["dv_start"] = (
      (s, of_keys) for s in start
    )
    aliases, dtype = {"dk_start": "dk", "dv_start": "dv"}, f32
  call.outputs |= {
    "dq": (
      struct(q.shape, q.dtype),
      call.block((1, q.shape[1], grid.width), "b0h"),
    ),
    "dk": (struct(k.shape, dtype), of_keys),
    "dv": (struct(k.shape, dtype), of_keys),
  }
  call.scratch |= {
    "dq_sum": pltpu.VMEM((q.shape[1], grid.width), f32),
    "dk_sum": pltpu.VMEM((grid.group, plan.bk, grid.dim), f32),
    "dv_sum": pltpu.VMEM((grid.group, plan.bk, grid.dim), f32),
  }
  if need_dbias:
    far = (2, 1 + plan.tails, 8, plan.bq)
    diagonals, of_diagonals = call.inputs["diagonals"]
    call.outputs |= {
      "dfar": (
        struct((grid.heads, *far), f32),
        pl.BlockSpec((grid.group, *far), lambda h, *_: (h, 0, 0, 0, 0)),
      ),
      "ddiagonals": (struct(diagonals.shape, f32), of_diagonals),
    }
    call.scratch["dtiles"] = call.scratch["tiles"]
  kernel = functools.partial(_kernel, grid, call.visits.numbering, need_dbias)
  out = call.run("flash_attention_backward", kernel, aliases)
  dbias = None
  if need_dbias:
    dbias = _dbias(x.bias, out, plan)
  dq = out["dq"].reshape(x.q.shape)
  if start is not None:
    return dq, out["dk"], out["dv"], dbias
  return dq, *(out[n].reshape(x.k.shape) for n in ("dk", "dv")), dbias


def _dbias(bias, out, plan: Plan) -> blocked.Bias:
  _, transpose = jax.vjp(
    lambda d: tiles.compact_diagonals(d, plan, transposed=True),
    bias.diagonals_HTL,
  )
  far = out["dfar"].sum((3, 4))
  return blocked.Bias(
    *transpose(out["ddiagonals"]),
    jnp.pad(far, ((0, 0), (0, 0), (0, 2 - far.shape[2]))),
  )


def _kernel(grid: Grid, numbering, need_dbias: bool, r) -> None:
  h, n = pl.program_id(0), pl.program_id(1)
  plan = grid.plan
  visit = read_visit(r.visits, n, numbering)

  if plan.biased:

    @pl.when(n == 0)
    def _():
      tiles.expand_all(r, grid.group, plan, plan.bk, plan.bq)
      if need_dbias:
        r.dtiles[...] = jnp.zeros(r.dtiles.shape, jnp.float32)
        r.dfar[...] = jnp.zeros(r.dfar.shape, jnp.float32)

  @pl.when(visit.first_of_batch)
  def _():
    r.dq_sum[...] = jnp.zeros(r.dq_sum.shape, jnp.float32)

  pl.when(visit.first_of_row)(lambda: _begin_keys(grid, r))
  _, j, i = visit.place
  body = functools.partial(_tile, grid, need_dbias, r, h, i)
  run_visit(visit, i, j, r.offset, plan, body)

  @pl.when(visit.last_of_row)
  def _():
    for a in range(grid.group):
      lanes = head_lanes(a, grid.dim)
      r.dk[0, :, lanes] = r.dk_sum[a].astype(r.dk.dtype)
      r.dv[0, :, lanes] = r.dv_sum[a].astype(r.dv.dtype)

  @pl.when(visit.last_of_batch)
  def _():
    r.dq[0] = r.dq_sum[...].astype(r.dq.dtype)

  if need_dbias:

    @pl.when(visit.last)
    def _():
      for a in range(grid.group):
        for t in range(plan.tiles):
          x_8L = tiles.collapse(r.dtiles[a, t], r.ddiagonals.shape[-1])
          r.ddiagonals[a, t] = x_8L


def _begin_keys(grid: Grid, r) -> None:
  for a in range(grid.group):
    lanes = head_lanes(a, grid.dim)
    for sums, start in ((r.dk_sum, "dk_start"), (r.dv_sum, "dv_start")):
      if hasattr(r, start):
        sums[a] = getattr(r, start)[0, :, lanes]
      else:
        sums[a] = jnp.zeros(sums.shape[1:], jnp.float32)
  if grid.plan.masked:
    r.ids_down[...] = tiles.column(r.down[0])
  if hasattr(r, "k_centred"):
    centred = r.k[0].astype(jnp.float32) - r.k_mean[0]
    r.k_centred[...] = centred.astype(r.k.dtype)


def _tile(grid: Grid, need_dbias: bool, r, h, i, t: Tile) -> None:
  plan = grid.plan
  dq = []
  for a in range(grid.group):
    lanes = head_lanes(a, grid.dim)
    q_a, do_a = r.q[0, :, lanes], r.do[0, :, lanes]
    k_a, v_a = r.k[0, :, lanes], r.v[0, :, lanes]
    s_KQ = tiles.scores(r, a, k_a, q_a, h * grid.group + a, t, plan)
    p_KQ = tiles.exp(s_KQ - r.lse[0, a])
    r.dv_sum[a] += tiles.dot(p_KQ.astype(do_a.dtype), do_a, tiles.NN)
    ds_KQ = p_KQ * (tiles.dot(v_a, do_a, tiles.NT) - r.delta[0, a])
    ds = tiles.scaled(ds_KQ, plan.scale).astype(q_a.dtype)
    r.dk_sum[a] += tiles.dot(ds, q_a, tiles.NN)
    # See blocked.mean_key.
    if hasattr(r, "k_centred"):
      k_a = r.k_centred[:, lanes]
    dq.append(tiles.dot(ds, k_a, tiles.TN))
    if need_dbias:
      tiles.add_bias_gradient(r, a, ds_KQ, t, plan)
  rows = pl.ds(pl.multiple_of(i * plan.bq, plan.bq), plan.bq)
  r.dq_sum[rows] += jnp.concatenate(dq, axis=1)
