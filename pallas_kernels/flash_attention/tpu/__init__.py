"""Flash attention for TPU in Pallas (Mosaic): v4 to v7x.

Forward: one program a group of heads, which visits the tiles that are visible
(`visits`), the keys of a query block one after the other, with the online
softmax in scratch. Backward: one fused kernel of five matrix products a tile,
transposed (keys down, queries across) so that row statistics broadcast along
sublanes; the gradient of a whole chunk of queries stays in VMEM, and longer
inputs are taken a chunk at a time (`chunks`).

The near tiles of the bias are expanded from their diagonals once a head, in
VMEM: no tile is ever in HBM. Their gradients are summed as whole tiles in VMEM,
over the batch and all blocks, and leave it as diagonals (`tiles`).

Heads of 64 lie two to a program, side by side in the 128 lanes, as the
projections leave them: nothing is transposed or padded in HBM.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked, tiling
from pallas_kernels.flash_attention.tpu import chunks
from pallas_kernels.flash_attention.tpu.tiles import head_group, padded_head_dim

_KERNELS = blocked.Kernels(chunks.forward, chunks.backward)


def unsupported(q_BQHD, k_BKHD, bias) -> str | None:
  """Why these arguments cannot run here, or None."""
  if not tiling.chip_is("TPU"):
    return f"it runs on TPUs, this is {tiling.device_kind()}"
  if q_BQHD.dtype == jnp.float16:
    return "TPUs have no float16; use bfloat16"
  reason = blocked.unsupported(q_BQHD, k_BKHD, bias)
  if reason or _blocks(q_BQHD, k_BKHD, bias):
    return reason
  return (
    f"the near tiles of a bias of radius {bias.radius} do not fit VMEM; use "
    "'chunked'"
  )


def _blocks(q_BQHD, k_BKHD, bias) -> tuple[int, int] | None:
  _, queries, heads, dim = q_BQHD.shape
  return tiling.tpu_blocks(
    queries,
    k_BKHD.shape[1],
    dim,
    None if bias is None else bias.radius,
    head_group(heads, padded_head_dim(heads, dim)),
  )


def attention(q_BQHD, k_BKHD, v_BKHD, bias, *operands, **settings) -> jax.Array:
  """Same function as reference.attention, on a TPU."""
  _, _, heads, dim = q_BQHD.shape
  bq, bk = _blocks(q_BQHD, k_BKHD, bias)
  return blocked.attention(
    _KERNELS,
    q_BQHD,
    k_BKHD,
    v_BKHD,
    bias,
    *operands,
    **settings,
    bq=bq,
    bk=bk,
    head_dim=padded_head_dim(heads, dim),
  )
