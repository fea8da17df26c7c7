"""Hugging Face T5, mT5, umT5, FLAN, UL2 and ByT5 folders, in and out.

`tie_word_embeddings` changed its meaning in transformers 5: configs there
always say true, tensors in the file decide whether weights are tied, and T5
keeps whether to scale the decoder output in `scale_decoder_outputs`, which in
4.x was the same flag. So a tied model is one without an `lm_head.weight` of its
own, and an export writes both what 4.x reads and what 5.x reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from fat5_jax.convert import table, tokenizers, torch_file
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

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
_ARCHITECTURES = {
  "t5": "T5ForConditionalGeneration",
  "mt5": "MT5ForConditionalGeneration",
  "umt5": "UMT5ForConditionalGeneration",
}
# Copies of `shared.weight` that older files hold beside it.
_EMBEDDING_ALIASES = (
  "encoder.embed_tokens.weight",
  "decoder.embed_tokens.weight",
)
# A table in T5 1.0 files that no version of the model reads.
_UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def rows(config: T5Config) -> list[table.Row]:
  """Every tensor of the model: HF name, our path, our shape."""
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
    for i in range(depth):
      theirs, ours = f"{stack}.block.{i}.layer", f"{stack}/layers_{i}"
      own = "attention" if stack == "encoder" else "self_attention"
      attention(f"{theirs}.0.SelfAttention", f"{ours}/{own}")
      norm(f"{theirs}.0", f"{ours}/pre_{own}_layer_norm")
      if i == 0 or config.relative_attention_per_layer:
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
  if not config.logits_via_embedding:
    add(
      "lm_head", "decoder/logits_dense/kernel", (emb, config.vocab_size), True
    )
  return out


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """The tensors of a folder: shapes at once, values on demand."""

  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, str]
  readers: Mapping[str, Callable[[], np.ndarray]]

  def read(self, name: str) -> np.ndarray:
    return self.readers[name]()


def _read_json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding="utf-8") as file:
      value = json.load(file)
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise UserError(f"{path}: not valid JSON: {e}") from None
  if not isinstance(value, dict):
    raise UserError(f"{path}: expected a JSON object")
  return value


@contextlib.contextmanager
def open_tensors(folder: str) -> Iterator[TensorFiles]:
  """The tensors of an HF folder: safetensors or `.bin`, sharded or whole.

  Raises:
    UserError: if there are none, a shard is missing, or a file is damaged.
  """
  for single, open_file in (
    ("model.safetensors", _open_safetensors),
    ("pytorch_model.bin", _open_bin),
  ):
    index = os.path.join(folder, f"{single}.index.json")
    if os.path.exists(os.path.join(folder, single)):
      files = [single]
    elif os.path.exists(index):
      weight_map = _read_json(index).get("weight_map", {})
      files = sorted(set(weight_map.values()))
    else:
      continue
    missing = [f for f in files if not os.path.exists(os.path.join(folder, f))]
    if missing:
      raise UserError(f"{folder}: {index} names {missing[0]}, which is missing")
    with contextlib.ExitStack() as stack:
      shapes, dtypes, readers = {}, {}, {}
      for file in files:
        path = os.path.join(folder, file)
        for name, (shape, dtype, read) in open_file(path, stack).items():
          shapes[name], dtypes[name], readers[name] = shape, dtype, read
      yield TensorFiles(shapes, dtypes, readers)
      return
  raise UserError(
    f"{folder}: no weights found; looked for model.safetensors and"
    " pytorch_model.bin, each whole or with an .index.json"
  )


def _open_safetensors(path: str, stack: contextlib.ExitStack):
  try:
    file = stack.enter_context(safetensors.safe_open(path, "numpy"))
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f"{path}: not a complete safetensors file: {e}") from None
  found = {}
  for name in file.keys():
    view = file.get_slice(name)
    found[name] = (
      tuple(view.get_shape()),
      {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(
        view.get_dtype(), view.get_dtype()
      ),
      lambda name=name: file.get_tensor(name),
    )
  return found


def _open_bin(path: str, stack: contextlib.ExitStack):
  del stack
  return {
    name: (array.shape, str(array.dtype), lambda array=array: array)
    for name, array in torch_file.load(path).items()
  }


def _config_from_json(hf: dict[str, Any], path: str) -> T5Config:
  """The T5Config of an HF config.json, but for what the tensors decide."""
  model_type = hf.get("model_type")
  if model_type not in _ARCHITECTURES:
    raise UserError(
      f"{path}: model_type is {model_type!r}; this reads"
      f" {', '.join(_ARCHITECTURES)}"
    )
  projection = hf.get(
    "feed_forward_proj", "relu" if model_type == "t5" else "gated-gelu"
  )
  gated, _, name = projection.rpartition("-")
  if projection == "gated-gelu":
    name = "gelu_new"
  if gated not in ("", "gated") or name not in _ACTIVATIONS:
    raise UserError(
      f"{path}: feed_forward_proj is {projection!r}; known are"
      f" {', '.join(sorted(_PROJECTIONS.values()))}"
    )
  activation = _ACTIVATIONS[name]
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
    return T5Config(
      vocab_size=hf.get("vocab_size", defaults[0]),
      emb_dim=hf.get("d_model", 512),
      num_heads=hf.get("num_heads", defaults[3]),
      head_dim=hf.get("d_kv", 64),
      num_encoder_layers=num_layers,
      num_decoder_layers=hf.get("num_decoder_layers") or num_layers,
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


def _token_id(hf: dict[str, Any], key: str, default: int) -> int:
  value = hf.get(key)
  if isinstance(value, list):
    value = value[0]
  return default if value is None else value


def _is_tied(config_json, tensors: TensorFiles) -> bool:
  """Whether the output projection is the embedding; see the module's head."""
  if "lm_head.weight" not in tensors.shapes:
    return True
  if config_json.get("tie_word_embeddings") is False:
    return False
  if "shared.weight" not in tensors.shapes:
    return False
  return np.array_equal(
    tensors.read("lm_head.weight"), tensors.read("shared.weight")
  )


def read_config(folder: str) -> T5Config:
  """The T5Config of an HF folder, without its weights.

  `dtype` is that of the stored weights, so that the model computes as stored.

  Raises:
    UserError: if the folder is not a T5 checkpoint.
  """
  with open_tensors(folder) as tensors:
    return _read_config(folder, tensors)


def _read_config(folder: str, tensors: TensorFiles) -> T5Config:
  path = os.path.join(folder, "config.json")
  config_json = _read_json(path)
  config = _config_from_json(config_json, path)
  stored = tensors.dtypes.get("shared.weight", "float32")
  return config.replace(
    logits_via_embedding=_is_tied(config_json, tensors),
    dtype="float32" if stored == "float32" else "bfloat16",
  )


def from_pretrained(folder: str) -> tuple[T5Config, dict[str, Any]]:
  """Loads an HF T5-family folder, strictly and without torch.

  Args:
    folder: holds config.json and safetensors or weights-only `.bin` files,
      sharded or whole.

  Returns:
    The config, and T5X's parameter tree of numpy arrays in the stored dtype.

  Raises:
    UserError: with a `-`/`+` list if a tensor is missing, unexpected or of
      another shape; if a file is damaged; if it is no T5.
  """
  with open_tensors(folder) as tensors:
    config = _read_config(folder, tensors)
    model_rows = rows(config)
    optional = set(_EMBEDDING_ALIASES) | set(_UNUSED)
    if config.logits_via_embedding:
      optional.add("lm_head.weight")
    found = set(tensors.shapes) - optional
    if "shared.weight" not in found and _EMBEDDING_ALIASES[0] in tensors.shapes:
      # A file that kept the alias instead of the name.
      model_rows[0] = dataclasses.replace(
        model_rows[0], foreign=_EMBEDDING_ALIASES[0]
      )
      found.add(_EMBEDDING_ALIASES[0])
    table.check_names((r.foreign for r in model_rows), found, folder)
    table.check_shapes(
      {r.foreign: r.foreign_shape for r in model_rows}, tensors.shapes, folder
    )
    shared = tensors.read(model_rows[0].foreign)
    for alias in _EMBEDDING_ALIASES:
      if alias in tensors.shapes and not np.array_equal(
        tensors.read(alias), shared
      ):
        raise UserError(
          f"{folder}: {alias} differs from shared.weight; T5 has one"
          " embedding for both stacks"
        )
    return config, table.to_tree(model_rows, tensors.read)


def hf_config(config: T5Config) -> dict[str, Any]:
  """config.json of an export, right for transformers 4.37 and 5.

  Raises:
    UserError: for an activation that HF has no name for.
  """
  projection = _PROJECTIONS.get(config.mlp_activations)
  if projection is None:
    raise UserError(
      f"mlp_activations={config.mlp_activations} has no Hugging Face name;"
      f" those with one: {', '.join(map(str, _PROJECTIONS))}"
    )
  name = projection.rpartition("-")[2]
  return {
    "architectures": [_ARCHITECTURES[config.model_type]],
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
    "is_encoder_decoder": True,
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
  scaled, tied = config.scales_decoder_outputs, config.logits_via_embedding
  if scaled and not tied:
    logger.warning(
      "this model scales its output but has a projection of its own:"
      " transformers 4.x cannot express that and will ignore lm_head.weight"
    )
  if config.model_type == "umt5" and not scaled:
    logger.warning(
      "transformers 5 (seen up to 5.23) always scales umT5's output by"
      " d_model**-0.5: logits there are smaller by that factor, generation"
      " by greedy search is the same; 4.x is exact"
    )
  if config.model_type == "mt5" and scaled:
    logger.warning("transformers 5 never scales mT5's output; 4.x does")


def to_pretrained(
  config: T5Config,
  params: Mapping[str, Any],
  folder: str,
  tokenizer: Any = None,
  *,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a complete HF folder that stock transformers 4.37 and 5 load.

  Args:
    config: describes `params`.
    params: T5X's parameter tree, unstacked; written in its own dtypes.
    folder: created; replaced as a whole if it is an earlier export.
    tokenizer: what to write the tokenizer from: a folder that holds tokenizer
      files, a SentencePiece model file, an HF tokenizer, or a SeqIO
      vocabulary; None writes none.
    max_shard_bytes: a larger model is split into several files.

  Raises:
    UserError: if the parameters are not the config's (`-`/`+` list), or the
      folder holds something else.
  """
  folder = os.path.abspath(folder)
  if (
    os.path.isdir(folder)
    and os.listdir(folder)
    and not os.path.exists(os.path.join(folder, "config.json"))
  ):
    raise UserError(f"{folder}: exists and is no Hugging Face folder")
  _warn_of_old_readers(config)
  tensors = dict(table.from_tree(rows(config), params, "the parameters"))
  if config.logits_via_embedding and not config.scales_decoder_outputs:
    # 4.x ties only models that it scales; a second copy is right everywhere.
    tensors["lm_head.weight"] = tensors["shared.weight"]
  parent = os.path.dirname(folder)
  os.makedirs(parent, exist_ok=True)
  # Written beside and moved in one step, so a failure leaves nothing half done.
  with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as scratch:
    target = os.path.join(scratch, "hf")
    os.mkdir(target)
    _write_tensors(tensors, target, max_shard_bytes)
    config_json = hf_config(config)
    dtype = str(tensors["shared.weight"].dtype)
    # 4.x reads torch_dtype, 5.x dtype.
    config_json |= {"torch_dtype": dtype, "dtype": dtype}
    _write_json(os.path.join(target, "config.json"), config_json)
    _write_json(
      os.path.join(target, "generation_config.json"),
      {
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
      },
    )
    if tokenizer is not None:
      tokenizers.write(tokenizer, target)
    if os.path.isdir(folder):
      os.rename(folder, os.path.join(scratch, "old"))
    os.rename(target, folder)


def _write_json(path: str, value: dict[str, Any]) -> None:
  with open(path, "w", encoding="utf-8") as file:
    json.dump(value, file, indent=2, sort_keys=True)
    file.write("\n")


def _write_tensors(tensors, folder: str, max_shard_bytes: int) -> None:
  shards: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, array in tensors.items():
    if size and size + array.nbytes > max_shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = array
    size += array.nbytes
  # transformers 4 refuses files that do not name their format.
  metadata = {"format": "pt"}
  if len(shards) == 1:
    path = os.path.join(folder, "model.safetensors")
    safetensors_numpy.save_file(shards[0], path, metadata=metadata)
    return
  weight_map = {}
  for i, shard in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    path = os.path.join(folder, file)
    safetensors_numpy.save_file(shard, path, metadata=metadata)
    weight_map |= dict.fromkeys(shard, file)
  _write_json(
    os.path.join(folder, "model.safetensors.index.json"),
    {
      "metadata": {"total_size": sum(a.nbytes for a in tensors.values())},
      "weight_map": weight_map,
    },
  )
