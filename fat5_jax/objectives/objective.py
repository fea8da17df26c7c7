"""What all objectives share: a loss, and the sums that metrics come from."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config
from fat5_jax.objectives import losses

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a batch costs: a sum over its labels, over an explicit normaliser.

  A language model has a label a target token, a head a label (or several) a
  row. Attributes are those of objectives.of.
  """

  config: T5Config
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  normalizing_factor: float | str | None = None

  def __post_init__(self):
    """Raises UserError for options that an objective does not have."""

  def check_microbatches(self, count: int) -> None:
    """Raises UserError if parts of a batch cost something else than it does."""

  def label_weights(self, batch: Batch) -> jax.Array:
    """The weight of each label, float32 (B, labels); 0 does not count."""
    raise NotImplementedError

  def parts(
    self, model, params: Any, batch: Batch, weights_BK: jax.Array, options
  ) -> dict[str, jax.Array]:
    """Sums `loss`, `cross_entropy`, `z_loss`, `token_loss`, and `correct` where
    there is such a thing."""
    raise NotImplementedError

  def predict(self, model, params: Any, batch: Batch) -> jax.Array:
    """What a head says of every row, float32 (B, K); see objectives/heads.py.

    A language model's answer is generated: see inference/decoding.py.
    """
    raise NotImplementedError

  def weights_and_normalizer(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of a whole batch, for `loss_and_sums` of it or of its parts."""
    return losses.weights_and_normalizer(
      self.label_weights(batch),
      self.normalizing_factor,
      batch.get("decoder_segment_ids"),
    )

  def loss_and_sums(
    self,
    model,
    params: Any,
    batch: Batch,
    weights_BK: jax.Array,
    normalizer: jax.Array,
    rng: jax.Array | None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, sums of a (micro)batch); totals.scalars makes metrics of them.

    Args:
      model: a language model or a head.
      params: its parameters.
      batch: model features of the data pipeline.
      weights_BK: see label_weights.
      normalizer: what the summed loss is divided by.
      rng: of dropout; None switches it off.
    """
    options: dict[str, Any] = {"enable_dropout": rng is not None}
    if rng is not None:
      options["rngs"] = {"dropout": rng}
    found = self.parts(model, params, batch, weights_BK, options)
    tokens = batch["encoder_input_tokens"]
    count = lambda x: jnp.sum(x, dtype=jnp.float32)
    # The loss itself, not the sum of its parts: only it has a gradient.
    loss = found.pop("loss") / normalizer
    return loss, found | {
      "loss": loss,
      "cross_entropy": found["cross_entropy"] / normalizer,
      "z_loss": found["z_loss"] / normalizer,
      "target_tokens": count(weights_BK != 0),
      "target_positions": jnp.float32(weights_BK.size),
      "encoder_tokens": count(tokens != self.config.pad_token_id),
      "encoder_positions": jnp.float32(tokens.size),
    }

  def refuse_classes_options(self) -> None:
    """Raises UserError for options that only choices between classes have."""
    if self.z_loss or self.label_smoothing:
      raise UserError(
        f"Z_LOSS = {self.z_loss} and LABEL_SMOOTHING = {self.label_smoothing}:"
        f" {self.config.head.problem_type} has neither; set both to 0.0"
      )
