"""Local files: paths and patterns, compression, lines, and their hashes.

Whatever a path leads to, what comes out is lines of text, or a UserError that
names file and row. A line is bounded by LONGEST_ROW.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import stat
from typing import Any
import zlib

from fat5_jax import fetched, storage
from fat5_jax.errors import UserError

Row = dict[str, Any]
LocatedRow = tuple[str, Row]


class Unread(Mapping[str, Any]):
  """A line that is no row: whoever asks it for a column gets the reason.

  Those who leave bad rows out leave it out; to all others it is an error.
  """

  def __init__(self, reason: str):
    self.reason = reason

  def __getitem__(self, name: str) -> Any:
    raise UserError(self.reason)

  def __iter__(self) -> Iterator[str]:
    raise UserError(self.reason)

  def __contains__(self, name: object) -> bool:
    raise UserError(self.reason)

  def __len__(self) -> int:
    raise UserError(self.reason)


# Bytes of a row of text.
LONGEST_ROW = 1 << 26


# ---- Words -------------------------------------------------------------------


def shown(value: Any, most: int = 40) -> str:
  """A value for a message: its beginning, where it is long."""
  if isinstance(value, (str, bytes)):
    return repr(value[:most]) + "..." * (len(value) > most)
  text = repr(value)
  return text if len(text) <= most else text[:most] + "..."


def listed(names, most: int = 8) -> str:
  """Names for a message: the first ones, where they are many."""
  names = [str(name) for name in names]
  more = f" and {len(names) - most} more" if len(names) > most else ""
  short = (n if len(n) <= 40 else f"{n[:40]}..." for n in names[:most])
  return printable(", ".join(short)) + more


def printable(text: str) -> str:
  """Text of a file's on one line, which changes no terminal."""
  return "".join(c if c.isprintable() else "?" for c in text)


def located(path: str, number: int) -> str:
  return f"{path}, row {number}"


# ---- Paths -------------------------------------------------------------------


def check_file(path: str) -> None:
  """Raises UserError unless a path is a file, which can be read again."""
  try:
    mode = os.stat(path).st_mode
  except FileNotFoundError:
    raise UserError(
      f"{path}: no such data file (looked from {os.path.abspath(os.curdir)})"
    ) from None
  except (OSError, ValueError) as e:
    raise UserError(
      f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}"
    ) from None
  if stat.S_ISDIR(mode):
    raise UserError(
      f"{path}: a folder, not a data file; name the files in it, such as"
      f" {os.path.join(path, '*.tsv')}"
    )
  if not stat.S_ISREG(mode):
    raise UserError(
      f"{path}: a pipe or a device, and rows are read more than once: write"
      " them to a file first"
    )


def expand(patterns: str | Sequence[str]) -> list[str]:
  """The files of one or more paths or glob patterns, sorted.

  Of an address there is a copy on this machine then.

  Raises:
    UserError: if a pattern matches no file, or something that is none.
  """
  patterns = [patterns] if isinstance(patterns, str) else patterns
  if (
    not isinstance(patterns, (list, tuple))
    or not patterns
    or not all(isinstance(pattern, str) for pattern in patterns)
  ):
    raise UserError(
      f"{shown(patterns)} names no data file: give a path, a pattern, or a list"
      " of them"
    )
  files = []
  for pattern in patterns:
    if storage.is_remote(pattern):
      files += fetched.matching(pattern)
      continue
    path = os.path.expanduser(pattern)
    matches = []
    # A path is a path first: `data[1].tsv` is also a pattern.
    if not os.path.lexists(path) and "\0" not in path:
      matches = sorted(glob.glob(path, recursive=True))
    files += matches or [path]
  for path in files:
    check_file(path)
  return files


# Larger files are known by 64 of their parts.
_WHOLE_HASH_BYTES = 1 << 32
# Of larger files the hash is kept beside the copies, under all that changes
# when the file does.
_KEPT_HASH_BYTES = 1 << 26


def file_record(path: str) -> dict[str, Any]:
  """What a data file is: where it lies, its size, and a hash of what it holds.

  `path` alone may differ between two records of the same data.
  """
  path = os.path.abspath(path)
  status = os.stat(path)
  return {
    "path": fetched.address_of(path),
    "bytes": status.st_size,
    "sha256": _hash(
      path,
      status.st_size,
      (status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino),
    ),
  }


@functools.lru_cache(maxsize=1024)
def _hash(path: str, size: int, state: tuple[int, ...]) -> str:
  """`state` is of the file as it was; another one is another file."""
  if size < _KEPT_HASH_BYTES:
    return _hash_of_content(path, size)
  name = hashlib.sha256(repr((path, size, state)).encode()).hexdigest()[:32]
  kept = os.path.join(fetched.cache_folder(), "hashes", name)
  with contextlib.suppress(OSError):
    with open(kept, encoding="ascii") as file:
      found = file.read()
    if re.fullmatch("[0-9a-f]{16}", found):
      return found
  found = _hash_of_content(path, size)
  with contextlib.suppress(OSError):
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    with open(f"{kept}.{os.getpid()}", "w", encoding="ascii") as file:
      file.write(found)
    os.replace(f"{kept}.{os.getpid()}", kept)
  return found


def _hash_of_content(path: str, size: int) -> str:
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


# ---- Compression -------------------------------------------------------------


class _Streams(io.RawIOBase):
  """Decompresses one stream after the other.

  The standard library's files leave out without a word what follows a stream
  and is none; here it is an error, as it is in gzip's.
  """

  def __init__(self, path: str, make: Callable[[], Any]):
    self._file, self._make = open(path, "rb"), make
    self._stream = make()

  def readable(self) -> bool:
    return True

  def close(self) -> None:
    self._file.close()
    super().close()

  def readinto(self, buffer) -> int:
    while True:
      more = b""
      if self._stream.eof:
        # Zeros may pad an .xz file.
        more = self._stream.unused_data.lstrip(b"\0")
        while not more:
          block = self._file.read(io.DEFAULT_BUFFER_SIZE)
          if not block:
            return 0
          more = block.lstrip(b"\0")
        self._stream = self._make()
      elif self._stream.needs_input:
        more = self._file.read(io.DEFAULT_BUFFER_SIZE)
        if not more:
          raise EOFError
      found = self._stream.decompress(more, len(buffer))
      if found:
        buffer[: len(found)] = found
        return len(found)


def _open_streams(make: Callable[[], Any], path: str, mode: str):
  del mode
  return io.BufferedReader(_Streams(path, make))


_OPENERS = {
  ".gz": gzip.open,
  # A header may ask for any amount of memory; `xz -9` needs 65 MiB.
  ".xz": functools.partial(
    _open_streams, lambda: lzma.LZMADecompressor(memlimit=1 << 29)
  ),
  ".bz2": functools.partial(_open_streams, bz2.BZ2Decompressor),
}
_MAGIC = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ", ".bz2": b"BZh"}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def split_suffix(path: str) -> tuple[str, Callable]:
  """(format suffix, opener) of a possibly compressed file."""
  base, suffix = os.path.splitext(path)
  if suffix in _OPENERS:
    return os.path.splitext(base)[1], _OPENERS[suffix]
  return suffix, open


def unreadable(path: str, number: int, error: Exception) -> UserError:
  """What is wrong with a file that could not be read on after a row."""
  if isinstance(error, OSError) and error.strerror:
    return UserError(f"{path}: cannot be read: {error.strerror}")
  suffix = os.path.splitext(path)[1]
  with open(path, "rb") as file:
    if not file.read(8).startswith(_MAGIC[suffix]):
      return UserError(
        f"{path}: not compressed as its ending {suffix} says; give it the"
        " ending of what it holds"
      )
  what = "is corrupt"
  if isinstance(error, EOFError):
    what = "ends too early"
  return UserError(
    f"{located(path, number + 1)}: the compressed data {what}; copy or compress"
    " the file again"
  )


# ---- Lines -------------------------------------------------------------------


def lines_of(
  file, name: str, lenient: bool = False
) -> Iterator[tuple[int, str | Unread]]:
  """`read_lines` of an open binary file, called `name` in messages."""
  for number in itertools.count(1):
    line = file.readline(LONGEST_ROW + 1)
    if not line:
      return
    if len(line) > LONGEST_ROW:
      raise UserError(
        f"{located(name, number)}: longer than {LONGEST_ROW >> 20} MiB; a row"
        " is a line of its own"
      )
    text, wrong = "", None
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as e:
      wrong = f"not valid UTF-8 ({e.reason} at byte {e.start})"
    if "\0" in text:
      wrong = "a zero byte, so this is no text, or text in UTF-16"
    if wrong is not None:
      wrong += "; convert the file to UTF-8"
      if not lenient:
        raise UserError(f"{located(name, number)}: {wrong}")
      yield number, Unread(wrong)
      continue
    text = text.rstrip("\r\n")
    if number == 1 and "\r" in text:
      raise UserError(
        f"{located(name, number)}: lines end in a carriage return alone;"
        " convert them to line feeds"
      )
    yield number, text


def read_lines(
  path: str, opener, lenient: bool = False
) -> Iterator[tuple[int, Any]]:
  """(1-based line number, text), without byte-order mark and line ends.

  Where it is `lenient`, a line that is no text is Unread instead.

  Raises:
    UserError: for a file that cannot be read or decompressed, and a line that
      is too long or no text.
  """
  check_file(path)
  number = 0
  try:
    with opener(path, "rb") as file:
      for number, text in lines_of(file, path, lenient):
        yield number, text
  except UNREADABLE as e:
    raise unreadable(path, number, e) from None
