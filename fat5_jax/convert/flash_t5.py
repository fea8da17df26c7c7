"""FAT5 / flashT5 folders (catie-aq/flashT5), in and out.

The names are Hugging Face's, moved about. Its attention is scaled by
1/sqrt(num_heads) unless `attention_scale` says otherwise, its output never. Of
its position encodings T5's and ALiBi's (symmetric) are ours; ALiBi has no
parameters. RoPE (which turns the values too) and FIRE (whose bias depends on
the query's position) are no functions of the distance alone, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
import re
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
from fat5_jax.models.config import T5Config

# A name that T5 has and FAT5 has not; see hf_heads.py.
_GUARD = "encoder.block.0.layer.0.layer_norm.weight"
_ATTENTION = {
  "SelfAttention": "self_attention",
  "EncDecAttention": "cross_attention",
}
_CLASSES = {
  "sequence_classification": "FlashT5ForSequenceClassification",
  "token_classification": "FlashT5ForTokenClassification",
  "question_answering": "FlashT5ForQuestionAnswering",
  "embedding": "FlashT5EncoderModel",
}


def flash_name(name: str) -> str:
  """FAT5's name of an HF tensor."""
  name = name.removeprefix("transformer.")
  match = re.match(r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d)\.(.*)$", name)
  if match is None:
    return name
  stack, block, layer, rest = match.groups()
  layers = ["self_attention_layer", "cross_attention_layer", "ff_layer"]
  if stack == "encoder":
    layers.remove("cross_attention_layer")
  part, _, rest = rest.partition(".")
  where = f"{stack}.block.{block}.{layers[int(layer)]}"
  if part == "layer_norm":
    return f"{where}.layer_norm.{rest}"
  if part == "DenseReluDense":
    inside = "" if rest.startswith("wo") else "act."
    return f"{where}.{inside}{rest}"
  inside = "pe_encoding." if rest.startswith("relative") else ""
  if re.match(r"[qkv]\.", rest):
    inside = "W"
  return f"{where}.{_ATTENTION[part]}.{inside}{rest}"


def _rows(config: T5Config) -> list[table.Row]:
  return [
    dataclasses.replace(row, foreign=flash_name(row.foreign))
    for row in hf.rows(config, published=True)
  ]


def is_flash(config_json: Mapping[str, Any]) -> bool:
  return config_json.get("model_type") == "flash_t5"


def open_model(folder: str) -> tuple[T5Config, Leaves]:
  """The config and the tensors of a FAT5 folder, to be read when wanted.

  Raises:
    UserError: with a `-`/`+` list if the tensors are not the config's, or for
      a position encoding that fat5_jax has not.
  """
  path = os.path.join(folder, "config.json")
  flash = tensor_files.read_json(path)
  tensors = hf_heads.without_guards(tensor_files.read_folder(folder))
  config = _config(flash, tensors, path)
  model_rows = _rows(config)
  tensors = hf.without_aliases(tensors, "shared.weight", folder)
  if config.logits_via_embedding:
    tensors.pop("lm_head.weight", None)
  return config, table.to_leaves(model_rows, tensors, folder)


def _config(flash, tensors: Mapping[str, Leaf], path: str) -> T5Config:
  position = flash.get("position_encoding_type", "t5")
  if position not in ("t5", "ALiBi") or (
    position == "ALiBi" and flash.get("alibi_mode", "symetric") != "symetric"
  ):
    raise UserError(
      f"{path}: position_encoding_type {str(position)[:80]!r}"
      f" ({str(flash.get('alibi_mode', ''))[:80]}): fat5_jax has FAT5's 't5'"
      " and symmetric 'ALiBi'"
    )
  for key in ("use_gelu_act", "use_glu_mlp"):
    hf.check_flag(flash, key, path)
  gelu = flash.get("use_gelu_act", True)
  glu = flash.get("use_glu_mlp", False)
  projection = ("gated-" if glu else "") + ("gelu_new" if gelu else "relu")
  if glu and gelu:
    projection = "gated-gelu"
  heads = flash.get("num_heads", 8)
  scale = flash.get("attention_scale")
  pad = flash.get("pad_token_id")
  if isinstance(pad, int) and pad < 0:
    pad = None  # FAT5's default is -100, which is no token.
  config = hf.config_from_json(
    {
      **flash,
      "model_type": "t5",
      "feed_forward_proj": projection,
      "scale_decoder_outputs": False,
      "pad_token_id": 0 if pad is None else pad,
    },
    path,
    tensors,
  )
  tied = flash.get("tie_word_embeddings", True) is not False
  has_head = hf_heads.read(flash, tensors, path)
  try:
    config = config.replace(
      attention_scale=heads**-0.5 if scale is None else scale,
      position_encoding="t5" if position == "t5" else "alibi",
      logits_via_embedding=has_head is None
      and (tied or "lm_head.weight" not in tensors),
      dtype=hf.stored_dtype(tensors),
    )
    return config.with_head(has_head)
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None


def to_folder(
  config: T5Config,
  params: Mapping[str, Any],
  folder: str,
  tokenizer: Any = None,
  *,
  max_shard_bytes: int = 10**9,
  facts: Mapping[str, Any] | None = None,
) -> None:
  """Writes a FAT5 folder; arguments as in hf.to_pretrained.

  Raises:
    UserError: for a model that FAT5 has not: another activation than its tanh
      GELU and ReLU, T5 1.0's scaled output, a bias of its own in every layer.
  """
  config, leaves = lora.merged(config, table.as_leaves(params))
  activation = config.mlp_activations[0]
  if activation not in ("gelu", "relu") or config.mlp_activations[1:] not in (
    (),
    ("linear",),
  ):
    raise UserError(f"FAT5 has no mlp_activations={config.mlp_activations}")
  if config.is_language_model and config.scales_decoder_outputs:
    raise UserError("FAT5 does not scale its output, as this T5 1.0 does")
  if config.relative_attention_per_layer:
    raise UserError("FAT5 has one position table for all layers, umT5 one each")
  tensors = table.to_foreign(_rows(config), leaves, "the parameters")
  plain = config.replace(attention_scale=1.0, position_encoding="t5")
  labels = {} if config.head is None else hf_heads.labels_json(config.head)
  config_json = hf.body_json(plain) | {
    **labels,
    "architectures": [
      _CLASSES.get(
        config.head and config.head.kind, "FlashT5ForConditionalGeneration"
      )
    ],
    "model_type": "flash_t5",
    "attention_scale": config.attention_scale,
    "position_encoding_type": "t5"
    if config.position_encoding == "t5"
    else "ALiBi",
    "alibi_mode": "symetric",
    "use_glu_mlp": len(config.mlp_activations) > 1,
    "use_gelu_act": activation == "gelu",
    "tie_word_embeddings": config.logits_via_embedding,
  }
  files = {
    "config.json": config_json,
    "README.md": model_card.text(config, "flash_t5", facts),
  }
  # FAT5's classes leave it unread, those of transformers refuse its shape.
  tensors[_GUARD] = table.leaf_of(np.zeros(0, np.float32))
  folders.write_folder(folder, files, tensors, tokenizer, max_shard_bytes)
