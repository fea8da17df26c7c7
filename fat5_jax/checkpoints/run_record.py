"""model.json: what a run folder says of its model, and of what made it."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from fat5_jax import storage
from fat5_jax.checkpoints import run_folder
from fat5_jax.convert import hf, plain_files, table
from fat5_jax.errors import UserError, nearest
from fat5_jax.models.config import T5Config

# Raised when a reader of before would misread it.
FORMAT = 1
_FIELDS = {
  *("format", "model", "vocabulary", "random_seed", "task", "own_head", "base")
}


def read_or_none(folder: str) -> dict[str, Any] | None:
  """The contents of a run folder's model.json, or None where there is none.

  Raises:
    UserError: if it is damaged, or says what this version does not know.
  """
  path = os.path.join(folder, "model.json")
  is_there = storage.exists if storage.is_remote(path) else os.path.lexists
  if not is_there(path):
    return None
  found = plain_files.read_json(path)
  if not isinstance(found.get("model"), dict):
    raise UserError(f"{path} describes no model")
  # What was written before there were numbers is of the first format.
  number = found.get("format", 1)
  unknown = sorted({*found} - _FIELDS)
  if number != FORMAT or unknown:
    what = f"field {unknown[0]!r}" if unknown else f"format {number!r}"
    raise UserError(
      f"{path} has {what}, which this fat5_jax does not know: a newer one wrote"
      " it, or it was edited"
    )
  return found


def read(folder: str) -> dict[str, Any]:
  """The contents of a run folder's model.json.

  Raises:
    UserError: if it is missing, and as `read_or_none`.
  """
  found = read_or_none(folder)
  if found is None:
    raise UserError(f"{folder}: model.json is missing")
  return found


def read_config(folder: str) -> T5Config:
  """The T5Config in a run folder's model.json.

  Raises:
    UserError: as `read`, and for a config that no model can have.
  """
  found = read(folder)
  where, known = f"{folder}/model.json", dataclasses.fields(T5Config)
  names = [field.name for field in known]
  for name in found["model"]:
    if name not in names:
      raise UserError(
        f"{where}: model has a field {name[:80]!r}, which this fat5_jax does"
        f" not know.{nearest(name[:80], names)}"
      )
  try:
    return T5Config(**found["model"])
  except (TypeError, ValueError) as e:
    reason = str(e).removeprefix("T5Config.__init__() ")
    raise UserError(f"{where}: model: {reason}") from None


def check_same_model(model_dir: str, config: T5Config) -> None:
  """Raises UserError if the folder holds a run of another architecture."""
  if read_or_none(model_dir) is None:
    return
  found = read_config(model_dir)
  before, now = found.architecture(), config.architecture()
  lines = [
    f"  - {key} = {before[key]!r}\n  + {key} = {now[key]!r}"
    for key in now
    if before[key] != now[key]
  ]
  labels = [
    c.head.label_names if c.head is not None else () for c in (found, config)
  ]
  if labels[0] != labels[1]:
    lines.append(f"  - labels = {labels[0]!r}\n  + labels = {labels[1]!r}")
  if lines:
    raise UserError(
      f"MODEL_DIR {model_dir} holds a different model (- there, + asked"
      " for):\n" + "\n".join(lines) + "\nUse another --gin.MODEL_DIR=..."
    )


def write(
  model_dir: str,
  config: T5Config,
  vocabulary: dict[str, Any] | None,
  **more: Any,
) -> None:
  """Records what a reader of the checkpoints needs to know."""
  value = {
    "format": FORMAT,
    "model": dataclasses.asdict(config),
    "vocabulary": vocabulary,
    **more,
  }
  run_folder.write_atomically(
    os.path.join(model_dir, "model.json"), json.dumps(value, indent=2) + "\n"
  )


def check_tensors(
  config: T5Config, leaves: table.Leaves, where: str, own_head: bool
) -> None:
  """Raises UserError unless the tensors are those of a run's model.json.

  Args:
    config: of model.json.
    leaves: the tensors.
    where: they are, for messages.
    own_head: whether a head of a person's own is among them.
  """
  name = "/".join
  table.check_layers(config, len(leaves), where)
  table.check_floats({name(k): leaf for k, leaf in leaves.items()}, where)
  if own_head:
    return  # Whose tensors only its module knows.
  plain = config.replace(lora=None)
  shapes = {row.path: row.shape for row in hf.rows(plain)}
  for (*path, last), shape in list(shapes.items()):
    if last == "kernel" and config.lora and config.lora.applies_to(name(path)):
      shapes[*path, "lora_a"] = (shape[0], config.lora.rank)
      shapes[*path, "lora_b"] = (config.lora.rank, shape[1])
  table.check_names(map(name, shapes), map(name, leaves), where)
  table.check_shapes(
    {name(k): shape for k, shape in shapes.items()},
    {name(k): leaf.shape for k, leaf in leaves.items()},
    where,
  )
