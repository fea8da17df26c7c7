"""Flash attention for Hopper in Pallas (Mosaic GPU).

Every kernel is three warpgroups: two compute 64 rows each, the third only loads
tiles into a ring of shared memory (`pipeline`). Forward follows
FlashAttention-3 (arXiv:2407.08608): a barrier lets one warpgroup do softmax
while the other multiplies. Backward is three kernels without atomics: `dq`,
`dkv`, and `dbias`, the near tiles of the bias, which are few.

Each kernel has two loop bodies: one for near blocks, which reads a bias tile,
and one for far blocks, which adds a number.

Needs jax 0.11 (`plgpu.kernel` with warpgroup lowering), hence Python 3.12.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked, tiling
from pallas_kernels.flash_attention.blocked import Cotangents, Operands

if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
  raise ImportError(
    "it needs jax 0.11 or later (and so Python 3.12); this is "
    f"{jax.__version__}"
  )
from pallas_kernels.flash_attention.gpu_common import (
  bias_gradient,
  dbias_splits,
)
from pallas_kernels.flash_attention.mosaic.config import Config
from pallas_kernels.flash_attention.mosaic.dbias import dbias
from pallas_kernels.flash_attention.mosaic.dkv import dkv
from pallas_kernels.flash_attention.mosaic.dq import dq
from pallas_kernels.flash_attention.mosaic.forward import forward

# How kernels are made; tests put one for the interpreter here.
CONFIG = Config()


def _backward(x: Operands, y: Cotangents, *, config, plan, need_dbias):
  dq_BQHD, far_BHNQ = dq(x, y, config, plan, need_dbias)
  dk_BKHD, dv_BKHD = dkv(x, y, config, plan)
  if not need_dbias:
    return dq_BQHD, dk_BKHD, dv_BKHD, None
  batch, queries, heads, _ = x.q.shape
  splits = dbias_splits(heads, plan, batch * (queries // plan.bq))
  dtiles = dbias(x, y, config, plan, splits)
  gradient = bias_gradient(x, plan, dtiles, far_BHNQ)
  return dq_BQHD, dk_BKHD, dv_BKHD, gradient


@functools.cache
def _kernels(config: Config) -> blocked.Kernels:
  return blocked.Kernels(
    functools.partial(forward, config=config),
    functools.partial(_backward, config=config),
  )


def unsupported(q_BQHD, k_BKHD, bias) -> str | None:
  """Why these arguments cannot run here, or None."""
  kind = tiling.device_kind()
  if not tiling.chip_is("NVIDIA"):
    return f"it runs on NVIDIA GPUs, this is {kind}"
  reason = blocked.unsupported(q_BQHD, k_BKHD, bias)
  if reason:
    return reason
  if kind.startswith("NVIDIA") and not tiling.is_hopper():
    return f"its wgmma instructions are Hopper's, this is {kind}; use 'triton'"
  if q_BQHD.dtype not in (jnp.bfloat16, jnp.float16):
    return (
      f"wgmma multiplies 16-bit floats, the inputs are {q_BQHD.dtype}; use "
      "'triton' or 'chunked'"
    )
  if q_BQHD.shape[3] > 128:
    return "head dimensions above 128 leave no registers; use 'triton'"
  return None


def attention(q_BQHD, k_BKHD, *operands, **settings) -> jax.Array:
  """Same function as reference.attention, on Hopper."""
  return blocked.attention(
    _kernels(CONFIG),
    q_BQHD,
    k_BKHD,
    *operands,
    **settings,
    bq=CONFIG.block,
    bk=CONFIG.block,
    head_dim=-(-q_BQHD.shape[3] // 64) * 64,
  )
