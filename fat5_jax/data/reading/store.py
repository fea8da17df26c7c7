"""Prepared examples on disk: read by number, their lengths always at hand.

A folder of ArrayRecord shards (one example a record), an array of lengths for
each feature of tokens, and `index.json`, which is written last: a folder
without it is no store.
"""

from __future__ import annotations

import array
from collections.abc import Collection, Iterable, Mapping, Sequence
import contextlib
import errno
import json
import os
from typing import Any

from array_record.python import array_record_module
import msgpack
import numpy as np

from fat5_jax.errors import UserError

INDEX = "index.json"
# What the index of a store tells of it, in numbers.
FACTS = ("rows", "skipped", "unknown", "tokens")
# Bytes of a shard, so that a copy of a store moves in parts.
_SHARD_BYTES = 1 << 28
# Records are read one by one, in any order.
_WRITE_OPTIONS = "group_size:1,uncompressed"
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:1"
# What has no length that anything goes by.
_WHOLE = ("text", "texts", "number", "array", "text array")


def _kind(value: Any, is_small: bool) -> str:
  """How a feature is stored: one of _WHOLE, or a row's type."""
  if isinstance(value, (str, bytes)):
    return "text"
  if isinstance(value, np.ndarray):
    is_text = value.dtype.kind in "OSU"
    if value.ndim != 1:
      return "text array" if is_text else "array"
    if not is_text:
      return "uint16" if is_small else value.dtype.name
  return "texts" if isinstance(value, (list, tuple, np.ndarray)) else "number"


def _pack(kind: str, name: str, value: Any) -> Any:
  if kind == "text":
    return value
  if kind == "texts":
    return list(value)
  if kind == "number":
    return value.item() if hasattr(value, "item") else value
  if kind == "text array":
    return [value.shape, value.ravel().tolist()]
  if kind == "array":
    return [value.dtype.name, value.shape, value.tobytes()]
  if not np.can_cast(value.dtype, np.int64 if kind == "uint16" else kind):
    raise UserError(f"{name} holds {value.dtype} where it held {kind} before")
  if kind == "uint16" and value.size:
    if value.min() < 0 or value.max() > 65_535:
      worst = value.min() if value.min() < 0 else value.max()
      raise UserError(f"{name} holds token id {worst}, which no vocabulary has")
  return np.ascontiguousarray(value, kind).tobytes()


def _unpack(kind: str, value: Any) -> Any:
  if kind in ("text", "texts", "number"):
    return value
  if kind == "text array":
    shape, flat = value
    return np.array(flat, object).reshape(shape)
  if kind == "array":
    dtype, shape, content = value
    return np.frombuffer(content, dtype).reshape(shape)
  array = np.frombuffer(value, kind)
  return array.astype(np.int32) if kind == "uint16" else array


class Writer:
  """Writes a store into a folder that is there and empty.

  Attributes:
    count: examples so far.
  """

  def __init__(self, folder: str, small: Collection[str] = ()):
    """`small`: features whose numbers are from 0 to 65,535."""
    self._folder, self._small = folder, frozenset(small)
    self._schema: dict[str, str] = {}
    self._lengths: dict[str, array.array] = {}
    self._shards: list[int] = []
    self._writer, self._bytes = None, 0
    self.count = 0

  def _open_shard(self) -> None:
    path = os.path.join(self._folder, _shard_name(len(self._shards)))
    self._writer = array_record_module.ArrayRecordWriter(path, _WRITE_OPTIONS)
    self._shards.append(0)
    self._bytes = 0

  def add(self, example: Mapping[str, Any]) -> None:
    if not self._schema:
      self._schema = {
        name: _kind(value, name in self._small)
        for name, value in example.items()
      }
      self._lengths = {
        name: array.array("I")
        for name, kind in self._schema.items()
        if kind not in _WHOLE
      }
    if self._writer is None or self._bytes > _SHARD_BYTES:
      self._close_shard()
      self._open_shard()
    values = [
      _pack(kind, name, example[name]) for name, kind in self._schema.items()
    ]
    record = msgpack.packb(values, unicode_errors="surrogatepass")
    with _as_os_error():
      self._writer.write(record)
    self._bytes += len(record)
    self._shards[-1] += 1
    self.count += 1
    for name, lengths in self._lengths.items():
      lengths.append(len(example[name]))

  def _close_shard(self) -> None:
    if self._writer is not None:
      with _as_os_error():
        self._writer.close()
      self._writer = None

  def close(self, facts: Mapping[str, Any]) -> None:
    """Completes the store; `facts` are kept in its index."""
    self._close_shard()
    for name, lengths in self._lengths.items():
      np.save(self._path(f"{name}.lengths.npy"), np.asarray(lengths, np.uint32))
    for name in os.listdir(self._folder):
      _sync(self._path(name))
    index = {
      "schema": self._schema,
      "shards": self._shards,
      "sums": {
        name: int(np.asarray(sizes).sum(dtype=np.int64))
        for name, sizes in self._lengths.items()
      },
      "bytes": [
        os.path.getsize(self._path(_shard_name(i)))
        for i in range(len(self._shards))
      ],
    }
    with open(self._path(INDEX), "w", encoding="utf-8") as file:
      json.dump(index | dict(facts), file, indent=1)
      file.flush()
      os.fsync(file.fileno())
    _sync(self._folder)

  def _path(self, name: str) -> str:
    return os.path.join(self._folder, name)


@contextlib.contextmanager
def _as_os_error():
  """What ArrayRecord says of a disk that is full."""
  try:
    yield
  except (RuntimeError, ValueError) as e:
    raise OSError(errno.EIO, str(e).split(";")[0]) from None


def _shard_name(number: int) -> str:
  return f"examples-{number:05d}.array_record"


def _sync(path: str) -> None:
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def _damaged(path: str, error: Exception) -> UserError:
  said = str(error).split(";")[0]
  return UserError(
    f"{path}: a damaged store of prepared examples ({said}); delete the folder,"
    " and the next run prepares it again"
  )


class Store:
  """A prepared split of a task.

  Attributes:
    path: its folder.
    facts: of its index: `rows`, `skipped`, `key`, ...
    lengths: uint32 (N,) by feature of tokens, whole; on disk.
  """

  def __init__(self, path: str):
    """Opens a store.

    Raises:
      UserError: if it is damaged.
    """
    self.path = path
    try:
      with open(os.path.join(path, INDEX), encoding="utf-8") as file:
        self.facts = json.load(file)
      self._schema = dict(self.facts["schema"])
      shards = self.facts["shards"]
      self._ends = np.cumsum([0, *shards])
      paths = [os.path.join(path, _shard_name(i)) for i in range(len(shards))]
      if [os.path.getsize(p) for p in paths] != self.facts["bytes"]:
        raise ValueError("a shard has not the size that it was written with")
      self._readers = [
        array_record_module.ArrayRecordReader(p, _READ_OPTIONS) for p in paths
      ]
      self.lengths = {
        name: np.load(os.path.join(path, f"{name}.lengths.npy"), mmap_mode="r")
        for name, kind in self._schema.items()
        if kind not in _WHOLE
      }
      for name, lengths in self.lengths.items():
        if lengths.shape != (len(self),):
          raise ValueError(f"{name} has not as many lengths as examples")
        if int(lengths.sum(dtype=np.int64)) != self.facts["sums"][name]:
          raise ValueError(f"the lengths of {name} are not those of the index")
      for name in FACTS:
        self.facts[name] += 0
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise _damaged(path, e) from None

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __reduce__(self):
    return Store, (self.path,)

  def read(
    self,
    numbers: Sequence[int] | np.ndarray,
    names: Iterable[str] | None = None,
  ) -> list[dict[str, Any]]:
    """The examples of these numbers, in their order.

    Args:
      numbers: from 0 on.
      names: of the features that are wanted; None is all.
    """
    numbers = np.asarray(numbers, np.int64)
    shards = np.searchsorted(self._ends, numbers, side="right") - 1
    records: list[bytes] = [b""] * len(numbers)
    for shard in np.unique(shards):
      places = np.flatnonzero(shards == shard)
      inside = (numbers[places] - self._ends[shard]).tolist()
      try:
        read = self._readers[shard].read(inside)
      except (RuntimeError, ValueError, OSError) as e:
        raise _damaged(self.path, e) from None
      for place, record in zip(places, read):
        records[place] = record
    wanted = set(self._schema if names is None else names)
    columns = [
      (i, name, kind)
      for i, (name, kind) in enumerate(self._schema.items())
      if name in wanted
    ]
    found = []
    for record in records:
      values = msgpack.unpackb(record, unicode_errors="surrogatepass")
      found.append({n: _unpack(kind, values[i]) for i, n, kind in columns})
    return found
