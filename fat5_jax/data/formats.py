"""Formats of rows: JSONL, TSV, CSV, Parquet, TFRecord and text.

Whatever a file holds, what comes out is its rows, or a UserError that names
file and row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import csv
import json
import math
import re
from typing import Any

from fat5_jax.data.files import (
  LONGEST_ROW,
  UNREADABLE,
  LocatedRow,
  Row,
  Unread,
  check_file,
  listed,
  located,
  printable,
  read_lines,
  shown,
  split_suffix,
  unreadable,
)
from fat5_jax.errors import UserError

# Bytes of a JSON file that is read as a whole.
_LONGEST_JSON = 1 << 30
# A cell may be a row.
csv.field_size_limit(LONGEST_ROW)


# ---- JSON --------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise UserError(f"key {shown(_twice([k for k, _ in pairs]))} twice")
  return found


def _float(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise UserError(f"the number {text[:40]} is too large")
  return value


def _constant(text: str) -> None:
  raise UserError(f"{text} is no number; leave the key out, or write null")


_DECODER = json.JSONDecoder(
  object_pairs_hook=_object, parse_float=_float, parse_constant=_constant
)


def parse_json(text: str) -> Any:
  """The value of a JSON text.

  Raises:
    UserError: for what is no JSON, or what others read in other ways: a key
      twice, NaN, numbers and nesting beyond all bounds, half a character.
  """
  try:
    value = _DECODER.decode(text)
    if "\\ud" in text or "\\uD" in text:
      json.dumps(value, ensure_ascii=False).encode("utf-8")
  except json.JSONDecodeError as e:
    line = f"line {e.lineno}, " if e.lineno > 1 else ""
    raise UserError(
      f"not valid JSON: {e.msg} ({line}character {e.colno})"
    ) from None
  except RecursionError:
    raise UserError("not valid JSON: nested too deep") from None
  except UnicodeEncodeError:
    raise UserError(
      "half a character (a lone \\ud800 to \\udfff); write it whole, or leave"
      " it out"
    ) from None
  except UserError:
    raise
  except ValueError:
    raise UserError("a number of too many digits; write it as text") from None
  return value


def read_json(path: str) -> Any:
  """The value of a whole JSON file.

  Raises:
    UserError: naming it; see `parse_json`.
  """
  check_file(path)
  try:
    with split_suffix(path)[1](path, "rb") as file:
      content = file.read(_LONGEST_JSON + 1)
  except UNREADABLE as e:
    raise unreadable(path, 0, e) from None
  if len(content) > _LONGEST_JSON:
    raise UserError(
      f"{path}: larger than {_LONGEST_JSON >> 30} GiB; write a row a line"
    )
  try:
    return parse_json(content.decode("utf-8-sig"))
  except UnicodeDecodeError:
    raise UserError(f"{path}: not valid UTF-8; convert it to UTF-8") from None
  except UserError as e:
    raise UserError(f"{path}: {e}") from None


def _read_jsonl(path: str, opener) -> Iterator[LocatedRow]:
  for number, line in read_lines(path, opener, lenient=True):
    yield located(path, number), _json_row(line, number)


def _json_row(line: str | Unread, number: int) -> Row | Unread:
  if isinstance(line, Unread):
    return line
  if not line.strip():
    return Unread("empty line")
  try:
    row = parse_json(line)
  except UserError as e:
    hint = "; a row is one object in one line" if number == 1 else ""
    return Unread(f"{e}{hint}")
  if isinstance(row, dict):
    return row
  return Unread(
    f"expected a JSON object, found {shown(line)}; a row is one object in one"
    " line"
  )


# ---- TSV and CSV -------------------------------------------------------------


def _twice(names: Sequence[str]) -> str | None:
  """The first name that occurs again."""
  seen: set[str] = set()
  for name in names:
    if name in seen:
      return name
    seen.add(name)
  return None


def check_columns(columns: Sequence[str], where: str) -> None:
  """Raises UserError for a name that two columns have."""
  again = _twice(columns)
  if again is not None:
    raise UserError(
      f"{where}: two columns are named {shown(again)}; rename or remove one"
    )


def _csv_records(
  path: str, lines: Iterator[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, list[str]]]:
  # Quoted fields may hold line ends, so the csv reader needs them back.
  records = csv.reader(
    (text + "\n" for _, text in lines), delimiter=delimiter, strict=True
  )
  begin = 1
  while True:
    try:
      record = next(records, None)
    except csv.Error as e:
      raise UserError(
        f"{located(path, begin)}: its quotes do not pair ({e}); a quote in a"
        ' quoted field is written "", or set quoting = False'
      ) from None
    if record is None:
      return
    yield begin, record
    begin = records.line_num + 1


def _read_delimited(
  path: str,
  opener,
  delimiter: str,
  quoting: bool,
  columns: Sequence[str] | None,
) -> Iterator[LocatedRow]:
  lines = read_lines(path, opener)
  if quoting:
    numbered = _csv_records(path, lines, delimiter)
  else:
    numbered = ((n, text.split(delimiter) if text else []) for n, text in lines)
  for number, record in numbered:
    where = located(path, number)
    if columns is None:
      columns = record
      if not any(columns):
        raise UserError(f"{where}: the header is empty")
      check_columns(columns, where)
      continue
    if not record:
      yield where, Unread("empty line")
    elif len(record) != len(columns):
      reason = f"{len(record)} columns, expected {len(columns)}"
      yield where, Unread(f"{reason} ({listed(columns)})")
    else:
      yield where, dict(zip(columns, record))


# ---- Parquet -----------------------------------------------------------------

# Rows that are in memory at once.
_PARQUET_ROWS = 1024


def _count_parquet(path: str) -> int:
  from pyarrow import parquet

  try:
    return parquet.read_metadata(path).num_rows
  except Exception as e:  # the library raises a dozen unrelated types
    raise _broken_parquet(path, e) from None


def _broken_parquet(where: str, error: Exception) -> UserError:
  reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
  return UserError(f"{where}: not a complete Parquet file: {printable(reason)}")


def _read_parquet(path: str) -> Iterator[LocatedRow]:
  from pyarrow import parquet

  number = 0
  try:
    with parquet.ParquetFile(path) as file:
      check_columns(file.schema_arrow.names, path)
      for batch in file.iter_batches(_PARQUET_ROWS):
        try:
          rows = iter(batch.to_pylist())
        except UnicodeDecodeError:
          # One by one, to find which.
          rows = (batch.slice(i, 1).to_pylist()[0] for i in range(len(batch)))
        for row in rows:
          number += 1
          yield located(path, number), row
  except UserError:
    raise
  except UnicodeDecodeError as e:
    raise UserError(
      f"{located(path, number + 1)}: not valid UTF-8 ({e.reason}); write the"
      " column as UTF-8"
    ) from None
  except Exception as e:  # the library raises a dozen unrelated types
    where = located(path, number + 1) if number else path
    raise _broken_parquet(where, e) from None


# ---- TFRecord ----------------------------------------------------------------


def _is_tfrecord(path: str) -> bool:
  """`.tfrecord`, `.tfrecords`, and shards, `.tfrecord-00000-of-00008`."""
  return re.search(r"\.tfrecords?(-\d+-of-\d+)?(\.gz)?$", path) is not None


def _tfrecords(path: str) -> Iterator[bytes]:
  import tensorflow as tf

  number = 0
  compression = "GZIP" if path.endswith(".gz") else None
  try:
    data = tf.data.TFRecordDataset(path, compression)
    for content in data.as_numpy_iterator():
      number += 1
      yield content
  except tf.errors.OpError as e:
    # TensorFlow puts the name of its own operation first.
    reason = printable(e.message.splitlines()[0].split("}} ")[-1][:120])
    raise UserError(
      f"{located(path, number + 1)}: not a whole TFRecord file ({reason}); copy"
      " or write the file again"
    ) from None


def _read_tfrecord(path: str) -> Iterator[LocatedRow]:
  """Rows of `tf.train.Example`: a column of one value holds it, of several a
  list, of none None. Bytes that are text are text.
  """
  import tensorflow as tf

  for number, content in enumerate(_tfrecords(path), 1):
    where = located(path, number)
    try:
      found = tf.train.Example.FromString(content).features.feature
    except Exception:  # protobuf's own type
      reason = (
        "no tf.train.Example, which is what a row of a TFRecord file must be"
      )
      yield where, Unread(reason)
      continue
    row = {}
    for name in sorted(found):
      feature = found[name]
      kind = feature.WhichOneof("kind")
      values = [] if kind is None else list(getattr(feature, kind).value)
      if kind == "bytes_list":
        values = [_text_or_bytes(value) for value in values]
      row[name] = values if len(values) > 1 else next(iter(values), None)
    yield where, row or Unread("no features")


def _text_or_bytes(value: bytes) -> str | bytes:
  # A column that nobody asks for, an image, may stay what it is.
  try:
    return value.decode("utf-8")
  except UnicodeDecodeError:
    return value


# ---- Any of them -------------------------------------------------------------


def read_file(
  path: str,
  *,
  columns: Sequence[str] | None = None,
  quoting: bool | None = None,
  delimiter: str | None = None,
) -> Iterator[LocatedRow]:
  """(place, row) of every row of a TSV, CSV, JSONL, Parquet or TFRecord file.

  Args:
    path: its ending tells the format: .tsv .csv .jsonl .json .txt (one column
      named `text`), also with .gz .xz .bz2; .parquet; .tfrecord of
      tf.train.Example, also with .gz and as shards (.tfrecord-00000-of-00008).
    columns: names where the file has no header.
    quoting: whether double quotes group fields; None is yes for CSV, no for
      TSV.
    delimiter: between the fields of a TSV or CSV file; None is a tab or a
      comma, by the ending.

  Raises:
    UserError: naming file and row, for a missing, unknown or broken file, a row
      that does not parse, has another number of columns, or is empty.
  """
  suffix, opener = split_suffix(path)
  check_file(path)
  if _is_tfrecord(path):
    return _read_tfrecord(path)
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
    if opener is not open:
      raise UserError(
        f"{path}: Parquet compresses by itself; decompress the file"
      )
    return _read_parquet(path)
  if suffix == ".txt":
    return (
      (located(path, number), {"text": line})
      for number, line in read_lines(path, opener)
    )
  raise UserError(
    f"{path}: unknown format {suffix!r}; known are .tsv .csv .jsonl .json"
    " .parquet .tfrecord .txt"
  )


def count_rows(
  path: str,
  *,
  columns: Sequence[str] | None = None,
  quoting: bool | None = None,
  delimiter: str | None = None,
) -> int:
  """The rows that `read_file` gives, without making any of them.

  Arguments are those of `read_file`.

  Raises:
    UserError: as `read_file`, where it shows without looking into the rows.
  """
  suffix, opener = split_suffix(path)
  check_file(path)
  if suffix == ".parquet" and opener is open:
    return _count_parquet(path)
  if _is_tfrecord(path):
    return sum(1 for _ in _tfrecords(path))
  is_csv = suffix == ".csv" if quoting is None else quoting
  if suffix in (".jsonl", ".json", ".txt"):
    return sum(1 for _ in read_lines(path, opener))
  if suffix in (".tsv", ".csv") and not is_csv:
    lines = sum(1 for _ in read_lines(path, opener))
    return max(lines - (columns is None), 0)
  # The quotes of a CSV file may hold line ends.
  how = {"columns": columns, "quoting": quoting, "delimiter": delimiter}
  return sum(1 for _ in read_file(path, **how))
