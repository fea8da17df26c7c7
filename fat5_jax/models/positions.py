"""Where tokens stand, and what attention makes of it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fat5_jax.models.config import T5Config
from pallas_kernels import Alibi, AtPositions, Fire, RelativeBuckets, rotate

Position = RelativeBuckets | Alibi | Fire | AtPositions
# FIRE's own start, and FAT5's.
_FIRE_C = 0.1


def token_positions(
  config: T5Config,
  length: int,
  *,
  index: int | jax.Array = 0,
  packed_ids_BL: jax.Array | None = None,
  key: jax.Array | None = None,
) -> jax.Array | None:
  """int32 (B or 1, L): where the tokens of a row stand.

  None where attention knows all it needs from the row itself. Rotary embeddings
  and biases of the distance read differences between tokens of one segment,
  which places in the packed row give as well. FIRE divides by the query's own
  position, and FAT5's rotary embeddings turn values, and reach from decoder to
  encoder: those count from the segment's first token.

  Args:
    config: see T5Config.
    length: of the row.
    index: of its first token.
    packed_ids_BL: segment ids of packed rows.
    key: of a training step, where positions are drawn at random.

  Raises:
    ValueError: if there are more tokens than places to draw.
  """
  encoding = config.position_encoding
  counts_from_segment = encoding == "fire" or _turns_all(config)
  if not counts_from_segment:
    packed_ids_BL = None
  if encoding != "rope" and packed_ids_BL is None and key is None:
    return None
  if key is None:
    positions_1L = (jnp.arange(length) + index)[None]
  else:
    positions_1L = _random_positions(key, length, config.max_positions)[None]
  if packed_ids_BL is None:
    return positions_1L
  is_first_BL = jnp.diff(packed_ids_BL, axis=1, prepend=-1) != 0
  starts_BL = jax.lax.cummax(jnp.where(is_first_BL, positions_1L, 0), axis=1)
  return positions_1L - starts_BL


def _random_positions(key: jax.Array, length: int, maximum: int) -> jax.Array:
  """int32 (L,): sorted, all different, the first 0 (arXiv:2305.16843)."""
  if length > maximum:
    raise ValueError(
      f"randomized_positions: {length} tokens, and max_positions={maximum}"
    )
  drawn_L = jnp.sort(jax.random.permutation(key, maximum)[:length])
  # Not at[0].set: split over devices, XLA sets the first of every part (jax
  # 0.10.2).
  return jnp.where(jnp.arange(length) == 0, 0, drawn_L)


def _turns_all(config: T5Config) -> bool:
  rope = config.position_encoding == "rope"
  return rope and config.rotary_scope == "everything"


def cross_positions(
  config: T5Config, positions_BL: jax.Array | None
) -> jax.Array | None:
  """What cross-attention turns by: nothing, but as in FAT5."""
  return positions_BL if _turns_all(config) else None


def turned_queries(
  config: T5Config, q_BQHD: jax.Array, positions_BQ: jax.Array | None
) -> jax.Array:
  """With rotary embeddings, where positions are given."""
  return _turned(config, q_BQHD, positions_BQ, 1)


def turned_memory(
  config: T5Config,
  memory: dict[str, jax.Array],
  positions_BK: jax.Array | None,
) -> dict[str, jax.Array]:
  """Keys, and in FAT5 values, likewise."""
  names = ("key", "value") if _turns_all(config) else ("key",)
  return memory | {
    name: _turned(config, memory[name], positions_BK, -1) for name in names
  }


def _turned(config, x_BLHD, positions_BL, sign: int):
  if config.position_encoding != "rope" or positions_BL is None:
    return x_BLHD
  exponents_BL = None
  if config.rotary_scale_base is not None:
    centred_BL = positions_BL - config.max_positions // 2
    exponents_BL = sign * centred_BL / config.rotary_scale_base
  return rotate(
    x_BLHD,
    positions_BL,
    dims=config.rotary_dims,
    base=config.rotary_base,
    interleaved=config.rotary_interleaved,
    exponents_BL=exponents_BL,
  )


class RelativePositionBias(nn.Module):
  """The parameters that attention computes its bias from.

  T5's table (heads, buckets), or FIRE's network; ALiBi has nothing to learn,
  and rotary embeddings are no bias.
  """

  config: T5Config
  bidirectional: bool

  @nn.compact
  def __call__(self, positions_BL: jax.Array | None = None) -> Position | None:
    """Between tokens at these positions; None is where they lie in the row."""
    config = self.config
    if config.position_encoding in ("rope", "none"):
      return None
    if config.position_encoding == "t5":
      bias = self._buckets()
    elif config.position_encoding == "fire":
      bias = self._fire()
    else:
      bias = Alibi.of(config.num_heads, config.alibi_mode)
    if positions_BL is None:
      return bias
    return AtPositions(bias, positions_BL, positions_BL)

  def _buckets(self) -> RelativeBuckets:
    config = self.config
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

  def _fire(self) -> Fire:
    config = self.config
    heads, width = config.num_heads, config.fire_mlp_width

    def within(limit):
      # PyTorch's start of a linear layer, which is FAT5's.
      return lambda key, shape: jax.random.uniform(
        key, shape, jnp.float32, -limit, limit
      )

    constant = nn.initializers.constant
    multiplier = self.param("threshold_multiplier", constant(1.0), ())
    return Fire(
      hidden_W=self.param("hidden_kernel", within(1.0), (1, width))[0],
      hidden_bias_W=self.param("hidden_bias", within(1.0), (width,)),
      out_HW=self.param("out_kernel", within(width**-0.5), (heads, width)),
      out_bias_H=self.param("out_bias", within(width**-0.5), (heads,)),
      c=self.param("c", constant(_FIRE_C), ()),
      threshold=multiplier * config.relative_attention_max_distance,
    )
