"""The rows of the table that are of T5X's commands."""

from __future__ import annotations

from typing import Any

from fat5_jax.gin_config.t5x import ours
from fat5_jax.gin_config.t5x.rows import (
  Reference,
  Row,
  built,
  neutral,
  only,
  refused,
  same,
)

_DATASET = "t5x.utils.DatasetConfig"
_PARTITIONER = "t5x.partitioning.PjitPartitioner"
_MODEL = "t5x.models.EncoderDecoderModel"
_RESTORE = "t5x.utils.RestoreCheckpointConfig"
_EVALUATOR = "seqio.Evaluator"
# T5X's None is another seed every time.
SEED = 42


def _action_names(value: Any) -> set[str]:
  """The names of all that `actions` holds."""
  if isinstance(value, Reference):
    return {value.name.rpartition(".")[2]}
  if isinstance(value, dict):
    return set().union(*map(_action_names, value.values()))
  if isinstance(value, (list, tuple)):
    return set().union(*map(_action_names, value))
  return set()


def _default(name: str, instead: str) -> Row:
  """T5X's own function, or None."""
  holds = lambda v: v is None or (isinstance(v, Reference) and v.name == name)
  return Row("T5X's default", holds=holds, instead=instead)


COMMAND_ROWS: dict[str, dict[str, Row]] = {
  "__main__.train": {
    "model": built(_MODEL, to=f"{ours.TRAIN}.model"),
    "model_dir": same(f"{ours.TRAIN}.model_dir"),
    "train_dataset_cfg": built(_DATASET, to=f"{ours.TRAIN}.train_dataset_cfg"),
    "train_eval_dataset_cfg": built(
      _DATASET,
      to=f"{ours.TRAIN}.train_eval_dataset_cfg",
      about="the same, but a mixture has one loss, not one a task",
      or_none=True,
    ),
    "infer_eval_dataset_cfg": built(
      _DATASET,
      to=f"{ours.TRAIN}.infer_eval_dataset_cfg",
      or_none=True,
    ),
    "checkpoint_cfg": built(
      "t5x.utils.CheckpointConfig", to=f"{ours.TRAIN}.checkpoint_cfg"
    ),
    "partitioner": built(
      _PARTITIONER,
      to=f"{ours.TRAIN}.partitioner",
      default=Reference("", _PARTITIONER, True),
    ),
    "trainer_cls": built(
      "t5x.trainer.Trainer",
      about="its learning_rate_fn and num_microbatches",
    ),
    "total_steps": same(
      f"{ours.TRAIN}.total_steps", "the same; relative_steps goes first"
    ),
    "relative_steps": same(f"{ours.TRAIN}.relative_steps"),
    "eval_steps": same(
      f"{ours.TRAIN}.eval_steps", "the same; a shorter split is read once"
    ),
    "eval_period": same(
      f"{ours.TRAIN}.eval_period", "the same, counted from step 0"
    ),
    "stats_period": same(f"{ours.TRAIN}.stats_period"),
    "random_seed": same(
      f"{ours.TRAIN}.random_seed",
      f"the same; None, T5X's new seed a run, is {SEED}",
      ours=lambda v: SEED if v is None else v,
      tells=lambda v: (
        f"random_seed = None: {SEED} here, so a run can be made again"
        if v is None
        else None
      ),
    ),
    "use_hardware_rng": neutral("jax's default generator is used"),
    "summarize_config_fn": neutral("config.gin is always written"),
    "inference_evaluator_cls": built(_EVALUATOR, about="the one evaluator"),
    "get_dataset_fn": _default(
      "t5x.utils.get_dataset",
      instead="the task's own module makes other data",
    ),
    "train_eval_get_dataset_fn": _default(
      "t5x.utils.get_training_eval_datasets",
      instead="the task's own module makes other data",
    ),
    "concurrent_metrics": neutral("metrics never wait for a step"),
    "actions": Row(
      "a loss that is not finite always stops a run; see KEEP_BEST",
      holds=lambda v: _action_names(v) <= {"TerminateOnNanAction"},
      instead="KEEP_BEST = 'TASK/METRIC' and PATIENCE = 3 stop early here: set"
      " them, and --gin.train_script.train.actions=None",
    ),
    "run_eval_before_training": same(
      f"{ours.TRAIN}.eval_before_training",
      ours=bool,
    ),
    "train_state_initializer_cls": _default(
      "t5x.utils.TrainStateInitializer",
      instead="leave it out; REINITIALIZE names parameters that start anew",
    ),
    "use_orbax": neutral("checkpoints are Orbax's"),
    "verify_matching_vocabs_fn": neutral(
      "ids beyond the model's embedding are always refused"
    ),
    "gc_period": neutral("of Python's memory"),
  },
  "__main__.evaluate": {
    "model": built(_MODEL, to=f"{ours.EVAL}.model"),
    "dataset_cfg": built(_DATASET, to=f"{ours.EVAL}.dataset_cfg"),
    "restore_checkpoint_cfg": built(_RESTORE, about="its path"),
    "partitioner": built(
      _PARTITIONER,
      to=f"{ours.EVAL}.partitioner",
      default=Reference("", _PARTITIONER, True),
    ),
    "output_dir": same(f"{ours.EVAL}.output_dir"),
    "inference_evaluator_cls": built(_EVALUATOR, about="the one evaluator"),
    "training_evaluator_cls": only(
      None, about="not here", instead="training reports the loss of a split"
    ),
    "summarize_config_fn": neutral("config.gin is always written"),
    "train_state_initializer_cls": _default(
      "t5x.utils.TrainStateInitializer",
      instead="leave it out",
    ),
    "train_eval_get_dataset_fn": _default(
      "t5x.utils.get_training_eval_datasets",
      instead="leave it out",
    ),
    "fallback_init_rng": only(
      None, about="not here", instead="a checkpoint has all parameters"
    ),
    "use_orbax": neutral("checkpoints of all kinds are read"),
  },
  "__main__.infer": {
    "mode": only(
      *("predict", "score"),
      about="the same",
      instead="'predict' and 'score' are here",
      to=f"{ours.INFER}.mode",
    ),
    "model": built(_MODEL, to=f"{ours.INFER}.model"),
    "dataset_cfg": built(_DATASET, to=f"{ours.INFER}.dataset_cfg"),
    "restore_checkpoint_cfg": built(_RESTORE, about="its path"),
    "partitioner": built(
      _PARTITIONER,
      to=f"{ours.INFER}.partitioner",
      default=Reference("", _PARTITIONER, True),
    ),
    "output_dir": Row(
      "the folder of <task>-predict.jsonl-00000-of-00001",
      f"{ours.INFER}.output",
    ),
    "checkpoint_period": neutral("the file is written once it is whole"),
    "shard_id": same(
      f"{ours.INFER}.shard",
      "the same; shards are neighbouring rows",
      ours=lambda v: v or 0,
    ),
    "num_shards": same(f"{ours.INFER}.num_shards", ours=lambda v: v or 1),
    "merge_chunked_results": neutral("there are no chunks"),
    "checkpoint_ds_iter": neutral("the file is written once it is whole"),
    "summarize_config_fn": neutral("predictions need no config.gin"),
    "output_vocab_feature_name": only(
      "targets", about="'targets'", instead="leave it 'targets'"
    ),
    "file_extension": only(
      "jsonl", about="'jsonl'", instead="leave it 'jsonl'"
    ),
    "keep_aux_as_numpy": neutral("there is no aux"),
    "use_orbax": neutral("checkpoints of all kinds are read"),
  },
  "__main__.precompile": {
    name: refused(
      "python -m fat5_jax.plan compiles for a chip that is not here"
    )
    for name in (
      *("model", "train_dataset_cfg", "model_dir", "partitioner"),
      *("random_seed", "output_dir"),
    )
  },
}
