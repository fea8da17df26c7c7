"""What lies at a path: a checkpoint of a run, or of another library.

Its config, and its tensors, which are read when they are wanted.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from fat5_jax import fetched, hub, storage
from fat5_jax.checkpoints import history, integrity, run_record
from fat5_jax.convert import formats, mesh_tf, orbax_files, t5x, table
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

# Libraries whose checkpoints have Adafactor's slots.
SLOT_READERS = {"t5x": t5x, "mesh_tf": mesh_tf}


@dataclasses.dataclass(frozen=True)
class CheckpointRef:
  """A checkpoint to read: which kind, where, and at which step.

  `kind` is "fat5" or one of convert.formats. `overrides` and `base` are those
  of formats.open_model. `continues` is False where a run makes another model
  of it, by a head or LoRA: its step and optimizer are not the run's.
  """

  kind: str
  path: str
  step: int = 0
  overrides: tuple[tuple[str, Any], ...] = ()
  base: str | None = None
  continues: bool = True

  @property
  def has_optimizer(self) -> bool:
    """Whether it counts steps, and holds what an optimizer keeps."""
    return self.kind in SLOT_READERS or (
      self.kind == "fat5"
      and storage.is_folder(os.path.join(self.path, "optimizer"))
    )

  @property
  def run_dir(self) -> str:
    """The folder that tells what is beside the tensors."""
    if self.kind == "peft" and self.base:
      return self.base
    return os.path.dirname(self.path) if self.kind == "fat5" else self.path

  def state(self) -> dict[str, str]:
    """What is another when what lies there is: of every file."""
    if storage.is_remote(self.path):
      return storage.states(self.path)
    names = [self.path]
    if os.path.isdir(self.path):
      names = [
        os.path.join(folder, name)
        for folder, _, files in os.walk(self.path)
        for name in sorted(files)
      ]
    found = {os.path.relpath(n, self.path): os.stat(n) for n in sorted(names)}
    return {name: f"{s.st_size} {s.st_mtime_ns}" for name, s in found.items()}


# google/flan-t5-small, or t5-small
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w-][\w.-]*$")


def find(path: str) -> CheckpointRef:
  """What lies at a path or an address: a run folder (its latest checkpoint),
  one checkpoint of a run (`best` in its folder is the best), or a checkpoint of
  another library, of which there is a copy on this machine then.

  Raises:
    UserError: if it is none of these.
  """
  given, path = path, storage.absolute(path)
  if hub.is_there(path):
    path = fetched.local(path)
  folder, name = os.path.split(path)
  if name == "best" and (best := history.best(folder)) is not None:
    path = os.path.join(folder, f"checkpoint_{best[1]}")
  is_here = not storage.is_remote(path)
  if is_here and not os.path.exists(path) and formats.find(path) is None:
    hint = ""
    if _HUB_NAME.match(given):
      hint = (
        f". If {given} is a model of the Hugging Face hub: hf://{given} is"
        " fetched from there"
      )
    raise UserError(f"{path}: no such checkpoint{hint}")
  match = history.STEP_FOLDER.match(os.path.basename(path))
  if match and _is_own(path):
    if reason := integrity.problem(path, ("params",)):
      raise UserError(
        f"{path} is damaged ({reason}). Name its run folder for the last whole"
        " one"
      )
    return CheckpointRef("fat5", path, int(match[1]))
  own = [n for n in history.steps(path) if _is_own(f"{path}/checkpoint_{n}")]
  if own:
    step, _ = history.latest_whole(path, ("params",))
    return CheckpointRef("fat5", os.path.join(path, f"checkpoint_{step}"), step)
  if storage.is_remote(path) and (other := _of_others(path)) is not None:
    path = fetched.local(other)
  found = None if storage.is_remote(path) else formats.find(path)
  if found is not None:
    return CheckpointRef(*found, base=formats.base_of(found))
  raise UserError(
    f"{path}: neither a Hugging Face folder (config.json), nor a fat5_jax run"
    " (model.json and checkpoint_<step>), nor a T5X, Mesh TensorFlow or PEFT"
    " checkpoint"
  )


# What tells a folder of another library's: Hugging Face's, PEFT's, T5X's.
_MARKS = ("config.json", "adapter_config.json", "checkpoint", "state")


def _of_others(address: str) -> str | None:
  """What is copied for a checkpoint of another library; None if none is."""
  names = storage.names(address)
  if any(n in _MARKS or n.endswith(".index") for n in names):
    return address
  steps = [m for m in map(history.STEP_FOLDER.match, names) if m]
  if steps:
    latest = max(steps, key=lambda match: int(match[1]))
    return _of_others(f"{address}/{latest[0]}")
  return address if storage.is_file(address) else None


def _is_own(folder: str) -> bool:
  """Whether it is one of ours, whole or not: T5X's have the same name."""
  items = [os.path.join(folder, item) for item in integrity.ITEMS]
  return any(map(storage.is_folder, items)) or integrity.has_checksums(folder)


def own_head_record(source: CheckpointRef) -> dict[str, Any] | None:
  """What a run folder says of a head module of a person's own, if it has one
  (models.factory.own_head)."""
  if source.kind != "fat5":
    return None
  found = run_record.read(source.run_dir).get("own_head")
  if found is not None and not (
    isinstance(found, dict) and isinstance(found.get("module"), str)
  ):
    raise UserError(
      f"{source.run_dir}/model.json: own_head is {str(found)[:80]!r}, and names"
      " no module"
    )
  return found


def read_config(source: CheckpointRef) -> T5Config:
  """The T5Config of a checkpoint."""
  return open_params(source)[0]


def model_config(path: str, **changes: Any) -> T5Config:
  """The T5Config of the checkpoint at `path`, with run-time fields changed.

  For gin: `T5Config` comes from the checkpoint instead of a size file.
  """
  return read_config(find(path)).replace(**changes)


def open_params(
  source: CheckpointRef, without_decoder: bool = False
) -> tuple[T5Config, table.Leaves]:
  """The config of a checkpoint, and its tensors, read when wanted.

  Layers are unstacked. `without_decoder` leaves the decoder out, unread.
  """
  if source.kind == "fat5":
    config = run_record.read_config(source.run_dir)
    leaves = orbax_files.read_item(os.path.join(source.path, "params"))
    own_head = own_head_record(source) is not None
    run_record.check_tensors(config, leaves, source.path, own_head)
  else:
    config, leaves = formats.open_model(
      source.kind,
      source.path,
      overrides=dict(source.overrides),
      base=source.base,
    )
  if without_decoder:
    leaves = {k: leaf for k, leaf in leaves.items() if k[0] != "decoder"}
  return config, leaves


def read_step(source: CheckpointRef) -> int:
  """The step of a checkpoint that has an optimizer.

  That of a T5X checkpoint is what it says, or else its folder's number.
  """
  if source.kind not in SLOT_READERS:
    return source.step
  step = SLOT_READERS[source.kind].read_step(source.path)
  return source.step if step is None else step
