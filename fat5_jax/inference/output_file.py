"""OUTPUT of a command: refused before work begins, whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import stat
import sys
import tempfile
from typing import Any

import jax

from fat5_jax import storage
from fat5_jax.errors import UserError

# What a run folder holds besides predictions.
_OF_THE_RUN = (
  *("model.json", "config.gin", "config.json", "model-info.txt"),
  *("metrics.csv", "curves.png"),
)


def _partial(path: str) -> str:
  return f"{os.path.realpath(path)}.partial"


def _same(first: str, second: str) -> bool:
  """Whether two paths are one file, however spelled."""
  if os.path.realpath(first) == os.path.realpath(second):
    return True
  try:
    return os.path.samefile(first, second)
  except OSError:
    return False


def check(path: str, inputs: Iterable[str] = ()) -> None:
  """Raises UserError unless OUTPUT can be written and is none of `inputs`."""
  if path == "-" or _is_sink(path):
    return
  cannot = f"OUTPUT {path!r} cannot be written:"
  if not path or "\0" in path:
    raise UserError(f"{cannot} it is no path; '-' is standard output")
  if storage.is_remote(path):
    _check_address(path, inputs, cannot)
    return
  for name in inputs:
    if _same(path, name) or _same(_partial(path), name):
      raise UserError(
        f"OUTPUT {path!r} is also what is read ({name}), and would overwrite"
        " it: give another name"
      )
  if path.endswith(os.sep) or os.path.isdir(path):
    raise UserError(f"{cannot} it is a folder; add a file's name")
  folder = os.path.dirname(os.path.realpath(path))
  if not os.path.isdir(folder):
    raise UserError(f"{cannot} there is no folder {folder}")
  try:
    if path.startswith("/dev/") or (
      os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode)
    ):
      raise UserError(f"{cannot} it is a pipe or a device; '-' is for pipes")
  except OSError as e:
    # A link to a file that is not there yet is fine.
    if not isinstance(e, FileNotFoundError):
      raise UserError(f"{cannot} {e.strerror}") from None
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"{cannot} its folder may not be written")


def _check_address(path: str, inputs: Iterable[str], cannot: str) -> None:
  if path in inputs:
    raise UserError(
      f"OUTPUT {path!r} is also what is read, and would overwrite it: give"
      " another name"
    )
  if path.endswith("/") or storage.is_folder(path):
    raise UserError(f"{cannot} it is a folder; add a file's name")
  probe = f"{path}.{secrets.token_hex(8)}.partial"
  try:
    storage.write(probe, b"")
  except FileNotFoundError:
    raise UserError(f"{cannot} there is no such bucket") from None
  storage.remove(probe)


def check_beside_run(path: str, run_dir: str, checkpoint: str) -> None:
  """Raises UserError if OUTPUT is a part of the run that is read."""
  if path == "-" or _is_sink(path):
    return
  if storage.is_remote(path):
    folder, name = path.rsplit("/", 1)
    inside = checkpoint != run_dir and f"{folder}/".startswith(f"{checkpoint}/")
    if inside or (folder == run_dir and name in _OF_THE_RUN):
      raise UserError(
        f"OUTPUT {path!r} is a part of the run in {run_dir}: give another name"
      )
    return
  folder, name = os.path.split(os.path.realpath(path))
  # A folder of Hugging Face's is its own checkpoint.
  inside = checkpoint != run_dir and os.path.isdir(checkpoint)
  if (_same(folder, run_dir) and name in _OF_THE_RUN) or (
    inside and (folder + os.sep).startswith(os.path.realpath(checkpoint) + "/")
  ):
    raise UserError(
      f"OUTPUT {path!r} is a part of the run in {run_dir}: give another name"
    )


@dataclasses.dataclass(frozen=True)
class Kept:
  """What makes the file of a command that was killed one to go on with.

  Attributes:
    identity: all that decides what is written, as JSON holds it.
    whole: of the bytes that are there, (records, bytes) that are whole.
  """

  identity: dict[str, Any]
  whole: Callable[[bytes], tuple[int, int]]


def records_there(path: str, kept: Kept) -> int:
  """Whole records of a command like this one, which was cut short; the file
  ends after them. None where OUTPUT is no file of this machine's.

  Raises:
    UserError: if a command is writing it.
  """
  if path == "-" or _is_sink(path) or storage.is_remote(path):
    return 0
  partial = _partial(path)
  try:
    with open(_note(partial), encoding="utf-8") as file:
      if json.load(file) != kept.identity:
        return 0
    with open(partial, "rb") as file:
      _lock(file, path)
      count, size = kept.whole(file.read())
    os.truncate(partial, size)
  except (OSError, ValueError):
    return 0
  return count


def _lock(file: Any, path: str) -> None:
  """Holds a partial file until it is closed.

  Raises:
    UserError: if another command does, or has made it whole just now.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
  except FileNotFoundError:
    is_there = False
  except OSError as e:
    if e.errno not in (errno.EAGAIN, errno.EACCES):
      return  # A file system that has no locks.
    is_there = False
  if not is_there:
    raise UserError(
      f"OUTPUT {path!r} is being written by another command: wait for it, or"
      " give another name"
    )


def _note(partial: str) -> str:
  """The file that tells whose a `.partial` is."""
  return f"{partial}.json"


def _is_sink(path: str) -> bool:
  return path == os.devnull or bool(jax.process_index())


@contextlib.contextmanager
def opened(
  path: str, kept: Kept | None = None, goes_on: bool = False
) -> Iterator:
  """The file to write, complete or not there; or standard output.

  Args:
    path: OUTPUT.
    kept: what is told beside a file that is not whole yet, so that the same
      command goes on with it after a kill or an interrupt.
    goes_on: whether it does (see `records_there`).

  Raises:
    UserError: if it cannot be written, as on a full disk.
  """
  try:
    if path == "-":
      with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(encoding="utf-8")
      yield sys.stdout
      sys.stdout.flush()
    elif _is_sink(path):
      with open(os.devnull, "w", encoding="utf-8") as file:
        yield file
    elif storage.is_remote(path):
      with tempfile.TemporaryDirectory(prefix="fat5_jax_") as scratch:
        here = os.path.join(scratch, "output")
        with open(here, "w", encoding="utf-8") as file:
          yield file
        storage.upload(here, path)
    else:
      with _replaced(path, kept, goes_on) as file:
        yield file
  except BrokenPipeError:
    raise  # `| head` has seen enough.
  except OSError as e:
    if path == "-":
      # What could not be written would be tried again at the end.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      path = "standard output"
    raise UserError(
      f"OUTPUT {path} cannot be written: {e.strerror or e}"
    ) from None


@contextlib.contextmanager
def _replaced(path: str, kept: Kept | None, goes_on: bool) -> Iterator:
  """A file beside `path` that takes its place once it is whole."""
  partial = _partial(path)
  note = _note(partial)
  with open(partial, "a", encoding="utf-8") as file:
    _lock(file, path)
    try:
      if not goes_on:
        # What is there is another command's: it goes before its note does.
        file.truncate(0)
        if kept is not None:
          with open(note, "w", encoding="utf-8") as told:
            json.dump(kept.identity, told)
      yield file
      file.flush()
      os.fsync(file.fileno())
      os.replace(partial, os.path.realpath(path))
    except BaseException as e:
      if kept is None or isinstance(e, Exception):
        _remove(partial)
        _remove(note)
      raise
    _remove(note)


def _remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)
