"""A Pallas call with operands by name, over a list of visits."""

from __future__ import annotations

import dataclasses
import types

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.flash_attention.blocked import Operands, Plan
from pallas_kernels.flash_attention.tpu import tiles
from pallas_kernels.flash_attention.tpu.visits import Visits, make_visits


@dataclasses.dataclass(frozen=True)
class Grid:
  """Sizes that a kernel is made for.

  Attributes:
    plan: the geometry of tiles.
    batch: rows.
    heads: all of them.
    dim: of a head.
    nq: query blocks.
    nk: key blocks.
    keys_stay: whether query blocks move past a key block: the backward pass,
      whose tiles are transposed.
  """

  plan: Plan
  batch: int
  heads: int
  dim: int
  nq: int
  nk: int
  keys_stay: bool

  @property
  def group(self) -> int:
    return tiles.head_group(self.heads, self.dim)

  @property
  def width(self) -> int:
    """Lanes of a group of heads."""
    return self.group * self.dim

  @classmethod
  def of(cls, x: Operands, plan: Plan, *, keys_stay: bool) -> Grid:
    batch, queries, heads, dim = x.q.shape
    nq, nk = queries // plan.bq, x.k.shape[1] // plan.bk
    return cls(plan, batch, heads, dim, nq, nk, keys_stay)


class Call:
  """Operands of a kernel as they are named, then the call.

  `inputs` and `outputs` map a name to (array or struct, BlockSpec), `scratch`
  to a scratch shape; the kernel gets all as refs in one namespace, with
  `offset` (shift and phase) and `visits` in scalar memory.
  """

  def __init__(self, grid: Grid, x: Operands):
    plan, self.grid = grid.plan, grid
    self.visits: Visits = make_visits(
      plan,
      x.segments,
      x.shift,
      grid.batch,
      grid.nq,
      grid.nk,
      keys_stay=grid.keys_stay,
    )
    self.inputs, self.outputs, self.scratch = {}, {}, {}
    self._offset = jnp.stack([x.shift, x.phase])
    if plan.biased:
      self._add_bias(x.bias)
    if plan.masked:
      self._add_ids(x.segments)

  def _add_bias(self, bias):
    plan, group = self.grid.plan, self.grid.group
    diagonals = tiles.compact_diagonals(
      bias.diagonals_HTL, plan, transposed=self.grid.keys_stay
    )
    self.inputs["constants"] = (
      bias.constants_H22,
      pl.BlockSpec(memory_space=pltpu.SMEM),
    )
    self.inputs["diagonals"] = (
      diagonals,
      pl.BlockSpec((group, *diagonals.shape[1:]), lambda h, *_: (h, 0, 0, 0)),
    )
    self.scratch["tiles"] = pltpu.VMEM(
      (group, plan.tiles, *self.tile_shape), jnp.float32
    )

  def _add_ids(self, segments):
    q, kv = segments.q_BQ[:, None], segments.kv_BK[:, None]
    of_queries = (q, self.block((1, 1, self.grid.plan.bq), "b0i"))
    of_keys = (kv, self.block((1, 1, self.grid.plan.bk), "b0j"))
    if self.grid.keys_stay:
      of_queries, of_keys = of_keys, of_queries
    self.inputs["down"], self.inputs["ids_across"] = of_queries, of_keys
    self.scratch["ids_down"] = pltpu.VMEM(
      (self.tile_shape[0], tiles.LANES), jnp.int32
    )

  @property
  def tile_shape(self) -> tuple[int, int]:
    plan = self.grid.plan
    return (plan.bk, plan.bq) if self.grid.keys_stay else (plan.bq, plan.bk)

  def block(self, shape, index: str) -> pl.BlockSpec:
    """A BlockSpec whose index is a letter an axis: h, b, i, j, or 0."""
    numbering = self.visits.numbering

    def place(h, n, offset, entries):
      del offset
      b, outer, inner = numbering.unpack(entries[n + 1])
      i, j = (inner, outer) if self.grid.keys_stay else (outer, inner)
      letters = {"h": h, "b": b, "i": i, "j": j, "0": 0}
      return tuple(letters[x] for x in index)

    return pl.BlockSpec(shape, place)

  def of_queries(self) -> pl.BlockSpec:
    """Of a (B, L, H * D) array: a query block of a group of heads."""
    return self.block((1, self.grid.plan.bq, self.grid.width), "bih")

  def of_keys(self) -> pl.BlockSpec:
    return self.block((1, self.grid.plan.bk, self.grid.width), "bjh")

  def rows(self) -> pl.BlockSpec:
    """Of a (B, H, 1, L) array: a number a query."""
    return self.block((1, self.grid.group, 1, self.grid.plan.bq), "bh0i")

  def run(self, name: str, kernel, aliases=None) -> dict[str, jax.Array]:
    """Name of an output -> array.

    Args:
      name: of the kernel, in profiles and dumps.
      kernel: called with a namespace of refs.
      aliases: name of an input -> name of the output that takes its memory.
    """
    names = ["offset", "visits", *self.inputs, *self.outputs, *self.scratch]
    aliases = {
      names.index(x): list(self.outputs).index(y)
      for x, y in (aliases or {}).items()
    }
    arrays, in_specs = zip(*self.inputs.values())
    out_shape, out_specs = zip(*self.outputs.values())
    # Under shard_map an output varies over the mesh axes that inputs vary over.
    axes = jax.typeof(self.inputs["q"][0]).manual_axis_type
    results = pl.pallas_call(
      lambda *refs: kernel(types.SimpleNamespace(**dict(zip(names, refs)))),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(self.grid.heads // self.grid.group, self.visits.count),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=list(self.scratch.values()),
      ),
      out_shape=[
        jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes)
        for x in out_shape
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=tiling.vmem_bytes(),
      ),
      input_output_aliases=aliases,
      name=name,
    )(self._offset, self.visits.entries_N, *arrays)
    return dict(zip(self.outputs, results))
