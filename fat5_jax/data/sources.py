"""Where rows come from: local files, HF datasets, TFDS, or a Python function.

A source yields plain Python dictionaries. What a task does with a row (see
preprocessors.py) is plain Python too; TensorFlow begins after it, with SeqIO.
How files are read is in files.py and formats.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import glob
import hashlib
import os
import re
from typing import Any

import numpy as np

from fat5_jax import fetched
from fat5_jax.data.files import (
  LocatedRow,
  Row,
  expand,
  file_record,
  listed,
  located,
  read_lines,
  shown,
  split_suffix,
)
from fat5_jax.data.formats import check_columns, count_rows, read_file
from fat5_jax.errors import UserError, nearest

RowFn = Callable[[Row], Row]
# Bytes of what only streams: too many to be held as a whole.
UNKNOWN_SIZE = 1 << 62

# What `datasets` leaves beside the data of a folder.
_LEFT_BESIDE = re.compile(r"cache-.*\.arrow|tmp[a-z0-9_]{8}")


def files_record(
  source: Any, splits: Mapping[str, Sequence[str]], **arguments: Any
) -> dict[str, Any]:
  """The record of a source of local files, from which it can be made again."""
  return {
    "kind": type(source).__name__,
    "files": {s: [file_record(p) for p in ps] for s, ps in splits.items()},
    "arguments": {k: v for k, v in arguments.items() if v is not None},
  }


_counts: dict[tuple, int] = {}


def count_files(paths: Iterable[str], how: Any, count: Callable[[str], int]):
  """The rows of files; each is counted once, as long as it does not change.

  `how` they are read; `count` counts one.
  """
  found = 0
  for path in paths:
    key = (repr(how), *file_record(path).values())
    if key not in _counts:
      _counts[key] = count(path)
    found += _counts[key]
  return found


def split_files(splits: Any) -> dict[str, list[str]]:
  """The files of every split.

  Raises:
    UserError: unless each names some, which are there.
  """
  if not isinstance(splits, Mapping) or not splits:
    raise UserError(
      f"splits = {shown(splits)} must name files by split: {{'train':"
      " 'train.tsv'}"
    )
  return {name: expand(patterns) for name, patterns in splits.items()}


def _weights(splits: Any) -> dict[str, float]:
  """The weights of the training files; {} where they have none."""
  if not isinstance(splits, Mapping):
    return {}
  for split, files in splits.items():
    if isinstance(files, Mapping) and split != "train":
      raise UserError(
        f"Files: split {split!r} has weights; they are for the rows that"
        " training draws: give a list"
      )
  found = splits.get("train")
  if not isinstance(found, Mapping):
    return {}
  for name, weight in found.items():
    is_number = isinstance(weight, (int, float)) and not isinstance(
      weight, bool
    )
    if not isinstance(name, str) or not is_number or not 0 < weight < 1e9:
      raise UserError(
        f"Files: {shown(name)}: {shown(weight)} is no weight of a file: give"
        " {'a.jsonl': 2.0, 'b.jsonl': 1.0}"
      )
  return {name: float(weight) for name, weight in found.items()}


class Files:
  """Local files, one or more glob patterns a split.

  Attributes:
    splits: split name to files.
    weights: by pattern, how often rows of its files are drawn in training
      beside the others'; {} where nobody says. A factory that is given such a
      source makes a mixture (mixtures.weighted).
  """

  def __init__(
    self,
    splits: Mapping[str, str | Sequence[str] | Mapping[str, float]],
    columns: Sequence[str] | Mapping[str, Sequence[str] | None] | None = None,
    quoting: bool | None = None,
    delimiter: str | None = None,
  ):
    """`splits` may give training files weights, {'train': {'a.tsv': 2.0, ...}}.

    `columns` names those of files without header, for all splits or each.
    `quoting` and `delimiter`: see `read_file`.
    """
    if delimiter is not None and (
      not isinstance(delimiter, str)
      or len(delimiter) != 1
      or delimiter in '"\r\n'
    ):
      raise UserError(
        f"Files: delimiter = {shown(delimiter)} must be one character, no quote"
        " or line end"
      )
    if quoting not in (None, True, False):
      raise UserError(
        f"Files: quoting = {shown(quoting)} must be True or False"
      )
    self.weights = _weights(splits)
    if self.weights:
      splits = {**splits, "train": list(self.weights)}
    self.splits = split_files(splits)
    by_split = columns if isinstance(columns, Mapping) else {"": columns}
    for names in by_split.values():
      if names is None:
        continue
      if not isinstance(names, (list, tuple)) or not all(
        isinstance(name, str) for name in names
      ):
        raise UserError(
          f"Files: columns = {shown(names)} must be a list of names"
        )
      check_columns(names, "Files: columns")
    self._columns, self._quoting = columns, quoting
    self._delimiter = delimiter

  def only(self, splits: Mapping[str, str | Sequence[str]]) -> Files:
    """Other files, read as these are."""
    return Files(splits, self._columns, self._quoting, self._delimiter)

  def _how(self, split: str) -> dict[str, Any]:
    columns = self._columns
    if isinstance(columns, Mapping):
      columns = columns.get(split)
    return {
      "columns": columns,
      "quoting": self._quoting,
      "delimiter": self._delimiter,
    }

  def rows(self, split: str) -> Iterator[LocatedRow]:
    for path in self.splits[split]:
      yield from read_file(path, **self._how(split))

  def num_rows(self, split: str) -> int:
    how = self._how(split)
    count = functools.partial(count_rows, **how)
    return count_files(self.splits[split], how, count)

  def record(self) -> dict[str, Any]:
    return files_record(
      self,
      self.splits,
      columns=self._columns,
      quoting=self._quoting,
      delimiter=self._delimiter,
    )

  def describe(self, split: str) -> str:
    return ", ".join(self.splits[split])

  def size_bytes(self, split: str) -> int:
    return sum(os.path.getsize(path) for path in self.splits[split])


class ParallelFiles:
  """Line-aligned text files, one a column, as translation corpora come.

  Attributes:
    splits: split name to {column: file}.
  """

  def __init__(self, splits: Mapping[str, Mapping[str, str]]):
    self.splits = {}
    for name, columns in splits.items():
      if not isinstance(columns, Mapping) or not columns:
        raise UserError(
          f"ParallelFiles: split {name!r} = {shown(columns)} must name a file a"
          " column: {'en': 'train.en', 'de': 'train.de'}"
        )
      files = {column: expand(path) for column, path in columns.items()}
      for column, found in files.items():
        if len(found) > 1:
          raise UserError(
            f"ParallelFiles: column {column!r} has {len(found)} files"
            f" ({listed(found)}); it is one"
          )
      self.splits[name] = {column: found[0] for column, found in files.items()}

  def rows(self, split: str) -> Iterator[LocatedRow]:
    columns = self.splits[split]
    readers = [read_lines(p, split_suffix(p)[1]) for p in columns.values()]
    first = next(iter(columns.values()))
    number = 0
    while True:
      lines = [next(reader, None) for reader in readers]
      number += 1
      if all(line is None for line in lines):
        return
      for path, line in zip(columns.values(), lines):
        if line is None:
          raise UserError(
            f"{path}: ends after {number - 1} rows, before the files beside it"
          )
      texts = [line[1] for line in lines]
      yield located(first, number), dict(zip(columns, texts))

  def num_rows(self, split: str) -> int:
    first = next(iter(self.splits[split].values()))
    lines = lambda path: sum(1 for _ in read_lines(path, split_suffix(path)[1]))
    return count_files([first], "lines", lines)

  def record(self) -> dict[str, Any]:
    files = {split: list(f.values()) for split, f in self.splits.items()}
    columns = list(next(iter(self.splits.values())))
    return files_record(self, files) | {"columns": columns}

  def describe(self, split: str) -> str:
    return ", ".join(self.splits[split].values())

  def size_bytes(self, split: str) -> int:
    return sum(os.path.getsize(path) for path in self.splits[split].values())


class HuggingFace:
  """A dataset of the Hugging Face `datasets` library: hub name or local folder.

  Attributes:
    splits: our split name to the dataset's.
    is_stream: whether its rows can be read from the first on alone.
  """

  def __init__(
    self,
    path: str,
    name: str | None = None,
    splits: Mapping[str, str] | None = None,
    streaming: bool = False,
  ):
    """`streaming` reads rows as they come, in their order, and keeps none."""
    self._given, self._path, self._name = path, fetched.local(path), name
    self.is_stream = streaming
    self.splits = dict(
      splits or {s: s for s in ("train", "validation", "test")}
    )
    self._loaded: dict[str, Any] = {}

  def _load(self, split: str):
    if split not in self._loaded:
      import datasets

      try:
        if os.path.exists(os.path.join(self._path, "dataset_dict.json")):
          found = datasets.load_from_disk(self._path)[self.splits[split]]
          found = found.to_iterable_dataset() if self.is_stream else found
        else:
          found = datasets.load_dataset(
            self._path,
            self._name,
            split=self.splits[split],
            streaming=self.is_stream,
          )
      except Exception as e:  # the library raises a dozen unrelated types
        raise UserError(f"{self.describe(split)}: {e}") from None
      self._loaded[split] = found
    return self._loaded[split]

  def rows(self, split: str) -> Iterator[LocatedRow]:
    where = self.describe(split)
    for number, row in enumerate(self._load(split), 1):
      yield f"{where}, row {number}", row

  def num_rows(self, split: str) -> int | None:
    """Those that its publisher counted, of a stream; None if nobody did."""
    if not self.is_stream:
      return len(self._load(split))
    known = self._load(split).info.splits or {}
    # Slices and merged splits are not counted apart.
    info = known.get(self.splits[split])
    return (info.num_examples or None) if info else None

  def label_names(self, column: str) -> tuple[str, ...]:
    """The names of a column of class numbers (ClassLabel); () if it is none."""
    for split in self.splits:
      try:
        # A stream may not know what it holds.
        found = (self._load(split).features or {}).get(column)
      except UserError:
        continue  # A data set need not have every split.
      found = getattr(found, "feature", found)
      return tuple(getattr(found, "names", None) or ())
    return ()

  def record(self) -> dict[str, Any]:
    found = {
      "kind": "HuggingFace",
      "arguments": {
        "path": self._given,
        "name": self._name,
        "splits": self.splits,
        **({"streaming": True} if self.is_stream else {}),
      },
    }
    if not os.path.isdir(self._path):
      return found | {"dataset": self._path}
    # A folder is known by what it holds.
    inside = os.path.join(glob.escape(self._path), "**", "*")
    files = [
      file
      for file in sorted(glob.glob(inside, recursive=True))
      # The library leaves caches beside the data.
      if os.path.isfile(file)
      and not _LEFT_BESIDE.fullmatch(os.path.basename(file))
      and not file.endswith(".lock")
    ]
    return found | {"content": [file_record(file) for file in files]}

  def describe(self, split: str) -> str:
    name = f"{self._path}/{self._name}" if self._name else self._path
    return f"HF dataset {name}, split {self.splits[split]}"

  def size_bytes(self, split: str) -> int:
    return UNKNOWN_SIZE if self.is_stream else self._load(split).data.nbytes


class Tfds:
  """A TensorFlow Datasets builder, prepared on this machine.

  Attributes:
    splits: our split name to TFDS's (slices allowed).
  """

  def __init__(
    self,
    name: str,
    splits: Mapping[str, str] | None = None,
    data_dir: str | None = None,
  ):
    self._name, self._data_dir = name, data_dir
    self.splits = dict(
      splits or {s: s for s in ("train", "validation", "test")}
    )

  def _builder(self):
    import tensorflow_datasets as tfds

    try:
      return tfds.builder(self._name, data_dir=self._data_dir)
    except Exception as e:
      raise UserError(f"TFDS {self._name}: {e}") from None

  def rows(self, split: str) -> Iterator[LocatedRow]:
    import tensorflow_datasets as tfds

    where = self.describe(split)
    try:
      data = self._builder().as_dataset(split=self.splits[split])
    except Exception as e:
      raise UserError(f"{where}: {e}") from None
    for number, row in enumerate(tfds.as_numpy(data), 1):
      yield f"{where}, row {number}", _to_python(row)

  def num_rows(self, split: str) -> int:
    return self._builder().info.splits[self.splits[split]].num_examples

  def record(self) -> dict[str, Any]:
    return {
      "kind": "Tfds",
      "arguments": {
        "name": self._builder().info.full_name,
        "splits": self.splits,
        "data_dir": self._data_dir,
      },
    }

  def describe(self, split: str) -> str:
    return f"TFDS {self._name}, split {self.splits[split]}"

  def size_bytes(self, split: str) -> int:
    return self._builder().info.splits[self.splits[split]].num_bytes


def _to_python(value):
  if isinstance(value, dict):
    return {k: _to_python(v) for k, v in value.items()}
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, np.ndarray):
    return [_to_python(v) for v in value.tolist()]
  return value.item() if isinstance(value, np.generic) else value


class Function:
  """Rows that a Python function makes.

  Attributes:
    splits: split name to a function without arguments.
    is_stream: whether they have no end, or are too many to keep.
  """

  def __init__(
    self,
    splits: Mapping[str, Callable[[], Iterable[Row]]],
    is_stream: bool = False,
  ):
    self.splits, self.is_stream = dict(splits), is_stream

  def rows(self, split: str) -> Iterator[LocatedRow]:
    for number, row in enumerate(self.splits[split](), 1):
      yield f"split {split}, row {number}", row

  def record(self) -> dict[str, Any]:
    return {
      "kind": "Function",
      "functions": {s: code_name(f) for s, f in self.splits.items()},
    }

  def describe(self, split: str) -> str:
    return f"split {split}"

  def size_bytes(self, split: str) -> int:
    return UNKNOWN_SIZE if self.is_stream else 0


def code_name(function: Any) -> str:
  """A function, or a callable object, by its name and a hash of what it does.

  The hash covers its byte code, the plain values that it closes over, and an
  object's fields: never an address, which is another in every process.
  """
  if isinstance(function, functools.partial):
    given = [*map(_seen, function.args)]
    given += [f"{k}={_seen(v)}" for k, v in sorted(function.keywords.items())]
    return f"{code_name(function.func)}({', '.join(given)})"
  code = getattr(function, "__code__", None)
  owner = function if code is not None else type(function)
  name = f"{owner.__module__}:{owner.__qualname__}"
  if code is not None:
    cells = [_seen(c.cell_contents) for c in function.__closure__ or ()]
    parts = [code.co_code.hex(), *map(_seen, code.co_consts), *cells]
  else:
    fields = getattr(function, "__dict__", {})
    parts = [f"{key}={_seen(value)}" for key, value in sorted(fields.items())]
  digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
  return f"{name}#{digest}"


def _seen(value: Any) -> str:
  """A value by what it is, without addresses."""
  if isinstance(value, (str, int, float, bool, bytes, type(None))):
    return repr(value)
  if isinstance(value, (list, tuple)):
    return f"[{', '.join(map(_seen, value))}]"
  if isinstance(value, Mapping):
    return (
      f"{{{', '.join(f'{_seen(k)}: {_seen(v)}' for k, v in value.items())}}}"
    )
  if callable(value) and hasattr(value, "__code__"):
    return code_name(value)
  return type(value).__qualname__


def has_column(row: Row, name: str) -> bool:
  """Whether `column` finds one."""
  try:
    column(row, name)
  except UserError:
    return False
  return True


def column(row: Row, name: str) -> Any:
  """A value of a row; `a.b` is the field b of column a, `a.0` its first item.

  Raises:
    UserError: for a missing column, with the others.
  """
  if name in row:
    return row[name]
  value: Any = row
  for part in name.split("."):
    if isinstance(value, Mapping) and part in value:
      value = value[part]
    elif (
      isinstance(value, Sequence)
      and not isinstance(value, (str, bytes))
      and part.isdecimal()
      and int(part) < len(value)
    ):
      value = value[int(part)]
    else:
      raise UserError(
        f"no column {name!r}.{nearest(name, row)} Columns: {listed(row)}"
      )
  return value
