"""The task and the head module that a run folder tells of."""

from __future__ import annotations

import dataclasses
from typing import Any

import seqio

from fat5_jax.checkpoints import reference, run_record
from fat5_jax.data import features, pipeline, records
from fat5_jax.errors import UserError


def record_of(source: reference.CheckpointRef) -> dict[str, Any] | None:
  """The record of the task that a run was trained on (data/records.py)."""
  if source.kind != "fat5":
    return None
  return (run_record.read_or_none(source.run_dir) or {}).get("task")


def with_task_of_run(
  dataset_cfg: pipeline.DatasetConfig,
  source: reference.CheckpointRef,
  vocabulary: seqio.Vocabulary | None,
) -> pipeline.DatasetConfig:
  """The data with what it leaves open from the checkpoint's run folder.

  Raises:
    UserError: if neither names a task, or it cannot be built from the folder.
  """
  vocabulary = dataset_cfg.vocabulary or vocabulary
  dataset_cfg = dataclasses.replace(dataset_cfg, vocabulary=vocabulary)
  if dataset_cfg.mixture_or_task_name is not None:
    return dataset_cfg
  record = record_of(source)
  if record is None:
    raise UserError(
      f"{source.run_dir} tells no task: set MIXTURE_OR_TASK_NAME, or give the"
      " gin file of the training with --gin_file=..."
    )
  task = records.build(record, vocabulary, dataset_cfg.data_dir, with_data=True)
  lengths = dataset_cfg.task_feature_lengths
  if lengths is None and record["kind"] in features.WINDOWED:
    lengths = record["lengths"]
  return dataclasses.replace(
    dataset_cfg, mixture_or_task_name=task, task_feature_lengths=lengths
  )


def head_module_of(
  source: reference.CheckpointRef, head_module: str | None
) -> Any:
  """The head module that a run folder names; None where the head is ours.

  Raises:
    UserError: unless the command names it too: importing it runs its code.
  """
  from fat5_jax.models import factory

  record = reference.own_head_record(source)
  if record is None:
    if head_module is not None:
      raise UserError(
        f"HEAD_MODULE = {head_module!r}: {source.run_dir} has no head module of"
        " its own"
      )
    return None
  if head_module != record["module"]:
    raise UserError(
      f"the head of {source.run_dir} is a module of your own. To import it,"
      f" which runs its code: --gin.HEAD_MODULE={record['module']}"
    )
  try:
    return factory.import_head(record)
  except (ValueError, TypeError) as e:
    raise UserError(f"{e}. Run the command where it can be imported") from None
