"""Hugging Face T5, mT5, umT5, FLAN, UL2 and ByT5 folders, in and out.

`tie_word_embeddings` changed its meaning in transformers 5: configs there
always say true, tensors in the file decide whether weights are tied, and T5
keeps whether to scale the decoder output in `scale_decoder_outputs`, which in
4.x was the same flag. So a tied model is one without an `lm_head.weight` of its
own, and an export writes both what 4.x reads and what 5.x reads.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import logging
import os
from typing import Any

import numpy as np

from fat5_jax.convert import (
  folders,
  hf_heads,
  lora,
  model_card,
  sentence_transformers,
  table,
  tensor_files,
)
from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

logger = logging.getLogger("fat5_jax")

_ACTIVATIONS = {
  "relu": "relu",
  "gelu_new": "gelu",
  "gelu": "gelu_exact",
  "silu": "silu",
  "swish": "silu",
}
# transformers reads "gated-gelu" as the tanh approximation.
_PROJECTIONS = {
  ("relu",): "relu",
  ("gelu", "linear"): "gated-gelu",
  ("silu", "linear"): "gated-silu",
  ("relu", "linear"): "gated-relu",
  ("gelu",): "gelu_new",
  ("gelu_exact",): "gelu",
  ("silu",): "silu",
}
_MODEL_TYPES = ("t5", "mt5", "umt5")
_HF_BODY = "transformer."
# Copies of `shared.weight` that older files hold beside it.
_EMBEDDING_ALIASES = (
  "encoder.embed_tokens.weight",
  "decoder.embed_tokens.weight",
)
# A table in T5 1.0 files that no version of the model reads.
_UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def rows(config: T5Config, published: bool = False) -> list[table.Row]:
  """Every tensor of the model: HF name, our path, our shape.

  Args:
    config: of the model.
    published: under FAT5's names of heads on the encoder; see hf_heads.py.

  Raises:
    UserError: for a head that has no names there.
  """
  prefix = hf_heads.prefix(config, published)
  found = [
    dataclasses.replace(row, foreign=prefix + row.foreign)
    for row in body_rows(config)
  ]
  return found + hf_heads.rows(config, published)


def body_rows(config: T5Config) -> list[table.Row]:
  """The tensors of the two stacks, and the language model's projection."""
  width = config.num_heads * config.head_dim
  emb, mlp = config.emb_dim, config.mlp_dim
  out: list[table.Row] = []

  def add(foreign, path, shape, transposed=False):
    out.append(
      table.Row(f"{foreign}.weight", tuple(path.split("/")), shape, transposed)
    )

  def attention(foreign, path):
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
      add(f"{foreign}.{theirs}", f"{path}/{ours}/kernel", (emb, width), True)
    add(f"{foreign}.o", f"{path}/out/kernel", (width, emb), True)

  def norm(foreign, path):
    add(f"{foreign}.layer_norm", f"{path}/scale", (emb,))

  def feed_forward(foreign, path):
    names = [f"wi_{i}" for i in range(len(config.mlp_activations))]
    for name in names if len(names) > 1 else ["wi"]:
      add(
        f"{foreign}.DenseReluDense.{name}",
        f"{path}/mlp/{name}/kernel",
        (emb, mlp),
        True,
      )
    add(
      f"{foreign}.DenseReluDense.wo", f"{path}/mlp/wo/kernel", (mlp, emb), True
    )
    norm(foreign, f"{path}/pre_mlp_layer_norm")

  add("shared", "token_embedder/embedding", (config.vocab_size, emb))
  for stack, depth in (
    ("encoder", config.num_encoder_layers),
    ("decoder", config.num_decoder_layers),
  ):
    if not depth:
      continue
    for i in range(depth):
      theirs, ours = f"{stack}.block.{i}.layer", f"{stack}/layers_{i}"
      own = "attention" if stack == "encoder" else "self_attention"
      attention(f"{theirs}.0.SelfAttention", f"{ours}/{own}")
      norm(f"{theirs}.0", f"{ours}/pre_{own}_layer_norm")
      is_first = i == 0 or config.relative_attention_per_layer
      if is_first and config.position_encoding == "t5":
        per_layer = config.relative_attention_per_layer
        add(
          f"{theirs}.0.SelfAttention.relative_attention_bias",
          f"{ours if per_layer else stack}/relpos_bias/rel_embedding",
          (config.num_heads, config.relative_attention_num_buckets),
          True,
        )
      if stack == "decoder":
        attention(
          f"{theirs}.1.EncDecAttention", f"{ours}/encoder_decoder_attention"
        )
        norm(f"{theirs}.1", f"{ours}/pre_cross_attention_layer_norm")
      feed_forward(f"{theirs}.{1 if stack == 'encoder' else 2}", ours)
    add(f"{stack}.final_layer_norm", f"{stack}/{stack}_norm/scale", (emb,))
  if config.is_language_model and not config.logits_via_embedding:
    add(
      "lm_head", "decoder/logits_dense/kernel", (emb, config.vocab_size), True
    )
  return out


def config_from_json(
  hf: dict[str, Any], path: str, tensors: Mapping[str, Leaf]
) -> T5Config:
  """The T5Config of an HF config.json, but for what the tensors decide."""
  model_type = hf.get("model_type")
  if model_type not in _MODEL_TYPES:
    raise UserError(
      f"{path}: model_type is {model_type!r}; this reads"
      f" {', '.join(_MODEL_TYPES)}"
    )
  projection = hf.get(
    "feed_forward_proj", "relu" if model_type == "t5" else "gated-gelu"
  )
  if not isinstance(projection, str):
    projection = str(projection)[:80]
  gated, _, name = projection.rpartition("-")
  if projection == "gated-gelu":
    name = "gelu_new"
  if gated not in ("", "gated") or name not in _ACTIVATIONS:
    raise UserError(
      f"{path}: feed_forward_proj is {projection!r}; known are"
      f" {', '.join(sorted(_PROJECTIONS.values()))}"
    )
  activation = _ACTIVATIONS[name]
  for key in ("tie_word_embeddings", "scale_decoder_outputs"):
    check_flag(hf, key, path)
  tied_flag = hf.get("tie_word_embeddings", model_type != "mt5")
  version = str(hf.get("transformers_version") or "5").split(".")[0]
  if model_type == "t5":
    scaled = hf.get("scale_decoder_outputs", tied_flag is not False)
  elif model_type == "mt5":
    # transformers 5 writes true and never scales; 4.x scaled where true.
    scaled = tied_flag is True and version < "5"
  else:
    scaled = tied_flag is not False
  defaults = {
    "t5": (32128, 2048, 6, 8),
    "mt5": (250112, 1024, 8, 6),
    "umt5": (250112, 1024, 8, 6),
  }[model_type]
  num_layers = hf.get("num_layers", defaults[2])
  try:
    config = T5Config(
      vocab_size=hf.get("vocab_size", defaults[0]),
      emb_dim=hf.get("d_model", 512),
      num_heads=hf.get("num_heads", defaults[3]),
      head_dim=hf.get("d_kv", 64),
      num_encoder_layers=num_layers,
      num_decoder_layers=_decoder_layers(hf, num_layers),
      mlp_dim=hf.get("d_ff", defaults[1]),
      mlp_activations=(activation, "linear") if gated else (activation,),
      logits_via_embedding=False,
      scale_decoder_outputs=bool(scaled),
      relative_attention_num_buckets=hf.get(
        "relative_attention_num_buckets", 32
      ),
      relative_attention_max_distance=hf.get(
        "relative_attention_max_distance", 128
      ),
      relative_attention_per_layer=model_type == "umt5",
      layer_norm_epsilon=hf.get("layer_norm_epsilon", 1e-6),
      dropout_rate=hf.get("dropout_rate", 0.1),
      pad_token_id=_token_id(hf, "pad_token_id", 0),
      eos_token_id=_token_id(hf, "eos_token_id", 1),
      decoder_start_token_id=_token_id(hf, "decoder_start_token_id", 0),
      model_type=model_type,
    )
  except (ValueError, TypeError) as e:
    raise UserError(f"{path}: {e}") from None
  table.check_layers(config, len(tensors), path)
  return config


def check_flag(hf: Mapping[str, Any], key: str, path: str) -> None:
  """Raises UserError unless a key says true, false or nothing."""
  value = hf.get(key)
  if value is not None and not isinstance(value, bool):
    raise UserError(f"{path}: {key} is {str(value)[:80]!r}, not true or false")


def _decoder_layers(hf: dict[str, Any], num_layers: int) -> int:
  found = hf.get("num_decoder_layers")
  return num_layers if found is None else found


def _token_id(hf: dict[str, Any], key: str, default: int) -> int:
  value = hf.get(key)
  if isinstance(value, list) and value:
    value = value[0]
  return default if value is None else value


def _is_tied(config_json, tensors: Mapping[str, Leaf]) -> bool:
  """Whether the output projection is the embedding; see the module's head."""
  if "lm_head.weight" not in tensors:
    return True
  # Ours says so of a tied model that is not scaled, which 4.x has no words for.
  said = hf_heads.own_part(config_json).get("logits_via_embedding", False)
  if config_json.get("tie_word_embeddings") is False and not said:
    return False
  if "shared.weight" not in tensors:
    return False
  return np.array_equal(
    tensors["lm_head.weight"].read(), tensors["shared.weight"].read()
  )


def read_config(folder: str) -> T5Config:
  """The T5Config of an HF folder, without its weights.

  `dtype` is that of the stored weights, so that the model computes as stored.

  Raises:
    UserError: if the folder is not a T5 checkpoint.
  """
  tensors = hf_heads.without_guards(tensor_files.read_folder(folder))
  return _read_config(folder, tensors)


def _read_config(folder: str, tensors: Mapping[str, Leaf]) -> T5Config:
  path = os.path.join(folder, "config.json")
  config_json = tensor_files.read_json(path)
  t5_json = config_json
  if "t5" in config_json:
    # A folder with a modelling file has the T5's own config inside.
    inside = config_json["t5"]
    if not isinstance(inside, dict):
      raise UserError(f"{path}: t5 is no JSON object")
    t5_json = {**inside, "model_type": inside.get("family")}
  config = config_from_json(t5_json, path, tensors)
  head = hf_heads.read(config_json, tensors, path)
  tied = False
  if head is None or head.kind == "language_model":
    body = _HF_BODY if "t5" in config_json else ""
    tied = _is_tied(
      config_json, {k.removeprefix(body): x for k, x in tensors.items()}
    )
  config = config.replace(
    logits_via_embedding=tied, dtype=stored_dtype(tensors)
  )
  if head is None and not has_decoder(tensors):
    # T5EncoderModel.
    head = HeadConfig("embedding")
  try:
    return config.with_head(head)
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None


def has_decoder(tensors: Mapping[str, Leaf]) -> bool:
  return any(".block." in name and "decoder." in name for name in tensors)


def stored_dtype(tensors: Mapping[str, Leaf]) -> str:
  """float32 for a file of it, else bfloat16."""
  stored = {x.dtype for x in tensors.values() if len(x.shape) == 2}
  return "float32" if stored <= {"float32"} else "bfloat16"


def open_model(
  folder: str, without_decoder: bool = False
) -> tuple[T5Config, Leaves]:
  """The config and the tensors of an HF folder, to be read when wanted.

  Args:
    folder: holds config.json and safetensors or weights-only `.bin` files,
      sharded or whole: a T5, one of HF's heads, or an encoder alone.
    without_decoder: leaves the decoder out, unread.

  Raises:
    UserError: as in `from_pretrained`.
  """
  tensors = hf_heads.without_guards(tensor_files.read_folder(folder))
  config = _read_config(folder, tensors)
  # FAT5's and monologg's have no `transformer.`, nor had our earlier exports.
  published = not any(name.startswith(_HF_BODY) for name in tensors)
  model_rows = rows(config, published)
  if config.head is None or config.head.kind != "enct5":
    # An EncT5's decoder has an embedding of its own.
    tensors = without_aliases(tensors, model_rows[0].foreign, folder)
  if config.logits_via_embedding:
    tensors.pop("lm_head.weight", None)
  leaves = table.to_leaves(model_rows, tensors, folder)
  if without_decoder:
    leaves = {k: leaf for k, leaf in leaves.items() if k[0] != "decoder"}
  return config, leaves


def without_aliases(
  tensors: Mapping[str, Leaf], embedding: str, where: str
) -> dict[str, Leaf]:
  """The tensors without copies of the embedding and those no model reads.

  Raises:
    UserError: for an alias that is another table.
  """
  prefix = embedding.removesuffix("shared.weight")
  found = {k: v for k, v in tensors.items() if k not in _prefixed(prefix)}
  aliases = [prefix + name for name in _EMBEDDING_ALIASES]
  if embedding not in tensors and aliases[0] in tensors:
    # A file that kept the alias instead of the name.
    found[embedding] = tensors[aliases[0]]
  for alias in aliases:
    if alias in tensors and embedding in found:
      same = tensors[alias].shape == found[embedding].shape
      if not (
        same and np.array_equal(tensors[alias].read(), found[embedding].read())
      ):
        raise UserError(
          f"{where}: {alias} differs from {embedding}; T5 has one embedding"
          " for both stacks"
        )
  return found


def _prefixed(prefix: str) -> set[str]:
  return {prefix + name for name in (*_EMBEDDING_ALIASES, *_UNUSED)}


def from_pretrained(
  folder: str, without_decoder: bool = False
) -> tuple[T5Config, dict[str, Any]]:
  """Loads an HF T5-family folder, strictly and without torch.

  Args:
    folder: see `open_model`.
    without_decoder: leaves the decoder out, unread.

  Returns:
    The config, and T5X's parameter tree of numpy arrays in the stored dtype.

  Raises:
    UserError: with a `-`/`+` list if a tensor is missing, unexpected or of
      another shape; if a file is damaged; if it is no T5.
  """
  config, leaves = open_model(folder, without_decoder)
  return config, table.read_all(leaves)


def hf_config(config: T5Config) -> dict[str, Any]:
  """config.json of an export, right for transformers 4.37 and 5.

  Raises:
    UserError: see `body_json`.
  """
  found = hf_heads.config_json(config, body_json(config))
  if _is_tied_unscaled(config):
    own = found.setdefault("fat5_jax", {})
    own["logits_via_embedding"] = True
  return found


def _is_tied_unscaled(config: T5Config) -> bool:
  return (
    config.is_language_model
    and config.logits_via_embedding
    and not config.scales_decoder_outputs
  )


def body_json(config: T5Config) -> dict[str, Any]:
  """What config.json says of the T5 itself, without its head.

  Raises:
    UserError: for an activation that HF has no name for.
  """
  projection = _PROJECTIONS.get(config.mlp_activations)
  if projection is None:
    raise UserError(
      f"mlp_activations={config.mlp_activations} has no Hugging Face name;"
      f" those with one: {', '.join(map(str, _PROJECTIONS))}"
    )
  if config.position_encoding != "t5" or config.attention_scale != 1.0:
    raise UserError(
      f"position_encoding={config.position_encoding!r} with attention_scale ="
      f" {config.attention_scale}: Hugging Face's T5 has its own relative"
      " buckets, and no scale. FAT5 has most of ours: write it with --to"
      " flash_t5"
    )
  name = projection.rpartition("-")[2]
  return {
    "model_type": config.model_type,
    "vocab_size": config.vocab_size,
    "d_model": config.emb_dim,
    "d_kv": config.head_dim,
    "d_ff": config.mlp_dim,
    "num_layers": config.num_encoder_layers,
    "num_decoder_layers": config.num_decoder_layers,
    "num_heads": config.num_heads,
    "relative_attention_num_buckets": config.relative_attention_num_buckets,
    "relative_attention_max_distance": config.relative_attention_max_distance,
    "dropout_rate": config.dropout_rate,
    "layer_norm_epsilon": config.layer_norm_epsilon,
    "initializer_factor": 1.0,
    "feed_forward_proj": projection,
    "dense_act_fn": "gelu_new" if projection == "gated-gelu" else name,
    "is_gated_act": len(config.mlp_activations) > 1,
    "is_encoder_decoder": config.num_decoder_layers > 0,
    "use_cache": True,
    "pad_token_id": config.pad_token_id,
    "eos_token_id": config.eos_token_id,
    "decoder_start_token_id": config.decoder_start_token_id,
    # 4.x: tied and scaled, or neither. 5.x: scaled (T5, umT5).
    "tie_word_embeddings": config.scales_decoder_outputs,
    # 5.x, T5 only; 4.x ignores it.
    "scale_decoder_outputs": config.scales_decoder_outputs,
  }


def _warn_of_old_readers(config: T5Config) -> None:
  if hf_heads.form(config) == "code" or not config.is_language_model:
    return
  scaled, tied = config.scales_decoder_outputs, config.logits_via_embedding
  if scaled and not tied:
    logger.warning(
      "this model scales its output but has a projection of its own:"
      " transformers 4.x cannot express that and will ignore lm_head.weight"
    )
  if config.model_type == "umt5" and not scaled:
    logger.warning(
      "transformers 5 up to 5.23 always scales umT5's output by"
      " d_model**-0.5: logits there are smaller by that factor, generation"
      " by greedy search is the same; 4.x and 5.24 are exact"
    )
  if config.model_type == "mt5" and scaled:
    logger.warning("transformers 5 never scales mT5's output; 4.x does")


def to_pretrained(
  config: T5Config,
  params: Mapping[str, Any],
  folder: str,
  tokenizer: Any = None,
  *,
  max_shard_bytes: int = 10**9,
  facts: Mapping[str, Any] | None = None,
) -> None:
  """Writes a complete HF folder that transformers 4.37 and 5 load.

  A head that they have no class for brings one in a file, which they load with
  `trust_remote_code=True`; the folder's README.md has the lines.

  Args:
    config: describes `params`.
    params: T5X's parameter tree, unstacked, of arrays or of `table.Leaf`;
      written in its own dtypes, LoRA merged.
    folder: created; replaced as a whole if it is an earlier export.
    tokenizer: what to write the tokenizer from: a folder that holds tokenizer
      files, a SentencePiece model file, an HF tokenizer, or a SeqIO
      vocabulary; None writes none.
    max_shard_bytes: a larger model is split into several files.
    facts: what the model card says of the run; model_card.facts_of_run.

  Raises:
    UserError: if the parameters are not the config's (`-`/`+` list), the
      folder holds something else, or HF has no such model.
  """
  leaves = table.as_leaves(params)
  config, leaves = lora.merged(config, leaves)
  config_json = hf_config(config)
  tensors = table.to_foreign(rows(config), leaves, "the parameters")
  _warn_of_old_readers(config)
  form = hf_heads.form(config)
  if _is_tied_unscaled(config) and form == "stock":
    # 4.x ties only models that it scales; a second copy is right everywhere.
    tensors["lm_head.weight"] = tensors["shared.weight"]
  files: dict[str, Any] = {
    "config.json": config_json | dtype_json(tensors),
    "README.md": model_card.text(config, f"hf_{form}", facts),
  }
  if form != "code":
    tensors = hf_heads.guards(config, tensors)
  if form != "stock":
    files[hf_heads.CODE_FILE] = hf_heads.code_text()
  if config.is_language_model:
    files["generation_config.json"] = {
      "decoder_start_token_id": config.decoder_start_token_id,
      "eos_token_id": config.eos_token_id,
      "pad_token_id": config.pad_token_id,
    }
    if form == "code":
      # The modelling file has none.
      files["generation_config.json"]["use_cache"] = False
  elif config.head.kind == "embedding":
    files |= sentence_transformers.files(config)
  folders.write_folder(folder, files, tensors, tokenizer, max_shard_bytes)


def dtype_json(tensors: Mapping[str, Leaf]) -> dict[str, str]:
  dtype = next(iter(tensors.values())).dtype
  # 4.x reads torch_dtype, 5.x dtype.
  return {"torch_dtype": dtype, "dtype": dtype}
