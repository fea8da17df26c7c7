"""The layers of T5, with T5X's parameter names, shapes and initialisers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fat5_jax.models.config import T5Config
from pallas_kernels import RelativeBuckets, flash_attention, rms_norm

_ACTIVATIONS = {
  "relu": nn.relu,
  "gelu": nn.gelu,
  "gelu_exact": lambda x: nn.gelu(x, approximate=False),
  "silu": nn.silu,
  "linear": lambda x: x,
}
_fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_fan_in_truncated = nn.initializers.variance_scaling(
  1.0, "fan_in", "truncated_normal"
)


def query_init(head_dim: int):
  """T5 folds attention's 1/sqrt(head_dim) into the query initialiser."""

  def init(key, shape, dtype):
    return _fan_in_normal(key, shape, dtype) / jnp.sqrt(head_dim).astype(dtype)

  return init


class Dense(nn.Module):
  """A bias-free projection with a 2-D kernel (inputs, features)."""

  features: int
  dtype: Any
  kernel_init: Any = _fan_in_truncated
  output_dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      "kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32
    )
    # Flat rows: XLA's CPU backend takes twice as long for the gradient of the
    # same product with two leading axes (tools/bench_train.py).
    y = jnp.matmul(
      x.reshape(-1, x.shape[-1]).astype(self.dtype),
      kernel.astype(self.dtype),
      preferred_element_type=self.output_dtype or self.dtype,
    )
    return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
  """T5's layer norm: no mean, no bias, variance in float32."""

  config: T5Config

  @nn.compact
  def __call__(self, x_BLM: jax.Array) -> jax.Array:
    scale = self.param(
      "scale", nn.initializers.ones, (x_BLM.shape[-1],), jnp.float32
    )
    y = rms_norm(x_BLM, scale, epsilon=self.config.layer_norm_epsilon)
    return y.astype(self.config.dtype)


class Embed(nn.Module):
  """The token embedding, which T5 1.0 also uses as output projection."""

  config: T5Config

  def setup(self):
    self.embedding = self.param(
      "embedding",
      nn.initializers.normal(stddev=1.0),
      (self.config.vocab_size, self.config.emb_dim),
      jnp.float32,
    )

  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    # An id beyond the table gives NaN instead of another token's row.
    embedding = jnp.take(self.embedding, tokens_BL, axis=0, mode="fill")
    return embedding.astype(self.config.dtype)

  def attend(self, x_BLM: jax.Array) -> jax.Array:
    """float32 logits (B, L, V) against the embedding."""
    logits = jnp.matmul(
      x_BLM.reshape(-1, x_BLM.shape[-1]).astype(self.config.dtype),
      self.embedding.astype(self.config.dtype).T,
      preferred_element_type=jnp.float32,
    )
    return logits.reshape(*x_BLM.shape[:-1], -1)


class Dropout(nn.Module):
  """Dropout whose mask is shared along the length axis, as in T5X."""

  config: T5Config
  enabled: bool

  @nn.compact
  def __call__(self, x_BLM: jax.Array) -> jax.Array:
    return nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(
      x_BLM, deterministic=not self.enabled
    )


class Mlp(nn.Module):
  """Feed-forward block; several activations make it gated."""

  config: T5Config
  enable_dropout: bool

  @nn.compact
  def __call__(self, x_BLM: jax.Array) -> jax.Array:
    config = self.config
    names = [f"wi_{i}" for i in range(len(config.mlp_activations))]
    if len(names) == 1:
      names = ["wi"]
    y_BLF = None
    for name, activation in zip(names, config.mlp_activations):
      branch = Dense(config.mlp_dim, config.dtype, name=name)(x_BLM)
      branch = _ACTIVATIONS[activation](branch)
      y_BLF = branch if y_BLF is None else y_BLF * branch
    y_BLF = Dropout(config, self.enable_dropout)(y_BLF)
    return Dense(config.emb_dim, config.dtype, name="wo")(y_BLF)


class Attention(nn.Module):
  """Multi-head attention over its own input or over a memory.

  Attention dropout is T5X's: one mask a head and key, shared by the queries,
  so it is a scaling of value rows outside the kernel.
  """

  config: T5Config
  enable_dropout: bool

  def setup(self):
    config = self.config
    width = config.num_heads * config.head_dim
    self.query = Dense(width, config.dtype, query_init(config.head_dim))
    self.key = Dense(width, config.dtype, _fan_in_normal)
    self.value = Dense(width, config.dtype, _fan_in_normal)
    self.out = Dense(config.emb_dim, config.dtype, _fan_in_normal)

  def _heads(self, x_BLI: jax.Array) -> jax.Array:
    return x_BLI.reshape(*x_BLI.shape[:2], self.config.num_heads, -1)

  def project_memory(self, memory_BKM: jax.Array) -> dict[str, jax.Array]:
    """Keys and values, (B, K, H, D) each."""
    return {
      "key": self._heads(self.key(memory_BKM)),
      "value": self._heads(self.value(memory_BKM)),
    }

  def __call__(
    self,
    x_BQM: jax.Array,
    memory: dict[str, jax.Array],
    *,
    position: RelativeBuckets | None = None,
    causal: bool = False,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
  ) -> jax.Array:
    config = self.config
    v_BKHD = memory["value"]
    if self.enable_dropout and config.dropout_rate > 0:
      keep = 1.0 - config.dropout_rate
      batch, keys, heads, _ = v_BKHD.shape
      mask = jax.random.bernoulli(
        self.make_rng("dropout"), keep, (batch, keys, heads, 1)
      )
      v_BKHD = jnp.where(mask, v_BKHD / keep, 0).astype(v_BKHD.dtype)
    o_BQHD = flash_attention(
      self._heads(self.query(x_BQM)),
      memory["key"],
      v_BKHD,
      position=position,
      causal=causal,
      q_segment_ids=q_segment_ids,
      kv_segment_ids=kv_segment_ids,
      scale=1.0,
      implementation=config.attention_implementation,
      q_offset=q_offset,
    )
    return self.out(o_BQHD.reshape(*o_BQHD.shape[:2], -1))
