"""Small valid model folders of every kind, made without torch."""

from __future__ import annotations

import functools
import json
import pathlib

import numpy as np
import safetensors.numpy
import torch_files

from fat5_jax import trees
from fat5_jax.checkpoints import writer

CONFIG = {
  "model_type": "t5",
  "vocab_size": 48,
  "d_model": 8,
  "d_kv": 4,
  "d_ff": 12,
  "num_heads": 2,
  "num_layers": 1,
  "num_decoder_layers": 1,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 16,
  "dropout_rate": 0.1,
  "layer_norm_epsilon": 1e-6,
  "feed_forward_proj": "relu",
  "tie_word_embeddings": True,
  "pad_token_id": 0,
  "eos_token_id": 1,
  "decoder_start_token_id": 0,
}
KINDS = ("safetensors", "bin", "t5x", "zarr", "run")
# Formats whose JSON files are fuzzed too; what is listed here is of KINDS.
OTHER_KINDS = ("flash_t5", "enct5", "tagger", "peft")


def _config():
  from fat5_jax.convert import hf

  config = hf.config_from_json(dict(CONFIG), "", dict.fromkeys(range(99)))
  return config.replace(logits_via_embedding=True, dtype="float32")


@functools.cache
def tensors() -> dict[str, np.ndarray]:
  """Of the model, by the names of Hugging Face."""
  from fat5_jax.convert import hf

  rng = np.random.default_rng(0)
  return {
    row.foreign: rng.normal(size=row.foreign_shape).astype(np.float32)
    for row in hf.rows(_config())
  }


def spiece() -> bytes:
  """A SentencePiece model of letters."""
  from sentencepiece import sentencepiece_model_pb2 as spm

  proto = spm.ModelProto()
  for text, kind in (("<pad>", 3), ("</s>", 3), ("<unk>", 2)):
    proto.pieces.add(piece=text, score=0.0, type=kind)
  for number, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz"):
    proto.pieces.add(piece=letter, score=-float(number))
  trainer = proto.trainer_spec
  trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(proto.pieces)
  trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
  proto.normalizer_spec.name = "identity"
  return proto.SerializeToString()


def make(kind: str, folder: pathlib.Path) -> None:
  """Writes the whole folder of a kind."""
  folder.mkdir(parents=True)
  if kind in ("safetensors", "bin"):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 10}')
    (folder / "spiece.model").write_bytes(spiece())
    if kind == "bin":
      torch_files.write(folder / "pytorch_model.bin", tensors())
    else:
      safetensors.numpy.save_file(tensors(), folder / "model.safetensors")
    return
  if kind in OTHER_KINDS:
    return _make_other(kind, folder)

  leaves = _leaves()
  if kind == "run":
    writer.write_params(str(folder), _config(), leaves)
    return
  tree = trees.nest({path: leaf.read() for path, leaf in leaves.items()})
  if kind == "zarr":
    tree = _beside(tree, folder)
  write_msgpack(folder, tree)


def _make_other(kind: str, folder: pathlib.Path) -> None:
  from fat5_jax.convert import enct5, flash_t5, hf, peft, table
  from fat5_jax.models.config import HeadConfig, LoRAConfig

  config = _config().replace(scale_decoder_outputs=False)
  if kind == "enct5":
    config = config.with_head(HeadConfig("enct5", label_names=("a", "b")))
  elif kind == "tagger":
    config = config.with_head(HeadConfig("token_classification"))
  elif kind == "peft":
    make("safetensors", folder / "base")
    config = config.replace(lora=LoRAConfig(rank=2))
  leaves = {
    row.path: table.leaf_of(np.ones(row.shape, np.float32))
    for row in hf.rows(config.replace(lora=None))
  }
  if kind == "peft":
    for row in peft._rows(config):
      leaves[row.path] = table.leaf_of(np.ones(row.shape, np.float32))
  write = {
    "flash_t5": flash_t5.to_folder,
    "enct5": enct5.to_folder,
    "tagger": hf.to_pretrained,
    "peft": lambda c, x, f: peft.to_peft(c, x, f, str(folder / "base")),
  }[kind]
  write(config, leaves, str(folder / "it" if kind == "peft" else folder))


def _leaves():
  from fat5_jax.convert import hf, table

  found = {name: table.leaf_of(x) for name, x in tensors().items()}
  return table.to_leaves(hf.rows(_config()), found, "")


def write_msgpack(folder: pathlib.Path, target) -> None:
  from flax import serialization

  tree = {"version": 3, "optimizer": {"target": target, "state": {}}}
  data = serialization.msgpack_serialize(tree)
  (folder / "checkpoint").write_bytes(data)


def _beside(node, folder: pathlib.Path, path=("target",)):
  """The tree with each array in a zarr folder, as T5X writes large ones."""
  if isinstance(node, dict):
    return {k: _beside(v, folder, (*path, k)) for k, v in node.items()}
  name = ".".join(path)
  (folder / name).mkdir()
  metadata = {
    "zarr_format": 2,
    "shape": list(node.shape),
    "chunks": list(node.shape),
    "dtype": "<f4",
    "compressor": None,
    "fill_value": None,
    "filters": None,
    "order": "C",
    "dimension_separator": ".",
  }
  (folder / name / ".zarray").write_text(json.dumps(metadata))
  chunk = ".".join("0" * node.ndim)
  (folder / name / chunk).write_bytes(node.tobytes())
  return f"PLACEHOLDER://{name}"
