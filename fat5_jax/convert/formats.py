"""What kind of checkpoint lies at a path, and how it is opened."""

from __future__ import annotations

from collections.abc import Mapping
import os
import re
from typing import Any, NamedTuple

from fat5_jax.convert import (
  enct5,
  flash_t5,
  hf,
  mesh_tf,
  peft,
  t5x,
  tensor_files,
)
from fat5_jax.convert.table import Leaves
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config


class Found(NamedTuple):
  """A checkpoint of another library: its kind, its path, its step."""

  kind: str
  path: str
  step: int = 0


# What the kinds are called to a person.
NAMES = {
  "hf": "Hugging Face T5",
  "flash_t5": "FAT5 / flashT5",
  "enct5": "EncT5 (hackyon)",
  "peft": "PEFT LoRA adapter",
  "t5x": "T5X checkpoint",
  "mesh_tf": "Mesh TensorFlow checkpoint",
  "fat5": "fat5_jax run",
}


def find(path: str) -> Found | None:
  """The checkpoint of another library at a path; None if it is none known.

  A folder of several T5X checkpoints is its latest.
  """
  if os.path.isdir(path) and peft.is_adapter(path):
    return Found("peft", path)
  if os.path.lexists(os.path.join(path, "config.json")):
    config_json = tensor_files.read_json(os.path.join(path, "config.json"))
    if flash_t5.is_flash(config_json):
      return Found("flash_t5", path)
    if tensor_files.has_tensors(path):
      tensors = tensor_files.read_folder(path)
      if enct5.is_enct5(config_json, tensors):
        return Found("enct5", path)
    return Found("hf", path)
  if mesh_tf.prefix_of(path) is not None:
    return Found("mesh_tf", path)
  if os.path.exists(path) and t5x.is_checkpoint(path):
    return Found("t5x", path, _step_of(path))
  if os.path.isdir(path):
    inside = [os.path.join(path, name) for name in os.listdir(path)]
    steps = [
      (_step_of(p), p)
      for p in inside
      if os.path.isdir(p) and "checkpoint_" in p and t5x.is_checkpoint(p)
    ]
    if steps:
      step, latest = max(steps)
      return Found("t5x", latest, step)
  return None


def _step_of(path: str) -> int:
  digits = os.path.basename(path).rpartition("_")[2]
  # Beyond int32 it is a name, no count of steps.
  return int(digits) if re.fullmatch(r"[0-9]{1,9}", digits) else 0


def open_model(
  kind: str,
  path: str,
  *,
  overrides: Mapping[str, Any] | None = None,
  base: str | None = None,
) -> tuple[T5Config, Leaves]:
  """The config and the tensors of a checkpoint, to be read when wanted.

  Args:
    kind: as found.
    path: likewise.
    overrides: fields of T5Config that a T5X or Mesh TensorFlow checkpoint does
      not tell, such as {"mlp_activations": ("silu", "linear")}.
    base: the model that a PEFT adapter belongs to; None is what it names.

  Raises:
    UserError: if it is damaged, or not what its kind says.
  """
  if overrides and kind not in ("t5x", "mesh_tf"):
    raise UserError(f"{path}: its own config.json says all of the model")
  if kind == "hf":
    return hf.open_model(path)
  if kind == "peft":
    return _with_adapter(path, base)
  if kind == "flash_t5":
    return flash_t5.open_model(path)
  if kind == "enct5":
    return enct5.open_model(path)
  reader = t5x if kind == "t5x" else mesh_tf
  return reader.open_model(path, overrides)


def base_of(found: Found) -> str | None:
  """The folder that an adapter names as its model's, where it is one."""
  if found.kind != "peft":
    return None
  named = tensor_files.read_json(os.path.join(found.path, peft.CONFIG))
  base = named.get("base_model_name_or_path") or ""
  if not isinstance(base, str):
    raise UserError(f"{found.path}: base_model_name_or_path is no text")
  return base if os.path.exists(os.path.join(base, "config.json")) else None


def _with_adapter(path: str, base: str | None) -> tuple[T5Config, Leaves]:
  base = base or base_of(Found("peft", path))
  if base is None:
    raise UserError(
      f"{path}: an adapter belongs to a model, and it names none that is a"
      " folder here. Say where the model is: --base FOLDER"
    )
  config, leaves = hf.open_model(base)
  return peft.from_peft(path, config, leaves)
