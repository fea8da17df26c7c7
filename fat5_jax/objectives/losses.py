"""Cross-entropy with z-loss and label smoothing, and what it is divided by."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SPECIAL_FACTORS = (
  "NUM_REAL_TARGET_TOKENS",
  "NUM_TOTAL_TARGET_TOKENS",
  "AVERAGE_PER_SEQUENCE",
)


def cross_entropy(
  logits_BLV: jax.Array,
  targets_BL: jax.Array,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and z-loss of every token, float32 (B, L) each.

  Label smoothing is T5X's: probability `label_smoothing` spread over the other
  V - 1 tokens, less the entropy of that distribution, so a perfect prediction
  costs 0. z-loss is `z_loss * log(Z)^2` (Mesh TensorFlow), which keeps logits
  from drifting.

  Args:
    logits_BLV: any float type; the losses are float32.
    targets_BL: token ids; ids outside the vocabulary are clipped into it.
    z_loss: coefficient.
    label_smoothing: in [0, 1).

  Returns:
    (cross-entropy, z-loss).
  """
  logits_BLV = logits_BLV.astype(jnp.float32)
  vocab_size = logits_BLV.shape[-1]
  log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  target_logits_BL = jnp.take_along_axis(
    logits_BLV, targets_BL[..., None], axis=-1, mode="clip"
  )[..., 0]
  loss_BL = log_z_BL - target_logits_BL
  if label_smoothing:
    low = label_smoothing / (vocab_size - 1)
    confidence = 1.0 - label_smoothing
    # sum over the vocabulary of -log p.
    uniform_BL = vocab_size * log_z_BL - logits_BLV.sum(axis=-1)
    entropy = -(
      confidence * jnp.log(confidence)
      + (vocab_size - 1) * low * jnp.log(low + 1e-20)
    )
    loss_BL = (confidence - low) * loss_BL + low * uniform_BL - entropy
  return loss_BL, z_loss * jnp.square(log_z_BL)


def weighted_sum(values_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
  """Sum of weight * value; a value of weight 0 may be inf or NaN."""
  return jnp.sum(jnp.where(weights_BL != 0, values_BL * weights_BL, 0.0))


def weights_and_normalizer(
  weights_BL: jax.Array,
  factor: float | str | None,
  segment_ids_BL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weights of the target tokens, and what their summed loss is divided by.

  `factor` means what LOSS_NORMALIZING_FACTOR means in T5X: None divides by
  nothing, a number by itself, NUM_REAL_TARGET_TOKENS by the sum of the weights,
  NUM_TOTAL_TARGET_TOKENS by the size of the batch with padding, and
  AVERAGE_PER_SEQUENCE averages each sequence (each segment of a packed row)
  first and then over sequences. A head's labels stand for tokens. It is
  computed over the whole batch, so microbatches do not change the objective.

  Raises:
    ValueError: for any other factor.
  """
  weights_BL = weights_BL.astype(jnp.float32)
  if factor is None:
    return weights_BL, jnp.float32(1.0)
  if isinstance(factor, (int, float)):
    return weights_BL, jnp.float32(factor)
  if factor == "NUM_REAL_TARGET_TOKENS":
    return weights_BL, jnp.maximum(weights_BL.sum(), 1.0)
  if factor == "NUM_TOTAL_TARGET_TOKENS":
    return weights_BL, jnp.float32(weights_BL.size)
  if factor == "AVERAGE_PER_SEQUENCE":
    total_BL = _segment_totals(weights_BL, segment_ids_BL)
    weights_BL = jnp.where(
      weights_BL != 0, weights_BL / jnp.where(total_BL == 0, 1, total_BL), 0
    )
    return weights_BL, jnp.maximum(weights_BL.sum(), 1.0)
  raise ValueError(
    f"LOSS_NORMALIZING_FACTOR = {factor!r} is neither None, nor a number, nor"
    f" one of {', '.join(SPECIAL_FACTORS)}"
  )


def _segment_totals(weights_BL, segment_ids_BL) -> jax.Array:
  """Each token's sum of weights over its segment, (B, L) or (B, 1)."""
  if segment_ids_BL is None:
    return weights_BL.sum(axis=-1, keepdims=True)
  segments = weights_BL.shape[1] + 1

  def row(weights, ids):
    return jax.ops.segment_sum(weights, ids, num_segments=segments)[ids]

  return jax.vmap(row)(weights_BL, segment_ids_BL)
