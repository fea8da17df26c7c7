"""Block sizes by chip and head dimension, and what chip we are on.

`tools/tune_attention.py` measures them on a real chip, each alone, to be put
here. The rows of chips we had no access to come from compiled programs
(bundles or instructions a tile, spills, memory), not from a clock.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

_MIB = 2**20


def _device():
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return device or jax.devices()[0]


def device_kind() -> str:
  """The chip being compiled for: "TPU v5 lite", "NVIDIA H100 80GB HBM3".

  Compiling for a chip that is not there, under
  `jax.sharding.use_abstract_mesh`, it is that chip.
  """
  return _device().device_kind


def chip_is(maker: str) -> bool:
  """Whether it is a "TPU" or an "NVIDIA" GPU."""
  return device_kind().startswith(maker)


def is_hopper() -> bool:
  """Whether this GPU multiplies by wgmma, which came and went with Hopper."""
  capability = getattr(_device(), "compute_capability", None)
  if capability is not None:
    return capability == "9.0"
  return any(name in device_kind() for name in ("H100", "H200", "H20", "GH200"))


# A few queries against a long cache are one dense tile of plain XLA: one row a
# head leaves a matrix unit idle, and a loop over key blocks only adds latency.
_FEW_QUERIES = 16


def preferred(queries: int) -> tuple[str, ...]:
  """Implementations in the order to try them on this chip."""
  kind = device_kind()
  if queries > _FEW_QUERIES:
    if kind.startswith("TPU"):
      return "mosaic_tpu", "chunked"
    if kind.startswith("NVIDIA"):
      kernels = ("mosaic_gpu", "triton") if is_hopper() else ("triton",)
      return *kernels, "chunked"
  return ("chunked",)


# Chip -> (VMEM that a kernel may use, queries x keys of a tile a head
# dimension up to 128, and above).
_TPU = {
  "TPU v4": (16 * _MIB, (256, 256), (256, 256)),
  "TPU v5 lite": (100 * _MIB, (512, 512), (512, 512)),
  "TPU v5": (90 * _MIB, (512, 512), (512, 512)),
  "TPU v6 lite": (100 * _MIB, (512, 512), (512, 512)),
  "TPU7x": (60 * _MIB, (512, 512), (512, 512)),
}


def _tpu_row():
  return _TPU.get(device_kind(), _TPU["TPU v4"])


def vmem_bytes() -> int:
  """VMEM that a kernel may use on this chip."""
  return _tpu_row()[0]


def tpu_query_chunk(width: int) -> int:
  """Queries whose dq, `width` lanes in float32, stays in VMEM."""
  return vmem_bytes() * 2 // 7 // (8 * width)


def tpu_blocks(queries: int, keys: int, head_dim: int) -> tuple[int, int]:
  """(bq, bk) for these lengths: no larger than needed to hold them."""
  bq, bk = _tpu_row()[1 if head_dim <= 128 else 2]
  # Multiples of 128 lanes, and a common unit that leaves few near tiles.
  fewest = lambda length: -(-length // 128) * 128
  return min(bq, fewest(queries)), min(bk, fewest(keys))


class MosaicParts(NamedTuple):
  """Into how many parts each kernel cuts a 128 x 128 tile.

  More parts mean fewer registers and smaller products.
  """

  forward: int
  dq: int
  dkv: int
  dbias: int


# Greatest head dimension -> parts. wgmma wants 64 rows or more of the operand
# that it sums over, so two is the most.
_MOSAIC_GPU = {64: MosaicParts(1, 2, 2, 1), 128: MosaicParts(2, 2, 2, 2)}


def mosaic_parts(head_dim: int) -> MosaicParts:
  return _MOSAIC_GPU[64 if head_dim <= 64 else 128]


class TritonBlocks(NamedTuple):
  """Queries and keys of a tile, keys (or queries) at a time, warps."""

  block: int
  part: int
  warps: int


# Greatest head dimension -> blocks for 16-bit and for float32 inputs.
_TRITON = {
  64: (TritonBlocks(128, 64, 8), TritonBlocks(64, 32, 8)),
  128: (TritonBlocks(128, 32, 8), TritonBlocks(64, 32, 8)),
  256: (TritonBlocks(64, 32, 8), TritonBlocks(64, 32, 8)),
}


def triton_blocks(head_dim: int, float32: bool) -> TritonBlocks:
  row = next(limit for limit in _TRITON if head_dim <= limit)
  return _TRITON[row][float32]
