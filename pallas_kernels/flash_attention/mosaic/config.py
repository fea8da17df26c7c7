"""What a kernel is made for, frozen: tracing it reads nothing else."""

from __future__ import annotations

import dataclasses

from pallas_kernels.flash_attention.blocked import Operands, Plan

ROWS = 64  # Of one warpgroup: M of wgmma.
COPIES = 8  # Of a row sum that wgmma takes: its least N.


@dataclasses.dataclass(frozen=True)
class Config:
  """How kernels are made.

  Attributes:
    warpgroups: that compute, 64 rows each; one more loads.
    stages: tiles in the ring of shared memory.
    registers: of a thread that computes, and of one that loads.
    interpreted: without what the interpreter does not know: accumulators that
      start from a value, and wgmma operands in registers.
  """

  warpgroups: int = 2
  stages: int = 2
  registers: tuple[int, int] = (240, 24)
  interpreted: bool = False

  @property
  def block(self) -> int:
    """Queries, and keys, of a tile."""
    return ROWS * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Grid:
  """Sizes that a kernel is made for.

  Attributes:
    config: see Config.
    plan: the geometry of tiles.
    batch: rows.
    heads: all of them.
    dim: of a head.
    nq: query blocks.
    nk: key blocks.
    parts: in which a tile is taken.
  """

  config: Config
  plan: Plan
  batch: int
  heads: int
  dim: int
  nq: int
  nk: int
  parts: int

  @property
  def part(self) -> int:
    """Of a tile's columns, those taken at a time."""
    return self.config.block // self.parts

  @classmethod
  def of(cls, x: Operands, config: Config, plan: Plan, parts: int) -> Grid:
    batch, queries, heads, dim = x.q.shape
    nq, nk = queries // plan.bq, x.k.shape[1] // plan.bk
    return cls(config, plan, batch, heads, dim, nq, nk, parts)
