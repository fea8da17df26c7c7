"""Reads a PyTorch `.bin` file of tensors without torch and without risk.

The zip format of torch >= 1.6 holds a pickle that rebuilds tensors from raw
storages. Python's unpickler is not asked: what it may call it may also change,
and a record can make it allocate without end. torch_pickle.py goes through the
few opcodes that torch writes, with the few names that takes. Every number is
held against the bytes that are there.
"""

from __future__ import annotations

import contextlib
import os
import zipfile

import ml_dtypes
import numpy as np

from fat5_jax.convert import torch_pickle
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
# numpy's.
_MOST_AXES = 64


@contextlib.contextmanager
def _archive(path: str):
  """The zip file, as torch writes one: entries stored, each once.

  Raises:
    UserError: if it is another, or damaged.
  """
  if not os.path.isfile(path):
    raise UserError(f"{path}: not a file")
  try:
    with zipfile.ZipFile(path) as archive:
      _check_entries(archive, os.path.getsize(path))
      yield archive
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
  except zipfile.BadZipFile as e:
    raise UserError(
      f"{path}: not a complete PyTorch zip archive ({str(e)[:100]}; truncated,"
      " or from torch < 1.6). Use the model.safetensors of this checkpoint, or"
      " save it again with a current torch"
    ) from None
  except Exception as e:
    # zipfile has a dozen types of error for what it does not expect.
    reason = str(e)[:200] or type(e).__name__
    raise UserError(f"{path}: damaged PyTorch archive: {reason}") from None


def _check_entries(archive: zipfile.ZipFile, file_bytes: int) -> None:
  entries = archive.infolist()
  names = {entry.filename for entry in entries}
  if len(names) < len(entries):
    raise UserError("two entries of the archive have one name")
  for entry in entries:
    if (
      entry.compress_type != zipfile.ZIP_STORED
      or entry.file_size != entry.compress_size
      or entry.flag_bits & 1
    ):
      raise UserError(
        f"entry {entry.filename[:80]!r} is compressed or encrypted, which torch"
        " does not do"
      )
    if entry.header_offset + entry.file_size > file_bytes:
      raise UserError(f"entry {entry.filename[:80]!r} is beyond the file's end")


class _Tensor:
  """A tensor's place in the entry of its storage."""

  __slots__ = ("entry", "dtype", "offset", "shape", "strides")

  def __init__(self, record: torch_pickle.Tensor, entry: zipfile.ZipInfo):
    """Raises UserError unless all of the tensor lies in the entry."""
    storage = record.storage
    self.entry = entry.filename
    self.dtype = np.dtype(_STORAGE_DTYPES[storage.type_name])
    self.offset, self.shape = record.offset, record.shape
    self.strides = record.strides
    size = entry.file_size // self.dtype.itemsize
    numbers = (storage.size, self.offset, *self.shape, *self.strides)
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
      raise UserError("size, offset, shape or stride is no count")
    if storage.size > size:
      raise UserError("its storage is said to be larger than it is")
    if len(self.shape) != len(self.strides) or len(self.shape) > _MOST_AXES:
      raise UserError("shape and strides do not belong together")
    if 0 in self.shape:
      np.empty(self.shape, np.bool_)  # ValueError if numpy has no such shape
      return
    count = 1
    for n in self.shape:
      # As many numbers as stored at most: an expanded one is no parameter.
      count *= n
      if count > size:
        raise UserError("it is larger than its storage")
    if self.offset + self._span > size:
      raise UserError("it points beyond its storage")

  @property
  def _span(self) -> int:
    """How many numbers from its first to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides))

  def read(self, path: str) -> np.ndarray:
    if 0 in self.shape:
      return np.empty(self.shape, self.dtype)
    with _archive(path) as archive:
      data = archive.read(self.entry)
      data = np.frombuffer(data, self.dtype, len(data) // self.dtype.itemsize)
      data = data[self.offset : self.offset + self._span]
      if len(data) < self._span:
        raise UserError(f"{self.entry} has changed meanwhile")
    steps = [step * self.dtype.itemsize for step in self.strides]
    return np.ascontiguousarray(
      np.lib.stride_tricks.as_strided(data, self.shape, steps, writeable=False)
    )


def load(path: str) -> dict[str, Leaf]:
  """The tensors of a `.bin` file by name, each read when it is wanted.

  Raises:
    UserError: if the file is not a torch zip archive of tensors, is truncated,
      or asks for anything but tensors.
  """
  with _archive(path) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise UserError("not a PyTorch archive (no data.pkl)")
    root = pickles[0].removesuffix("/data.pkl")
    order = f"{root}/byteorder"
    if order in entries and archive.read(order) != b"little":
      raise UserError("its numbers are not little-endian")
    records = torch_pickle.load(archive.read(pickles[0]), _STORAGE_DTYPES)
    tensors = {}
    for name, record in records.items():
      entry = entries.get(f"{root}/data/{record.storage.key}")
      if entry is None:
        raise UserError(f"the numbers of tensor {name[:80]!r} are missing")
      try:
        tensors[name] = _Tensor(record, entry)
      except ValueError as e:
        raise UserError(f"tensor {name[:80]!r}: {e}") from None
  return {
    name: Leaf(t.shape, str(t.dtype), lambda t=t: t.read(path))
    for name, t in tensors.items()
  }
