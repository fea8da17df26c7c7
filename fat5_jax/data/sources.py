"""Where rows come from: local files, HF datasets, TFDS, or a Python function.

A source yields plain Python dictionaries. What a task does with a row (see
preprocessors.py) is plain Python too; TensorFlow begins after it, with SeqIO.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import csv
import functools
import glob
import gzip
import hashlib
import json
import lzma
import os
from typing import Any

import numpy as np

from fat5_jax.errors import UserError, nearest

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

Row = dict[str, Any]
LocatedRow = tuple[str, Row]
RowFn = Callable[[Row], Row]


def split_suffix(path: str) -> tuple[str, Callable]:
  """(format suffix, opener) of a possibly compressed file."""
  base, suffix = os.path.splitext(path)
  if suffix in _OPENERS:
    return os.path.splitext(base)[1], _OPENERS[suffix]
  return suffix, open


def _located(path: str, number: int) -> str:
  return f"{path}, row {number}"


def read_lines(path: str, opener) -> Iterator[tuple[int, str]]:
  """(1-based line number, text), without byte-order mark and line ends."""
  with opener(path, "rb") as file:
    for number, line in enumerate(file, 1):
      try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
      except UnicodeDecodeError as e:
        raise UserError(
          f"{_located(path, number)}: not valid UTF-8 ({e.reason} at byte"
          f" {e.start}); convert the file to UTF-8"
        ) from None
      yield number, text.rstrip("\r\n")


def _read_jsonl(path: str, opener) -> Iterator[LocatedRow]:
  for number, line in read_lines(path, opener):
    where = _located(path, number)
    if not line.strip():
      raise UserError(f"{where}: empty line")
    try:
      row = json.loads(line)
    except json.JSONDecodeError as e:
      raise UserError(f"{where}: not valid JSON: {e}") from None
    if not isinstance(row, dict):
      raise UserError(f"{where}: expected a JSON object, found {line[:40]!r}")
    yield where, row


def _read_delimited(
  path: str,
  opener,
  delimiter: str,
  quoting: bool,
  columns: Sequence[str] | None,
) -> Iterator[LocatedRow]:
  lines = read_lines(path, opener)
  if quoting:
    # Quoted fields may hold line ends, so the csv reader needs them back.
    records = csv.reader(
      (text + "\n" for _, text in lines), delimiter=delimiter
    )
    numbered = ((records.line_num, record) for record in records)
  else:
    numbered = ((n, text.split(delimiter) if text else []) for n, text in lines)
  try:
    for number, record in numbered:
      where = _located(path, number)
      if columns is None:
        columns = record
        if not any(columns):
          raise UserError(f"{where}: the header is empty")
        continue
      if not record:
        raise UserError(f"{where}: empty line")
      if len(record) != len(columns):
        raise UserError(
          f"{where}: {len(record)} columns, expected {len(columns)}"
          f" ({', '.join(columns)})"
        )
      yield where, dict(zip(columns, record))
  except csv.Error as e:
    raise UserError(f"{path}, row {records.line_num}: {e}") from None


def _read_parquet(path: str) -> Iterator[LocatedRow]:
  import pyarrow as pa
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
    number = 0
    for batch in file.iter_batches():
      for row in batch.to_pylist():
        number += 1
        yield _located(path, number), row
  except pa.ArrowException as e:
    raise UserError(f"{path}: not a complete Parquet file: {e}") from None


def read_file(
  path: str,
  *,
  columns: Sequence[str] | None = None,
  quoting: bool | None = None,
  delimiter: str | None = None,
) -> Iterator[LocatedRow]:
  """(place, row) of every row of a TSV, CSV, JSONL or Parquet file.

  Args:
    path: its ending tells the format: .tsv .csv .jsonl .json .parquet .txt (one
      column named `text`), all but Parquet also .gz .xz .bz2.
    columns: names where the file has no header.
    quoting: whether double quotes group fields; None is yes for CSV, no for
      TSV.
    delimiter: between the fields of a TSV or CSV file; None is a tab or a
      comma, by the ending.

  Raises:
    UserError: naming file and row, for a missing or unknown file, a row that
      does not parse, has another number of columns, or is empty.
  """
  suffix, opener = split_suffix(path)
  if not os.path.exists(path):
    raise UserError(f"{path}: no such data file")
  if suffix in (".jsonl", ".json"):
    return _read_jsonl(path, opener)
  if suffix in (".tsv", ".csv"):
    is_csv = suffix == ".csv"
    return _read_delimited(
      path,
      opener,
      delimiter or ("," if is_csv else "\t"),
      is_csv if quoting is None else quoting,
      columns,
    )
  if suffix == ".parquet":
    return _read_parquet(path)
  if suffix == ".txt":
    return (
      (_located(path, number), {"text": line})
      for number, line in read_lines(path, opener)
    )
  raise UserError(
    f"{path}: unknown format {suffix!r}; known are .tsv .csv .jsonl .json"
    " .parquet .txt"
  )


# Larger files are known by 64 of their parts.
_WHOLE_HASH_BYTES = 1 << 32


def file_record(path: str) -> dict[str, Any]:
  """What a data file is: where it lies, its size, and a hash of what it holds.

  `path` alone may differ between two records of the same data.
  """
  path = os.path.abspath(path)
  status = os.stat(path)
  return {
    "path": path,
    "bytes": status.st_size,
    "sha256": _hash(path, status.st_size, status.st_mtime_ns),
  }


@functools.lru_cache(maxsize=1024)
def _hash(path: str, size: int, changed: int) -> str:
  """`changed`, a time, only keeps the cache right."""
  found = hashlib.sha256()
  with open(path, "rb") as file:
    if size <= _WHOLE_HASH_BYTES:
      while block := file.read(1 << 20):
        found.update(block)
    else:
      for part in range(64):
        file.seek((size - (1 << 20)) * part // 63)
        found.update(file.read(1 << 20))
  return found.hexdigest()[:16]


def files_record(
  source: Any, splits: Mapping[str, Sequence[str]], **arguments: Any
) -> dict[str, Any]:
  """The record of a source of local files, from which it can be made again."""
  return {
    "kind": type(source).__name__,
    "files": {s: [file_record(p) for p in ps] for s, ps in splits.items()},
    "arguments": {k: v for k, v in arguments.items() if v is not None},
  }


def expand(patterns: str | Sequence[str]) -> list[str]:
  """The files of one or more glob patterns, sorted.

  Raises:
    UserError: if a pattern matches no file.
  """
  files = []
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    # A path is a path first: `data[1].tsv` is also a pattern.
    if os.path.exists(os.path.expanduser(pattern)):
      files.append(os.path.expanduser(pattern))
      continue
    matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not matches:
      raise UserError(
        f"{pattern}: no such data file"
        f" (looked from {os.path.abspath(os.curdir)})"
      )
    files.extend(matches)
  return files


class Files:
  """Local files, one or more glob patterns a split.

  Attributes:
    splits: split name to pattern or patterns.
  """

  def __init__(
    self,
    splits: Mapping[str, str | Sequence[str]],
    columns: Sequence[str] | Mapping[str, Sequence[str] | None] | None = None,
    quoting: bool | None = None,
    delimiter: str | None = None,
  ):
    """`columns` names those of files without header, for all splits or each.

    `quoting` and `delimiter`: see `read_file`.
    """
    if delimiter is not None and len(delimiter) != 1:
      raise UserError(f"Files: delimiter = {delimiter!r} must be one character")
    self.splits = {name: expand(pattern) for name, pattern in splits.items()}
    self._columns, self._quoting = columns, quoting
    self._delimiter = delimiter

  def rows(self, split: str) -> Iterator[LocatedRow]:
    columns = self._columns
    if isinstance(columns, Mapping):
      columns = columns.get(split)
    for path in self.splits[split]:
      yield from read_file(
        path,
        columns=columns,
        quoting=self._quoting,
        delimiter=self._delimiter,
      )

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


SPLIT_STEMS = {
  "train": ("train",),
  "validation": ("validation", "valid", "dev"),
  "test": ("test",),
}


def named_splits(
  data_dir: str | None, hf_path: str, hf_name: str | None
) -> Any:
  """Files of a folder named after their split, or (None) a dataset of HF's.

  Raises:
    UserError: if there is no such file.
  """
  if data_dir is None:
    return HuggingFace(hf_path, hf_name)
  found = {}
  for split, names in SPLIT_STEMS.items():
    for stem in names:
      for suffix in ("jsonl", "json", "tsv", "csv", "parquet"):
        pattern = os.path.join(data_dir, f"{stem}*.{suffix}*")
        if split not in found and glob.glob(pattern):
          found[split] = pattern
  if not found:
    raise UserError(
      f"{data_dir}: no data file named after a split (train*.jsonl,"
      " validation*.tsv, ...) is there"
    )
  return Files(found)


class ParallelFiles:
  """Line-aligned text files, one a column, as translation corpora come.

  Attributes:
    splits: split name to {column: file}.
  """

  def __init__(self, splits: Mapping[str, Mapping[str, str]]):
    self.splits = {
      name: {column: expand(path)[0] for column, path in columns.items()}
      for name, columns in splits.items()
    }

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
      yield _located(first, number), dict(zip(columns, texts))

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
  """

  def __init__(
    self,
    path: str,
    name: str | None = None,
    splits: Mapping[str, str] | None = None,
  ):
    self._path, self._name = path, name
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
        else:
          found = datasets.load_dataset(
            self._path, self._name, split=self.splits[split]
          )
      except Exception as e:  # the library raises a dozen unrelated types
        raise UserError(f"{self.describe(split)}: {e}") from None
      self._loaded[split] = found
    return self._loaded[split]

  def rows(self, split: str) -> Iterator[LocatedRow]:
    where = self.describe(split)
    for number, row in enumerate(self._load(split), 1):
      yield f"{where}, row {number}", row

  def label_names(self, column: str) -> tuple[str, ...]:
    """The names of a column of class numbers (ClassLabel); () if it is none."""
    for split in self.splits:
      try:
        found = self._load(split).features.get(column)
      except UserError:
        continue  # A data set need not have every split.
      found = getattr(found, "feature", found)
      return tuple(getattr(found, "names", None) or ())
    return ()

  def record(self) -> dict[str, Any]:
    found = {
      "kind": "HuggingFace",
      "arguments": {
        "path": self._path,
        "name": self._name,
        "splits": self.splits,
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
      and not os.path.basename(file).startswith(("cache-", "tmp"))
      and not file.endswith(".lock")
    ]
    return found | {"content": [file_record(file) for file in files]}

  def describe(self, split: str) -> str:
    name = f"{self._path}/{self._name}" if self._name else self._path
    return f"HF dataset {name}, split {self.splits[split]}"

  def size_bytes(self, split: str) -> int:
    return self._load(split).data.nbytes


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
  """

  def __init__(self, splits: Mapping[str, Callable[[], Iterable[Row]]]):
    self.splits = dict(splits)

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
    return 0


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
      and not isinstance(value, str)
      and part.isdigit()
      and int(part) < len(value)
    ):
      value = value[int(part)]
    else:
      raise UserError(
        f"no column {name!r}.{nearest(name, row)} Columns: {', '.join(row)}"
      )
  return value
