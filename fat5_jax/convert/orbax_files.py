"""Single arrays of an orbax checkpoint, read when wanted, by tensorstore."""

from __future__ import annotations

import ast
import math
import os
from typing import Any

import numpy as np
import tensorstore as ts

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
  found = {}
  for key, entry in entries.items():
    where = _path_of(key, path)
    kind = entry.get("value_metadata") if isinstance(entry, dict) else None
    kind = kind.get("value_type") if isinstance(kind, dict) else None
    if kind in ("None", "Dict", "List", "Tuple", "NamedTuple"):
      continue  # An empty node of the tree.
    name = ".".join(where)
    plain_files.beside(folder, name, path)
    if os.path.exists(os.path.join(folder, "manifest.ocdbt")):
      store = {
        "driver": "ocdbt",
        # As parts: in an address, `?` and `%` of a path would mean something.
        "base": {"driver": "file", "path": os.path.abspath(folder) + "/"},
        "path": f"{name}/",
      }
    else:
      store = {"driver": "file", "path": os.path.join(folder, name) + "/"}
    found[where] = array(driver, store, f"{folder}: {name}", stored)
  return found


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
  """One array of a key-value store.

  Args:
    driver: tensorstore's name of the format.
    store: where it is.
    where: for messages.
    stored: bytes of all that is stored there.

  Raises:
    UserError: if it is not there, larger than what is stored can tell, or (when
      read) damaged.
  """
  spec = {"driver": driver, "kvstore": store}

  def opened():
    return ts.open(spec, open=True, read=True).result()

  # tensorstore gives the errors of its own code many types.
  def read(part=...) -> np.ndarray:
    try:
      return np.asarray(opened()[part].read().result())
    except Exception as e:
      raise UserError(f"{where}: damaged: {_first_line(e)}") from None

  try:
    found = opened()
    shape, dtype = tuple(map(int, found.shape)), found.dtype
    chunk = found.chunk_layout.read_chunk.shape or shape
    itemsize = dtype.numpy_dtype.itemsize
  except Exception as e:
    raise UserError(f"{where}: cannot be opened: {_first_line(e)}") from None
  largest = max(math.prod(shape), math.prod(map(int, chunk))) * itemsize
  if largest > stored * _MOST_A_BYTE:
    raise UserError(
      f"{where}: damaged: {largest} bytes are told in {stored} bytes of files"
    )
  return Leaf(shape, dtype.name, read, read)


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:300] if str(error) else repr(error)
