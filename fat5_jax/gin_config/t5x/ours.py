"""What T5X's names become: all that this folder knows of the rest of fat5_jax.

Where a module or an object of ours gets another name, it gets it here.
"""

from __future__ import annotations

from fat5_jax.gin_config import annotations, files, grammar

# What each command builds or calls; each has a parameter `decoding`.
TRAIN = "fat5_jax.train.Run"
EVAL = "fat5_jax.eval.Evaluation"
INFER = "fat5_jax.infer.Inference"
# Command to the name that gin_files checks.
FUNCTIONS = {"train": "Run", "eval": "Evaluation", "infer": "Inference"}
DATA = "fat5_jax.data.pipeline.DatasetConfig"
CHECKPOINTS = "fat5_jax.checkpoints"
SHARDING = "fat5_jax.distributed.sharding"
OPTIMIZERS = "fat5_jax.optimizers"
CONFIG = "fat5_jax.models.config.T5Config"
MODEL = "fat5_jax.models.factory.create"
DECODING = "fat5_jax.inference.decoding.Decoding"
CHAIN = "fat5_jax.gin_config.t5x.optimizers.chain"
# As our own gin files import our modules.
ALIASES = {
  TRAIN.rpartition(".")[0]: "train_script",
  EVAL.rpartition(".")[0]: "eval_script",
  INFER.rpartition(".")[0]: "infer_script",
  CHECKPOINTS: "checkpoints",
  DATA.rpartition(".")[0]: "pipeline",
  SHARDING: "sharding",
  OPTIMIZERS: "optimizers",
  CONFIG.rpartition(".")[0]: "config",
  MODEL.rpartition(".")[0]: "factory",
  DECODING.rpartition(".")[0]: "decoding",
}
GIN_ROOTS = files.GIN_ROOTS
# A gin file's text; raises UserError, in words, for what is none.
read_text = files.read_text
# Parses a gin text; raises UserError, in words, for what is no gin.
check_gin = grammar.read
# (function, parameter, value): the type that the value has not, or None.
type_problem = annotations.problem
