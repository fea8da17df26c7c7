"""T5's Adafactor, AdamW, and T5X's learning-rate schedules, as optax."""

from fat5_jax.optimizers._adafactor import AdafactorState, adafactor
from fat5_jax.optimizers._adamw import adamw
from fat5_jax.optimizers._base import Optimizer, Schedule, scale_by_pattern
from fat5_jax.optimizers._hyperparameters import (
  HParamMap,
  standard_logical_factor_rules,
)
from fat5_jax.optimizers._schedules import create_learning_rate_scheduler

__all__ = [
  "AdafactorState",
  "HParamMap",
  "Optimizer",
  "Schedule",
  "adafactor",
  "adamw",
  "create_learning_rate_scheduler",
  "scale_by_pattern",
  "standard_logical_factor_rules",
]
