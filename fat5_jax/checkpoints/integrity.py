"""Whether a checkpoint on disk is what was written: a checksum of every file.

`checksums.json` is written into a checkpoint's folder before the folder gets
its name, so a checkpoint has it or is none. A checkpoint without one is of an
older version, or of another program: of it only the structure is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import concurrent.futures
import contextlib
import functools
import json
import os
from typing import Any

from fat5_jax.convert import orbax_files, plain_files
from fat5_jax.errors import UserError

NAME = "checksums.json"
# Of the file; raised when what it says changes.
_FORMAT = 1
_PIECE = 2**24
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
    if os.path.isdir(os.path.join(folder, item)):
      _check_structure(folder, item)
  names = list(_files(folder))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    paths = [os.path.join(folder, name) for name in names]
    found = dict(zip(names, threads.map(_sync_and_sum, paths)))
  path = os.path.join(folder, NAME)
  value = {"format": _FORMAT, "sum": _sum_of_sums(found), "files": found}
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
  """
  stamp = 0
  with contextlib.suppress(OSError):
    stamp = os.stat(os.path.join(folder, NAME)).st_mtime_ns
  return _problem(folder, tuple(items), stamp)


@functools.lru_cache
def _problem(folder: str, items: tuple[str, ...], stamp: int) -> str | None:
  del stamp
  for item in items:
    if not os.path.isdir(os.path.join(folder, item)):
      return f"{item} is missing"
  try:
    known = _read(os.path.join(folder, NAME))
    for item in items:
      # What is named in it is there in full, whatever the sums cover.
      _check_structure(folder, item)
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
  there = {x for x in ITEMS if os.path.isdir(os.path.join(folder, x))}
  known = _read(os.path.join(folder, NAME))
  return there | {n.split("/")[0] for n in known or ()}, known is not None


def has_checksums(folder: str) -> bool:
  return os.path.lexists(os.path.join(folder, NAME))


def _files(folder: str) -> Iterator[str]:
  """All files of the items, with `/` between the parts of a name.

  What orbax keeps beside them it writes again when the folder gets its name;
  nothing is read of it.
  """
  for item in ITEMS:
    for where, _, names in os.walk(os.path.join(folder, item)):
      for name in sorted(names):
        path = os.path.relpath(os.path.join(where, name), folder)
        yield path.replace(os.sep, "/")


def _sync_and_sum(path: str) -> dict[str, Any]:
  with open(path, "rb") as file:
    os.fsync(file.fileno())
    return _sum(file)


def _sum(file) -> dict[str, Any]:
  import xxhash  # A digest as fast as memory; it is no seal against forgery.

  digest, size = xxhash.xxh3_128(), 0
  while piece := file.read(_PIECE):
    digest.update(piece)
    size += len(piece)
  return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _difference(folder: str, name: str, entry: dict[str, Any]) -> str | None:
  try:
    with open(os.path.join(folder, name), "rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size != entry["bytes"]:
        return f"{name} has {size:,} bytes, {entry['bytes']:,} were written"
      if _sum(file) != entry:
        return f"{name} holds other bytes than were written"
  except FileNotFoundError:
    return f"{name} is missing"
  except OSError as e:
    return f"{name} cannot be read: {e.strerror}"
  return None


def _read(path: str) -> dict[str, dict[str, Any]] | None:
  """The sums in a file, checked; None where there is no such file."""
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except FileNotFoundError:
    return None
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
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
    if not isinstance(found, dict):
      raise ValueError("it is no table")
  except (OSError, ValueError) as e:
    raise UserError(f"data/metadata: {_one_line(e)}") from None
  return found


def _one_line(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return " ".join(str(error).split())[:300] or type(error).__name__
