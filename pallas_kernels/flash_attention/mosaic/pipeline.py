"""Who does what: warpgroups that compute, and one that loads tiles for them."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention.gpu_common import Span, longest_first
from pallas_kernels.flash_attention.mosaic.config import ROWS, Config, Grid


class Program:
  """One program: a block of queries, or of keys, and the blocks it visits.

  Attributes:
    b, h: batch row and head.
    block: which block.
    span: the blocks it visits.
    total: visits of a part of a block.
  """

  def __init__(self, g: Grid, r, axis: str):
    self.h, self.b = lax.axis_index("heads"), lax.axis_index("batch")
    self.block = lax.axis_index(axis)
    if axis == "queries":
      self.block = longest_first(g.plan, self.block, g.nq)
    self.span = Span(r.spans.at[self.b, self.block], g.config.block)
    self.total = self.span.count * g.parts


def by_role(config: Config, compute, load) -> None:
  """Calls compute(warpgroup) in those that compute, load() in the last."""
  wg = lax.axis_index("wg")
  most, least = config.registers

  @pl.when(wg < config.warpgroups)
  def _():
    plgpu.set_max_registers(most, action="increase")
    compute(wg)

  @pl.when(wg == config.warpgroups)
  def _():
    plgpu.set_max_registers(least, action="decrease")
    load()


def copy_ids(r, side: str, b, rows, target, index, ready) -> None:
  """Starts to load segment ids of "q" or "kv", where the call is masked.

  Args:
    r: refs.
    side: whose ids.
    b, rows: batch row and positions.
    target: scratch, None where the call is not masked.
    index: of the target.
    ready: the barrier, which counts on them where there are any.
  """
  if target is not None:
    ids = getattr(r, f"{side}_ids").at[b, rows]
    plgpu.copy_gmem_to_smem(ids, target.at[index], ready)


def my_rows(g: Grid, block, wg):
  """The positions that a warpgroup computes."""
  return pl.ds(block * g.config.block + wg * ROWS, ROWS)


def slot_of(g: Grid, t):
  """The stage of the ring that the t-th tile lies in."""
  return lax.rem(t, jnp.asarray(g.config.stages, jax.typeof(t).dtype))


def ring(g: Grid, total, load, free) -> None:
  """The loading warpgroup: load(t, slot) for t < total, as slots get free.

  `free` is one barrier a slot, or a list of them with a `load` each where what
  a slot holds gets free piece by piece.
  """
  loads, frees = ([load], [free]) if callable(load) else (load, free)
  stages = g.config.stages
  for t in range(stages):

    @pl.when(t < total)
    def _(t=t):
      for one in loads:
        one(jnp.int32(t), t)

  # Every arrival is waited for, so that no barrier ends in an odd phase.
  @pl.loop(0, total)
  def _(t):
    for one, free in zip(loads, frees):
      plgpu.barrier_wait(free.at[slot_of(g, t)])
      pl.when(t + stages < total)(
        functools.partial(one, t + stages, slot_of(g, t))
      )
