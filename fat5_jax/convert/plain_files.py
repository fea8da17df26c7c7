"""Files of others, opened with care: no pipes, no way out of their folder."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from typing import Any

from fat5_jax import storage
from fat5_jax.errors import UserError

# Begins the names of what is not finished.
SCRATCH = ".writing-"


def check_regular(path: str) -> None:
  """Raises UserError unless a path (or what it links to) is a plain file.

  The hub's cache links its files to where they are; a pipe or a device would be
  read without end.
  """
  if storage.is_remote(path):
    if not storage.is_file(path):
      raise UserError(f"{path}: no such file")
    return
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except (OSError, ValueError) as e:
    raise UserError(f"{path}: cannot be read: {_reason(e)}") from None
  if not stat.S_ISREG(mode):
    kind = "a folder" if stat.S_ISDIR(mode) else "no plain file"
    raise UserError(f"{path}: is {kind}, and a file is wanted")


def read_bytes(path: str) -> bytes:
  """All of a plain file, at an address too."""
  if storage.is_remote(path):
    try:
      return storage.read(path)
    except FileNotFoundError:
      raise UserError(f"{path}: no such file") from None
  check_regular(path)
  try:
    with open(path, "rb") as file:
      return file.read()
  except OSError as e:
    raise UserError(f"{path}: cannot be read: {_reason(e)}") from None


def read_text(path: str) -> str:
  """All of a plain file of text, for people: what is no UTF-8 is replaced."""
  return read_bytes(path).decode("utf-8", errors="replace")


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error)


def read_json(path: str) -> dict[str, Any]:
  """A JSON object.

  Raises:
    UserError: if the file is missing or holds anything else.
  """
  data = read_bytes(path)
  try:
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path}: not valid JSON: {str(e)[:200]}") from None
  if not isinstance(value, dict):
    raise UserError(f"{path}: expected a JSON object")
  return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object in which a key says one thing."""
  found = dict(pairs)
  if len(found) < len(pairs):
    for key, value in pairs:
      if repr(found[key]) != repr(value):
        raise ValueError(f"key {key[:80]!r} is there twice, with two values")
  return found


def beside(folder: str, name: Any, where: str) -> str:
  """The path of a file that an index names, which is beside the index.

  Raises:
    UserError: if the name leads elsewhere, or nothing is there.
  """
  if (
    not isinstance(name, str)
    or name in ("", ".", "..")
    or any(c in name for c in "/\\\0")
  ):
    raise UserError(
      f"{where}: names {str(name)[:80]!r}, which is no file beside it"
    )
  return os.path.join(folder, name)


def tree_bytes(folder: str) -> int:
  """Bytes of all files in a folder.

  Raises:
    UserError: if there is anything that is no file and no folder.
  """
  if storage.is_remote(folder):
    return sum(storage.files(folder).values())
  total = 0
  for here, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(here, name)
      check_regular(path)
      total += os.path.getsize(path)
  return total


def replace_with(path: str, data: bytes) -> None:
  """Writes a file as a whole, and never through a link that lies there.

  A reader, or a crash, sees all of it or nothing.
  """
  if storage.is_remote(path):
    storage.write(path, data)
    return
  folder = os.path.dirname(os.path.abspath(path))
  with tempfile.NamedTemporaryFile(
    dir=folder, prefix=SCRATCH, delete=False
  ) as file:
    try:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
      os.chmod(file.name, 0o644)
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise
  sync_folder(folder)


def sync_folder(folder: str) -> None:
  """Makes the names in a folder last, where the file system can."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:
    pass  # Some network file systems know no such thing.
  finally:
    os.close(descriptor)
