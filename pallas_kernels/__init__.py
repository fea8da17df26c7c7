"""The kernels of T5: attention, cross-entropy, layer norm.

Axis legend, used in every array name of this repository: `B` batch,
`Q`/`K` query/key length, `H` heads, `D` head dimension, `N` position buckets,
`R` relative distances, `M` model width, `V` vocabulary.
"""

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.flash_attention.positions import (
  Alibi,
  AtPositions,
  DistanceVector,
  Fire,
  FullBias,
  RelativeBuckets,
)
from pallas_kernels.linear_cross_entropy import (
  LossSums,
  linear_cross_entropy,
)
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import rotate

__all__ = [
  "Alibi",
  "AtPositions",
  "DistanceVector",
  "Fire",
  "FullBias",
  "LossSums",
  "RelativeBuckets",
  "flash_attention",
  "linear_cross_entropy",
  "rms_norm",
  "rotate",
]
