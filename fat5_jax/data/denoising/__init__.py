"""Pre-training objectives: from tokens of a text to what is asked and answered.

Plain numpy: what happens to a piece of text is known from its length and a
seed, so it is known which go together before any of them is read.
"""

from fat5_jax.data.denoising.denoisers import (
  OBJECTIVES,
  Denoiser,
  PrefixLM,
  SpanCorruption,
  find,
)
from fat5_jax.data.denoising.masks import (
  random_spans_helper,
  random_spans_noise_mask,
  sentinels,
  span_counts,
  span_to_unique_sentinel,
)
from fat5_jax.data.denoising.objective import Objective, Segments

__all__ = [
  "OBJECTIVES",
  "Denoiser",
  "Objective",
  "PrefixLM",
  "Segments",
  "SpanCorruption",
  "find",
  "random_spans_helper",
  "random_spans_noise_mask",
  "sentinels",
  "span_counts",
  "span_to_unique_sentinel",
]
