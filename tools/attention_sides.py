"""Attentions that bench_attention.py compares: ours and every peer's.

A side is a function of (q, k, v, table, ids) in its framework's arrays: q, k, v
(B, L, H, D) in jax and (B, H, L, D) in torch, T5's table (H, 32), segment ids
(B, L) or None. A peer without such a bias gets a dense one, made from the table
in front of it and differentiated through, or none ("no bias").
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import RelativeBuckets, flash_attention
from pallas_kernels.flash_attention import positions, relative_bias, tiling

# Where the segments of a packed row end, in parts of its length.
CUTS = (0.1, 0.35, 0.7, 1.0)


@dataclasses.dataclass(frozen=True)
class Shape:
  """A layer's attention; `segments`: whether each row is packed of four."""

  batch: int
  length: int
  heads: int
  dim: int
  causal: bool = False
  segments: bool = False

  @property
  def flops(self) -> float:
    """Of the forward products, for pairs that see each other."""
    ends = [round(cut * self.length) for cut in CUTS]
    pairs = self.length**2
    if self.segments:
      pairs = sum((b - a) ** 2 for a, b in zip([0, *ends], ends))
    pairs /= 2 if self.causal else 1
    return 4 * self.batch * self.heads * pairs * self.dim

  def segment_ids(self) -> np.ndarray | None:
    if not self.segments:
      return None
    ends = [round(cut * self.length) for cut in CUTS]
    row = 1 + np.searchsorted(ends, np.arange(self.length), side="right")
    return np.tile(row.astype(np.int32), (self.batch, 1))


@dataclasses.dataclass(frozen=True)
class Side:
  """`make(shape)` gives the attention; `biased`: whether the table matters."""

  framework: str
  biased: bool
  make: object


# --- jax ---------------------------------------------------------------------


def position(table, shape: Shape):
  return RelativeBuckets(table, bidirectional=not shape.causal)


def dense_bias(table, shape: Shape, dtype):
  """(1, H, L, L): what a side without our bias needs."""
  bias = position(table, shape).lowered()
  diagonals = bias.window(1 - shape.length, 2 * shape.length - 1)
  tile = relative_bias.toeplitz(diagonals, shape.length, shape.length)
  return tile[None].astype(dtype)


def dense_mask(ids):
  """(B, 1, L, L), or None."""
  return None if ids is None else (ids[:, :, None] == ids[:, None])[:, None]


def ours(implementation: str, with_bias: bool, shape: Shape):
  def attention(q, k, v, table, ids):
    return flash_attention(
      q,
      k,
      v,
      position=position(table, shape) if with_bias else None,
      causal=shape.causal,
      q_segment_ids=ids,
      kv_segment_ids=ids,
      implementation=implementation,
    )

  return attention


def _jax_nn(implementation: str, shape: Shape):
  def attention(q, k, v, table, ids):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      bias=dense_bias(table, shape, q.dtype),
      mask=dense_mask(ids),
      is_causal=shape.causal,
      scale=1.0,
      implementation=implementation,
    )

  return attention


def _jax_pallas_gpu(shape: Shape):
  from jax.experimental.pallas.ops.gpu import attention as gpu_attention

  def attention(q, k, v, table, ids):
    del table
    return gpu_attention.mha(q, k, v, ids, sm_scale=1.0, causal=shape.causal)

  return attention


def _jax_pallas_tpu(shape: Shape):
  from jax.experimental.pallas.ops.tpu import flash_attention as tpu

  names = (
    "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv"
    " block_k_dkv block_q_dkv block_k_major_dq block_k_dq block_q_dq"
  ).split()
  block = min(512, shape.length)
  sizes = tpu.BlockSizes(**dict.fromkeys(names, block), block_b=1)

  def attention(q, k, v, table, ids):
    del table
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    o = tpu.flash_attention(
      swap(q),
      swap(k),
      swap(v),
      segment_ids=None if ids is None else tpu.SegmentIds(ids, ids),
      causal=shape.causal,
      block_sizes=sizes,
    )
    return swap(o)

  return attention


def _tokamax(shape: Shape):
  import tokamax

  def attention(q, k, v, table, ids):
    return tokamax.dot_product_attention(
      q,
      k,
      v,
      bias=dense_bias(table, shape, q.dtype),
      mask=dense_mask(ids),
      is_causal=shape.causal,
      scale=1.0,
    )

  return attention


# --- torch -------------------------------------------------------------------


def torch_device() -> str:
  import torch

  return "cuda" if torch.cuda.is_available() else "cpu"


def _bucket_index(shape: Shape):
  """(2 L - 1,): the bucket of each distance, from 1 - L on."""
  import torch

  buckets = positions.distance_buckets(32, 128, not shape.causal)
  offsets = np.clip(np.arange(1 - shape.length, shape.length), -128, 128)
  return torch.tensor(buckets[offsets + 128], device=torch_device()).long()


def _sdpa(backend: str, with_bias: bool, shape: Shape):
  import torch
  from torch.nn import functional
  from torch.nn.attention import SDPBackend, sdpa_kernel

  if backend == "FLASH_ATTENTION" and shape.segments:
    raise NotImplementedError("torch's flash attention takes no mask")
  length, index = shape.length, _bucket_index(shape)
  rows = torch.arange(length, device=torch_device())
  backend = getattr(SDPBackend, backend)

  def attention(q, k, v, table, ids):
    mask, causal = None, shape.causal
    if with_bias:
      place = rows[None] - rows[:, None] + length - 1
      mask = table[:, index[place]][None].to(q.dtype)
    if ids is not None:
      seen = (ids[:, :, None] == ids[:, None])[:, None]
      mask = seen if mask is None else mask.masked_fill(~seen, -math.inf)
    if causal and mask is not None:
      # A kernel takes a mask or causality.
      before, causal = rows[None] <= rows[:, None], False
      bool_mask = mask.dtype == torch.bool
      mask = (
        mask & before if bool_mask else mask.masked_fill(~before, -math.inf)
      )
    with sdpa_kernel(backend):
      return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=1.0
      )

  return attention


def _flex(read: str, shape: Shape):
  """`read` is how a score finds its bias: a vector by distance, or a bucket."""
  import torch
  import torch._functorch.config
  from torch.nn.attention.flex_attention import (
    create_block_mask,
    flex_attention,
  )

  # The backward pass is timed again and again on one forward pass.
  torch._functorch.config.donated_buffer = False
  length, index = shape.length, _bucket_index(shape)
  flex = torch.compile(flex_attention, dynamic=False)
  ids = shape.segment_ids()
  ids = None if ids is None else torch.tensor(ids, device=torch_device())
  block_mask = None
  if shape.causal or ids is not None:

    def sees(b, h, i, j):
      if ids is None:
        return j <= i
      same = ids[b, i] == ids[b, j]
      return same & (j <= i) if shape.causal else same

    block_mask = create_block_mask(
      sees, shape.batch, None, length, length, device=torch_device()
    )

  def attention(q, k, v, table, ids):
    del ids  # They are in the block mask.
    if read == "vector":
      vector = table[:, index]
      score = lambda s, b, h, i, j: s + vector[h, j - i + length - 1]
    else:
      score = lambda s, b, h, i, j: s + table[h, index[j - i + length - 1]]
    return flex(q, k, v, score_mod=score, block_mask=block_mask, scale=1.0)

  return attention


# --- by name -----------------------------------------------------------------


def sides(platform: str) -> dict[str, Side]:
  """All of them by name, ours first, for "cpu", "gpu" or "tpu"."""
  part, found = functools.partial, {}
  kernels = [name for name in tiling.preferred(512) if name != "chunked"]
  for name in kernels:
    found[f"ours, {name}"] = Side("jax", True, part(ours, name, True))
    found[f"ours, {name}, no bias"] = Side(
      "jax", False, part(ours, name, False)
    )
  found["ours, chunked"] = Side("jax", True, part(ours, "chunked", True))
  if platform == "gpu":
    found["jax.nn cudnn + bias"] = Side("jax", True, part(_jax_nn, "cudnn"))
    found["jax pallas gpu, no bias"] = Side("jax", False, _jax_pallas_gpu)
  if platform == "tpu":
    found["jax pallas tpu, no bias"] = Side("jax", False, _jax_pallas_tpu)
  if platform != "cpu":
    found["tokamax + bias"] = Side("jax", True, _tokamax)
  found["jax.nn xla + bias"] = Side("jax", True, part(_jax_nn, "xla"))
  if platform == "gpu":
    for title, backend in (
      ("cudnn", "CUDNN_ATTENTION"),
      ("efficient", "EFFICIENT_ATTENTION"),
    ):
      found[f"torch SDPA {title} + bias"] = Side(
        "torch", True, part(_sdpa, backend, True)
      )
    found["torch SDPA flash, no bias"] = Side(
      "torch", False, part(_sdpa, "FLASH_ATTENTION", False)
    )
    found["torch Flex, distance vector"] = Side(
      "torch", True, part(_flex, "vector")
    )
    found["torch Flex, bucket gather"] = Side(
      "torch", True, part(_flex, "bucket")
    )
  if platform == "cpu":
    found["torch SDPA math + bias"] = Side(
      "torch", True, part(_sdpa, "MATH", True)
    )
  return found
