"""What a run folder says of its model (model.json), against its tensors."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from fat5_jax.convert import hf, plain_files, table
from fat5_jax.errors import UserError, nearest
from fat5_jax.models.config import T5Config


def read(run_dir: str) -> dict[str, Any]:
  """What a run folder's model.json says, as far as it is what it should be.

  Raises:
    UserError: if it is missing, damaged, or of an unknown kind.
  """
  path = os.path.join(run_dir, "model.json")
  if not os.path.lexists(path):
    raise UserError(f"{run_dir}: model.json is missing")
  found = plain_files.read_json(path)
  if not isinstance(found.get("model"), dict):
    raise UserError(f"{path}: no description of a model in it")
  return found


def read_config(run_dir: str) -> T5Config:
  """The T5Config of a run folder."""
  path = os.path.join(run_dir, "model.json")
  model = read(run_dir)["model"]
  known = {field.name for field in dataclasses.fields(T5Config)}
  for name in model:
    if name not in known:
      raise UserError(
        f"{path}: model has a field {name[:80]!r}, which this version of"
        f" fat5_jax does not know.{nearest(name[:80], known)}"
      )
  try:
    return T5Config(**model)
  except (TypeError, ValueError) as e:
    raise UserError(f"{path}: {e}") from None


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
