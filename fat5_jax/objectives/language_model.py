"""The cost of a text: cross-entropy of every target token."""

from __future__ import annotations

import jax.numpy as jnp

from fat5_jax.models import partitioning
from fat5_jax.objectives.objective import Objective


class LanguageModel(Objective):
  """Teacher-forced cross-entropy, by pieces of the vocabulary."""

  def label_weights(self, batch):
    return batch["decoder_loss_weights"].astype(jnp.float32)

  def parts(self, model, params, batch, weights_BL, options):
    hidden_BLM = model.apply(
      {"params": params},
      batch["encoder_input_tokens"],
      batch["decoder_input_tokens"],
      batch["decoder_target_tokens"],
      encoder_segment_ids=batch.get("encoder_segment_ids"),
      decoder_segment_ids=batch.get("decoder_segment_ids"),
      project=False,
      **options,
    )
    found = partitioning.token_cross_entropy(
      hidden_BLM,
      model.output_kernel(params),
      batch["decoder_target_tokens"],
      weights_BL,
      z_loss=self.z_loss,
      label_smoothing=self.label_smoothing,
    )
    return {
      "loss": found.loss,
      "cross_entropy": found.cross_entropy,
      "z_loss": found.z_loss,
      "token_loss": found.unweighted,
      "correct": found.correct,
    }
