"""Checkpoints: what gin files name of them; the rest is in the modules."""

from fat5_jax.checkpoints.checkpointer import (
  CheckpointConfig,
  RestoreCheckpointConfig,
  SaveCheckpointConfig,
)
from fat5_jax.checkpoints.reference import model_config
from fat5_jax.checkpoints.vocabulary import vocabulary_of

__all__ = [
  "CheckpointConfig",
  "RestoreCheckpointConfig",
  "SaveCheckpointConfig",
  "model_config",
  "vocabulary_of",
]
