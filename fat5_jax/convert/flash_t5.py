"""FAT5 / flashT5 folders (catie-aq/flashT5), in and out.

The names are Hugging Face's, moved about. Its attention is scaled by
1/sqrt(num_heads) unless `attention_scale` says otherwise, its output never.
What its position encodings do, read in its code:

- RoPE turns queries, keys and values, in cross-attention too, where each side
  counts from its own start: `rotary_scope="everything"`. Its angles are rounded
  to the dtype it computes in, ours are float32. Of RoPE it ignores
  `use_randomized_position_encoding`.
- FIRE's network is the first block's, and shared; its threshold is a multiplier
  that is trained and `init_L`, a tensor that is not, made of
  `relative_attention_max_distance`.
- Random positions are drawn apart for queries and keys, and in evaluation too;
  ours are one draw for both, in training alone.
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


# Of FIRE: FAT5's name -> ours, and the axes.
_FIRE = {
  "mlp.0.weight": "hidden_kernel",
  "mlp.0.bias": "hidden_bias",
  "mlp.2.weight": "out_kernel",
  "mlp.2.bias": "out_bias",
  "c": "c",
  "L_multiplier": "threshold_multiplier",
}
_INIT = ".pe_encoding.init_L"
_ENCODINGS = {"t5": "t5", "ALiBi": "alibi", "RoPE": "rope", "FIRE": "fire"}
_ALIBI_MODES = {"symetric": "symmetric", "asymetric": "asymmetric"}


def _rows(config: T5Config) -> list[table.Row]:
  rows = [
    dataclasses.replace(row, foreign=flash_name(row.foreign))
    for row in hf.rows(config, published=True)
  ]
  if config.position_encoding != "fire":
    return rows
  heads, width = config.num_heads, config.fire_mlp_width
  shapes = {
    "hidden_kernel": (1, width),
    "hidden_bias": (width,),
    "out_kernel": (heads, width),
    "out_bias": (heads,),
  }
  for stack, where in _fire_modules(config).items():
    for theirs, ours in _FIRE.items():
      path, turned = (stack, "relpos_bias", ours), ours == "hidden_kernel"
      shape = shapes.get(ours, ())
      rows.append(table.Row(f"{where}.{theirs}", path, shape, turned))
  return rows


def _fire_modules(config: T5Config) -> dict[str, str]:
  """Stack -> the module of its first block that holds FIRE."""
  stacks = ["encoder", "decoder"] if config.num_decoder_layers else ["encoder"]
  return {
    stack: f"{stack}.block.0.self_attention_layer.self_attention.pe_encoding"
    for stack in stacks
  }


def _check_thresholds(
  config: T5Config, thresholds: Mapping[str, Leaf], folder: str
) -> None:
  """Raises UserError unless FIRE's `init_L` are what the config says."""
  expected = config.relative_attention_max_distance
  for name, leaf in thresholds.items():
    found = leaf.read().reshape(-1).tolist()
    if config.position_encoding != "fire" or found != [expected]:
      raise UserError(
        f"{folder}: {table.shown(name)} is {str(found)[:80]}; FAT5 makes it of"
        f" FIRE's relative_attention_max_distance, which is {expected}"
      )


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
  thresholds = {
    name: tensors.pop(name) for name in list(tensors) if name.endswith(_INIT)
  }
  config = _config(flash, tensors, path)
  _check_thresholds(config, thresholds, folder)
  model_rows = _rows(config)
  tensors = hf.without_aliases(tensors, "shared.weight", folder)
  if config.logits_via_embedding:
    tensors.pop("lm_head.weight", None)
  return config, table.to_leaves(model_rows, tensors, folder)


def _config(flash, tensors: Mapping[str, Leaf], path: str) -> T5Config:
  positions = _positions(flash, path)
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
      **positions,
      logits_via_embedding=has_head is None
      and (tied or "lm_head.weight" not in tensors),
      dtype=hf.stored_dtype(tensors),
    )
    return config.with_head(has_head)
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None


def _positions(flash: Mapping[str, Any], path: str) -> dict[str, Any]:
  """The fields of T5Config that say where tokens stand."""

  def choice(key, default, choices):
    value = flash.get(key, default)
    if not isinstance(value, str) or value not in choices:
      raise UserError(
        f"{path}: {key} is {str(value)[:80]!r}; fat5_jax has FAT5's"
        f" {', '.join(map(repr, choices))}"
      )
    return choices[value]

  hf.check_flag(flash, "use_randomized_position_encoding", path)
  encoding = choice("position_encoding_type", "t5", _ENCODINGS)
  randomized = flash.get("use_randomized_position_encoding") or False
  found = {
    "position_encoding": encoding,
    "randomized_positions": encoding != "rope" and randomized,
    "max_positions": flash.get("max_sequence_length", 1024),
  }
  if encoding == "alibi":
    found["alibi_mode"] = choice("alibi_mode", "symetric", _ALIBI_MODES)
  if encoding == "fire":
    found["fire_mlp_width"] = flash.get("fire_mlp_width", 32)
  if encoding == "rope":
    found |= {
      "rotary_scope": "everything",
      "rotary_fraction": flash.get("rotary_emb_fraction", 1.0),
      "rotary_base": flash.get("rotary_base", 10_000),
      "rotary_interleaved": flash.get("rotary_interleaved", False),
      "rotary_scale_base": flash.get("rotary_scale_base"),
    }
  return found


def _positions_json(config: T5Config) -> dict[str, Any]:
  """The inverse of `_positions`."""
  named = lambda names, ours: {v: k for k, v in names.items()}[ours]
  return {
    "position_encoding_type": named(_ENCODINGS, config.position_encoding),
    "use_randomized_position_encoding": config.randomized_positions,
    "max_sequence_length": config.max_positions,
    "alibi_mode": named(_ALIBI_MODES, config.alibi_mode),
    "fire_mlp_width": config.fire_mlp_width,
    "rotary_emb_fraction": config.rotary_fraction,
    "rotary_base": config.rotary_base,
    "rotary_interleaved": config.rotary_interleaved,
    "rotary_scale_base": config.rotary_scale_base,
  }


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
      GELU and ReLU, T5 1.0's scaled output, a bias of its own in every layer,
      no position encoding, rotary embeddings of self-attention alone.
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
  if config.position_encoding == "none":
    raise UserError("FAT5 has no position_encoding='none'")
  if config.position_encoding == "rope" and config.rotary_scope != "everything":
    raise UserError(
      "FAT5's RoPE turns values, and cross-attention: it has no"
      f" rotary_scope={config.rotary_scope!r}"
    )
  tensors = table.to_foreign(_rows(config), leaves, "the parameters")
  if config.position_encoding == "fire":
    threshold = np.int64(config.relative_attention_max_distance)
    for where in _fire_modules(config).values():
      tensors[f"{where}.init_L"] = table.leaf_of(threshold)
  plain = config.replace(
    attention_scale=1.0, position_encoding="t5", randomized_positions=False
  )
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
    **_positions_json(config),
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
