"""EncT5: T5's encoder and its first decoder layers, read by prompts.

A few learned prompt vectors take the place of the decoder's tokens; each reads
the encoded text through T5's own decoder layers (one, as published). Source:
arXiv:2110.08426, algorithm 1, as in hackyon/EncT5.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fat5_jax.models import heads
from fat5_jax.models.t5 import Decoder, row_segments


class PromptEmbed(nn.Module):
  """The prompt vectors (P, M)."""

  prompts: int
  features: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param(
      "embedding",
      nn.initializers.normal(stddev=1.0),
      (self.prompts, self.features),
      jnp.float32,
    )


class PromptClassifier(nn.Module):
  """A weight vector and a bias for each prompt's own output."""

  prompts: int
  standard_deviation: float

  @nn.compact
  def __call__(self, x_BPM: jax.Array) -> jax.Array:
    """(B, P) of (B, P, M)."""
    kernel_PM = self.param(
      "kernel",
      nn.initializers.normal(self.standard_deviation),
      (self.prompts, x_BPM.shape[-1]),
      jnp.float32,
    )
    bias_P = self.param("bias", nn.initializers.zeros, (self.prompts,))
    return (x_BPM * kernel_PM).sum(axis=-1) + bias_P


class EncT5(heads.Head):
  """Labels, or numbers, of whole rows, read by prompts.

  One prompt and a projection for a single label or regression; for multi-label
  a prompt a label, which all see each other, although with the decoder's
  unidirectional buckets: a later prompt is at distance 0.
  """

  kind = "enct5"

  def setup_output(self):
    config, head = self.config, self.config.head
    self.decoder = Decoder(
      config.replace(scale_decoder_outputs=False), causal=False
    )
    self.prompt_embedder = PromptEmbed(head.prompts, config.emb_dim)
    deviation = config.emb_dim**-0.5
    if head.problem_type == "multi_label_classification":
      self.classifier = PromptClassifier(head.prompts, deviation)
    else:
      self.classifier = heads.output_layer(head.num_labels, deviation)

  def __call__(
    self, encoder_input_tokens: jax.Array, *, enable_dropout: bool = False
  ) -> jax.Array:
    """float32 (B, num_labels) of tokens (B, L)."""
    segment_ids = row_segments(encoder_input_tokens, self.config)
    encoded_BKM = self.encoder(
      self.token_embedder(encoder_input_tokens),
      segment_ids,
      enable_dropout=enable_dropout,
    )
    prompt_PM = self.prompt_embedder()
    x_BPM, _ = self.decoder(
      jnp.broadcast_to(
        prompt_PM.astype(self.config.dtype),
        (len(encoder_input_tokens), *prompt_PM.shape),
      ),
      encoded_BKM,
      encoder_segment_ids=segment_ids,
      enable_dropout=enable_dropout,
      project=False,
    )
    x_BPM = x_BPM.astype(jnp.float32)
    if self.config.head.problem_type != "multi_label_classification":
      x_BPM = x_BPM[:, 0]
    return self.apply_head(x_BPM, enable_dropout)
