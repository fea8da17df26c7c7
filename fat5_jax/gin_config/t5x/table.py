"""Every binding of T5X's gin files, and what it is here. One table.

`python -m fat5_jax.gin_config.t5x.table` prints it (docs/t5x.md). A name that
is not here is refused by name, file and line: nothing is dropped.
"""

from __future__ import annotations

from typing import Any

from fat5_jax.gin_config.t5x import ours
from fat5_jax.gin_config.t5x.command_rows import COMMAND_ROWS
from fat5_jax.gin_config.t5x.model_rows import MODEL_ROWS
from fat5_jax.gin_config.t5x.rows import (
  Macro,
  Reference,
  Row,
  built,
  neutral,
  only,
  same,
)

_DATASET = "t5x.utils.DatasetConfig"
_PARTITIONER = "t5x.partitioning.PjitPartitioner"
_RESTORE = "t5x.utils.RestoreCheckpointConfig"
_EVALUATOR = "seqio.Evaluator"
# A step that no run reaches.
NEVER = 2**31 - 1


def _path(value: Any) -> Any:
  """T5X's path: a text, a list of one, or nothing."""
  if isinstance(value, (list, tuple)) and len(value) < 2:
    return value[0] if value else None
  return value


def _is_path(value: Any) -> bool:
  return _path(value) is None or isinstance(_path(value), str)


_default_is = lambda *names: {
  "holds": lambda v: v is None or (isinstance(v, Reference) and v.name in names)
}
_NOTHING = (None, (), {})
_LOGGERS = tuple(
  f"seqio.{name}"
  for name in ("PyLoggingLogger", "TensorBoardLogger", "JSONLogger")
)


def _are_loggers(value: Any) -> bool:
  return isinstance(value, (list, tuple)) and all(
    isinstance(v, Reference) and v.name in _LOGGERS for v in value
  )


_DATA_ROWS: dict[str, dict[str, Row]] = {
  _DATASET: {
    "mixture_or_task_name": same(f"{ours.DATA}.mixture_or_task_name"),
    "task_feature_lengths": same(f"{ours.DATA}.task_feature_lengths"),
    "split": same(f"{ours.DATA}.split"),
    "batch_size": same(f"{ours.DATA}.batch_size"),
    "shuffle": same(f"{ours.DATA}.shuffle"),
    "seed": same(f"{ours.DATA}.seed", "the same; None is the run's"),
    "use_cached": same(
      f"{ours.DATA}.use_cached",
      "the same; a task that is built from local files has no cache",
    ),
    "pack": same(f"{ours.DATA}.pack"),
    "use_custom_packing_ops": neutral("packing gives the same rows"),
    "module": same(f"{ours.DATA}.module"),
    "use_memory_cache": neutral("rows are read once"),
    "trim_output_features": only(
      True, about="True", instead="leave it True: rows are cut to lengths"
    ),
    "runtime_preprocessors": only(
      *_NOTHING, about="None", instead="put them into the task"
    ),
    "num_prefetch_threads": neutral("tf.data chooses"),
    "num_workers": neutral("tf.data chooses"),
  },
  "t5x.utils.CheckpointConfig": {
    "save": built(
      "t5x.utils.SaveCheckpointConfig",
      to=f"{ours.CHECKPOINTS}.CheckpointConfig.save",
      about="the same; None saves the first and the last step alone",
      or_none=True,
    ),
    "restore": built(
      _RESTORE,
      to=f"{ours.CHECKPOINTS}.CheckpointConfig.restore",
      about="the same; None is from scratch",
      or_none=True,
    ),
  },
  "t5x.utils.SaveCheckpointConfig": {
    "period": same(
      f"{ours.CHECKPOINTS}.SaveCheckpointConfig.period",
      ours=lambda v: NEVER if v is None else v,
      default=None,
    ),
    "keep": same(f"{ours.CHECKPOINTS}.SaveCheckpointConfig.keep", default=None),
    "dtype": only(
      "float32",
      about="'float32': what a run goes on from, bit for bit",
      instead="checkpoints are float32: leave it 'float32';"
      " tools/convert_checkpoint.py writes smaller ones",
    ),
    "save_dataset": neutral("the data's position is in every checkpoint"),
    "keep_dataset_checkpoints": neutral(
      "the data's position is a part of its checkpoint"
    ),
    "checkpoint_steps": only(
      *_NOTHING, about="not here", instead="set period, and keep = None"
    ),
    "checkpointer_cls": Row(
      "T5X's default; keeping the best is to come",
      **_default_is("t5x.checkpoints.Checkpointer"),
      instead="keeping the best is not here yet: leave it out, and keep = None"
      " keeps all",
    ),
    "checkpoint_manager_cls": Row(
      "T5X's default",
      **_default_is("t5x.checkpoints.OrbaxCheckpointManagerInterface"),
      instead="leave it out; keep = None keeps all",
    ),
    "state_transformation_fns": only(
      *_NOTHING, about="none", instead="tools/convert_checkpoint.py converts"
    ),
  },
  _RESTORE: {
    "path": same(
      {
        "train": f"{ours.CHECKPOINTS}.RestoreCheckpointConfig.path",
        "eval": f"{ours.EVAL}.checkpoint_path",
        "infer": f"{ours.INFER}.checkpoint_path",
      },
      "the same; [] and None are from scratch",
      ours=_path,
      holds=_is_path,
      instead="one checkpoint at a time: give one path",
      default=None,
    ),
    "mode": only(
      *("specific", "latest"),
      about="what lies at path: a checkpoint, or a folder's latest",
      instead="one checkpoint at a time: mode = 'specific', and a command for"
      " each path",
    ),
    "dtype": Row(
      "parameters are float32; products are in T5Config.dtype",
      holds=lambda v: v in (None, "float32", "bfloat16"),
      instead="leave it 'float32'",
      tells=lambda v: (
        "RestoreCheckpointConfig.dtype = 'bfloat16': parameters stay float32,"
        " which rounds less; products are in T5Config.dtype"
        if v == "bfloat16"
        else None
      ),
    ),
    "strict": only(
      True,
      about="True",
      instead="REINITIALIZE is a pattern of the parameters that start anew",
    ),
    "fallback_to_scratch": only(
      False,
      about="False",
      instead="REINITIALIZE is a pattern of the parameters that start anew",
    ),
    "assignment_map": only(
      *_NOTHING,
      about="none",
      instead="REINITIALIZE is a pattern of the parameters that start anew;"
      " tools/convert_checkpoint.py renames",
    ),
    "restore_dataset": neutral("a run goes on where its own data was"),
    "checkpointer_cls": neutral("checkpoints of all kinds are read"),
    "checkpoint_manager_cls": neutral("checkpoints of all kinds are read"),
    "state_transformation_fns": only(
      *_NOTHING, about="none", instead="tools/convert_checkpoint.py converts"
    ),
  },
  _PARTITIONER: {
    "num_partitions": same(
      f"{ours.SHARDING}.Partitioner.num_partitions",
      "the same; model_parallel_submesh goes first",
      ours=lambda v: None if v == 1 else v,
    ),
    "model_parallel_submesh": same(
      f"{ours.SHARDING}.Partitioner.model_parallel_submesh"
    ),
    "logical_axis_rules": same(
      f"{ours.SHARDING}.Partitioner.logical_axis_rules"
    ),
    "params_on_devices": neutral("parameters lie on the devices"),
    "backend": only(
      *(None, "cpu", "gpu", "tpu"),
      about="the chips that jax finds",
      instead="leave it out; JAX_PLATFORMS chooses",
    ),
    **{
      name: only(
        *_NOTHING,
        about="MESH and DCN_MESH",
        instead="set MESH and DCN_MESH, tables of sizes by axis"
        " (--gin.MESH=\"{'fsdp': 4, 'model': 2}\")",
      )
      for name in ("ici_mesh_shape", "dcn_mesh_shape")
    },
    "use_cpu_pjit": neutral("one way of compiling for all devices"),
  },
  "t5x.partitioning.standard_logical_axis_rules": {
    "activation_partitioning_dims": neutral(
      "where activations lie; they are the same"
    ),
    "parameter_partitioning_dims": Row(
      "2 is a mesh whose data axis is `fsdp`",
      holds=lambda v: v in (1, 2),
      instead="1 or 2",
    ),
    "additional_rules": same(
      f"{ours.SHARDING}.standard_logical_axis_rules.additional_rules",
      ours=lambda v: () if v is None else v,
    ),
  },
  _EVALUATOR: {
    "num_examples": only(
      None,
      about="all of the split",
      instead="a part of a split is not here yet: None scores all of it, or"
      " make a split of that many rows",
    ),
    "use_memory_cache": neutral("rows are read once"),
    "logger_cls": Row(
      "JSON and TensorBoard are always written, a line is always printed",
      holds=_are_loggers,
      instead="leave it out: JSON, TensorBoard and lines are always written",
    ),
    "log_dir": only(
      None, about="where the run is", instead="leave it out: MODEL_DIR has it"
    ),
    "async_compute_metrics": neutral("metrics are the same"),
  },
  "seqio.JSONLogger": {
    "write_n_results": Row(
      "every prediction is written",
      tells=lambda v: (
        f"JSONLogger.write_n_results = {v}: all predictions are written"
        if v is not None
        else None
      ),
    ),
  },
  "seqio.TensorBoardLogger": {},
  "seqio.PyLoggingLogger": {},
}

TABLE: dict[str, dict[str, Row]] = {
  **COMMAND_ROWS,
  **_DATA_ROWS,
  **MODEL_ROWS,
}

# What may only be named, with nothing to bind that is known here.
NAMES = (
  *("t5x.utils.get_dataset", "t5x.utils.get_training_eval_datasets"),
  *("t5x.utils.TrainStateInitializer", "t5x.checkpoints.Checkpointer"),
  "t5x.checkpoints.OrbaxCheckpointManagerInterface",
  *("t5x.gin_utils.summarize_gin_config", "t5x.gin_utils.get_gin_config_str"),
  "t5x.trainer.TerminateOnNanAction",
  "t5x.trainer.EarlyStoppingAction",
  "t5x.trainer.WeightMetricsComputer",
  "t5x.checkpoints.SaveBestCheckpointer",
)

# Modules that a gin file may import, and what there is instead of the others.
REFUSED_MODULES = {
  "t5x.export_lib": "tools/convert_checkpoint.py writes Hugging Face folders",
  "t5x.examples.decoder_only": "there are encoder-decoders here, and"
  " encoders: models/t5_1_1/base.gin",
  "t5x.models.DecoderOnlyModel": "there are encoder-decoders here, and"
  " encoders: models/t5_1_1/base.gin",
  "__main__.create_task_from_tfexample_file": "rows of a .jsonl or .tsv file"
  " are predicted with --gin.INPUT=rows.jsonl, without T5X's files",
  "t5x.losses": "bind LOSS_NORMALIZING_FACTOR",
  "mesh_tensorflow": "that is a configuration of Mesh TensorFlow: its"
  " checkpoints are read (INITIAL_CHECKPOINT_PATH), and a run file of T5X"
  " (t5x/configs/runs/finetune.gin) trains",
  "t5.models": "that is a configuration of Mesh TensorFlow: its checkpoints"
  " are read (INITIAL_CHECKPOINT_PATH), and a run file of T5X"
  " (t5x/configs/runs/finetune.gin) trains",
  "flaxformer": "of T5X's models there are those of t5x.examples",
}

# Macros that T5X has not: our parameters that they set.
OWN_MACROS = {
  "DATA_DIR": f"{ours.DATA}.data_dir",
  "MESH": f"{ours.SHARDING}.Partitioner.mesh",
  "DCN_MESH": f"{ours.SHARDING}.Partitioner.dcn_mesh",
  "ATTENTION": f"{ours.CONFIG}.attention_implementation",
  "TRAINABLE": f"{ours.TRAIN}.trainable",
  "FROZEN": f"{ours.TRAIN}.frozen",
  "CACHE_DIR": f"{ours.DATA}.cache_dir",
  "BUCKETS": f"{ours.DATA}.buckets",
  "STREAM": f"{ours.DATA}.stream",
  "NUM_WORKERS": f"{ours.DATA}.num_workers",
  "KEEP_BEST": f"{ours.TRAIN}.keep_best",
  "BEST_MODE": f"{ours.TRAIN}.best_mode",
  "PATIENCE": f"{ours.TRAIN}.patience",
  "EMA_DECAY": f"{ours.TRAIN}.ema_decay",
  "REINITIALIZE": f"{ours.CHECKPOINTS}.RestoreCheckpointConfig.reinitialize",
}


def markdown() -> str:
  """All of it as a Markdown table."""
  rows = [
    "| T5X's binding | here | what it is |",
    "|---|---|---|",
  ]
  for configurable, parameters in TABLE.items():
    for name, row in parameters.items():
      about = row.about + (f"; else: {row.instead}" if row.instead else "")
      where = f"`{configurable}.{name}`"
      rows.append(f"| {where} | {row.kind} | {about} |".replace("\n", " "))
  for module, instead in REFUSED_MODULES.items():
    rows.append(f"| `{module}` | refused | {instead} |")
  return "\n".join(rows) + "\n"


__all__ = ["Macro", "OWN_MACROS", "REFUSED_MODULES", "TABLE", "markdown"]

if __name__ == "__main__":
  print(markdown(), end="")
