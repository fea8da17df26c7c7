"""Position parameters: the learned relative bias of T5, or ALiBi's slopes."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from fat5_jax.models.config import T5Config
from pallas_kernels import Alibi, RelativeBuckets


class RelativePositionBias(nn.Module):
  """The table (heads, buckets) that attention reads its bias from.

  With ALiBi there is nothing to learn, and no table.
  """

  config: T5Config
  bidirectional: bool

  @nn.compact
  def __call__(self) -> RelativeBuckets | Alibi:
    config = self.config
    if config.position_encoding == "alibi":
      return Alibi(jnp.asarray(Alibi.slopes(config.num_heads)))
    table_HN = self.param(
      "rel_embedding",
      nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
      (config.num_heads, config.relative_attention_num_buckets),
      jnp.float32,
    )
    return RelativeBuckets(
      table_HN.astype(jnp.float32),
      bidirectional=self.bidirectional,
      max_distance=config.relative_attention_max_distance,
    )
