"""hackyon's EncT5 folders, in and out.

A T5Model inside `transformer.`, whose decoder reads an embedding of its own:
`transformer.decoder.embed_tokens.weight`, or under its other name
`decoder_embeddings.weight`. (monologg's and TART's EncT5 are encoders with a
`classifier`: convert/hf_heads.py.)
"""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import numpy as np

from fat5_jax.convert import (
  folders,
  hf,
  hf_heads,
  lora,
  model_card,
  table,
  tensor_files,
)
from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

_PROMPT = "transformer.decoder.embed_tokens.weight"
_PROMPT_ALIAS = "decoder_embeddings.weight"
_MULTI = "multi_label_classification"


def _rows(config: T5Config) -> list[table.Row]:
  head = config.head
  if head.hidden_widths(config.emb_dim):
    raise UserError(
      f"hackyon's EncT5 has no hidden layers {head.widths}; write it --to hf"
    )
  return hf.rows(config)


def is_enct5(config_json: Mapping[str, Any], tensors: Mapping[str, Leaf]):
  """Whether a folder is hackyon's."""
  return _PROMPT_ALIAS in tensors or (
    config_json.get("model_type") == "enct5" and _PROMPT in tensors
  )


def open_model(folder: str) -> tuple[T5Config, Leaves]:
  """The config and the tensors of an EncT5 folder, to be read when wanted.

  Raises:
    UserError: with a `-`/`+` list if the tensors are not the config's.
  """
  path = os.path.join(folder, "config.json")
  config_json = tensor_files.read_json(path)
  tensors = hf_heads.without_guards(tensor_files.read_folder(folder))
  prompt = tensors.pop(_PROMPT_ALIAS, None)
  if prompt is not None and _PROMPT in tensors:
    if not np.array_equal(prompt.read(), tensors[_PROMPT].read()):
      raise UserError(f"{folder}: {_PROMPT_ALIAS} and {_PROMPT} differ")
  elif prompt is not None:
    tensors[_PROMPT] = prompt
  alias = "transformer.encoder.embed_tokens.weight"
  shared = "transformer.shared.weight"
  if alias in tensors:
    embedding = tensors.pop(alias)
    if shared not in tensors:
      tensors[shared] = embedding
    elif not np.array_equal(embedding.read(), tensors[shared].read()):
      raise UserError(f"{folder}: {alias} and {shared} differ")
  config = hf.config_from_json(
    # EncT5Config's own defaults.
    {"num_decoder_layers": 1, **config_json, "model_type": "t5"},
    path,
    tensors,
  )
  many = "classification_head.weights" in tensors
  kernel = tensors.get(
    "classification_head.weights"
    if many
    else "classification_head.out_proj.weight"
  )
  if kernel is None or len(kernel.shape) != 2:
    raise UserError(f"{folder}: no classification_head; not an EncT5")
  num_labels = kernel.shape[0]
  problem = _MULTI if many else hf_heads.problem_type(config_json, num_labels)
  try:
    head = HeadConfig(
      "enct5",
      num_labels=num_labels,
      problem_type=problem,
      label_names=hf_heads.label_names(config_json, num_labels),
      dropout_rate=config_json.get("classifier_dropout") or 0.0,
      decoder_layers=config.num_decoder_layers,
    )
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None
  try:
    config = config.replace(head=head, dtype=hf.stored_dtype(tensors))
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None
  return config, table.to_leaves(_rows(config), tensors, folder)


def to_folder(
  config: T5Config,
  params: Mapping[str, Any],
  folder: str,
  tokenizer: Any = None,
  *,
  max_shard_bytes: int = 10**9,
  facts: Mapping[str, Any] | None = None,
) -> None:
  """Writes a folder that hackyon's EncT5 loads, and transformers 4.37 and 5 by
  the file inside; arguments as in hf.to_pretrained.

  Raises:
    UserError: if the model is no EncT5, has hidden layers in its head, or is a
      umT5, whose position tables hackyon's has not.
  """
  if config.head is None or config.head.kind != "enct5":
    raise UserError("only an EncT5 can be written as one")
  if config.relative_attention_per_layer:
    raise UserError(
      "hackyon's EncT5 has one position table for all layers, umT5 one each;"
      " write it --to hf"
    )
  config, leaves = lora.merged(config, table.as_leaves(params))
  body = hf.body_json(config)
  tensors = table.to_foreign(_rows(config), leaves, "the parameters")
  config_json = body | {
    **hf_heads.labels_json(config.head),
    **hf.dtype_json(tensors),
    "architectures": ["EncT5ForSequenceClassification"],
    "auto_map": hf_heads.auto_map(config),
    "model_type": "enct5",
    "decoder_vocab_size": config.head.prompts,
    "tie_word_embeddings": False,
  }
  files = {
    "config.json": config_json,
    "README.md": model_card.text(config, "enct5", facts),
    hf_heads.CODE_FILE: hf_heads.code_text(),
  }
  folders.write_folder(folder, files, tensors, tokenizer, max_shard_bytes)
