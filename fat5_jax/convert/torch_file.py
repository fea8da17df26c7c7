"""Reads a PyTorch `.bin` file of tensors without torch and without risk.

The zip format of torch >= 1.6 holds a pickle that rebuilds tensors from raw
storages. This reader unpickles with the few names that takes and refuses any
other, so a hostile file cannot run code.
"""

from __future__ import annotations

import collections
import pickle
from typing import NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from fat5_jax.convert.table import Leaf
from fat5_jax.errors import UserError

_STORAGE_DTYPES = {
  "FloatStorage": np.float32,
  "DoubleStorage": np.float64,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
  """Where a tensor's numbers are in the archive."""

  key: str
  dtype: np.dtype
  size: int


class _Tensor(NamedTuple):
  """A tensor's place in its storage."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _StorageType:
  def __init__(self, name: str):
    self.dtype = np.dtype(_STORAGE_DTYPES[name])


def _rebuild_tensor(storage, offset, shape, strides, *unused):
  if any(n < 0 for n in (offset, *shape, *strides)):
    raise UserError("negative offset, shape or stride in a tensor record")
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
  if all(shape) and last >= storage.size:
    raise UserError("a tensor record points beyond its storage")
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *unused):
  return data


_ALLOWED = {
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Unpickler(pickle.Unpickler):
  """Unpickles tensors only, as places in the archive."""

  def __init__(self, file, archive: zipfile.ZipFile, root: str):
    super().__init__(file)
    self._archive, self._root = archive, root

  def find_class(self, module, name):
    if (module, name) in _ALLOWED:
      return _ALLOWED[module, name]
    if module == "torch" and name in _STORAGE_DTYPES:
      return _StorageType(name)
    raise UserError(
      f"the pickle asks for {module}.{name}, which is not a tensor; nothing"
      " was run. Convert the checkpoint to safetensors where you trust it"
    )

  def persistent_load(self, pid):
    kind, storage_type, key, _, _ = pid
    if kind != "storage":
      raise UserError(f"unknown record {kind!r} in the pickle")
    entry = self._archive.getinfo(f"{self._root}/data/{key}")
    size = entry.file_size // storage_type.dtype.itemsize
    return _Storage(entry.filename, storage_type.dtype, size)


def _read(path: str, tensor: _Tensor) -> np.ndarray:
  storage = tensor.storage
  try:
    with zipfile.ZipFile(path) as archive:
      data = np.frombuffer(archive.read(storage.key), storage.dtype)
  except (zipfile.BadZipFile, EOFError) as e:
    raise UserError(f"{path}: damaged PyTorch archive: {e}") from None
  strides = [step * storage.dtype.itemsize for step in tensor.strides]
  view = np.lib.stride_tricks.as_strided(
    data[tensor.offset :], tensor.shape, strides, writeable=False
  )
  return np.ascontiguousarray(view)


def load(path: str) -> dict[str, Leaf]:
  """The tensors of a `.bin` file by name, each read when it is wanted.

  Raises:
    UserError: if the file is not a torch zip archive of tensors, is truncated,
      or asks for anything but tensors.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise UserError(f"{path}: not a PyTorch archive (no data.pkl)")
      root = pickles[0].removesuffix("/data.pkl")
      with archive.open(pickles[0]) as file:
        tensors = _Unpickler(file, archive, root).load()
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
  except zipfile.BadZipFile:
    raise UserError(
      f"{path}: not a complete PyTorch zip archive (truncated, or from torch"
      " < 1.6). Use the model.safetensors of this checkpoint, or save it again"
      " with a current torch"
    ) from None
  except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as e:
    raise UserError(f"{path}: damaged PyTorch archive: {e}") from None
  if not isinstance(tensors, dict) or not all(
    isinstance(t, _Tensor) for t in tensors.values()
  ):
    raise UserError(f"{path}: holds more than a table of tensors")
  return {
    name: Leaf(t.shape, str(t.storage.dtype), lambda t=t: _read(path, t))
    for name, t in tensors.items()
  }
