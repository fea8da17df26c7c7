"""T5: encoder, decoder, and the two together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fat5_jax.models import cache as cache_lib
from fat5_jax.models import layers, partitioning
from fat5_jax.models.config import T5Config
from fat5_jax.models.positions import (
  RelativePositionBias,
  cross_positions,
  token_positions,
)


def _remat_policy(config: T5Config):
  """What the backward pass keeps; see T5Config.remat_policy."""
  policies = jax.checkpoint_policies
  if config.remat_policy == "full":
    return None
  if config.remat_policy in ("minimal", "gathered"):
    kernels = ("kernel",) if config.remat_policy == "gathered" else ()
    return policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable,
      policies.save_only_these_names("attention", *kernels),
    )
  return policies.save_only_these_names(*config.remat_policy)


class EncoderLayer(nn.Module):
  """Self-attention, then feed-forward, each normalised and residual."""

  config: T5Config
  enable_dropout: bool

  @nn.compact
  def __call__(self, x_BLM, cache, segment_ids, position, positions_BL):
    config, on = self.config, self.enable_dropout
    if config.relative_attention_per_layer:
      bias = RelativePositionBias(config, True, name="relpos_bias")
      position = bias(positions_BL)
    h = layers.RMSNorm(config, name="pre_attention_layer_norm")(x_BLM)
    attention = layers.Attention(config, on, name="attention")
    h = attention(
      h,
      attention.project_memory(h, positions_BL),
      positions_BQ=positions_BL,
      position=position,
      q_segment_ids=segment_ids,
      kv_segment_ids=segment_ids,
    )
    x_BLM = x_BLM + layers.Dropout(config, on)(h)
    h = layers.RMSNorm(config, name="pre_mlp_layer_norm")(x_BLM)
    h = layers.Mlp(config, on, name="mlp")(h)
    x_BLM = x_BLM + layers.Dropout(config, on)(h)
    return partitioning.constrain(x_BLM, "batch", "length", "embed"), cache


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention, feed-forward."""

  config: T5Config
  enable_dropout: bool
  # Rows of the cache that the first decoding step makes; 0 in training.
  cache_length: int
  causal: bool = True

  @nn.compact
  def __call__(
    self,
    x_BLM,
    cache,
    encoded_BKM,
    decoder_segment_ids,
    cross_q_segment_ids,
    encoder_segment_ids,
    position,
    positions_BL,
    encoder_positions_BK,
    index,
  ):
    config, on = self.config, self.enable_dropout
    if config.relative_attention_per_layer:
      bias = RelativePositionBias(config, False, name="relpos_bias")
      position = bias(positions_BL)
    h = layers.RMSNorm(config, name="pre_self_attention_layer_norm")(x_BLM)
    attention = layers.Attention(config, on, name="self_attention")
    memory = attention.project_memory(h, positions_BL)
    if self.cache_length:
      new_cache = cache_lib.write(
        None if cache is None else cache["self"],
        cache_lib.heads_first(memory),
        index,
        self.cache_length,
      )
      memory = cache_lib.heads_first(new_cache)
    h = attention(
      h,
      memory,
      positions_BQ=positions_BL,
      position=position,
      causal=self.causal,
      q_segment_ids=decoder_segment_ids,
      kv_segment_ids=decoder_segment_ids,
      q_offset=index,
    )
    x_BLM = x_BLM + layers.Dropout(config, on)(h)

    h = layers.RMSNorm(config, name="pre_cross_attention_layer_norm")(x_BLM)
    attention = layers.Attention(config, on, name="encoder_decoder_attention")
    if cache is None:
      cross = attention.project_memory(encoded_BKM, encoder_positions_BK)
    else:
      cross = cache_lib.heads_first(cache["cross"])
    # Beams of a row are so many queries more, at the same positions.
    shape, rows = h.shape, cross["key"].shape[0]
    positions_BQ = cross_positions(config, positions_BL)
    if positions_BQ is not None:
      positions_BQ = jnp.tile(positions_BQ, (1, shape[0] // rows))
    h = attention(
      h.reshape(rows, -1, shape[-1]),
      cross,
      positions_BQ=positions_BQ,
      q_segment_ids=cross_q_segment_ids,
      kv_segment_ids=encoder_segment_ids,
    ).reshape(shape)
    x_BLM = x_BLM + layers.Dropout(config, on)(h)

    h = layers.RMSNorm(config, name="pre_mlp_layer_norm")(x_BLM)
    h = layers.Mlp(config, on, name="mlp")(h)
    x_BLM = x_BLM + layers.Dropout(config, on)(h)
    x_BLM = partitioning.constrain(x_BLM, "batch", "length", "embed")
    if not self.cache_length:
      return x_BLM, None
    return x_BLM, {"self": new_cache, "cross": cache_lib.heads_first(cross)}


def _apply_layers(
  layer_class, num_layers, x_BLM, caches, *shared, **attributes
):
  """Runs the layers in a loop or as one scanned layer.

  Parameters are `layers_{i}` in the loop, and `layers` with a leading layer
  axis where `config.scan_layers`.
  """
  config = attributes["config"]
  if config.remat_policy != "none":
    layer_class = nn.remat(
      layer_class,
      policy=_remat_policy(config),
      prevent_cse=not config.scan_layers,
    )
  if config.scan_layers:
    scanned = nn.scan(
      layer_class,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=(0,) + (nn.broadcast,) * len(shared),
      length=num_layers,
    )
    return scanned(**attributes, name="layers")(x_BLM, caches, *shared)
  new_caches = []
  for i in range(num_layers):
    cache = None if caches is None else caches[i]
    layer = layer_class(**attributes, name=f"layers_{i}")
    x_BLM, cache = layer(x_BLM, cache, *shared)
    new_caches.append(cache)
  return x_BLM, new_caches


def _positions_key(module: nn.Module, training: bool) -> jax.Array | None:
  """Of the positions that this step draws, or None."""
  if module.config.randomized_positions and training:
    return module.make_rng("dropout")
  return None


class Encoder(nn.Module):
  """Embedded tokens to hidden states; `packed` rows are several texts."""

  config: T5Config

  @nn.compact
  def __call__(
    self, x_BLM, segment_ids, *, packed: bool = False, enable_dropout: bool
  ) -> jax.Array:
    config = self.config
    positions_BL = token_positions(
      config,
      x_BLM.shape[1],
      packed_ids_BL=segment_ids if packed else None,
      key=_positions_key(self, enable_dropout),
    )
    position = None
    if not config.relative_attention_per_layer:
      bias = RelativePositionBias(config, True, name="relpos_bias")
      position = bias(positions_BL)
    x_BLM = layers.Dropout(config, enable_dropout)(x_BLM)
    x_BLM, _ = _apply_layers(
      EncoderLayer,
      config.num_encoder_layers,
      x_BLM,
      None,
      segment_ids,
      position,
      positions_BL,
      config=config,
      enable_dropout=enable_dropout,
    )
    x_BLM = layers.RMSNorm(config, name="encoder_norm")(x_BLM)
    # T5X does not share this one mask along the length.
    return nn.Dropout(config.dropout_rate)(
      x_BLM, deterministic=not enable_dropout
    )


class Decoder(nn.Module):
  """Embedded target tokens and encoder output to hidden states, or logits.

  `head` is what stands before the projection to logits, or None; `packed` rows
  are several texts.
  """

  config: T5Config
  causal: bool = True

  @nn.compact
  def __call__(
    self,
    x_BLM,
    encoded_BKM,
    *,
    decoder_segment_ids=None,
    cross_q_segment_ids=None,
    encoder_segment_ids=None,
    cache=None,
    cache_length: int = 0,
    index=0,
    packed: bool = False,
    enable_dropout: bool,
    head: Callable[..., jax.Array] | None = None,
    project: bool = True,
  ) -> tuple[jax.Array, Any]:
    config = self.config
    positions_BL = token_positions(
      config,
      x_BLM.shape[1],
      index=index,
      packed_ids_BL=decoder_segment_ids if packed else None,
      key=_positions_key(self, enable_dropout),
    )
    encoder_positions_BK = None
    if cache is None:
      encoder_positions_BK = token_positions(
        config,
        encoded_BKM.shape[1],
        packed_ids_BL=encoder_segment_ids if packed else None,
      )
    position = None
    if not config.relative_attention_per_layer:
      bias = RelativePositionBias(config, False, name="relpos_bias")
      position = bias(positions_BL)
    x_BLM = layers.Dropout(config, enable_dropout)(x_BLM)
    x_BLM, cache = _apply_layers(
      DecoderLayer,
      config.num_decoder_layers,
      x_BLM,
      cache,
      encoded_BKM,
      decoder_segment_ids,
      cross_q_segment_ids,
      encoder_segment_ids,
      position,
      positions_BL,
      cross_positions(config, encoder_positions_BK),
      index,
      config=config,
      enable_dropout=enable_dropout,
      cache_length=cache_length,
      causal=self.causal,
    )
    x_BLM = layers.RMSNorm(config, name="decoder_norm")(x_BLM)
    x_BLM = layers.Dropout(config, enable_dropout)(x_BLM)
    if head is not None:
      x_BLM = head(x_BLM, enable_dropout=enable_dropout)
    if config.scales_decoder_outputs:
      x_BLM = x_BLM / jnp.sqrt(config.emb_dim).astype(x_BLM.dtype)
    if config.logits_via_embedding or not project:
      return x_BLM, cache
    logits_BLV = layers.Dense(
      config.vocab_size,
      config.dtype,
      axes=("embed", "vocab"),
      output_dtype=jnp.float32,
      lora=config.lora,
      enable_dropout=enable_dropout,
      name="logits_dense",
    )(x_BLM)
    return logits_BLV, cache


class Transformer(nn.Module):
  """An encoder-decoder T5 whose parameter tree is T5X's.

  `apply({"params": params}, ...)`; methods `encode` and `decode` split the
  call for generation. Padding is token `config.pad_token_id` or segment 0 and
  is masked in every attention. `head` is a module between the decoder and the
  projection to logits; None is what the config describes, by default nothing.
  """

  config: T5Config
  head: nn.Module | None = None

  def __post_init__(self):
    if self.head is None:
      self.head = layers.head_layers(self.config)
    super().__post_init__()

  def setup(self):
    config = self.config
    if not config.is_language_model or not config.num_decoder_layers:
      raise ValueError(
        "this config is not a language model's: head"
        f" {config.head and config.head.kind!r}, {config.num_decoder_layers}"
        " decoder layers"
      )
    self.token_embedder = layers.Embed(config)
    self.encoder = Encoder(config)
    self.decoder = Decoder(config)

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    encoder_segment_ids: jax.Array | None = None,
    *,
    enable_dropout: bool = False,
  ) -> jax.Array:
    """Hidden states (B, L, M) of tokens (B, L); packed where ids are given."""
    packed = encoder_segment_ids is not None
    if not packed:
      encoder_segment_ids = self.segments(encoder_input_tokens)
    return self.encoder(
      self.token_embedder(encoder_input_tokens),
      encoder_segment_ids,
      packed=packed,
      enable_dropout=enable_dropout,
    )

  def decode(
    self,
    encoded_BKM: jax.Array | None,
    encoder_segment_ids: jax.Array,
    decoder_input_tokens: jax.Array,
    *,
    decoder_segment_ids: jax.Array | None = None,
    cache: Any = None,
    cache_length: int = 0,
    index: int | jax.Array = 0,
    packed: bool | None = None,
    enable_dropout: bool = False,
    project: bool = True,
  ) -> tuple[jax.Array, Any]:
    """Logits of decoder tokens, and the cache for the tokens after them.

    Args:
      encoded_BKM: encoder output; unused, may be None, once a cache exists.
      encoder_segment_ids: (B, K); 0 is padding.
      decoder_input_tokens: (B, L) tokens at positions index ... index + L - 1;
        with a cache also (W B, L), W rows after each other for each of the
        encoder's.
      decoder_segment_ids: (B, L), for packed rows, or None.
      cache: what the previous call returned, or None in the first.
      cache_length: positions the cache shall hold; 0 keeps none (training).
      index: position of the first token, a number or a traced scalar.
      packed: whether rows are several texts; None where decoder_segment_ids are
        given.
      enable_dropout: whether dropout is on (needs a "dropout" rng).
      project: False gives the hidden states that `output_kernel` projects.

    Returns:
      float32 logits (B, L, V), or hidden states (B, L, M), and the new cache.
    """
    # Unpacked decoder rows see every real encoder token of their row; in packed
    # rows segments must agree.
    outputs, cache = self.decoder(
      self.token_embedder(decoder_input_tokens),
      encoded_BKM,
      decoder_segment_ids=decoder_segment_ids,
      cross_q_segment_ids=decoder_segment_ids,
      encoder_segment_ids=encoder_segment_ids,
      cache=cache,
      cache_length=cache_length,
      index=index,
      packed=decoder_segment_ids is not None if packed is None else packed,
      enable_dropout=enable_dropout,
      head=self.head,
      project=project,
    )
    if self.config.logits_via_embedding and project:
      outputs = self.token_embedder.attend(outputs)
    return outputs, cache

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array | None = None,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    encoder_positions: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    *,
    enable_dropout: bool = False,
    project: bool = True,
  ) -> jax.Array:
    """float32 logits (B, L, V) of every decoder position.

    Args:
      encoder_input_tokens: (B, K) ints.
      decoder_input_tokens: (B, L) ints, targets shifted right.
      decoder_target_tokens: (B, L); where given, its padding is masked too.
      encoder_segment_ids: (B, K), 1, 2, ... in packed rows, 0 for padding.
      decoder_segment_ids: (B, L), likewise; both or neither.
      encoder_positions: (B, K) positions within each segment, as SeqIO's
        packing writes them. The model makes them of the segments
        (models/positions.py); they are checked to agree where their values
        are known.
      decoder_positions: (B, L), likewise.
      enable_dropout: whether dropout is on (needs a "dropout" rng).
      project: False gives hidden states (B, L, M) instead, for a loss that
        projects them a chunk at a time with `output_kernel`.

    Raises:
      ValueError: if one side alone has segments, or if positions do not count
        up by one inside a segment.
    """
    if (encoder_segment_ids is None) != (decoder_segment_ids is None):
      raise ValueError(
        "packing needs encoder_segment_ids and decoder_segment_ids, or neither"
      )
    _check_positions("encoder", encoder_positions, encoder_segment_ids)
    _check_positions("decoder", decoder_positions, decoder_segment_ids)
    packed = encoder_segment_ids is not None
    encoded_BKM = self.encode(
      encoder_input_tokens, encoder_segment_ids, enable_dropout=enable_dropout
    )
    if not packed:
      encoder_segment_ids = self.segments(encoder_input_tokens)
      if decoder_target_tokens is not None:
        decoder_segment_ids = self.segments(decoder_target_tokens)
    return self.decode(
      encoded_BKM,
      encoder_segment_ids,
      decoder_input_tokens,
      decoder_segment_ids=decoder_segment_ids,
      packed=packed,
      enable_dropout=enable_dropout,
      project=project,
    )[0]

  def output_kernel(self, params: Any) -> jax.Array:
    """(M, V): what projects the last hidden states to logits."""
    if self.config.logits_via_embedding:
      return params["token_embedder"]["embedding"].T
    dense = params["decoder"]["logits_dense"]
    if "lora_a" in dense:
      update = dense["lora_a"] @ dense["lora_b"]
      return dense["kernel"] + self.config.lora.scale * update
    return dense["kernel"]

  def segments(self, tokens_BL: jax.Array) -> jax.Array:
    """Segment ids of unpacked rows; see `row_segments`."""
    return row_segments(tokens_BL, self.config)


def row_segments(tokens_BL: jax.Array, config: T5Config) -> jax.Array:
  """Segment ids of unpacked rows: 1 for real tokens, 0 for padding."""
  return (tokens_BL != config.pad_token_id).astype(jnp.int32)


def _check_positions(side, positions_BL, segment_ids_BL) -> None:
  """Raises unless known positions count up by one inside each segment."""
  known = (positions_BL, segment_ids_BL)
  if positions_BL is None or any(isinstance(x, jax.core.Tracer) for x in known):
    return
  positions = np.asarray(positions_BL)
  if segment_ids_BL is None:
    # The row is one segment, and zeros after its start are padding.
    inside = positions[:, 1:] != 0
  else:
    segments = np.asarray(segment_ids_BL)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  wrong = inside & (np.diff(positions, axis=1) != 1)
  if wrong.any():
    row, column = np.argwhere(wrong)[0]
    raise ValueError(
      f"{side}_positions[{row}] does not count up by one at column"
      f" {column + 1}: T5 attends by distance within a contiguous segment"
    )
