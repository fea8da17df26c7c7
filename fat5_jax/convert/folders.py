"""Export folders: written beside their place, put there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
import tempfile
from typing import Any

from fat5_jax import staging, storage
from fat5_jax.convert import tensor_files, tokenizers
from fat5_jax.convert.table import Leaf
from fat5_jax.errors import UserError

# A folder that holds one of these is an earlier export.
_MARKS = ("config.json", "adapter_config.json")
# By which a folder is known, the last that is written to a bucket the last.
_LAST = ("model.json", *_MARKS)


@contextlib.contextmanager
def whole_folder(folder: str, marks: tuple[str, ...] = _MARKS):
  """A new folder that takes the place of `folder` if nothing fails.

  Whoever writes it may also look at it there: what raises before the end leaves
  `folder` as it was. To a bucket it goes when it is whole, what tells its kind
  last: nothing is known there before.

  Args:
    folder: where it will be.
    marks: files that tell a folder that may be replaced; an empty one may be.

  Raises:
    UserError: if `folder` holds something else.
  """
  folder = storage.absolute(folder)
  _check_replaceable(folder, marks)
  if storage.is_remote(folder):
    with tempfile.TemporaryDirectory(prefix="fat5_jax_") as scratch:
      target = os.path.join(scratch, "new")
      os.mkdir(target)
      yield target
      _check_replaceable(folder, marks)
      staging.upload_folder(target, folder, _LAST)
    return
  with (
    _parent(folder) as parent,
    tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as scratch,
  ):
    target = os.path.join(scratch, "new")
    os.mkdir(target)
    yield target
    # Someone may have written there meanwhile.
    _check_replaceable(folder, marks)
    old = os.path.join(scratch, "old")
    if os.path.isdir(folder):
      os.rename(folder, old)
    try:
      os.rename(target, folder)
    except BaseException:
      if os.path.isdir(old):
        os.rename(old, folder)
      raise


@contextlib.contextmanager
def _parent(folder: str):
  """The folder around a new one; made, and unmade if it is not needed.

  Raises:
    UserError: if it cannot be made or written.
  """
  parent = os.path.dirname(folder)
  new = []
  while not os.path.lexists(parent):
    new.append(parent)
    parent = os.path.dirname(parent)
  try:
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryFile(dir=os.path.dirname(folder)):
      pass
  except OSError as e:
    raise UserError(f"{folder}: cannot be written: {e.strerror}") from None
  try:
    yield os.path.dirname(folder)
  except BaseException:
    for path in new:
      with contextlib.suppress(OSError):
        os.rmdir(path)
    raise


def _check_replaceable(folder: str, marks: tuple[str, ...]) -> None:
  is_there = storage.exists if storage.is_remote(folder) else os.path.lexists
  if not is_there(folder):
    return
  if not storage.is_folder(folder):
    raise UserError(f"{folder}: exists and is no folder")
  found = storage.names(folder)
  if found and not set(found) & set(marks):
    what = "no Hugging Face folder" if marks else "not empty"
    raise UserError(f"{folder}: exists and is {what}")


def write_folder(
  folder: str,
  files: Mapping[str, Mapping[str, Any] | list[Any] | str],
  tensors: Mapping[str, Leaf],
  tokenizer: Any,
  max_shard_bytes: int,
) -> None:
  """Writes JSON and text files, tensors and tokenizer, all of them or none."""
  with whole_folder(folder) as target:
    tensor_files.write_folder(tensors, target, max_shard_bytes)
    write_files(target, files)
    if tokenizer is not None:
      tokenizers.write(tokenizer, target)


def write_files(
  folder: str, files: Mapping[str, Mapping[str, Any] | list[Any] | str]
) -> None:
  """Writes texts, and anything else as JSON, under their names in a folder."""
  for name, value in files.items():
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(value, str):
      with open(path, "w", encoding="utf-8") as file:
        file.write(value)
    else:
      tensor_files.write_json(path, value)
