"""SeqIO vocabularies as files beside a checkpoint, and from HF folders."""

from __future__ import annotations

import os
from typing import Any

import seqio

from fat5_jax import fetched, storage
from fat5_jax.convert import plain_files, sentencepiece_file
from fat5_jax.data import tokenizer_json
from fat5_jax.data.tokenizer_json import OtherTokenizerError
from fat5_jax.errors import UserError

# More than any model has; each costs memory.
_MOST_EXTRA_IDS = 100_000


def file(path: str | None) -> str | None:
  """A SentencePiece model's path; that of a copy, where it is an address."""
  return path and fetched.local(path)


def piece_id(vocabulary: seqio.Vocabulary, piece: str) -> int | None:
  """The id of a piece of a SentencePiece model; None where it has none."""
  tokenizer = getattr(vocabulary, "tokenizer", None)
  if not hasattr(tokenizer, "piece_to_id"):
    return None
  number = tokenizer.piece_to_id(piece)
  return number if tokenizer.id_to_piece(number) == piece else None


def save(vocabulary: seqio.Vocabulary, folder: str) -> dict[str, Any] | None:
  """Copies a vocabulary into `folder`; its description, or None if unknown."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return {"kind": "byte", "extra_ids": vocabulary.extra_ids}
  path = getattr(vocabulary, "sentencepiece_model_file", None)
  if path is None:
    return None
  target = os.path.join(folder, "spiece.model")
  if storage.is_remote(target):
    data = sentencepiece_file.read(path)
    if not storage.exists(target) or storage.read(target) != data:
      storage.write(target, data)
  elif not os.path.exists(target) or not os.path.samefile(path, target):
    plain_files.replace_with(target, sentencepiece_file.read(path))
  return {"kind": "sentencepiece", "extra_ids": vocabulary.extra_ids}


def load(description: dict[str, Any], folder: str) -> seqio.Vocabulary:
  """The vocabulary that `save` described.

  Raises:
    UserError: if it is none, or its file is damaged.
  """
  path = os.path.join(folder, "model.json")
  kind = description.get("kind") if isinstance(description, dict) else None
  if kind not in ("byte", "sentencepiece"):
    raise UserError(
      f"{path}: vocabulary is {str(description)[:80]!r}, no description of one"
    )
  extra_ids = _extra_ids(description.get("extra_ids"), path)
  if kind == "byte":
    return seqio.ByteVocabulary(extra_ids)
  path = fetched.local(os.path.join(folder, "spiece.model"))
  return _sentencepiece(path, extra_ids)


def _extra_ids(value: Any, path: str) -> int:
  if type(value) is not int or not 0 <= value <= _MOST_EXTRA_IDS:
    raise UserError(
      f"{path}: extra_ids is {str(value)[:80]!r}, not a number of sentinels"
      " (T5 has 100)"
    )
  return value


def _sentencepiece(path: str, extra_ids: int) -> seqio.Vocabulary:
  """The vocabulary of a model file, which SentencePiece has loaded."""
  sentencepiece_file.read(path)
  vocabulary = seqio.SentencePieceVocabulary(path, extra_ids)
  try:
    vocabulary.encode("a")
  except Exception as e:
    # SentencePiece raises its own and protobuf's types.
    raise UserError(
      f"{path}: SentencePiece does not load it: {str(e)[:200]}"
    ) from None
  return vocabulary


def from_hf(folder: str) -> seqio.Vocabulary:
  """The vocabulary of an HF folder's tokenizer.

  Raises:
    OtherTokenizerError: if the folder holds neither a SentencePiece model nor
      a tokenizer.json of one, nor says that it is a byte tokenizer.
    UserError: if what it holds is damaged.
  """
  spiece = os.path.join(folder, "spiece.model")
  path = os.path.join(folder, "tokenizer_config.json")
  config = plain_files.read_json(path) if os.path.lexists(path) else {}
  if os.path.lexists(spiece):
    return _sentencepiece(
      spiece, _extra_ids(config.get("extra_ids", 100), path)
    )
  if str(config.get("tokenizer_class")).startswith("ByT5"):
    # The sentinels of ByT5 reuse byte ids, so they add none.
    return seqio.ByteVocabulary(_extra_ids(config.get("extra_ids", 125), path))
  alone = os.path.join(folder, "tokenizer.json")
  if os.path.lexists(alone):
    return tokenizer_json.vocabulary(alone)
  raise OtherTokenizerError(
    f"{folder}: no spiece.model, no tokenizer.json and no byte tokenizer; copy"
    " the SentencePiece model of this checkpoint there, or bind VOCABULARY in"
    " gin"
  )
