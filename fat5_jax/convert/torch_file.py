"""Reads a PyTorch `.bin` file of tensors without torch and without risk.

The zip format of torch >= 1.6 holds a pickle that rebuilds tensors from raw
storages. This reader unpickles with the few names that takes and refuses any
other, so a hostile file cannot run code.
"""

from __future__ import annotations

import collections
import pickle
import zipfile

import ml_dtypes
import numpy as np

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


class _StorageType:
  def __init__(self, name: str):
    self.dtype = np.dtype(_STORAGE_DTYPES[name])


def _rebuild_tensor(storage, offset, shape, strides, *unused):
  itemsize = storage.dtype.itemsize
  if any(n < 0 for n in (offset, *shape, *strides)):
    raise UserError("negative offset, shape or stride in a tensor record")
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
  if all(shape) and last >= storage.size:
    raise UserError("a tensor record points beyond its storage")
  return np.lib.stride_tricks.as_strided(
    storage[offset:], shape, [s * itemsize for s in strides], writeable=False
  )


def _rebuild_parameter(data, *unused):
  return data


_ALLOWED = {
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Unpickler(pickle.Unpickler):
  """Unpickles tensors only; `archive` yields the bytes of a storage."""

  def __init__(self, file, archive: zipfile.ZipFile, root: str):
    super().__init__(file)
    self._archive, self._root = archive, root
    self._storages: dict[str, np.ndarray] = {}

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
    if key not in self._storages:
      data = self._archive.read(f"{self._root}/data/{key}")
      self._storages[key] = np.frombuffer(data, storage_type.dtype)
    return self._storages[key]


def load(path: str) -> dict[str, np.ndarray]:
  """The tensors of a `.bin` file by name.

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
    isinstance(t, np.ndarray) for t in tensors.values()
  ):
    raise UserError(f"{path}: holds more than a table of tensors")
  return dict(tensors)
