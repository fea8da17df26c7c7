"""plgpu.kernel with operands by name, and the memory that kernels ask for."""

from __future__ import annotations

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.flash_attention.blocked import Cotangents, Operands
from pallas_kernels.flash_attention.gpu_common import (
  bias_operands,
  id_operands,
)
from pallas_kernels.flash_attention.mosaic.config import ROWS, Grid
from pallas_kernels.manual_axes import vary_together


def call(g: Grid, name: str, kernel, axes, inputs, outputs, scratch):
  """Name of an output -> array.

  Args:
    g: the sizes.
    name: of the kernel, in profiles and dumps.
    kernel: called with a namespace of refs; None is what this variant lacks.
    axes: name -> programs. Those next to each other along the last axis start
      one after the other: blocks of a head, which share its keys in the L2
      cache.
    inputs: name -> array.
    outputs: name -> jax.ShapeDtypeStruct.
    scratch: name -> scratch type or None.
  """
  present = {n: x for n, x in scratch.items() if x is not None}
  names = [*inputs, *outputs, *present]
  results = plgpu.kernel(
    lambda *refs: kernel(
      types.SimpleNamespace(**dict.fromkeys(scratch) | dict(zip(names, refs)))
    ),
    out_type=list(outputs.values()),
    scratch_types=list(present.values()),
    grid=tuple(axes.values()),
    grid_names=tuple(axes),
    num_threads=g.config.warpgroups + 1,
    thread_name="wg",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs.values())
  # plgpu.kernel forgets over which mesh axes its operands vary.
  return dict(zip(outputs, vary_together(results, like=inputs["q"])))


def struct(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def matrix(dtype, *shape):
  """A scratch type: in shared memory as wgmma wants it."""
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def staging(g: Grid, dtype):
  """Where the interpreter puts a left operand that registers would hold."""
  if not g.config.interpreted:
    return None
  return matrix(dtype, g.config.warpgroups, ROWS, g.part)


def of(ref, wg):
  """A warpgroup's part of scratch that not every variant has."""
  return None if ref is None else ref.at[wg]


def ids(g: Grid, *shape):
  """Scratch type of segment ids in shared memory, where there are any."""
  return plgpu.SMEM(shape, jnp.int32) if g.plan.masked else None


def arrivals(g: Grid, number: int):
  """A barrier a stage."""
  return plgpu.Barrier(num_arrivals=number, num_barriers=g.config.stages)


def rows_ready(g: Grid, number: int):
  """A barrier a warpgroup that computes, for what it loads itself."""
  return plgpu.Barrier(num_arrivals=number, num_barriers=g.config.warpgroups)


def freed(g: Grid):
  """A barrier a stage, at which every warpgroup that computes arrives."""
  return arrivals(g, g.config.warpgroups)


def bias_inputs(g: Grid, x: Operands, *, transposed=False):
  """The bias; where it has tails, places in a block to multiply slopes by."""
  found = bias_operands(x, g.plan, transposed=transposed)
  if g.plan.tails:
    found["places"] = jnp.arange(g.config.block, dtype=jnp.float32)
  return found


def backward_inputs(x: Operands, y: Cotangents) -> dict[str, jax.Array]:
  """What all backward kernels read."""
  return {
    "q": x.q,
    "k": x.k,
    "v": x.v,
    "do": y.do,
    "statistics": jnp.stack([y.lse, y.delta], axis=2),
    "shift": x.shift[None],
    **id_operands(x.segments),
  }
