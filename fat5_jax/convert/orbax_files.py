"""Single arrays of an orbax checkpoint, read when wanted, by tensorstore."""

from __future__ import annotations

import ast
import json
import os

import numpy as np
import tensorstore as ts

from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.errors import UserError


def read_item(folder: str) -> Leaves:
  """The arrays of an item of a checkpoint (the folder that holds `_METADATA`).

  Raises:
    UserError: if it is no such folder, or damaged.
  """
  path = os.path.join(folder, "_METADATA")
  try:
    with open(path, encoding="utf-8") as file:
      metadata = json.load(file)
    entries = metadata["tree_metadata"]
    paths = [tuple(map(str, ast.literal_eval(key))) for key in entries]
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except (KeyError, ValueError, SyntaxError) as e:
    raise UserError(f"{path}: not orbax's metadata: {e!r}") from None
  driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
  found = {}
  for where, entry in zip(paths, entries.values()):
    kind = (entry.get("value_metadata") or {}).get("value_type", "")
    if kind in ("None", "Dict", "List", "Tuple", "NamedTuple"):
      continue  # An empty node of the tree.
    name = ".".join(where)
    if os.path.exists(os.path.join(folder, "manifest.ocdbt")):
      store = {
        "driver": "ocdbt",
        "base": f"file://{os.path.abspath(folder)}/",
        "path": f"{name}/",
      }
    else:
      store = {"driver": "file", "path": os.path.join(folder, name) + "/"}
    found[where] = array(driver, store, f"{folder}: {name}")
  return found


def array(driver: str, store: dict, where: str) -> Leaf:
  """One array of a key-value store.

  Raises:
    UserError: if it is not there, or (when read) damaged.
  """
  spec = {"driver": driver, "kvstore": store}

  def opened():
    return ts.open(spec, open=True, read=True).result()

  def read(part=...) -> np.ndarray:
    try:
      return np.asarray(opened()[part].read().result())
    except (ValueError, OSError, KeyError) as e:
      raise UserError(f"{where}: damaged: {_first_line(e)}") from None

  try:
    found = opened()
  except (ValueError, OSError, KeyError) as e:
    raise UserError(f"{where}: cannot be opened: {_first_line(e)}") from None
  return Leaf(tuple(found.shape), found.dtype.name, read, read)


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:300] if str(error) else repr(error)
