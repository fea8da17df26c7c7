"""Tokenizer files of an HF folder, from whatever names the vocabulary."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from fat5_jax.convert import fast_tokenizer, plain_files, sentencepiece_file
from fat5_jax.errors import UserError

FILES = (
  "spiece.model",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
)


def write(tokenizer: Any, folder: str) -> None:
  """Writes tokenizer files into `folder`.

  Args:
    tokenizer: a folder that holds tokenizer files (copied), a SentencePiece
      model file (100 sentinels are added, as in T5), an HF tokenizer (its own
      `save_pretrained`), or a SeqIO SentencePiece or byte vocabulary.
    folder: an existing folder.

  Raises:
    UserError: if it is none of these, or damaged.
  """
  if hasattr(tokenizer, "save_pretrained"):
    tokenizer.save_pretrained(folder)
  elif isinstance(tokenizer, (str, os.PathLike)):
    path = os.fspath(tokenizer)
    if os.path.isdir(path):
      _copy(path, folder)
    elif os.path.isfile(path):
      _write_sentencepiece(path, 100, folder)
    else:
      raise UserError(f"{path}: no such tokenizer file or folder")
  elif getattr(tokenizer, "sentencepiece_model_file", None):
    _write_sentencepiece(
      tokenizer.sentencepiece_model_file, tokenizer.extra_ids, folder
    )
  elif type(tokenizer).__name__ == "ByteVocabulary":
    _write_config(folder, "ByT5Tokenizer", tokenizer.extra_ids)
  else:
    raise UserError(
      f"cannot write a Hugging Face tokenizer from {type(tokenizer).__name__}"
    )


def _copy(source: str, folder: str) -> None:
  found = [f for f in FILES if os.path.lexists(os.path.join(source, f))]
  if not found:
    raise UserError(f"{source}: holds no tokenizer file ({', '.join(FILES)})")
  for file in found:
    path = os.path.join(source, file)
    if file.endswith(".json"):
      plain_files.read_json(path)
      data = plain_files.read_bytes(path)
    else:
      data = sentencepiece_file.read(path)
    plain_files.replace_with(os.path.join(folder, file), data)


def _write_sentencepiece(path: str, extra_ids: int, folder: str) -> None:
  data = sentencepiece_file.read(path)
  alone = None
  try:
    special = fast_tokenizer.special_tokens(data)
    if fast_tokenizer.is_needed(data):
      alone = fast_tokenizer.to_json(data, extra_ids)
  except UserError as e:
    raise UserError(f"{path}: {e}") from None
  plain_files.replace_with(os.path.join(folder, "spiece.model"), data)
  target = os.path.join(folder, "tokenizer.json")
  if alone:
    plain_files.replace_with(target, alone)
    # Both versions of transformers take this class's file as it is.
    _write_config(folder, "PreTrainedTokenizerFast", extra_ids, special)
  else:
    # transformers would prefer one that is there to spiece.model.
    with contextlib.suppress(FileNotFoundError):
      os.unlink(target)
    _write_config(folder, "T5Tokenizer", extra_ids, special)


def _write_config(
  folder: str,
  tokenizer_class: str,
  extra_ids: int,
  special_tokens: tuple[str, str, str] = ("<pad>", "</s>", "<unk>"),
) -> None:
  pad, eos, unknown = special_tokens
  special = {
    "eos_token": eos,
    "unk_token": unknown,
    "pad_token": pad,
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(extra_ids)],
  }
  config = {
    **special,
    "tokenizer_class": tokenizer_class,
    "extra_ids": extra_ids,
    # No token_type_ids: no T5 takes them.
    "model_input_names": ["input_ids", "attention_mask"],
    # Text as it was, "it 's" too.
    "clean_up_tokenization_spaces": False,
    # T5's relative positions set no limit.
    "model_max_length": int(1e30),
  }
  for name, value in (
    ("tokenizer_config.json", config),
    ("special_tokens_map.json", special),
  ):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
      json.dump(value, file, indent=2)
      file.write("\n")
