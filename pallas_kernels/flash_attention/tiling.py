"""Block sizes by chip and head dimension, and what chip we are on.

`tools/tune_attention.py` measures them on a real chip and prints the rows to
put here. The rows of chips we had no access to come from compiled programs
(bundles or instructions a tile, spills, memory), not from a clock.
"""

from __future__ import annotations

import jax

_MIB = 2**20


def device_kind() -> str:
  """The chip being compiled for: "TPU v5 lite", "NVIDIA H100 80GB HBM3".

  Compiling for a chip that is not there, under
  `jax.sharding.use_abstract_mesh`, it is that chip.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return (device or jax.devices()[0]).device_kind


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
      return "mosaic_gpu", "triton", "chunked"
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
  # A block of fewer queries than 128 must be all of them.
  fewest = -(-queries // 16) * 16 if queries < 128 else -(-queries // 128) * 128
  return min(bq, fewest), min(bk, -(-keys // 128) * 128)
