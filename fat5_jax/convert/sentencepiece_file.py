"""SentencePiece models, gone through before anyone trusts or copies them.

Protocol buffers of the one message (sentencepiece_model.proto), read by hand:
SentencePiece itself follows the table of its normaliser wherever that leads.
"""

from __future__ import annotations

from collections.abc import Iterator
import math
import struct

import numpy as np

from fat5_jax.convert import plain_files
from fat5_jax.errors import UserError

# Fields of ModelProto, of a piece, of the normaliser.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_CHARSMAP = 2
_UNKNOWN = 2


def read(path: str) -> bytes:
  """The bytes of a SentencePiece model file.

  Raises:
    UserError: if it is none.
  """
  data = plain_files.read_bytes(path)
  try:
    check(data)
  except ValueError as e:
    raise UserError(
      f"{path}: not a SentencePiece model ({e}). Copy the spiece.model of the"
      " checkpoint there again"
    ) from None
  return data


def check(data: bytes) -> None:
  """Raises ValueError unless the bytes are a SentencePiece model."""
  texts: set[bytes] = set()
  unknown = 0
  parts = set()
  for field, value in _fields(data):
    parts.add(field)
    if field == _PIECES:
      text, kind = _piece(value)
      if text in texts:
        raise ValueError(f"piece {text[:40]!r} is there twice")
      texts.add(text)
      unknown += kind == _UNKNOWN
    elif field == _NORMALIZER:
      for inner, table in _fields(value):
        if inner == _CHARSMAP and table:
          _check_charsmap(table)
  if not {_PIECES, _TRAINER, _NORMALIZER} <= parts:
    # Cut between two of its fields it would still be a message.
    raise ValueError("pieces, trainer or normaliser are missing")
  if unknown != 1:
    raise ValueError(f"{unknown} of its pieces are the unknown one")


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
  """(number, value) of a message's fields."""
  if not isinstance(data, bytes):
    raise ValueError("a number where a message is expected")
  at, end = 0, len(data)
  while at < end:
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
      yield key >> 3, value
      continue
    size = {1: 8, 5: 4}.get(kind)
    if kind == 2:
      size, at = _varint(data, at)
    if size is None or size > end - at:
      raise ValueError("damaged or truncated")
    yield key >> 3, data[at : at + size]
    at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    if at >= len(data) or shift > 63:
      raise ValueError("damaged or truncated")
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _piece(data: bytes | int) -> tuple[bytes, int]:
  """(text, type) of a piece."""
  text, kind = b"", 1
  for field, value in _fields(data):
    if field == _TEXT:
      text = value
    elif field == _SCORE:
      if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("a score is no number")
      if not math.isfinite(struct.unpack("<f", value)[0]):
        raise ValueError("a score is not finite")
    elif field == _TYPE:
      kind = value
  if not isinstance(text, bytes) or not text:
    raise ValueError("a piece without text")
  text.decode("utf-8")
  return text, kind


def _check_charsmap(data: bytes | int) -> None:
  """Raises ValueError if the normaliser's table leads out of itself.

  It is the size of a trie (a double array of units), the trie, and the texts
  that its leaves point to. A unit's children are in the block of 256 units that
  `position ^ offset` is in.
  """
  if not isinstance(data, bytes) or len(data) < 4:
    raise ValueError("its normaliser's table is damaged")
  size = struct.unpack("<I", data[:4])[0]
  texts = data[4 + size :]
  if size % 1024 or not size or len(data) < 4 + size or texts[-1:] != b"\0":
    raise ValueError("its normaliser's table is damaged")
  units = np.frombuffer(data, "<u4", size // 4, 4)
  is_leaf = units >> 31 == 1
  offsets = (units >> 10) << ((units & 512) >> 6)
  positions = np.arange(len(units), dtype="u4")
  leads = np.where(is_leaf, 0, positions ^ offsets)
  if (
    leads.max() >= len(units)
    or ((units[is_leaf] & 0x7FFFFFFF) >= len(texts)).any()
  ):
    raise ValueError("its normaliser's table leads out of itself")
