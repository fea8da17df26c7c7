"""T5's Adafactor, AdamW, Muon, and learning-rate schedules, as optax."""

from fat5_jax.optimizers._adafactor import AdafactorState, adafactor
from fat5_jax.optimizers._adamw import adamw
from fat5_jax.optimizers._base import (
  Optimizer,
  Schedule,
  keep_attributes,
  scale_by_pattern,
)
from fat5_jax.optimizers._hyperparameters import (
  HParamMap,
  standard_logical_factor_rules,
)
from fat5_jax.optimizers._kahan import Compensated, CompensatedState
from fat5_jax.optimizers._muon import MuonState, muon
from fat5_jax.optimizers._schedules import create_learning_rate_scheduler

__all__ = [
  "AdafactorState",
  "Compensated",
  "CompensatedState",
  "HParamMap",
  "MuonState",
  "Optimizer",
  "Schedule",
  "adafactor",
  "adamw",
  "create_learning_rate_scheduler",
  "keep_attributes",
  "muon",
  "scale_by_pattern",
  "standard_logical_factor_rules",
]
