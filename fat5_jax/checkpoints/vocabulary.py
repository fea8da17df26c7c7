"""The vocabulary that a checkpoint brings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fat5_jax import console
from fat5_jax.checkpoints import reference, run_record
from fat5_jax.checkpoints.reference import CheckpointRef

if TYPE_CHECKING:
  import seqio

# What a folder of another library says its vocabulary by.
_FILES = ("spiece.model", "tokenizer_config.json", "tokenizer.json")


def vocabulary_of(path: str) -> seqio.Vocabulary:
  """The vocabulary of what lies at a path, for gin.

  Raises:
    OtherTokenizerError: if it brings none.
    UserError: if it is damaged.
  """
  with console.without_native_lines():  # Only here: it brings TensorFlow.
    from fat5_jax.data import vocabularies

  source = reference.find(path)
  if source.kind != "fat5":
    return vocabularies.from_hf(source.run_dir)
  found = read(source)
  if found is None:
    raise vocabularies.OtherTokenizerError(
      f"{source.run_dir}: model.json names no vocabulary; set VOCABULARY in gin"
    )
  return found


def read(source: CheckpointRef) -> seqio.Vocabulary | None:
  """The vocabulary beside a checkpoint's tensors, or None.

  Raises:
    UserError: if it is damaged, or of a kind that is not known.
  """
  with console.without_native_lines():
    from fat5_jax.data import vocabularies

  if source.kind == "fat5":
    record = run_record.read_or_none(source.run_dir) or {}
    if record.get("vocabulary") is None:
      return None
    return vocabularies.load(record["vocabulary"], source.run_dir)
  if any(os.path.exists(os.path.join(source.run_dir, n)) for n in _FILES):
    return vocabularies.from_hf(source.run_dir)
  return None
