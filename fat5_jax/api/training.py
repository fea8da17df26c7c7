"""The Run that fine_tune trains: gin's objects with gin's defaults."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import optax
import seqio

from fat5_jax import macros, optimizers
from fat5_jax.api import data
from fat5_jax.checkpoints import (
  CheckpointConfig,
  RestoreCheckpointConfig,
  SaveCheckpointConfig,
)
from fat5_jax.data import features, pipeline
from fat5_jax.errors import UserError, nearest
from fat5_jax.training.run import Run

# What lora.gin trains.
LORA_TRAINABLE = r"lora_|^head/|^classifier/|^prompt_embedder/"
# Fields of Run that a call may set besides: gin's macros of the same names.
RUN_FIELDS = (
  *("eval_steps", "eval_period", "stats_period", "z_loss", "label_smoothing"),
  *("loss_normalizing_factor", "num_microbatches", "loggers", "profile_steps"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """What a call of fine_tune says of a run; see Model.fine_tune."""

  steps: int | None = None
  epochs: float | None = None
  batch_size: int | None = None
  max_input_tokens: int | None = None
  max_target_tokens: int | None = None
  learning_rate: Any = None
  optimizer: Any = None
  seed: int = 42
  pack: bool | None = None
  buckets: int | Sequence[Any] | None = None
  checkpoint_period: int = 1000
  keep: int | None = 3

  def __post_init__(self):
    if (self.steps is None) == (self.epochs is None):
      raise UserError("give one of steps and epochs")
    for macro, name in (
      ("TRAIN_STEPS_RELATIVE", "steps"),
      ("RANDOM_SEED", "seed"),
      ("CHECKPOINT_PERIOD", "checkpoint_period"),
      ("KEEP", "keep"),
    ):
      macros.check(macro, getattr(self, name), name)
    for macro, name in (
      ("BATCH_SIZE", "batch_size"),
      ("MAX_INPUT_LENGTH", "max_input_tokens"),
      ("MAX_OUTPUT_LENGTH", "max_target_tokens"),
      ("PACK", "pack"),
      ("BUCKETS", "buckets"),
    ):
      if getattr(self, name) is not None:
        macros.check(macro, getattr(self, name), name)
    epochs = self.epochs
    if epochs is not None and (
      isinstance(epochs, bool)
      or not isinstance(epochs, (int, float))
      or not 0 < epochs < math.inf
    ):
      raise UserError(f"epochs = {epochs!r} must be a number above 0")


def make_run(
  wanted: Wanted,
  module: Any,
  task: seqio.Task | seqio.Mixture,
  validation: str | None,
  *,
  start: str,
  run_folder: str,
  partitioner: Any,
  trainable: str | None,
  frozen: str | None,
  more: dict[str, Any],
) -> Run:
  """The run, as runs/finetune.gin and the recipes build it.

  Args:
    wanted: what the caller says.
    module: the model.
    task: from api.data.
    validation: its split to evaluate on, or None.
    start: the checkpoint to start from.
    run_folder: MODEL_DIR.
    partitioner: the mesh.
    trainable: pattern of the parameters that train, None for all.
    frozen: of those that do not.
    more: RUN_FIELDS that the caller gives.

  Raises:
    UserError: for settings that no run has.
  """
  _check_fields(more)
  config = module.config
  kind = "language_model" if config.head is None else config.head.kind
  is_text = features.label_feature(task) is None
  batch_size, lengths = _sizes(wanted, task, kind)
  pack = wanted.pack
  if pack is None:
    # A label, or an embedding, is one row an example.
    pack = kind == "language_model" and wanted.buckets is None
  train = pipeline.DatasetConfig(
    task,
    lengths,
    "train",
    batch_size,
    shuffle=True,
    seed=wanted.seed,
    pack=pack,
    buckets=wanted.buckets,
  )
  same = {"shuffle": False, "split": validation}
  generation_lengths = None if is_text else lengths
  if kind in ("sequence_classification", "enct5"):
    generation_lengths = None
  fields = {"z_loss": 0.0001 if kind == "language_model" else 0.0}
  fields |= {"loss_normalizing_factor": "NUM_REAL_TARGET_TOKENS"} | more
  return Run(
    model=module,
    train_dataset_cfg=train,
    train_eval_dataset_cfg=dataclasses.replace(train, **same, seed=42),
    infer_eval_dataset_cfg=None
    if kind == "embedding"
    else dataclasses.replace(
      train,
      **same,
      seed=42,
      pack=False,
      buckets=None,
      task_feature_lengths=generation_lengths,
    ),
    checkpoint_cfg=CheckpointConfig(
      SaveCheckpointConfig(wanted.checkpoint_period, wanted.keep),
      RestoreCheckpointConfig(start),
    ),
    optimizer=_optimizer(wanted, config),
    model_dir=run_folder,
    partitioner=partitioner,
    relative_steps=wanted.steps or _steps(train, wanted.epochs),
    random_seed=wanted.seed,
    trainable=trainable,
    frozen=frozen,
    **fields,
  )


def _check_fields(more: dict[str, Any]) -> None:
  for name, value in more.items():
    if name not in RUN_FIELDS:
      raise UserError(
        f"fine_tune has no argument {name!r}.{nearest(name, RUN_FIELDS)}"
        f" Besides those of its signature: {', '.join(RUN_FIELDS)}"
      )
    macros.check(name.upper(), value, name)


def _sizes(
  wanted: Wanted, task: seqio.Task | seqio.Mixture, kind: str
) -> tuple[int, dict[str, int]]:
  """(batch size, tokens by feature): those wanted, or what the data says."""
  names = ["inputs"]
  if features.label_feature(task) is None:
    names.append("targets")
  elif wanted.max_target_tokens is not None:
    raise UserError("max_target_tokens: a head's targets are labels, no text")
  given = {
    "inputs": wanted.max_input_tokens,
    "targets": wanted.max_target_tokens,
  }
  default = 128 if kind in ("language_model", "embedding") else 32
  if wanted.batch_size and all(given[name] for name in names):
    return wanted.batch_size, {name: given[name] for name in names}
  count, most = data.longest(task)
  lengths = {
    name: given[name] or min(most[name], data.MOST_TOKENS) for name in names
  }
  return wanted.batch_size or max(1, min(default, count)), lengths


def _steps(train: pipeline.DatasetConfig, epochs: float) -> int:
  """Steps of so many passes over the training rows."""
  if isinstance(train.task(), seqio.Mixture):
    raise UserError("epochs: a mixture has no end; give steps")
  return max(1, math.ceil(pipeline.count_batches(train) * epochs))


def _optimizer(wanted: Wanted, config: Any) -> optax.GradientTransformation:
  chosen, rate = wanted.optimizer, wanted.learning_rate
  if isinstance(chosen, optax.GradientTransformation):
    if rate is not None:
      raise UserError("learning_rate is inside of an optimizer of your own")
    return chosen
  if chosen not in (None, "adafactor", "adamw"):
    raise UserError(
      f"optimizer = {chosen!r} must be 'adafactor', 'adamw', or an optax"
      " transformation"
    )
  # lora.gin takes AdamW, at Adafactor's rate.
  name = chosen or ("adafactor" if config.lora is None else "adamw")
  if rate is None:
    rate = 0.0001 if chosen == "adamw" and config.lora is None else 0.001
  if not callable(rate):
    macros.check("LEARNING_RATE", rate, "learning_rate")
    rate = optimizers.create_learning_rate_scheduler("constant", rate)
  if name == "adamw":
    return optimizers.adamw(rate, global_norm_clip_threshold=1.0)
  head = config.head
  multipliers = None
  if head is not None and head.kind in ("sequence_classification", "enct5"):
    multipliers = {r"^(head|classifier)/": 3.0}  # recipes/classify.gin
  return optimizers.adafactor(rate, learning_rate_multipliers=multipliers)
