"""Attention for T5: the relative position bias is computed, never stored.

Axis legend, used in every array name of this repository: `B` batch,
`Q`/`K` query/key length, `H` heads, `D` head dimension, `N` position buckets,
`R` relative distances.
"""

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.positions import (
  Alibi,
  DistanceVector,
  FullBias,
  RelativeBuckets,
)

__all__ = [
  "Alibi",
  "DistanceVector",
  "FullBias",
  "RelativeBuckets",
  "flash_attention",
]
