"""Checkpoints of a run, saved and restored; see weights.py for all others.

A run folder (MODEL_DIR) holds `model.json` (the T5Config and the vocabulary)
and `checkpoint_<step>/` folders: `params`, `optimizer` and `data`, written by
orbax. Layers are always `layers_{i}` on disk; stacking them for a scan happens
here. Every host writes and reads the parts that its devices hold, so a
checkpoint goes onto any mesh and any number of hosts; the files beside it are
written by host 0.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import orbax.checkpoint as ocp

from fat5_jax.convert import orbax_files
from fat5_jax.errors import UserError
from fat5_jax.models import layer_stack
from fat5_jax.models.config import T5Config
from fat5_jax.sharding import Partitioner, put_parts

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


# ---- As on disk, and as a run has it -----------------------------------------


def as_on_disk(abstract: Any) -> Any:
  """Shapes of a state as they lie on disk."""
  return jax.eval_shape(layer_stack.unstack, abstract)


def as_running(reads: Any, abstract: Any) -> Any:
  """A state in a run's layout, from functions that read it from disk.

  Layers are read and stacked one parameter at a time, and what was read is
  freed, so the devices hold one parameter twice, never all.

  Args:
    reads: functions without arguments, of arrays on the devices, unstacked.
    abstract: the state's shapes, and where they lie.
  """

  def join(like, *layers):
    arrays = [read() for read in layers]
    stacked = jax.jit(lambda *x: jnp.stack(x), out_shardings=like.sharding)(
      *arrays
    )
    stacked.block_until_ready()
    for array in arrays:
      array.delete()
    return stacked

  def stack(node, like):
    if not layer_stack.is_loop(node) or not layer_stack.is_scan(like):
      return jax.tree.map(lambda read: read(), node)
    layers, rest = layer_stack.apart(node)
    stacked = jax.tree.map(join, like["layers"], *layers)
    return jax.tree.map(lambda read: read(), rest) | {"layers": stacked}

  return jax.tree.map(stack, reads, abstract, is_leaf=layer_stack.is_loop)


def _to_hosts(stacked: jax.Array) -> Sequence[jax.Array]:
  """The slices of a scanned layer's parameter, in the hosts' memory.

  A save takes one parameter after the other there: the devices have no room
  for the state twice.
  """
  sharding = stacked.sharding
  if not isinstance(sharding, NamedSharding):
    return list(stacked)
  there = NamedSharding(
    sharding.mesh, P(*sharding.spec[1:]), memory_kind="pinned_host"
  )
  split = jax.jit(list, out_shardings=[there] * len(stacked))
  return jax.block_until_ready(split(stacked))


# ---- The run folder ----------------------------------------------------------


def write_atomically(path: str, text: str) -> None:
  """Writes a file so that a reader, or a crash, sees all of it or nothing.

  Host 0 writes it; the others see it in the folder that they share.
  """
  if jax.process_index():
    return
  folder = os.path.dirname(os.path.abspath(path))
  with tempfile.NamedTemporaryFile(
    "w", dir=folder, delete=False, encoding="utf-8"
  ) as file:
    file.write(text)
  os.chmod(file.name, 0o644)
  os.replace(file.name, path)


def prepare_model_dir(model_dir: str) -> str:
  """Makes the folder, and sure that it can be written; its absolute path.

  Raises:
    UserError: if it cannot, or is no folder of a file system.
  """
  if "://" in model_dir:
    raise UserError(
      f"MODEL_DIR {model_dir} is an address, not a folder: mount the bucket"
      " (gcsfuse, s3fs) on every host and give the folder"
    )
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
  labels = [
    c.head.label_names if c.head is not None else ()
    for c in (T5Config(**found["model"]), config)
  ]
  if labels[0] != labels[1]:
    lines.append(f"  - labels = {labels[0]!r}\n  + labels = {labels[1]!r}")
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


def open_item(folder: str, abstract: Any) -> Any:
  """Functions that read the arrays of an item of a checkpoint; see as_running.

  Each reads one array, of it the parts that this host's devices hold, and
  places it as `abstract` says: orbax's own reader keeps many whole tensors in
  memory at once.

  Raises:
    ValueError: if the item holds other arrays.
  """
  leaves = orbax_files.read_item(folder)
  paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
  reads = []
  for path, target in paths:
    where = tuple(jax.tree_util.keystr((k,), simple=True) for k in path)
    leaf = leaves.pop(where, None)
    if leaf is None or leaf.shape != target.shape:
      found = "nothing" if leaf is None else leaf.shape
      raise ValueError(f"{'/'.join(where)}: {found}, not {target.shape}")
    reads.append(functools.partial(put_parts, target, leaf.read_part))
  # Schedules once had a count of their own; the run's step is theirs now.
  leaves = {where: x for where, x in leaves.items() if where[-1] != "count"}
  if leaves:
    raise ValueError(f"{'/'.join(next(iter(leaves)))} is not wanted")
  return jax.tree.unflatten(structure, reads)


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
        params=ocp.args.StandardSave(layer_stack.unstack(params, _to_hosts)),
        optimizer=ocp.args.StandardSave(
          layer_stack.unstack(opt_state, _to_hosts)
        ),
        data=ocp.args.JsonSave(data),
      ),
    )

  def restore(self, step: int, params, opt_state, partitioner: Partitioner):
    """(params, opt_state, data) of a step, given abstract ones as they run."""
    folder = os.path.join(self._manager.directory, f"checkpoint_{step}")
    on_disk = as_on_disk(params)
    try:
      found = {
        "params": open_item(
          os.path.join(folder, "params"), partitioner.place(on_disk)
        ),
        "optimizer": open_item(
          os.path.join(folder, "optimizer"),
          partitioner.place(as_on_disk(opt_state), on_disk),
        ),
      }
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{self._manager.directory}: the optimizer of step {step} is that of"
        " other settings (optimizer, TRAINABLE, FROZEN):"
        f" {str(e).splitlines()[0][:200]}. Use another --gin.MODEL_DIR=..., and"
        " this one as INITIAL_CHECKPOINT_PATH"
      ) from None
    data = self._manager.restore(
      step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
    )
    return (
      as_running(found["params"], params),
      as_running(found["optimizer"], opt_state),
      data["data"],
    )

  def wait(self) -> None:
    """Until the last save is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for what is being saved."""
    self._manager.close()

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind, error, trace) -> None:
    if error is None:
      self.close()
    elif jax.process_count() == 1:
      # The error is what a person wants to hear. Other hosts, of which one may
      # have failed, are not waited for.
      with contextlib.suppress(Exception):
        self.close()
