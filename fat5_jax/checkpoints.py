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
import errno
import functools
import glob
import itertools
import os
import re
import shutil
import tempfile
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp

from fat5_jax import console, integrity, macros
from fat5_jax.convert import orbax_files, plain_files
from fat5_jax.errors import UserError
from fat5_jax.models import layer_stack
from fat5_jax.sharding import Partitioner, put_parts

STEP_FOLDER = re.compile(r"checkpoint_(\d+)$")
_UNFINISHED = re.compile(r"checkpoint_\d+\.orbax-checkpoint-tmp")
_DAMAGED = "damaged"
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
  plain_files.replace_with(path, text.encode())


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
  if "\\" in model_dir:
    raise UserError(
      f"MODEL_DIR {model_dir} holds a backslash, which tensorstore takes for a"
      " slash: choose another with --gin.MODEL_DIR=..."
    )
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


def steps(model_dir: str) -> list[int]:
  """The steps of the complete checkpoints in a run folder, ascending."""
  if not os.path.isdir(model_dir):
    return []
  matches = map(STEP_FOLDER.match, os.listdir(model_dir))
  return sorted(int(match[1]) for match in matches if match)


def latest_whole(
  model_dir: str, items: Sequence[str] = integrity.ITEMS
) -> tuple[int | None, list[int]]:
  """(the latest step that is whole, the later ones that are damaged).

  Says so, where a step is passed over.

  Args:
    model_dir: the run folder.
    items: what will be read of it.

  Raises:
    UserError: if there are checkpoints, and all are damaged.
  """
  damaged: dict[int, str] = {}
  found = steps(model_dir)
  folder_of = lambda step: os.path.join(model_dir, f"checkpoint_{step}")
  summed = [n for n in found if integrity.has_checksums(folder_of(n))]
  for step in reversed(found):
    reason = integrity.problem(folder_of(step), items)
    if (
      reason is None and step not in summed and step > min(summed, default=step)
    ):
      # One of an older fat5_jax comes before those that have them.
      reason = f"{integrity.NAME} is missing"
    if reason is None:
      for bad, why in damaged.items():
        _warn_once(
          f"warning: {folder_of(bad)} is damaged ({why}): passed over for step"
          f" {step}, the last whole one"
        )
      return step, list(damaged)
    damaged[step] = reason
  if damaged:
    listed = "\n".join(
      f"  checkpoint_{step}: {reason}" for step, reason in damaged.items()
    )
    raise UserError(
      f"{model_dir}: every checkpoint is damaged:\n{listed}\nStart from"
      " another with --gin.INITIAL_CHECKPOINT_PATH=..., in another MODEL_DIR"
    )
  return None, []


@functools.lru_cache
def _warn_once(text: str) -> None:
  """A command looks for the latest more than once."""
  console.say(text)


def _put_aside(model_dir: str, step: int) -> None:
  """Takes a damaged checkpoint's name, so that the step can be saved anew."""
  path = os.path.join(model_dir, f"checkpoint_{step}")
  free = (f"{path}.{_DAMAGED}{n or ''}" for n in itertools.count())
  os.rename(path, next(name for name in free if not os.path.exists(name)))


def _remove_unfinished(model_dir: str) -> None:
  """What a process that was killed had begun to write, or to remove."""
  for entry in list(os.scandir(model_dir)):
    if entry.name.startswith(plain_files.SCRATCH) or _UNFINISHED.match(
      entry.name
    ):
      if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
      else:
        os.unlink(entry.path)


@contextlib.contextmanager
def _without_wildcards(folder: str):
  """The folder by a path that no program takes for a pattern.

  orbax looks for its own files with glob, to which `[1]` is a pattern: it finds
  none, and leaves a checkpoint without its index.
  """
  if not glob.has_magic(folder):
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
  """Saves and restores a run, asynchronously, keeping the latest few.

  Every step is a folder of its own, which gets its name when all of it is on
  disk, read back, and summed (integrity.py).
  """

  def __init__(self, model_dir: str, config: SaveCheckpointConfig):
    self._folder, self._keep = model_dir, config.keep
    self._saving: int | None = None
    self._last = max(steps(model_dir), default=None)
    self._opened = contextlib.ExitStack()
    self._there = self._opened.enter_context(_without_wildcards(model_dir))
    if jax.process_index() == 0:
      _remove_unfinished(model_dir)
    self._orbax = ocp.AsyncCheckpointer(
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
        found, damaged = latest_whole(self._folder)
        step = -1 if found is None else found
        for n in damaged:
          _put_aside(self._folder, n)
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

    Raises:
      UserError: if the earlier one, or this one, cannot be written.
    """
    self.wait()
    if self._last == step:
      return
    self._saving = step
    with self._explaining():
      self._orbax.save(
        os.path.join(self._there, f"checkpoint_{step}"),
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(layer_stack.unstack(params, _to_hosts)),
          optimizer=ocp.args.StandardSave(
            layer_stack.unstack(opt_state, _to_hosts)
          ),
          data=ocp.args.JsonSave(data),
        ),
      )

  def _seal(self) -> None:
    """Sums what was written, on host 0, before it gets its name."""
    name = f"checkpoint_{self._saving}"
    [folder] = [
      entry.path
      for entry in os.scandir(self._folder)
      if entry.name.startswith(f"{name}.")
      and not entry.name.startswith(f"{name}.{_DAMAGED}")
    ]
    integrity.write(folder)

  def restore(self, step: int, params, opt_state, partitioner: Partitioner):
    """(params, opt_state, data) of a step, given abstract ones as they run."""
    folder = os.path.join(self._folder, f"checkpoint_{step}")
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
        f"{self._folder}: the optimizer of step {step} is that of"
        " other settings (optimizer, TRAINABLE, FROZEN):"
        f" {str(e).splitlines()[0][:200]}. Use another --gin.MODEL_DIR=..., and"
        " this one as INITIAL_CHECKPOINT_PATH"
      ) from None
    return (
      as_running(found["params"], params),
      as_running(found["optimizer"], opt_state),
      integrity.read_data(folder),
    )

  def wait(self) -> None:
    """Until the last save is complete on disk.

    Raises:
      UserError: if it could not be written.
    """
    with self._explaining():
      self._orbax.wait_until_finished()
    if self._saving is None:
      return
    self._last, self._saving = self._saving, None
    if jax.process_index() == 0:
      plain_files.sync_folder(self._folder)
      self._drop_old()

  def _drop_old(self) -> None:
    """Removes what is beyond `keep`; a name is gone before its files are."""
    for step in steps(self._folder)[: -self._keep] if self._keep else []:
      folder = os.path.join(self._folder, f"checkpoint_{step}")
      leaving = os.path.join(
        self._folder, f"{plain_files.SCRATCH}checkpoint_{step}"
      )
      os.rename(folder, leaving)
      shutil.rmtree(leaving, ignore_errors=True)

  @contextlib.contextmanager
  def _explaining(self):
    """A save that fails is a disk that is full, gone or read-only."""
    try:
      yield
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
    return f"The last good checkpoint is step {self._last} and untouched"

  def close(self) -> None:
    """Waits for what is being saved."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):
        self._orbax.close()
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
