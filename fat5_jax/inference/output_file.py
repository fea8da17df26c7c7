"""OUTPUT of a command: refused before work begins, whole or not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import os
import secrets
import stat
import sys
import tempfile

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


def _is_sink(path: str) -> bool:
  return path == os.devnull or bool(jax.process_index())


@contextlib.contextmanager
def opened(path: str) -> Iterator:
  """The file to write, complete or not there; or standard output.

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
      with _replaced(path) as file:
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
def _replaced(path: str) -> Iterator:
  """A file beside `path` that takes its place once it is whole."""
  partial = _partial(path)
  try:
    with open(partial, "w", encoding="utf-8") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, os.path.realpath(path))
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.remove(partial)
