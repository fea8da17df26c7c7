"""What a batch of each kind of model costs, and the sums its metrics come from.

A language model has a label a target token, a head a label (or several) a row.
This module runs where seqio, TensorFlow and gin are not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fat5_jax import losses
from fat5_jax.errors import UserError
from fat5_jax.models import partitioning
from fat5_jax.models.config import T5Config

Batch = Mapping[str, jax.Array]


def label_weights(config: T5Config, batch: Batch) -> jax.Array:
  """The weight of each label, float32 (B, labels); 0 where it does not count.

  Labels below 0 (-100 is customary), and positions beyond the row, count for
  nothing, but in regression, where any number is a label.
  """
  if config.is_language_model:
    return batch["decoder_loss_weights"].astype(jnp.float32)
  if config.head.kind == "embedding":
    both = [batch[f"{side}_tokens"] for side in _PAIR]
    real_B = jnp.stack([(x != config.pad_token_id).any(axis=1) for x in both])
    return real_B.all(axis=0).astype(jnp.float32)[:, None]
  weights_BK = batch["label_weights"].astype(jnp.float32)
  labels_BK = batch["labels"]
  if config.head.problem_type == "regression":
    return weights_BK
  valid_BK = labels_BK >= 0
  if config.head.kind == "question_answering":
    valid_BK &= labels_BK < batch["encoder_input_tokens"].shape[1]
  return weights_BK * valid_BK


_PAIR = ("encoder_input", "decoder_target")


def sums(
  model,
  params: Any,
  batch: Batch,
  weights_BK: jax.Array,
  normaliser: jax.Array,
  rng: jax.Array | None,
  z_loss: float,
  label_smoothing: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(loss, sums of a (micro)batch); see metrics.scalars.

  Args:
    model: a language model or a head.
    params: its parameters.
    batch: model features of the data pipeline.
    weights_BK: see label_weights.
    normaliser: what the summed loss is divided by.
    rng: of dropout; None switches it off.
    z_loss: coefficient of log(Z)^2.
    label_smoothing: in [0, 1).
  """
  config = model.config
  options: dict[str, Any] = {"enable_dropout": rng is not None}
  if rng is not None:
    options["rngs"] = {"dropout": rng}
  if config.is_language_model:
    found = _language_model(
      model, params, batch, weights_BK, z_loss, label_smoothing, options
    )
  else:
    found = _head(
      model, params, batch, weights_BK, z_loss, label_smoothing, options
    )
  tokens = batch["encoder_input_tokens"]
  count = lambda x: jnp.sum(x, dtype=jnp.float32)
  # The loss itself, not the sum of its parts: only it has a gradient.
  loss = found.pop("loss") / normaliser
  return loss, found | {
    "loss": loss,
    "cross_entropy": found["cross_entropy"] / normaliser,
    "z_loss": found["z_loss"] / normaliser,
    "target_tokens": count(weights_BK != 0),
    "target_positions": jnp.float32(weights_BK.size),
    "encoder_tokens": count(tokens != config.pad_token_id),
    "encoder_positions": jnp.float32(tokens.size),
  }


def _language_model(
  model, params, batch, weights_BL, z_loss, label_smoothing, options
):
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
    z_loss=z_loss,
    label_smoothing=label_smoothing,
  )
  return {
    "loss": found.loss,
    "cross_entropy": found.cross_entropy,
    "z_loss": found.z_loss,
    "token_loss": found.unweighted,
    "correct": found.correct,
  }


def _head(model, params, batch, weights_BK, z_loss, label_smoothing, options):
  head = model.config.head
  embed = lambda side: model.apply(
    {"params": params}, batch[f"{side}_tokens"], **options
  )
  outputs = embed(_PAIR[0])
  if head.kind == "embedding":
    # The other rows' partners are the wrong answers (Sentence-T5, section 3).
    other_BM = embed(_PAIR[1])
    similarity_BB = head.similarity_scale * outputs @ other_BM.T
    missing_B = weights_BK[:, 0] == 0
    logits = jnp.where(missing_B[None, :], -1e9, similarity_BB)[:, None]
    labels_BK = jnp.arange(len(other_BM))[:, None]
  else:
    logits, labels_BK = outputs, batch["labels"]
  if head.kind == "question_answering":
    logits = jnp.swapaxes(outputs, 1, 2)  # (B, 2, L)
  elif head.kind in ("sequence_classification", "enct5"):
    logits = outputs[:, None]
  if head.problem_type == "regression":
    loss_BK = jnp.square(outputs - labels_BK)
    z_BK, correct_BK = jnp.zeros_like(loss_BK), None
  elif head.problem_type == "multi_label_classification":
    # softplus(x) - x y: sigmoid cross-entropy that cannot overflow.
    loss_BK = jax.nn.softplus(outputs) - outputs * labels_BK
    z_BK = jnp.zeros_like(loss_BK)
    correct_BK = (outputs > 0) == (labels_BK > 0.5)
  else:
    loss_BK, z_BK = losses.cross_entropy(
      logits, labels_BK, z_loss=z_loss, label_smoothing=label_smoothing
    )
    correct_BK = jnp.argmax(logits, axis=-1) == labels_BK
  counted = (weights_BK != 0).astype(jnp.float32)
  cross_entropy = losses.weighted_sum(loss_BK, weights_BK)
  z = losses.weighted_sum(z_BK, weights_BK)
  found = {
    "loss": cross_entropy + z,
    "cross_entropy": cross_entropy,
    "z_loss": z,
    "token_loss": losses.weighted_sum(loss_BK, counted),
  }
  if correct_BK is not None:
    found["correct"] = losses.weighted_sum(correct_BK, counted)
  return found


def check(
  config: T5Config,
  z_loss: float,
  label_smoothing: float,
  num_microbatches: int | None,
) -> None:
  """Raises UserError for options that this model's objective does not have."""
  if config.is_language_model:
    return
  if config.head.problem_type != "single_label_classification":
    if z_loss or label_smoothing:
      raise UserError(
        f"Z_LOSS = {z_loss} and LABEL_SMOOTHING = {label_smoothing}:"
        f" {config.head.problem_type} has neither; set both to 0.0"
      )
  if config.head.kind == "embedding" and (num_microbatches or 1) > 1:
    raise UserError(
      "NUM_MICROBATCHES: an embedding's wrong answers are the rest of its"
      " batch, so splitting it changes the objective"
    )
