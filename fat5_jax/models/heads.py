"""Heads: T5 as a classifier, a tagger, a span finder, a sentence encoder.

The body of every head is T5's own (`token_embedder`, `encoder`, where the head
stands on both stacks also `decoder`); `head` holds its hidden layers and
`classifier` its output. Encoder-only heads are FAT5's (catie-aq/flashT5), those
on both stacks Hugging Face's. Heads compute in float32.

A module of your own takes the place of the hidden layers:

  SequenceClassifier(config, head=MyModule())

It is called as `module(x, enable_dropout=...)` and may end in any width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fat5_jax.models import layers
from fat5_jax.models.config import T5Config
from fat5_jax.models.t5 import Decoder, Encoder, row_segments

# Logit of what cannot be chosen: its probability is 0, its gradient finite.
MASKED = -1e9


def pool(x_BLM: jax.Array, tokens_BL: jax.Array, config: T5Config) -> jax.Array:
  """One vector (B, M) a row, by `config.head.pooled`.

  Rows may hold any number of end-of-sequence tokens; without one, "eos" is the
  last real token. A row of padding alone gives its first position, or 0 for
  "mean".
  """
  how = config.head.pooled
  real_BL = row_segments(tokens_BL, config)
  if how == "first":
    return x_BLM[:, 0]
  if how == "mean":
    weights_BL1 = real_BL[..., None].astype(x_BLM.dtype)
    total_BM = (x_BLM * weights_BL1).sum(axis=1)
    return total_BM / jnp.maximum(weights_BL1.sum(axis=1), 1.0)
  position_L = jnp.arange(tokens_BL.shape[1])
  is_eos_BL = (tokens_BL == config.eos_token_id) & (real_BL != 0)
  last_eos_B = jnp.where(is_eos_BL, position_L, -1).max(axis=1)
  last_real_B = jnp.where(real_BL != 0, position_L, 0).max(axis=1)
  index_B = jnp.where(last_eos_B >= 0, last_eos_B, last_real_B)
  return jnp.take_along_axis(x_BLM, index_B[:, None, None], axis=1)[:, 0]


def output_layer(features: int, standard_deviation: float) -> nn.Dense:
  return nn.Dense(
    features,
    kernel_init=nn.initializers.normal(standard_deviation),
    name="classifier",
  )


class Head(nn.Module):
  """What the heads share: hidden states (B, L, M), the head's layers, output.

  Subclasses say in `kind` which `config.head` they are.
  """

  config: T5Config
  head: nn.Module | None = None

  kind = ""

  def __post_init__(self):
    if self.head is None:
      self.head = layers.head_layers(self.config)
    super().__post_init__()

  def setup(self):
    config = self.config
    if config.head is None or config.head.kind != self.kind:
      raise ValueError(
        f"{type(self).__name__} needs HeadConfig(kind={self.kind!r}), not"
        f" {config.head}"
      )
    self.token_embedder = layers.Embed(config)
    self.encoder = Encoder(config)
    if config.head.body == "encoder_decoder":
      # Scaling belongs to the projection that a head replaces.
      self.decoder = Decoder(config.replace(scale_decoder_outputs=False))
    self.setup_output()

  def setup_output(self) -> None:
    """Makes the output layer."""

  def hidden_states(
    self, tokens_BL: jax.Array, enable_dropout: bool
  ) -> jax.Array:
    """The body's float32 output (B, L, M)."""
    config = self.config
    segment_ids = row_segments(tokens_BL, config)
    x_BLM = self.encoder(
      self.token_embedder(tokens_BL), segment_ids, enable_dropout=enable_dropout
    )
    if config.head.body == "encoder_decoder":
      # As Hugging Face: the decoder reads the inputs, shifted right.
      shifted_BL = jnp.pad(
        tokens_BL[:, :-1],
        ((0, 0), (1, 0)),
        constant_values=config.decoder_start_token_id,
      )
      x_BLM, _ = self.decoder(
        self.token_embedder(shifted_BL),
        x_BLM,
        encoder_segment_ids=segment_ids,
        enable_dropout=enable_dropout,
        project=False,
      )
    return x_BLM.astype(jnp.float32)

  def apply_head(self, x: jax.Array, enable_dropout: bool) -> jax.Array:
    """The head's layers and output on (..., M)."""
    return self.classifier(self.head(x, enable_dropout=enable_dropout))


class SequenceClassifier(Head):
  """Labels, or numbers, of whole rows.

  Single label and multi-label give logits, regression numbers, (B, num_labels).
  """

  kind = "sequence_classification"

  def setup_output(self):
    self.classifier = output_layer(
      self.config.head.num_labels, self.config.emb_dim**-0.5
    )

  def __call__(
    self, encoder_input_tokens: jax.Array, *, enable_dropout: bool = False
  ) -> jax.Array:
    """float32 (B, num_labels) of tokens (B, L)."""
    x_BLM = self.hidden_states(encoder_input_tokens, enable_dropout)
    x_BM = pool(x_BLM, encoder_input_tokens, self.config)
    return self.apply_head(x_BM, enable_dropout)


class TokenClassifier(Head):
  """A label a token."""

  kind = "token_classification"

  def setup_output(self):
    self.classifier = output_layer(self.config.head.num_labels, 1.0)

  def __call__(
    self, encoder_input_tokens: jax.Array, *, enable_dropout: bool = False
  ) -> jax.Array:
    """float32 logits (B, L, num_labels) of tokens (B, L)."""
    x_BLM = self.hidden_states(encoder_input_tokens, enable_dropout)
    return self.apply_head(x_BLM, enable_dropout)


class QuestionAnswerer(Head):
  """The first and last token of an answer."""

  kind = "question_answering"

  def setup_output(self):
    self.classifier = output_layer(2, self.config.emb_dim**-0.5)

  def __call__(
    self, encoder_input_tokens: jax.Array, *, enable_dropout: bool = False
  ) -> jax.Array:
    """float32 logits (B, L, 2) of start and end; padding cannot be chosen."""
    x_BLM = self.hidden_states(encoder_input_tokens, enable_dropout)
    logits_BL2 = self.apply_head(x_BLM, enable_dropout)
    real_BL = row_segments(encoder_input_tokens, self.config)
    return jnp.where(real_BL[..., None] != 0, logits_BL2, MASKED)


class SentenceEmbedder(Head):
  """A vector of length one a row (Sentence-T5, arXiv:2108.08877)."""

  kind = "embedding"

  def __call__(
    self, encoder_input_tokens: jax.Array, *, enable_dropout: bool = False
  ) -> jax.Array:
    """float32 (B, M) of tokens (B, L); 0 for a row of padding alone."""
    x_BLM = self.hidden_states(encoder_input_tokens, enable_dropout)
    x_BM = pool(x_BLM, encoder_input_tokens, self.config)
    # The root of the larger, so that a row of zeros has a gradient.
    squares_B1 = jnp.square(x_BM).sum(axis=-1, keepdims=True)
    return x_BM * jax.lax.rsqrt(jnp.maximum(squares_B1, 1e-24))
