"""Whether a checkpoint on disk is what was written: a checksum of every file.

`checksums.json` is written into a checkpoint's folder before the folder gets
its name, so a checkpoint has it or is none. A checkpoint without one is of an
older version, or of another program: of it only the structure is known. In a
bucket, where a folder has its name from the first, it is written last, and what
has none is no checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import errno
import functools
import json
import os
from typing import Any

from fat5_jax import storage
from fat5_jax.convert import orbax_files, plain_files
from fat5_jax.errors import UserError

NAME = "checksums.json"
# Of the file; raised when what it says changes.
_FORMAT = 1
# Reads overlap; a hash is faster than most disks.
_THREADS = 4
ITEMS = ("params", "optimizer", "data")


def write(folder: str) -> None:
  """Writes the checksums of all files of a checkpoint, and all of it to disk.

  Raises:
    OSError: if the disk does not take it.
    UserError: if what lies there cannot be read back.
  """
  for item in ITEMS:
    if storage.is_folder(os.path.join(folder, item)):
      _check_structure(folder, item)
  names = list(_files(folder))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    paths = [os.path.join(folder, name) for name in names]
    found = dict(zip(names, threads.map(_sync_and_sum, paths)))
  path = os.path.join(folder, NAME)
  value = {"format": _FORMAT, "sum": _sum_of_sums(found), "files": found}
  if storage.is_remote(path):
    storage.write(path, json.dumps(value, indent=1).encode())
    return
  with open(path, "w", encoding="utf-8") as file:
    json.dump(value, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  for where, _, _ in os.walk(folder):
    plain_files.sync_folder(where)


def problem(folder: str, items: Iterable[str] = ITEMS) -> str | None:
  """What is damaged in some items of a checkpoint, or None.

  A command asks more than once; the files are read the first time.

  Args:
    folder: of the checkpoint.
    items: those that will be read; every one must be there.

  Raises:
    StorageError: if its store does not answer.
  """
  stamp: Any = 0
  with contextlib.suppress(OSError):
    path = os.path.join(folder, NAME)
    if storage.is_remote(path):
      stamp = storage.states(path)[""]
    else:
      stamp = os.stat(path).st_mtime_ns
  return _problem(folder, tuple(items), stamp)


@functools.lru_cache
def _problem(folder: str, items: tuple[str, ...], stamp: Any) -> str | None:
  del stamp
  for item in items:
    if not storage.is_folder(os.path.join(folder, item)):
      return f"{item} is missing"
  try:
    known = _read(os.path.join(folder, NAME))
    for item in items:
      # What is named in it is there in full, whatever the sums cover.
      _check_structure(folder, item)
  except storage.StorageError:
    raise
  except (UserError, OSError, ValueError, KeyError, TypeError) as e:
    return _one_line(e)
  if known is None:
    return None
  for name in _files(folder):
    if name.split("/")[0] in items and name not in known:
      return f"{name} has no checksum"
  wanted = {
    name: entry for name, entry in known.items() if name.split("/")[0] in items
  }
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    jobs = [
      threads.submit(_difference, folder, name, entry)
      for name, entry in wanted.items()
    ]
    for job in concurrent.futures.as_completed(jobs):
      if text := job.result():
        threads.shutdown(cancel_futures=True)
        return text
  return None


def items_of(folder: str) -> tuple[set[str], bool]:
  """(items that a checkpoint has or had, whether they have checksums).

  Raises:
    UserError: if the file of the checksums is damaged.
  """
  there = {x for x in ITEMS if storage.is_folder(os.path.join(folder, x))}
  known = _read(os.path.join(folder, NAME))
  return there | {n.split("/")[0] for n in known or ()}, known is not None


def has_checksums(folder: str) -> bool:
  path = os.path.join(folder, NAME)
  return (
    storage.exists(path) if storage.is_remote(path) else (os.path.lexists(path))
  )


def _files(folder: str) -> Iterator[str]:
  """All files of the items, with `/` between the parts of a name.

  What orbax keeps beside them it writes again when the folder gets its name;
  nothing is read of it.
  """
  if storage.is_remote(folder):
    found = sorted(storage.files(folder))
    yield from (name for name in found if name.split("/")[0] in ITEMS)
    return
  for item in ITEMS:
    for where, _, names in os.walk(os.path.join(folder, item)):
      for name in sorted(names):
        path = os.path.relpath(os.path.join(where, name), folder)
        yield path.replace(os.sep, "/")


def _sync_and_sum(path: str) -> dict[str, Any]:
  if not storage.is_remote(path):
    with open(path, "rb") as file:
      os.fsync(file.fileno())
  return _sum(path)


def _sum(path: str) -> dict[str, Any]:
  import xxhash  # A digest as fast as memory; it is no seal against forgery.

  digest, size = xxhash.xxh3_128(), 0
  for piece in storage.pieces(path):
    digest.update(piece)
    size += len(piece)
  return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _difference(folder: str, name: str, entry: dict[str, Any]) -> str | None:
  path = os.path.join(folder, name)
  try:
    size = storage.size_of(path)
    if size != entry["bytes"]:
      return f"{name} has {size:,} bytes, {entry['bytes']:,} were written"
    if _sum(path) != entry:
      return f"{name} holds other bytes than were written"
  except FileNotFoundError:
    return f"{name} is missing"
  except OSError as e:
    return f"{name} cannot be read: {e.strerror}"
  return None


def _read(path: str) -> dict[str, dict[str, Any]] | None:
  """The sums in a file, checked; None where there is no such file."""
  try:
    found = json.loads(storage.read(path))
  except FileNotFoundError:
    return None
  except storage.StorageError:
    raise
  except (ValueError, OSError) as e:
    raise UserError(f"{NAME} cannot be read: {_one_line(e)}") from None
  if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
    raise UserError(f"{NAME} lists no files")
  if found.get("format") != _FORMAT:
    raise UserError(
      f"{NAME} is of format {found.get('format')!r}, this fat5_jax knows"
      f" {_FORMAT}: a newer one wrote it"
    )
  for name, entry in found["files"].items():
    parts = name.split("/")
    if not name or ".." in parts or name.startswith("/"):
      raise UserError(f"{NAME} names {name!r}, which is not of the checkpoint")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
      raise UserError(f"{NAME} has no sum of {name}")
  if found.get("sum") != _sum_of_sums(found["files"]):
    raise UserError(f"{NAME} holds other sums than were written")
  return found["files"]


def _sum_of_sums(files: dict[str, Any]) -> str:
  import xxhash

  return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def _check_structure(folder: str, item: str) -> None:
  """Raises for an item whose list of arrays, or an array's head, is damaged."""
  if item == "data":
    read_data(folder)
  else:
    orbax_files.read_item(os.path.join(folder, item))


def read_data(folder: str) -> dict[str, Any]:
  """The position in the data, and what else a checkpoint says in JSON.

  Raises:
    UserError: if it cannot be read.
  """
  path = os.path.join(folder, "data", "metadata")
  try:
    found = json.loads(storage.read(path))
    if not isinstance(found, dict):
      raise ValueError("it is no table")
  except storage.StorageError:
    raise
  except (OSError, ValueError) as e:
    raise UserError(f"data/metadata: {_one_line(e)}") from None
  return found


def _one_line(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if isinstance(error, FileNotFoundError):
    return os.strerror(errno.ENOENT)  # An object's has no words.
  return " ".join(str(error).split())[:300] or type(error).__name__
