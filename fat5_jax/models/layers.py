"""The layers of T5, with T5X's parameter names, shapes and initialisers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from fat5_jax.models import partitioning, positions
from fat5_jax.models.config import LoRAConfig, T5Config
from pallas_kernels import bfloat16_product, rms_norm

_ACTIVATIONS = {
  "relu": nn.relu,
  "gelu": nn.gelu,
  "gelu_exact": lambda x: nn.gelu(x, approximate=False),
  "silu": nn.silu,
  "linear": lambda x: x,
  "tanh": jnp.tanh,
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


def _lora_a_init(key, shape, dtype):
  """PEFT's: uniform within 1 / sqrt(inputs)."""
  limit = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -limit, limit)


class Dense(nn.Module):
  """A bias-free projection with a 2-D kernel (inputs, features).

  `axes` are the kernel's logical axes. Where LoRA applies to its name, `lora_a`
  (inputs, rank) and `lora_b` (rank, features) add to it.
  """

  features: int
  dtype: Any
  axes: tuple[str, str]
  kernel_init: Any = _fan_in_truncated
  output_dtype: Any = None
  lora: LoRAConfig | None = None
  enable_dropout: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def product(x, kernel):
      return bfloat16_product.matmul(
        x.astype(self.dtype),
        kernel.astype(self.dtype),
        self.output_dtype or self.dtype,
      )

    kernel = self.param(
      "kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32
    )
    # Flat rows: XLA's CPU backend takes twice as long for the gradient of the
    # same product with two leading axes (tools/bench_train.py).
    flat = x.reshape(-1, x.shape[-1])
    whole = partitioning.gather_kernel(
      kernel.astype(self.dtype), *self.axes, rows=flat.shape[0]
    )
    y = product(flat, checkpoint_name(whole, "kernel"))
    lora = self.lora
    if lora is not None and lora.applies_to("/".join(self.path)):
      a = self.param(
        "lora_a", _lora_a_init, (x.shape[-1], lora.rank), jnp.float32
      )
      b = self.param(
        "lora_b",
        nn.initializers.zeros,
        (lora.rank, self.features),
        jnp.float32,
      )
      read = nn.Dropout(lora.dropout_rate)(
        flat, deterministic=not self.enable_dropout
      )
      y = y + product(product(read, a), b) * lora.scale
    # A policy of rematerialisation may save it by its name.
    y = checkpoint_name(y, self.name or "")
    return y.reshape(*x.shape[:-1], self.features)


class HeadLayers(nn.Module):
  """What a head has before its output: dropout, then dense layers.

  A module of your own may stand in its place; it is called in the same way.
  """

  widths: tuple[int, ...]
  activation: str
  dropout_rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, enable_dropout: bool) -> jax.Array:
    x = nn.Dropout(self.dropout_rate)(x, deterministic=not enable_dropout)
    for i, width in enumerate(self.widths):
      x = nn.Dense(width, kernel_init=_fan_in_normal, name=f"dense_{i}")(x)
      x = _ACTIVATIONS[self.activation](x)
      x = nn.Dropout(self.dropout_rate)(x, deterministic=not enable_dropout)
    return x


def head_layers(config: T5Config) -> HeadLayers | None:
  """The layers that `config.head` describes; None where it has none."""
  head = config.head
  if head is None or head.kind == "embedding":
    return None
  widths = head.hidden_widths(config.emb_dim)
  # No parent: whoever holds it becomes that.
  return HeadLayers(widths, head.activation, head.dropout_rate, parent=None)


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
    x_BLM = partitioning.embed(self.embedding, tokens_BL, self.config.dtype)
    return partitioning.constrain(x_BLM, "batch", "length", "embed")

  def attend(self, x_BLM: jax.Array) -> jax.Array:
    """float32 logits (B, L, V) against the embedding."""
    # Contracted as they lie: XLA's CPU backend computes a product with the
    # transposed embedding in float32.
    logits = jax.lax.dot_general(
      x_BLM.reshape(-1, x_BLM.shape[-1]).astype(self.config.dtype),
      self.embedding.astype(self.config.dtype),
      (((1,), (1,)), ((), ())),
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
    low_rank = {"lora": config.lora, "enable_dropout": self.enable_dropout}
    y_BLF = None
    for name, activation in zip(names, config.mlp_activations):
      dense = Dense(
        config.mlp_dim, config.dtype, ("embed", "mlp"), name=name, **low_rank
      )
      branch = dense(x_BLM)
      branch = _ACTIVATIONS[activation](branch)
      y_BLF = branch if y_BLF is None else y_BLF * branch
    y_BLF = partitioning.constrain(y_BLF, "batch", "length", "mlp")
    y_BLF = Dropout(config, self.enable_dropout)(y_BLF)
    dense = Dense(
      config.emb_dim, config.dtype, ("mlp", "embed"), name="wo", **low_rank
    )
    return dense(y_BLF)


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

    def dense(features, *axes, kernel_init=_fan_in_normal):
      return Dense(
        features,
        config.dtype,
        axes,
        kernel_init,
        lora=config.lora,
        enable_dropout=self.enable_dropout,
      )

    self.query = dense(
      *(width, "embed", "joined_kv"), kernel_init=query_init(config.head_dim)
    )
    self.key = dense(width, "embed", "joined_kv")
    self.value = dense(width, "embed", "joined_kv")
    self.out = dense(config.emb_dim, "joined_kv", "embed")

  def _heads(self, x_BLI: jax.Array) -> jax.Array:
    return x_BLI.reshape(*x_BLI.shape[:2], self.config.num_heads, -1)

  def project_memory(
    self, memory_BKM: jax.Array, positions_BK: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """Keys and values, (B, K, H, D) each, turned where they are rotary."""
    memory = {
      "key": self._heads(self.key(memory_BKM)),
      "value": self._heads(self.value(memory_BKM)),
    }
    return positions.turned_memory(self.config, memory, positions_BK)

  def __call__(
    self,
    x_BQM: jax.Array,
    memory: dict[str, jax.Array],
    *,
    positions_BQ: jax.Array | None = None,
    position: positions.Position | None = None,
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
    q_BQHD = self._heads(self.query(x_BQM))
    o_BQHD = partitioning.attention(
      positions.turned_queries(config, q_BQHD, positions_BQ),
      memory["key"],
      v_BKHD,
      position=position,
      causal=causal,
      q_segment_ids=q_segment_ids,
      kv_segment_ids=kv_segment_ids,
      scale=config.attention_scale,
      implementation=config.attention_implementation,
      q_offset=q_offset,
    )
    return self.out(o_BQHD.reshape(*o_BQHD.shape[:2], -1))
