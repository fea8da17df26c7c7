"""What a batch costs each kind of model, and what the model says of its rows.

The rooms above ask `of(config)` once; these modules run where seqio, TensorFlow
and gin are not installed.
"""

from __future__ import annotations

from fat5_jax.models.config import T5Config
from fat5_jax.objectives.heads import (
  Contrastive,
  MultiLabel,
  Regression,
  SingleLabel,
  Spans,
  Tags,
)
from fat5_jax.objectives.language_model import LanguageModel
from fat5_jax.objectives.objective import Batch, Objective

__all__ = ["Batch", "Objective", "of"]

_BY_KIND = {
  "embedding": Contrastive,
  "question_answering": Spans,
  "token_classification": Tags,
}
_BY_PROBLEM = {
  "regression": Regression,
  "multi_label_classification": MultiLabel,
  "single_label_classification": SingleLabel,
}


def of(
  config: T5Config,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  normalizing_factor: float | str | None = None,
) -> Objective:
  """The objective of a model.

  Args:
    config: of the model; its head says which objective it has.
    z_loss: coefficient of log(Z)^2.
    label_smoothing: in [0, 1).
    normalizing_factor: see losses.weights_and_normalizer.

  Raises:
    UserError: for options that this objective does not have.
  """
  if config.is_language_model:
    kind: type[Objective] = LanguageModel
  else:
    head = config.head
    kind = _BY_KIND.get(head.kind) or _BY_PROBLEM[head.problem_type]
  return kind(config, z_loss, label_smoothing, normalizing_factor)
