"""SeqIO vocabularies as files beside a checkpoint, and from HF folders."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import seqio

from fat5_jax import checkpoints, weights
from fat5_jax.data import tokenizer_json
from fat5_jax.errors import UserError


def save(vocabulary: seqio.Vocabulary, folder: str) -> dict[str, Any] | None:
  """Copies a vocabulary into `folder`; its description, or None if unknown."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return {"kind": "byte", "extra_ids": vocabulary.extra_ids}
  path = getattr(vocabulary, "sentencepiece_model_file", None)
  if path is None:
    return None
  target = os.path.join(folder, "spiece.model")
  if not os.path.exists(target) or not os.path.samefile(path, target):
    shutil.copyfile(path, target)
  return {"kind": "sentencepiece", "extra_ids": vocabulary.extra_ids}


def load(description: dict[str, Any], folder: str) -> seqio.Vocabulary:
  """The vocabulary that `save` described."""
  if description["kind"] == "byte":
    return seqio.ByteVocabulary(description["extra_ids"])
  return seqio.SentencePieceVocabulary(
    os.path.join(folder, "spiece.model"), description["extra_ids"]
  )


def from_hf(folder: str) -> seqio.Vocabulary:
  """The vocabulary of an HF folder's tokenizer.

  Raises:
    UserError: if the folder holds neither a SentencePiece model nor a
      tokenizer.json of one, nor says that it is a byte tokenizer.
  """
  spiece = os.path.join(folder, "spiece.model")
  path = os.path.join(folder, "tokenizer_config.json")
  config = {}
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      config = json.load(file)
  extra_ids = config.get("extra_ids", 100)
  if os.path.exists(spiece):
    return seqio.SentencePieceVocabulary(spiece, extra_ids)
  if config.get("tokenizer_class", "").startswith("ByT5"):
    # The sentinels of ByT5 reuse byte ids, so they add none.
    return seqio.ByteVocabulary(config.get("extra_ids", 125))
  alone = os.path.join(folder, "tokenizer.json")
  if os.path.exists(alone):
    return tokenizer_json.vocabulary(alone)
  raise UserError(
    f"{folder}: no spiece.model, no tokenizer.json and no byte tokenizer; copy"
    " the SentencePiece model of this checkpoint there, or bind VOCABULARY in"
    " gin"
  )


def of_checkpoint(path: str) -> seqio.Vocabulary:
  """The vocabulary that a checkpoint brings: an HF folder or a fat5_jax run.

  Raises:
    UserError: if it brings none.
  """
  source = weights.find(path)
  if source.kind != "fat5":
    return from_hf(source.run_dir)
  found = checkpoints.read_model_json(source.run_dir) or {}
  if not found.get("vocabulary"):
    raise UserError(
      f"{source.run_dir}: model.json names no vocabulary; set VOCABULARY in gin"
    )
  return load(found["vocabulary"], source.run_dir)
