"""Checkpoints of a run, saved and restored; see load.py for all others.

A run folder (MODEL_DIR) holds `model.json` (the T5Config and the vocabulary)
and `checkpoint_<step>/` folders: `params`, `optimizer` and `data`, written by
orbax. Layers are always `layers_{i}` on disk (layout.py). Every host writes and
reads the parts that its devices hold, so a checkpoint goes onto any mesh and
any number of hosts; the files beside it are written by host 0.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import functools
import glob
import os
import sys
import tempfile
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from fat5_jax import macros, storage
from fat5_jax.checkpoints import bucket, history, integrity, layout
from fat5_jax.convert import plain_files
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.models import layer_stack

# What a disk says that takes no more.
_DISK = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
  *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN),
)


@dataclasses.dataclass(frozen=True)
class SaveCheckpointConfig:
  """How often to save, and how many to keep (None keeps all).

  Raises:
    UserError: if either is no whole number of 1 or more.
  """

  period: int = 1000
  keep: int | None = None

  def __post_init__(self):
    macros.check("CHECKPOINT_PERIOD", self.period, "period")
    macros.check("KEEP", self.keep, "keep")


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


@contextlib.contextmanager
def _without_wildcards(folder: str):
  """The folder by a path that no program takes for a pattern.

  orbax looks for its own files with glob, to which `[1]` is a pattern: it finds
  none, and leaves a checkpoint without its index.
  """
  if not glob.has_magic(folder) or storage.is_remote(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory(prefix="fat5_jax_") as scratch:
    link = os.path.join(scratch, "run")
    os.symlink(folder, link, target_is_directory=True)
    yield link


def _reason(error: BaseException) -> str:
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split()) or type(error).__name__
  # tensorstore tells it last, after the names of all that it was writing.
  for number in _DISK:
    if os.strerror(number) in text:
      return os.strerror(number)
  return text.split(" [source locations")[0][:300]


def _is_there(folder: str) -> bool:
  # A bucket may be why it is asked for; what was saved there stays.
  return storage.is_remote(folder) or os.path.isdir(folder)


@functools.cache
def _silence_late_writes() -> None:
  """From now on, for good: they may come after all is closed.

  Once a save has failed, tensorstore reports each array that it still writes to
  an event loop that orbax has closed, and prints the traceback of that.
  """
  before = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook


class Checkpointer:
  """Saves and restores a run, asynchronously, keeping the latest few.

  Every step is a folder of its own, which gets its name when all of it is on
  disk, read back, and summed (integrity.py). In a bucket it is bucket.py that
  writes it.

  Attributes:
    best: a step that stays whatever comes after it, or None.
  """

  def __init__(self, model_dir: str, config: SaveCheckpointConfig):
    _silence_late_writes()
    self._folder, self._keep = model_dir, config.keep
    self._saving: int | None = None
    self.best: int | None = None
    self._last = max(history.steps(model_dir), default=None)
    self._opened = contextlib.ExitStack()
    self._there = self._opened.enter_context(_without_wildcards(model_dir))
    if jax.process_index() == 0:
      history.remove_unfinished(model_dir)
    if storage.is_remote(model_dir):
      self._saver: Any = bucket.Saver()
      return
    self._saver = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      async_options=ocp.options.AsyncOptions(
        # Host 0 reads all of a checkpoint back; the others wait.
        timeout_secs=7200,
        post_finalization_callback=self._seal,
      ),
    )

  def find_latest(self) -> int | None:
    """The latest whole checkpoint; damaged ones after it are put aside.

    Raises:
      UserError: if there are checkpoints, and all are damaged.
    """
    step, said = -1, ""
    if jax.process_index() == 0:
      try:
        found, damaged = history.latest_whole(self._folder)
        step = -1 if found is None else found
        for n in damaged:
          history.put_aside(self._folder, n)
      except UserError as e:
        step, said = -2, str(e)
    if jax.process_count() > 1:
      step = int(multihost_utils.broadcast_one_to_all(np.int64(step)))
    if step == -2:
      raise UserError(said or f"{self._folder}: every checkpoint is damaged")
    self._last = None if step == -1 else step
    return self._last

  def save(self, step: int, params, opt_state, data: dict[str, Any]) -> None:
    """Starts a save; waits for an earlier one first. A saved step is left.

    The caller may go on with `data`: it is saved as it is now.

    Raises:
      UserError: if the earlier one, or this one, cannot be written.
    """
    self.wait()
    if self._last == step:
      return
    self._saving = step
    data = copy.deepcopy(data)  # Written in the background.
    folder = os.path.join(self._there, f"checkpoint_{step}")
    items = {
      "params": layer_stack.unstack(params, layout.to_hosts),
      "optimizer": layer_stack.unstack(opt_state, layout.to_hosts),
    }
    with self._explaining():
      if isinstance(self._saver, bucket.Saver):
        self._saver.save(folder, items, data)
        return
      args = {name: ocp.args.StandardSave(x) for name, x in items.items()}
      self._saver.save(
        folder, args=ocp.args.Composite(data=ocp.args.JsonSave(data), **args)
      )

  def _seal(self) -> None:
    """Sums what was written, on host 0, before it gets its name."""
    name = f"checkpoint_{self._saving}"
    [folder] = [
      entry.path
      for entry in os.scandir(self._folder)
      if entry.name.startswith(f"{name}.")
      and not entry.name.startswith(f"{name}.{history.DAMAGED}")
    ]
    integrity.write(folder)

  def restore(self, step: int, params, opt_state, partitioner: Partitioner):
    """(params, opt_state, data) of a step, given abstract ones as they run."""
    folder = os.path.join(self._folder, f"checkpoint_{step}")
    on_disk = layout.to_disk_layout(params)
    try:
      found = {
        "params": layout.open_item(
          os.path.join(folder, "params"), partitioner.place(on_disk)
        ),
        "optimizer": layout.open_item(
          os.path.join(folder, "optimizer"),
          partitioner.place(layout.to_disk_layout(opt_state), on_disk),
        ),
      }
    except storage.StorageError:
      raise
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{self._folder}: the optimizer of step {step} is that of"
        " other settings (optimizer, TRAINABLE, FROZEN, EMA_DECAY,"
        " PARAMETER_DTYPE):"
        f" {str(e).splitlines()[0][:200]}. Use another --gin.MODEL_DIR=..., and"
        " this one as INITIAL_CHECKPOINT_PATH"
      ) from None
    return (
      layout.to_run_layout(found["params"], params),
      layout.to_run_layout(found["optimizer"], opt_state),
      integrity.read_data(folder),
    )

  def wait(self) -> None:
    """Until the last save is complete on disk.

    Raises:
      UserError: if it could not be written.
    """
    with self._explaining():
      self._saver.wait_until_finished()
    if self._saving is None:
      return
    self._last, self._saving = self._saving, None
    if jax.process_index() == 0:
      if not storage.is_remote(self._folder):
        plain_files.sync_folder(self._folder)
      history.drop_old(self._folder, self._keep, self.best)

  @contextlib.contextmanager
  def _explaining(self):
    """A save that fails is a disk that is full, gone or read-only."""
    try:
      yield
    except storage.StorageError as e:
      step, self._saving = self._saving, None
      raise UserError(
        f"the checkpoint of step {step} could not be written: {e}."
        f" {self.last_good()}"
      ) from None
    except UserError:
      raise
    except Exception as e:
      step, self._saving = self._saving, None
      raise UserError(
        f"{self._folder}: the checkpoint of step {step} could not be written:"
        f" {_reason(e)}. {self.last_good()}"
      ) from e

  def last_good(self) -> str:
    if self._last is None:
      return "There is no earlier one"
    path = os.path.join(self._folder, f"checkpoint_{self._last}")
    if not _is_there(path):
      return f"The last good checkpoint, step {self._last}, is gone too"
    return f"The last good checkpoint is step {self._last} and untouched"

  def close(self) -> None:
    """Waits for what is being saved."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):
        self._saver.close()
      self._opened.close()

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
