"""What a run folder tells of its run, and that it goes on with the same one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

import seqio

from fat5_jax import console, run_record, weights
from fat5_jax.data import features, pipeline, records, seqio_source, sources
from fat5_jax.errors import UserError


def check_same_task(
  model_dir: str, record: dict[str, Any], own_head: dict[str, Any] | None
) -> None:
  """Raises UserError if the folder holds a run on other data, or another head.

  What its labels mean, its metrics and its curves are those of one task.
  """
  found = run_record.read_or_none(model_dir) or {}
  before = found.get("task")
  if before is None:
    return
  lines = records.difference(before, json.loads(json.dumps(record)))
  if found.get("own_head") != own_head:
    lines.append(f"  - head module {found.get('own_head')}")
    lines.append(f"  + head module {own_head}")
  if lines:
    raise UserError(
      f"MODEL_DIR {model_dir} holds a run on other data (- there, + asked"
      " for):\n"
      + "\n".join(lines)
      + "\nUse another --gin.MODEL_DIR=..., and this one as"
      " INITIAL_CHECKPOINT_PATH to go on from its weights"
    )


def base_of(
  model_dir: str, initial_path: str | None, own_step: int | None
) -> str | None:
  """The checkpoint that a run started from, as recorded then."""
  if own_step is not None:
    return (run_record.read_or_none(model_dir) or {}).get("base")
  return initial_path and os.path.abspath(os.path.expanduser(initial_path))


# Lines of a configuration: MACRO = value, or scope/module.name.parameter.
_SETTING = re.compile(r"^([\w./]+) = (.*)$", re.MULTILINE)


def _short(value: str | None) -> str:
  value = value or "unset"
  return value if len(value) <= 60 else f"{value[:57]}..."


def _settings(config_text: str) -> dict[str, str]:
  """Names and values; gin wraps long ones over several indented lines."""
  text = re.sub(r"\\?\n[ \t]+", " ", config_text)
  return {k: " ".join(v.split()) for k, v in _SETTING.findall(text)}


def tell_changes(model_dir: str, config_text: str) -> None:
  """Says in a line what differs from the settings that the run had."""
  path = os.path.join(model_dir, "config.gin")
  if not os.path.exists(path):
    return
  with open(path, encoding="utf-8") as file:
    before = _settings(file.read())
  now = _settings(config_text)
  changed = [
    f"{key} {_short(before.get(key))} -> {_short(now.get(key))}"
    for key in sorted({*before, *now})
    if before.get(key) != now.get(key) and key != "MODEL_DIR"
  ]
  if changed:
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    console.say(f"changed since: {', '.join(changed[:8])}{more}")


def own_head(source: weights.Source, head_module: str | None) -> Any:
  """The head module that a run folder names; None where the head is ours.

  Raises:
    UserError: unless the command names it too: importing it runs its code.
  """
  from fat5_jax.models import factory

  record = weights.own_head_record(source)
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


def with_own_task(
  dataset_cfg: pipeline.DatasetConfig,
  source: weights.Source,
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
  record = own_task(source)
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


def own_task(source: weights.Source) -> dict[str, Any] | None:
  """The record of the task that a run was trained on (data/records.py)."""
  if source.kind != "fat5":
    return None
  return (run_record.read_or_none(source.run_dir) or {}).get("task")


def example(task: seqio.Task | seqio.Mixture) -> tuple[tuple[str, ...], str]:
  """(the columns that a task asks about, a text of its only one or "")."""
  source = getattr(task, "source", None)
  if not isinstance(source, seqio_source.SeqioSource):
    return (), ""
  if len(source.columns) != 1:
    return source.columns, ""
  try:
    split = "validation" if "validation" in source.splits else "train"
    _, row = next(iter(source.rows_source.rows(split)))
    value = sources.column(row, source.columns[0])
  except (UserError, StopIteration):
    return source.columns, ""
  return source.columns, " ".join(value) if isinstance(value, list) else value
