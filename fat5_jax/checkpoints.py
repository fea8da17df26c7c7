"""Checkpoints of a run, saved and restored; see weights.py for all others.

A run folder (MODEL_DIR) holds `model.json` (the T5Config and the vocabulary)
and `checkpoint_<step>/` folders: `params`, `optimizer` and `data`, written by
orbax. Layers are always `layers_{i}` on disk; stacking them for a scan happens
here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

logger = logging.getLogger("fat5_jax")
STEP_FOLDER = re.compile(r"checkpoint_(\d+)$")


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
  """How often to save, and how many to keep (None keeps all)."""

  period: int = 1000
  keep: int | None = None


@dataclasses.dataclass(frozen=True)
class RestoreCheckpointConfig:
  """Where a run starts from.

  Attributes:
    path: a run folder, one of its checkpoints, or a folder of any format that
      tools/convert_checkpoint.py reads; None starts from scratch.
    reinitialize: regular expression, searched in the names of parameters, of
      those that are initialised anew instead of read: `head|classifier`.
  """

  path: str | None = None
  reinitialize: str | None = None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """T5X's pair of saving and restoring."""

  save: SaveCheckpointConfig = SaveCheckpointConfig()
  restore: RestoreCheckpointConfig = RestoreCheckpointConfig()


# ---- Layers: a loop's layout and a scan's ------------------------------------


def stack_layers(tree: Any) -> Any:
  """`layers_0`, `layers_1`, ... as one `layers` with a leading layer axis."""

  def is_stack(node):
    return isinstance(node, dict) and "layers_0" in node

  def stack(node):
    if not is_stack(node):
      return node
    rest = {k: v for k, v in node.items() if not k.startswith("layers_")}
    layers = [node[f"layers_{i}"] for i in range(len(node) - len(rest))]
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}

  return jax.tree.map(stack, tree, is_leaf=is_stack)


def unstack_layers(tree: Any) -> Any:
  """The inverse of `stack_layers`."""

  def is_stack(node):
    return isinstance(node, dict) and "layers" in node

  def unstack(node):
    if not is_stack(node):
      return node
    rest = {k: v for k, v in node.items() if k != "layers"}
    count = len(jax.tree.leaves(node["layers"])[0])
    return rest | {
      f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], node["layers"])
      for i in range(count)
    }

  return jax.tree.map(unstack, tree, is_leaf=is_stack)


def as_on_disk(abstract: Any) -> Any:
  """Shapes of a state as they lie on disk."""
  return jax.eval_shape(unstack_layers, abstract)


def as_running(tree: Any, scan_layers: bool) -> Any:
  return stack_layers(tree) if scan_layers else tree


# ---- The run folder ----------------------------------------------------------


def write_atomically(path: str, text: str) -> None:
  """Writes a file so that a reader, or a crash, sees all of it or nothing."""
  folder = os.path.dirname(path)
  with tempfile.NamedTemporaryFile(
    "w", dir=folder, delete=False, encoding="utf-8"
  ) as file:
    file.write(text)
  os.chmod(file.name, 0o644)
  os.replace(file.name, path)


def prepare_model_dir(model_dir: str) -> str:
  """Makes the folder, and sure that it can be written; its absolute path."""
  model_dir = os.path.abspath(os.path.expanduser(model_dir))
  try:
    os.makedirs(model_dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=model_dir):
      pass
  except OSError as e:
    raise UserError(
      f"MODEL_DIR {model_dir} cannot be written: {e.strerror}. Choose another"
      " with --gin.MODEL_DIR=..."
    ) from None
  return model_dir


def read_model_json(folder: str) -> dict[str, Any] | None:
  """The contents of a run folder's model.json, or None."""
  path = os.path.join(folder, "model.json")
  if not os.path.exists(path):
    return None
  try:
    with open(path, encoding="utf-8") as file:
      return json.load(file)
  except json.JSONDecodeError as e:
    raise UserError(f"{path}: not valid JSON: {e}") from None


def check_same_model(model_dir: str, config: T5Config) -> None:
  """Raises UserError if the folder holds a run of another architecture."""
  found = read_model_json(model_dir)
  if found is None:
    return
  before = T5Config(**found["model"]).architecture()
  now = config.architecture()
  lines = [
    f"  - {key} = {before[key]!r}\n  + {key} = {now[key]!r}"
    for key in now
    if before[key] != now[key]
  ]
  if lines:
    raise UserError(
      f"MODEL_DIR {model_dir} holds a different model (- there, + asked"
      " for):\n" + "\n".join(lines) + "\nUse another --gin.MODEL_DIR=..."
    )


def write_model_json(
  model_dir: str,
  config: T5Config,
  vocabulary: dict[str, Any] | None,
  **more: Any,
) -> None:
  """Records what a reader of the checkpoints needs to know."""
  value = {
    "model": dataclasses.asdict(config),
    "vocabulary": vocabulary,
    **more,
  }
  write_atomically(
    os.path.join(model_dir, "model.json"), json.dumps(value, indent=2) + "\n"
  )


def steps(model_dir: str) -> list[int]:
  """The steps of the complete checkpoints in a run folder, ascending."""
  if not os.path.isdir(model_dir):
    return []
  matches = map(STEP_FOLDER.match, os.listdir(model_dir))
  return sorted(int(match[1]) for match in matches if match)


class Checkpointer:
  """Saves and restores a run, asynchronously, keeping the latest few."""

  def __init__(self, model_dir: str, config: SaveCheckpointConfig):
    self._manager = ocp.CheckpointManager(
      model_dir,
      item_names=("params", "optimizer", "data"),
      options=ocp.CheckpointManagerOptions(
        step_prefix="checkpoint",
        max_to_keep=config.keep,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, params, opt_state, data: dict[str, Any]) -> None:
    """Starts a save; waits for an earlier one first. A saved step is left."""
    if self._manager.latest_step() == step:
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(unstack_layers(params)),
        optimizer=ocp.args.StandardSave(unstack_layers(opt_state)),
        data=ocp.args.JsonSave(data),
      ),
    )

  def restore(self, step: int, params, opt_state, scan_layers: bool):
    """(params, opt_state, data) of a step, given abstract ones as they run."""
    try:
      found = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(as_on_disk(params)),
          optimizer=ocp.args.StandardRestore(as_on_disk(opt_state)),
          data=ocp.args.JsonRestore(),
        ),
      )
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{self._manager.directory}: the optimizer of step {step} is that of"
        " other settings (optimizer, TRAINABLE, FROZEN):"
        f" {str(e).splitlines()[0][:200]}. Use another --gin.MODEL_DIR=..., and"
        " this one as INITIAL_CHECKPOINT_PATH"
      ) from None
    return (
      as_running(found["params"], scan_layers),
      as_running(found["optimizer"], scan_layers),
      found["data"],
    )

  def wait(self) -> None:
    """Until the last save is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()
