"""Single arrays of an orbax checkpoint, read when wanted, by tensorstore."""

from __future__ import annotations

import ast
from collections.abc import Callable
import math
import os
from typing import Any

import numpy as np
import tensorstore as ts

from fat5_jax import storage
from fat5_jax.convert import plain_files
from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.errors import UserError

# Deflate, the densest of the formats here, makes of a byte at most as many: a
# larger array than that is in its metadata alone.
_MOST_A_BYTE = 1032
# Of an array's name in the metadata; more is no parameter's.
_LONGEST_KEY = 1000


def read_item(folder: str) -> Leaves:
  """The arrays of an item of a checkpoint (the folder that holds `_METADATA`).

  Raises:
    UserError: if it is no such folder, or damaged.
  """
  path = os.path.join(folder, "_METADATA")
  metadata = plain_files.read_json(path)
  entries = metadata.get("tree_metadata")
  if not isinstance(entries, dict):
    raise UserError(f"{path}: not orbax's metadata: no tree_metadata")
  driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
  stored = plain_files.tree_bytes(folder)
  is_ocdbt = storage.exists(os.path.join(folder, "manifest.ocdbt"))
  opening = {}
  for key, entry in entries.items():
    where = _path_of(key, path)
    kind = entry.get("value_metadata") if isinstance(entry, dict) else None
    kind = kind.get("value_type") if isinstance(kind, dict) else None
    if kind in ("None", "Dict", "List", "Tuple", "NamedTuple"):
      continue  # An empty node of the tree.
    name = ".".join(where)
    plain_files.beside(folder, name, path)
    if is_ocdbt:
      base = storage.kvstore(folder)
      store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
      store = storage.kvstore(os.path.join(folder, name))
    # Many at a time: each asks a bucket several times.
    opening[where] = begin_array(driver, store, f"{folder}: {name}", stored)
  return {where: finish() for where, finish in opening.items()}


def _path_of(key: str, where: str) -> tuple[str, ...]:
  """The path of an array, which orbax writes as Python does a tuple."""
  parts: Any = None
  if len(key) <= _LONGEST_KEY:
    try:
      parts = ast.literal_eval(key)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      pass
  if (
    not isinstance(parts, tuple)
    or not parts
    or not all(isinstance(part, (str, int)) for part in parts)
  ):
    raise UserError(f"{where}: not orbax's metadata: key {key[:80]!r}")
  return tuple(map(str, parts))


def array(driver: str, store: dict, where: str, stored: int) -> Leaf:
  """One array of a key-value store; see begin_array."""
  return begin_array(driver, store, where, stored)()


def begin_array(
  driver: str, store: dict, where: str, stored: int
) -> Callable[[], Leaf]:
  """Begins to open an array of a key-value store; a function that ends it.

  Args:
    driver: tensorstore's name of the format.
    store: where it is.
    where: for messages.
    stored: bytes of all that is stored there.

  Returns:
    A function that returns the array. It raises UserError if there is none, if
    it is larger than what is stored can tell, or (when read) damaged.
  """
  spec = {"driver": driver, "kvstore": store}
  context = storage.tensorstore_context()

  def opened():
    return ts.open(spec, open=True, read=True, context=context)

  # tensorstore gives the errors of its own code many types.
  def read(part=...) -> np.ndarray:
    try:
      return np.asarray(opened().result()[part].read().result())
    except Exception as e:
      raise _told(e, f"{where}: damaged") from None

  try:
    begun = opened()
  except Exception as e:
    raise _told(e, f"{where}: cannot be opened") from None

  def finish() -> Leaf:
    try:
      found = begun.result()
      shape, dtype = tuple(map(int, found.shape)), found.dtype
      chunk = found.chunk_layout.read_chunk.shape or shape
      itemsize = dtype.numpy_dtype.itemsize
    except Exception as e:
      raise _told(e, f"{where}: cannot be opened") from None
    largest = max(math.prod(shape), math.prod(map(int, chunk))) * itemsize
    if largest > stored * _MOST_A_BYTE:
      raise UserError(
        f"{where}: damaged: {largest} bytes are told in {stored} bytes of files"
      )
    return Leaf(shape, dtype.name, read, read)

  return finish


def _told(error: Exception, what: str) -> UserError:
  text = str(error).splitlines()[0][:300] if str(error) else repr(error)
  # Of a bucket, after tensorstore's own tries.
  if text.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")):
    return storage.StorageError(f"not reached: {text}")
  return UserError(f"{what}: {text}")
