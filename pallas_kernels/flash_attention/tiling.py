"""Block sizes by chip and head dimension, and what chip we are on.

`tools/tune_attention.py` measures them on a real chip, each alone, to be put
here. The rows of chips we had no access to come from compiled programs
(bundles or instructions a tile, spills, memory), not from a clock.
"""

from __future__ import annotations

import itertools
import math
import re
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


# What a name says where the device does not: compiling for one not here.
_CAPABILITIES = {
  (8, 0): ("A100", "A30", "A800"),
  (8, 6): ("A10", "A16", "A2", "A40", "RTX A", "RTX 30"),
  (8, 9): ("L4", "L20", "L2", "RTX 40", "RTX 6000 Ada"),
  (9, 0): ("H100", "H200", "H800", "H20", "GH200"),
  (10, 0): ("B200", "B100", "GB200"),
  (10, 3): ("B300", "GB300"),
  (12, 0): ("RTX 50", "RTX PRO"),
}
# Shared memory that a block of threads may ask for, by capability: CUDA's
# programming guide, "Technical Specifications per Compute Capability".
_SHARED_MEMORY = {
  (8, 0): 163 * 1024,
  (8, 7): 163 * 1024,
  (9, 0): 227 * 1024,
  (10, 0): 227 * 1024,
  (10, 3): 227 * 1024,
  (11, 0): 227 * 1024,
}
_LEAST_SHARED_MEMORY = 99 * 1024


def compute_capability() -> tuple[int, int]:
  """(major, minor) of this NVIDIA GPU; (0, 0) of one that nobody knows."""
  capability = getattr(_device(), "compute_capability", None)
  if capability is not None:
    major, _, minor = str(capability).partition(".")
    return int(major), int(minor or 0)
  words = device_kind().removeprefix("NVIDIA").strip()
  names = [(n, c) for c, known in _CAPABILITIES.items() for n in known]
  for name, capability in sorted(names, key=lambda x: -len(x[0])):
    if re.search(rf"\b{name}", words):
      return capability
  return 0, 0


def shared_memory() -> int:
  """Bytes of shared memory that a block of threads of this GPU may have."""
  return _SHARED_MEMORY.get(compute_capability(), _LEAST_SHARED_MEMORY)


def is_hopper() -> bool:
  """Whether this GPU multiplies by wgmma, which came and went with Hopper."""
  return compute_capability() == (9, 0)


# So few queries against a long cache are one dense tile of plain XLA: one row a
# head leaves a matrix unit idle, and a loop over key blocks only adds latency.
# On a GPU, XLA transposes keys and values for more than one; a kernel reads
# them once, as they lie.
_FEW_QUERIES = {"TPU": 16, "NVIDIA": 1}


def preferred(queries: int) -> tuple[str, ...]:
  """Implementations in the order to try them on this chip."""
  kind = device_kind()
  maker = next((m for m in _FEW_QUERIES if kind.startswith(m)), None)
  if maker is None or queries <= _FEW_QUERIES[maker]:
    return ("chunked",)
  if maker == "TPU":
    return "mosaic_tpu", "chunked"
  kernels = ("mosaic_gpu", "triton") if is_hopper() else ("triton",)
  return *kernels, "chunked"


class TpuBlocks(NamedTuple):
  """VMEM that a kernel may use, and queries and keys of a tile.

  `best` is the fastest block of long inputs at head dimensions to 128, `most`
  the largest that may be taken where it pads less; `wide` is both above 128.
  """

  vmem: int
  best: int
  most: int
  wide: int


# v5e: blocks of 1,024 take 6 % fewer bundles forward, and 3 % more backward.
_TPU = {
  "TPU v4": TpuBlocks(16 * _MIB, 256, 384, 256),
  "TPU v5 lite": TpuBlocks(100 * _MIB, 512, 1024, 512),
  "TPU v5": TpuBlocks(90 * _MIB, 512, 1024, 512),
  "TPU v6 lite": TpuBlocks(100 * _MIB, 1024, 1024, 512),
  "TPU7x": TpuBlocks(60 * _MIB, 512, 1024, 512),
}


def _tpu_row() -> TpuBlocks:
  return _TPU.get(device_kind(), _TPU["TPU v4"])


def vmem_bytes() -> int:
  """VMEM that a kernel may use on this chip."""
  return _tpu_row().vmem


def tpu_visits() -> int:
  """Tiles that a list in scalar memory (1 MiB on all) may name."""
  return 2**17


def tpu_query_chunk(width: int) -> int:
  """Queries whose dq, `width` lanes in float32, stays in VMEM."""
  return vmem_bytes() * 2 // 7 // (8 * width)


# What a block costs beside its own pairs, in rows of pairs: from the bundles of
# 512 and 1,024 on v6e.
_BLOCK_OVERHEAD = 128


def tpu_blocks(
  queries: int, keys: int, head_dim: int, radius: int | None, group: int
) -> tuple[int, int] | None:
  """(bq, bk) that compute the least beside what is needed.

  Needed are the pairs of lengths in whole lanes of 128. Blocks that compute at
  most 1.2 times those go before the others.

  Args:
    queries: their number.
    keys: their number.
    head_dim: of a head.
    radius: of the bias, whose near tiles must fit half of VMEM; None for none.
    group: heads a program, which all have their tiles there.

  Returns:
    The blocks, or None where no tile fits.
  """
  row = _tpu_row()
  most, best = (row.most, row.best) if head_dim <= 128 else 2 * (row.wide,)
  whole = [-(-length // 128) * 128 for length in (queries, keys)]

  def cost(block, length):
    count = -(-length // block)
    # Beyond the best block its overhead no longer falls.
    overhead = _BLOCK_OVERHEAD * -(-length // min(block, best))
    return count * block, count * block + overhead

  options = []
  for bq, bk in itertools.product(range(128, most + 1, 128), repeat=2):
    if bq > whole[0] or bk > whole[1]:
      continue
    if radius is not None and tile_bytes(bq, bk, radius, group) > row.vmem // 2:
      continue
    padded, total = map(math.prod, zip(cost(bq, whole[0]), cost(bk, whole[1])))
    wasteful = 5 * padded > 6 * math.prod(whole)
    beyond = max(bq, bk) > best
    options.append(
      (wasteful and padded, total, padded, beyond, -bq * bk, bq, bk)
    )
  return min(options)[-2:] if options else None


def tile_bytes(bq: int, bk: int, radius: int, group: int) -> int:
  """Of the near tiles and their gradients, in the backward pass."""
  near = (2 * radius + bq + bk) // math.gcd(bq, bk) + 1
  return 2 * group * near * bq * bk * 4


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
  """Queries and keys of a tile, keys (or queries) at a time, warps.

  `shared` is the shared memory that the greediest kernel asks for, where the
  least that a GPU has may not do.
  """

  block: int
  part: int
  warps: int
  shared: int = 0


# Greatest head dimension -> blocks for 16-bit and for float32 inputs, the best
# first.
_TRITON = {
  64: ([TritonBlocks(128, 64, 8)], [TritonBlocks(64, 32, 8)]),
  128: (
    [TritonBlocks(128, 32, 8)],
    [TritonBlocks(64, 32, 8, 106_624), TritonBlocks(64, 16, 8)],
  ),
  256: (
    [TritonBlocks(64, 32, 8, 106_880), TritonBlocks(64, 16, 8)],
    [
      TritonBlocks(64, 32, 8, 172_544),
      TritonBlocks(32, 32, 8, 135_552),
      TritonBlocks(32, 16, 8),
    ],
  ),
}


def triton_blocks(head_dim: int, float32: bool) -> TritonBlocks:
  """The best blocks whose kernels fit this GPU's shared memory."""
  row = next(limit for limit in _TRITON if head_dim <= limit)
  choices = _TRITON[row][float32]
  return next(b for b in choices if b.shared <= shared_memory())
