"""The files of a folder by their names: `train.jsonl`, `dev.tsv`, `val.en`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import glob
import os
from typing import Any

from fat5_jax import console, fetched
from fat5_jax.data import sources
from fat5_jax.errors import UserError

SPLIT_STEMS = {
  "train": ("train",),
  "validation": ("validation", "valid", "dev"),
  "test": ("test",),
}
_SUFFIXES = ("jsonl", "json", "tsv", "csv", "parquet", "tfrecord")


def named_splits(
  data_dir: str | None,
  hf_path: str,
  hf_name: str | None,
  more: Sequence[str] = (),
) -> Any:
  """Files of a folder named after their split, or (None) a dataset of HF's.

  `more`: suffixes, beside those of files of rows.

  Raises:
    UserError: if there is no such file.
  """
  if data_dir is None:
    return sources.HuggingFace(hf_path, hf_name)
  data_dir = fetched.local(data_dir)
  found, unread = {}, set()
  for split, names in SPLIT_STEMS.items():
    for stem in names:
      for suffix in (*_SUFFIXES, *more):
        pattern = os.path.join(glob.escape(data_dir), f"{stem}*.{suffix}*")
        files = glob.glob(pattern)
        if files and split not in found:
          found[split] = pattern
        else:
          unread.update(map(os.path.basename, files))
  for pattern in found.values():
    unread.difference_update(map(os.path.basename, glob.glob(pattern)))
  if unread:
    console.say(
      f"{data_dir}: not read, because a split has files of one kind:"
      f" {', '.join(sorted(unread))}"
    )
  if not found:
    raise UserError(
      f"{data_dir}: no data file named after a split (train*.jsonl,"
      " validation*.tsv, ...) is there"
    )
  return sources.Files(found)


def aligned_files(
  data_dir: str | None, endings: Mapping[str, str]
) -> sources.ParallelFiles | None:
  """The line-aligned files of a folder, `train.en` and `train.de`, if any.

  `endings`: of each column's files; `val.en` is a validation split too.
  """
  if data_dir is None:
    return None
  data_dir = fetched.local(data_dir)
  found: dict[str, dict[str, str]] = {}
  for split, stems in SPLIT_STEMS.items():
    for stem in (*stems, "val") if split == "validation" else stems:
      files = {
        column: sorted(
          glob.glob(os.path.join(glob.escape(data_dir), f"{stem}*.{ending}*"))
        )
        for column, ending in endings.items()
      }
      if all(files.values()) and split not in found:
        found[split] = {column: paths[0] for column, paths in files.items()}
  return sources.ParallelFiles(found) if found else None
