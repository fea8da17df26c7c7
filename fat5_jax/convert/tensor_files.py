"""Files of named tensors: safetensors and weights-only `.bin`, in and out.

Tensors are read one at a time, and their file is closed again, so that memory
holds neither the tensors before nor their pages.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from fat5_jax.convert import plain_files, torch_file
from fat5_jax.convert.plain_files import read_json as read_json
from fat5_jax.convert.table import Leaf
from fat5_jax.errors import UserError

_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "BF16": "bfloat16",
  "F16": "float16",
  "I64": "int64",
  "I32": "int32",
  "BOOL": "bool",
}


def write_json(path: str, value: Mapping[str, Any]) -> None:
  with open(path, "w", encoding="utf-8") as file:
    json.dump(value, file, indent=2, sort_keys=True)
    file.write("\n")


def read_folder(folder: str) -> dict[str, Leaf]:
  """The tensors of an HF folder: safetensors or `.bin`, sharded or whole.

  Raises:
    UserError: if there are none, a shard is missing, or a file is damaged.
  """
  for single, read_file in (
    ("model.safetensors", read_safetensors),
    ("pytorch_model.bin", torch_file.load),
  ):
    index = os.path.join(folder, f"{single}.index.json")
    if os.path.lexists(os.path.join(folder, single)):
      return read_file(os.path.join(folder, single))
    if os.path.lexists(index):
      return _read_shards(folder, index, read_file)
  raise UserError(
    f"{folder}: no weights found; looked for model.safetensors and"
    " pytorch_model.bin, each whole or with an .index.json"
  )


def _read_shards(folder: str, index: str, read_file) -> dict[str, Leaf]:
  """The tensors of the files that an index names."""
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"{index}: no weight_map, the file of every tensor")
  for file in weight_map.values():
    if not os.path.exists(plain_files.beside(folder, file, index)):
      raise UserError(f"{index}: names {file[:80]}, which is missing")
  found: dict[str, Leaf] = {}
  for file in sorted(set(weight_map.values())):
    for name, leaf in read_file(os.path.join(folder, file)).items():
      if name in found:
        raise UserError(f"{folder}: two files hold tensor {name[:80]!r}")
      found[name] = leaf
  return found


def has_tensors(folder: str) -> bool:
  """Whether `read_folder` would find files there."""
  return any(
    os.path.exists(os.path.join(folder, name + end))
    for name in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
  )


def read_safetensors(path: str) -> dict[str, Leaf]:
  """The tensors of one file.

  Raises:
    UserError: if it is damaged.
  """

  def damaged(e: Exception) -> UserError:
    return UserError(f"{path}: not a complete safetensors file: {str(e)[:200]}")

  def read(name):
    try:
      with safetensors.safe_open(path, "numpy") as file:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as e:
      raise damaged(e) from None

  plain_files.check_regular(path)
  try:
    with safetensors.safe_open(path, "numpy") as file:
      views = {name: file.get_slice(name) for name in file.keys()}
      return {
        name: Leaf(
          tuple(view.get_shape()),
          _DTYPES.get(view.get_dtype(), view.get_dtype()),
          lambda name=name: read(name),
        )
        for name, view in views.items()
      }
  except (safetensors.SafetensorError, OSError) as e:
    raise damaged(e) from None


def write_folder(
  tensors: Mapping[str, Leaf], folder: str, max_shard_bytes: int
) -> None:
  """Writes `model.safetensors`, or shards with their index, one in memory."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, leaf in tensors.items():
    if size and size + leaf.nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += leaf.nbytes
  if len(shards) == 1:
    write_safetensors(tensors, os.path.join(folder, "model.safetensors"))
    return
  weight_map = {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    write_safetensors(
      {name: tensors[name] for name in names}, os.path.join(folder, file)
    )
    weight_map |= dict.fromkeys(names, file)
  write_json(
    os.path.join(folder, "model.safetensors.index.json"),
    {
      "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
      "weight_map": weight_map,
    },
  )


def write_safetensors(tensors: Mapping[str, Leaf], path: str) -> None:
  # Not ascontiguousarray, which gives a scalar an axis.
  arrays = {
    name: np.asarray(leaf.read(), order="C") for name, leaf in tensors.items()
  }
  # transformers 4 refuses files that do not name their format.
  safetensors_numpy.save_file(arrays, path, metadata={"format": "pt"})
  os.chmod(path, 0o644)  # It writes files that only their owner reads.
