"""A step of a run, written to a bucket by all hosts; orbax reads it.

A bucket has no rename, and orbax no `s3://`. So the arrays are written here, in
orbax's own layout: every host puts those parts that its devices hold, first
copies, into a database of its own (`ocdbt.process_<i>`), and host 0 one above
them that points into each. A step is in four moments:

1. `.writing/...` says that it is begun;
2. every host writes, and says so in `.writing/<run>-<host>`;
3. host 0 reads all of it back, and sums it;
4. `checksums.json` is written, and `.writing` goes.

What has `.writing` and no `checksums.json` is not finished, and is removed when
the run starts again. Removing goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import json
import os
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np
import tensorstore as ts

from fat5_jax import storage
from fat5_jax.checkpoints import integrity

MARK = ".writing"
# By which orbax itself knows a step in a bucket.
_ORBAX_MARK = "commit_success.txt"
# Bytes of arrays that become objects together.
_GROUP_BYTES = 2**28
_CONFIG = {
  "compression": {"id": "zstd"},
  "max_inline_value_bytes": 1024,
  "max_decoded_node_bytes": 100_000_000,
}
_LOOK_SECONDS = 0.5
_EMPTY = {dict: "Dict", list: "List", tuple: "Tuple"}


class _Array(NamedTuple):
  """What this host writes of an array: (place, values) of its parts."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  chunks: tuple[int, ...]
  parts: list[tuple[Any, np.ndarray]]


class _Item(NamedTuple):
  """`metadata` is orbax's list of the arrays, and of empty nodes."""

  arrays: list[_Array]
  metadata: dict[str, Any]


def _copied(tree: Any) -> _Item:
  """What a host writes of a tree; the devices may go on with it."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
  arrays, metadata = [], {}
  for path, leaf in paths:
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    kinds = [isinstance(k, jax.tree_util.SequenceKey) for k in path]
    told: dict[str, Any] = {"value_type": "jax.Array"}
    if leaf is None:
      told["value_type"] = "None"
    elif _is_empty(leaf):
      is_named = hasattr(leaf, "_fields")
      told["value_type"] = "NamedTuple" if is_named else _EMPTY[type(leaf)]
    else:
      arrays.append(_array(".".join(keys), leaf))
      told["write_shape"] = list(arrays[-1].shape)
    metadata[str(tuple(keys))] = {
      "key_metadata": [
        {"key": key, "key_type": 1 if is_sequence else 2}
        for key, is_sequence in zip(keys, kinds)
      ],
      "value_metadata": told | {"skip_deserialize": _is_empty(leaf)},
    }
  return _Item(arrays, metadata)


def _is_empty(node: Any) -> bool:
  return node is None or (isinstance(node, (dict, list, tuple)) and not node)


def _array(name: str, leaf: Any) -> _Array:
  if not isinstance(leaf, jax.Array):
    value = np.array(leaf)
    parts = [] if jax.process_index() else [((), value)]
    return _Array(name, value.shape, value.dtype.name, value.shape, parts)
  # A copy: the step after this one takes the memory.
  parts = [
    (shard.index, np.array(shard.data))
    for shard in leaf.addressable_shards
    if shard.replica_id == 0
  ]
  chunks = leaf.sharding.shard_shape(leaf.shape)
  return _Array(name, leaf.shape, leaf.dtype.name, chunks, parts)


def _store(folder: str) -> dict[str, Any]:
  base = storage.kvstore(folder)
  return {"driver": "ocdbt", "base": base, "config": _CONFIG}


def _write_arrays(folder: str, arrays: list[_Array]) -> None:
  """To a host's own database, a group of arrays at a time."""
  group: list[_Array] = []
  size = 0
  for i, array in enumerate(arrays):
    group.append(array)
    size += sum(values.nbytes for _, values in array.parts)
    if size >= _GROUP_BYTES or i == len(arrays) - 1:
      _write_group(folder, group)
      group, size = [], 0


def _write_group(folder: str, arrays: list[_Array]) -> None:
  transaction = ts.Transaction()
  context, store = storage.tensorstore_context(), _store(folder)
  opening = [
    ts.open(
      {
        "driver": "zarr",
        "kvstore": store | {"path": f"{array.name}/"},
        "metadata": {
          "shape": array.shape,
          "chunks": [max(n, 1) for n in array.chunks],
          "dtype": _zarr_dtype(array.dtype),
          "compressor": {"id": "zstd", "level": 1},
          "fill_value": None,
          "order": "C",
        },
        # Zeros are written too: what is missing is damage.
        "store_data_equal_to_fill_value": True,
      },
      create=True,
      open=True,
      transaction=transaction,
      context=context,
    )
    for array in arrays
    if array.parts
  ]
  writing = [
    opened.result()[place].write(values)
    for array, opened in zip((a for a in arrays if a.parts), opening)
    for place, values in array.parts
  ]
  for future in writing:
    future.copy.result()
  transaction.commit_sync()


def _zarr_dtype(name: str) -> str:
  return name if name == "bfloat16" else np.dtype(name).newbyteorder("<").str


def _merge(folder: str, hosts: int) -> None:
  """One database above those of all hosts, which points into them."""
  context = storage.tensorstore_context()
  parent = ts.KvStore.open(_store(folder), context=context).result()
  transaction = ts.Transaction(atomic=True)
  for i in range(hosts):
    part = f"{folder}/ocdbt.process_{i}"
    # A host whose devices hold no first copy has none.
    if storage.exists(f"{part}/manifest.ocdbt"):
      child = ts.KvStore.open(_store(part), context=context).result()
      child.experimental_copy_range_to(
        parent.with_transaction(transaction)
      ).result()
  transaction.commit_sync()


class Saver:
  """Saves steps in the background, one after the other.

  Every host makes one and asks the same of it.
  """

  def __init__(self):
    self._run = int.from_bytes(os.urandom(4), "big")
    if jax.process_count() > 1:
      same = multihost_utils.broadcast_one_to_all(np.uint32(self._run))
      self._run = int(same)
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._job: concurrent.futures.Future | None = None

  def save(
    self, folder: str, items: dict[str, Any], data: dict[str, Any]
  ) -> None:
    """Starts to write a step, of which nothing is there yet.

    Args:
      folder: its address.
      items: a tree of arrays each, as they lie on disk; copied here.
      data: what is told in JSON.
    """
    self.wait_until_finished()
    copied = {name: _copied(tree) for name, tree in items.items()}
    self._job = self._thread.submit(self._write, folder, copied, data)

  def wait_until_finished(self) -> None:
    """Until the last step is there, whole; raises what prevented it."""
    job, self._job = self._job, None
    if job is not None:
      job.result()

  def close(self) -> None:
    self._thread.shutdown(wait=False, cancel_futures=True)

  def _mark(self, folder: str, host: int) -> str:
    return f"{folder}/{MARK}/{self._run:08x}-{host}"

  def _write(self, folder, items: dict[str, _Item], data) -> None:
    me, hosts = jax.process_index(), jax.process_count()
    storage.write(f"{folder}/{MARK}/begun-{me}", b"")
    for name, item in items.items():
      _write_arrays(f"{folder}/{name}/ocdbt.process_{me}", item.arrays)
    storage.write(self._mark(folder, me), b"")
    sums = f"{folder}/{integrity.NAME}"
    if me:
      _look_until(lambda: storage.exists(sums))
      return
    _look_until(
      lambda: all(storage.exists(self._mark(folder, i)) for i in range(hosts))
    )
    for name, item in items.items():
      _merge(f"{folder}/{name}", hosts)
      _write_json(
        f"{folder}/{name}/_METADATA",
        {
          "tree_metadata": item.metadata,
          "use_ocdbt": True,
          "use_zarr3": False,
          "store_array_data_equal_to_fill_value": True,
          "custom_metadata": None,
        },
      )
    _write_json(f"{folder}/data/metadata", data)
    storage.write(f"{folder}/{_ORBAX_MARK}", b"see checksums.json\n")
    integrity.write(folder)
    storage.remove_all(f"{folder}/{MARK}")


def _write_json(address: str, value: dict[str, Any]) -> None:
  storage.write(address, json.dumps(value).encode())


def _look_until(is_so: Callable[[], bool]) -> None:
  """A host that is gone ends this one (distributed/hosts.py)."""
  while not is_so():
    time.sleep(_LOOK_SECONDS)


def is_unfinished(folder: str) -> bool:
  """Whether a step was begun and never finished, or is half removed."""
  return storage.exists(f"{folder}/{MARK}") and not integrity.has_checksums(
    folder
  )


def remove(folder: str) -> None:
  """Removes a step: first what says that it is one."""
  storage.write(f"{folder}/{MARK}/removed", b"")
  storage.remove(f"{folder}/{integrity.NAME}")
  storage.remove(f"{folder}/{_ORBAX_MARK}")
  storage.remove_all(folder, but=MARK)
  storage.remove_all(f"{folder}/{MARK}")


def put_aside(folder: str, target: str) -> None:
  """A step under another name, within its store."""
  for name in storage.files(folder):
    storage.copy(f"{folder}/{name}", f"{target}/{name}")
  remove(folder)
