"""Sums of steps, and the metrics that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of a step's sums, those that are divided by its normalizer.
NORMALISED = ("loss", "cross_entropy", "z_loss")
# Of a step's update, over all parameters that train together.
NORMS = ("gradient_norm", "update_norm", "weight_norm")


def scalars(sums: Mapping[str, float]) -> dict[str, float]:
  """T5X's metrics from sums over one or more steps.

  `loss` and its parts are as normalised, a step's mean (of an evaluation, that
  of all its rows); the per-token values are natural logarithms. A head's labels
  stand for target tokens. Norms are L2, the mean of the steps'.
  """
  tokens = max(sums["target_tokens"], 1.0)
  count = sums["steps"] or 1.0
  result = {
    "loss": sums["loss"] / count,
    "cross_ent_loss": sums["cross_entropy"] / count,
    "z_loss": sums["z_loss"] / count,
    "loss_per_nonpadding_target_token": sums["token_loss"] / tokens,
    "non_padding_fraction/encoder": sums["encoder_tokens"]
    / max(sums["encoder_positions"], 1.0),
    "non_padding_fraction/decoder": sums["target_tokens"]
    / max(sums["target_positions"], 1.0),
    "non_padding_fraction/overall": (
      sums["encoder_tokens"] + sums["target_tokens"]
    )
    / max(sums["encoder_positions"] + sums["target_positions"], 1.0),
  }
  if "correct" in sums:  # Regression has no right answers.
    result["accuracy"] = sums["correct"] / tokens
  for name in NORMS:
    if name in sums:
      result[name] = sums[name] / count
  return result


def add(total: dict[str, float], step: Mapping[str, Any]) -> None:
  """Adds a step's sums, in place."""
  for key, value in step.items():
    total[key] = total.get(key, 0.0) + float(value)
