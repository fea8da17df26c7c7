"""A task's split as a store: prepared by the first run, read by all others.

Stores lie in a cache folder, each under a hash of what decides its content:
files, templates and other code, preprocessors, vocabulary, split. Preparation
writes beside the place and renames: a store is complete or absent.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax import console, fetched, staging, storage
from fat5_jax.data import examples as examples_lib
from fat5_jax.data import identity, records, seqio_source
from fat5_jax.data.reading import workers
from fat5_jax.data.reading.store import INDEX, Store, Writer
from fat5_jax.errors import UserError

# Examples that tell what code does beside what it says.
_LOOKED_AT = 16
# Of a source of SeqIO's own, what the record of its task tells.
_TOLD = ("_split_to_filepattern", "_splits", "_num_input_examples")
# Raise it when a store of before cannot be read as one of now.
_VERSION = 2


def cache_folder(given: str | None = None) -> str:
  """The folder of the stores: given, or that of all copies.

  Raises:
    UserError: if nothing can be written there.
  """
  path = os.path.abspath(os.path.expanduser(given or fetched.cache_folder()))
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as e:
    raise UserError(
      f"{path}: prepared data cannot be written there ({e.strerror}):"
      " --gin.CACHE_DIR=... or FAT5_JAX_CACHE names another folder"
    ) from None
  return path


def prepared(
  task: seqio.Task,
  split: str,
  cache_dir: str | None,
  limits: Mapping[str, int] | None,
  use_cached: bool = False,
  num_workers: int = 0,
) -> Store:
  """The store of a split, made now unless it is there.

  What a function of a person's own makes cannot be known by a hash of files: it
  is prepared for this process alone.

  Args:
    task: no mixture.
    split: of it.
    cache_dir: see cache_folder; at an address, stores are copied from and to.
    limits: tokens by feature; they decide the store of a task whose long texts
      come in windows, and no other.
    use_cached: from SeqIO's own offline cache.
    num_workers: processes that tokenise; 0 is this one. The store is the same.

  Raises:
    UserError: for bad data, or a disk that is full.
  """
  is_remote = cache_dir is not None and storage.is_remote(cache_dir)
  root = cache_folder(None if is_remote else cache_dir)
  content = _content(task, split, limits, use_cached)
  key = _key_of(content, task, split, use_cached)
  make = lambda folder: _write(
    task, split, limits, use_cached, folder, key, num_workers
  )
  if key is None:
    folder = tempfile.mkdtemp(prefix=".own-", dir=root)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make(folder)
    return Store(folder)
  name = f"{_plain_name(task.name)}-{split}-{key}"
  path = os.path.join(root, name)
  if is_remote:
    address = f"{cache_dir.rstrip('/')}/{name}"
    if storage.exists(f"{address}/{INDEX}"):
      return Store(fetched.local(address))
  if not os.path.exists(os.path.join(path, INDEX)):
    with _alone(path):
      if not os.path.exists(os.path.join(path, INDEX)):
        _remove_halves(path)
        folder = tempfile.mkdtemp(
          prefix=f".half-{os.path.basename(path)}-", dir=root
        )
        try:
          make(folder)
          if _content(task, split, limits, use_cached) != content:
            raise UserError(
              f"task {task.name!r}, split {split!r}: its files or code changed"
              " while they were prepared; run the command again"
            )
          shutil.rmtree(path, ignore_errors=True)  # Never a whole one.
          os.rename(folder, path)
        except BaseException:
          shutil.rmtree(folder, ignore_errors=True)
          raise
  if is_remote and not storage.exists(f"{address}/{INDEX}"):
    staging.upload_folder(path, address, last=[INDEX])
  return Store(path)


def _plain_name(name: str) -> str:
  return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80]


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
  """Holds the lock of a store; says so where it must wait for another."""
  folder, name = os.path.split(path)
  with open(os.path.join(folder, f".lock-{name}"), "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      console.say(f"waiting for another process that prepares {path}")
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      pass  # A file system without locks: the rename decides.
    yield


def _remove_halves(path: str) -> None:
  """Removes what killed preparations left; the lock is held."""
  folder, name = os.path.split(path)
  for entry in os.listdir(folder):
    if entry.startswith(f".half-{name}-"):
      shutil.rmtree(os.path.join(folder, entry), ignore_errors=True)


# ---- What decides the content of a store -------------------------------------


def _key(
  task: seqio.Task,
  split: str,
  limits: Mapping[str, int] | None,
  use_cached: bool,
) -> str | None:
  """A hash of it; None where it cannot be known."""
  content = _content(task, split, limits, use_cached)
  return _key_of(content, task, split, use_cached)


def _key_of(
  content: list[Any] | None, task: seqio.Task, split: str, use_cached: bool
) -> str | None:
  if content is None:
    return None
  first = _first_examples(task, split, use_cached)
  text = json.dumps([*content, first], sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(
  task: seqio.Task,
  split: str,
  limits: Mapping[str, int] | None,
  use_cached: bool,
) -> list[Any] | None:
  """What files and code tell of it; None where that is not all."""
  record = records.describe(task)
  if not records.is_known(record):
    return None
  try:
    inside = identity_of(task)
  except identity.Unknown:
    return None
  if use_cached:
    record = record | {"seqio_cache": _stamp_of_folder(task.cache_dir)}
  layout = getattr(task.source, "layout", None)
  windows = None
  if layout is not None and layout.is_windowed:
    windows = dict(limits or {})
  content = records.content_of_split(record, split)
  return [_VERSION, content, split, windows, _code(), inside]


def _first_examples(
  task: seqio.Task, split: str, use_cached: bool
) -> str | None:
  """A hash of the first examples, where somebody's own code makes them.

  What the code asks of the world as it runs shows in them as a rule.
  """
  if isinstance(task.source, seqio_source.SeqioSource):
    return None
  from fat5_jax.data import seqio_tasks

  found = hashlib.sha256()
  try:
    for example in seqio_tasks.first(task, split, use_cached, _LOOKED_AT):
      for name, value in sorted(example.items()):
        array = np.asarray(value)
        content = array.tolist() if array.dtype == object else array.tobytes()
        found.update(repr((name, array.shape, content)).encode())
  except (UserError, tf.errors.OpError, OSError):
    return None  # Preparing meets it too, and says where.
  return found.hexdigest()[:16]


def identity_of(task: seqio.Task) -> Any:
  """What of a task is no plain data: vocabularies; steps that are not ours.

  Raises:
    identity.Unknown: see there.
  """
  found = {
    name: [feature.add_eos, str(feature.dtype), feature.rank]
    + [identity.of(feature.vocabulary)]
    for name, feature in task.output_features.items()
  }
  if not isinstance(task.source, seqio_source.SeqioSource):
    source = {k: v for k, v in vars(task.source).items() if k not in _TOLD}
    found["source"] = [identity.of(type(task.source)), identity.of(source)]
    found["steps"] = identity.of(list(task.preprocessors))
  elif task.source.row_code is not None:
    found["rename"] = identity.of(task.source.row_code)
  return found


def _code() -> list[str]:
  """Hashes of our modules that decide what an example is."""
  found = []
  for module in examples_lib.code_modules():
    with open(inspect.getsourcefile(module), "rb") as file:
      found.append(hashlib.sha256(file.read()).hexdigest()[:16])
  return found


def _stamp_of_folder(path: str) -> list[Any]:
  found = []
  for name in sorted(os.listdir(path)):
    status = os.stat(os.path.join(path, name))
    found.append([name, status.st_size, status.st_mtime_ns])
  return found


# ---- Preparation -------------------------------------------------------------


def _write(
  task: seqio.Task,
  split: str,
  limits: Mapping[str, int] | None,
  use_cached: bool,
  folder: str,
  key: str | None,
  num_workers: int,
) -> None:
  counts = examples_lib.Counts()
  small = examples_lib.small_features(task)
  writer = Writer(folder, small)
  is_ours = isinstance(task.source, seqio_source.SeqioSource)
  rows: Iterable[dict[str, Any]]
  if num_workers and is_ours:
    rows = workers.whole(task, split, limits, counts, num_workers)
  else:
    rows = examples_lib.whole(task, split, limits, counts, use_cached)
  what = f"preparing {task.name}, {split}"
  # Windows are more than their rows.
  total = None
  if is_ours and not task.source.layout.is_windowed:
    total = task.source.known_rows(split)
  try:
    with seqio_source.reraise():
      for example in console.counted(rows, what, "examples", total):
        writer.add(example)
    if not writer.count:
      raise UserError(f"task {task.name!r}, split {split!r}: no rows")
    writer.close(
      {"key": key, "task": task.name, "split": split} | counts.facts()
    )
  except OSError as e:
    raise UserError(f"{folder}: {e.strerror or e}") from None
  except tf.errors.OpError as e:
    # A damaged file, or a step that cannot take what is in it.
    said = str(e.message).splitlines()[0].split("}} ")[-1]
    raise UserError(
      f"task {task.name!r}, split {split!r}, after {writer.count:,} examples:"
      f" {said}"
    ) from None
