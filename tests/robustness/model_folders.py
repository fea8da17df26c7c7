"""Model folders whole and broken, made from a seed, without torch.

`make(folder)` writes a small valid one of a kind; `cases(seed)` lists what is
broken about copies of it. The files of PyTorch, which a pickle rules, are in
torch_files.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch_files

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
# What is broken: (folder, its own randomness).
Damage = Callable[[pathlib.Path, random.Random], None]


@dataclasses.dataclass(frozen=True)
class Case:
  """A folder of a kind, and what is wrong with it.

  Attributes:
    name: for people.
    kind: of the folder that is copied.
    damage: what is done to the copy.
    nonsense: whether it must be refused; else it may also be read.
  """

  name: str
  kind: str
  damage: Damage
  nonsense: bool = True


# ---- Whole folders -----------------------------------------------------------


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
  from fat5_jax.convert import table

  leaves = _leaves()
  if kind == "run":
    from fat5_jax import weights

    weights.write_params(str(folder), _config(), leaves)
    return
  tree = table.nest({path: leaf.read() for path, leaf in leaves.items()})
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


# ---- What is broken ----------------------------------------------------------

_NUMBERS = ("12", [], {}, True, -1, 2.5, 1e308, float("nan"), 2**31, 10**30)
_INTS = (
  *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"),
  *("num_decoder_layers", "relative_attention_num_buckets"),
  "relative_attention_max_distance",
)
_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def _with_config(**fields) -> Damage:
  def damage(folder, rng):
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))

  return damage


def _text(name: str, text: str | bytes) -> Damage:
  def damage(folder, rng):
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(data)

  return damage


def _config_cases() -> Iterator[tuple[str, Damage]]:
  for field in _INTS:
    for value in (*_NUMBERS, 0, 3, 10**6, float("inf"), None):
      # A distance of a million, or no word of the decoder, is fine.
      if (field, value) not in (
        ("relative_attention_max_distance", 10**6),
        ("num_decoder_layers", None),
      ):
        yield f"{field}={value!r:.40}", _with_config(**{field: value})
  for field in _IDS:
    for value in (*_NUMBERS, 48, ["a"]):
      # An empty list says nothing.
      yield f"{field}={value!r:.40}", _with_config(**{field: value})
  for field in ("dropout_rate", "layer_norm_epsilon"):
    for value in (*_NUMBERS, 1, None):
      yield f"{field}={value!r:.40}", _with_config(**{field: value})
  for field in ("tie_word_embeddings", "scale_decoder_outputs"):
    for value in ("yes", 1, 0, [], {}, 0.5):
      yield f"{field}={value!r}", _with_config(**{field: value})
  for value in (None, 5, [], {}, "bert", "T5", "t5 ", True):
    yield f"model_type={value!r}", _with_config(model_type=value)
  for value in (None, 5, [], {}, "", "swiglu", "gated-", "gated-gated-relu"):
    yield f"projection={value!r}", _with_config(feed_forward_proj=value)
  yield "fat5_jax=3", _with_config(fat5_jax=3)
  for head in (3, {}, {"kind": "nonsense"}, {"kind": "embedding", "x": 1}):
    yield f"head={head!r}", _with_config(fat5_jax={"head": head})
  yield "t5=[]", _with_config(t5=[])
  for name, text in (
    ("empty", ""),
    ("no JSON", "{"),
    ("a list", "[]"),
    ("a number", "3"),
    ("null", "null"),
    ("no UTF-8", b"\xff\xfe{}"),
    ("UTF-16", json.dumps(CONFIG).encode("utf-16")),
    ("deep", "[" * 200_000),
    ("deep objects", '{"a":' * 50_000),
    ("a huge integer", '{"vocab_size": ' + "9" * 5000 + "}"),
    ("two values", json.dumps(CONFIG)[:-1] + ', "d_model": 9}'),
  ):
    yield f"config.json is {name}", _text("config.json", text)


def _is_folder(name: str) -> Damage:
  def damage(folder, rng):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

  return damage


def _is_pipe(name: str) -> Damage:
  def damage(folder, rng):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

  return damage


def _is_link(name: str, target: str) -> Damage:
  def damage(folder, rng):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)

  return damage


def _with_tensors(change: Callable[[dict], object]) -> Damage:
  """A safetensors file of other tensors."""

  def damage(folder, rng):
    found = dict(tensors())
    change(found)
    safetensors.numpy.save_file(found, folder / "model.safetensors")

  return damage


_Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
_WI = "encoder.block.0.layer.1.DenseReluDense.wi.weight"


def _spoilt(value: float, dtype=np.float32):
  def change(found):
    found[_Q] = found[_Q].astype(dtype)
    found[_Q][1, 2] = value

  return change


def _tensor_cases() -> Iterator[tuple[str, Damage]]:
  yield "NaN", _with_tensors(_spoilt(np.nan))
  yield "inf", _with_tensors(_spoilt(-np.inf))
  yield "NaN in bfloat16", _with_tensors(_spoilt(np.nan, ml_dtypes.bfloat16))
  yield "inf in float16", _with_tensors(_spoilt(np.inf, np.float16))
  yield "3e38", _with_tensors(_spoilt(3e38))
  for dtype in (np.int32, np.int64, np.bool_, np.int8, np.uint16):
    yield (
      np.dtype(dtype).name,
      _with_tensors(lambda x, d=dtype: x.update({_Q: x[_Q].astype(d)})),
    )
  yield "none", _with_tensors(lambda x: x.clear())
  yield "missing", _with_tensors(lambda x: x.pop(_Q))
  yield "extra", _with_tensors(lambda x: x.update(more=np.zeros(3)))
  yield "transposed", _with_tensors(lambda x: x.update({_WI: x[_WI].T.copy()}))
  yield "a row less", _with_tensors(lambda x: x.update({_Q: x[_Q][1:]}))
  yield "flat", _with_tensors(lambda x: x.update({_Q: x[_Q].ravel()}))
  yield "empty", _with_tensors(lambda x: x.update({_Q: x[_Q][:0]}))
  yield (
    "an empty projection",
    _with_tensors(lambda x: x.update({"lm_head.weight": np.zeros((0, 8))})),
  )
  yield (
    "a flat classifier",
    _with_tensors(lambda x: x.update({"classifier.weight": np.zeros(8)})),
  )
  yield (
    "names of lines",
    _with_tensors(
      lambda x: x.update({f"a\n{i}\x1b[2J" * 99: np.zeros(1) for i in range(9)})
    ),
  )


def safetensors_file(header: bytes, data: bytes) -> bytes:
  return len(header).to_bytes(8, "little") + header + data


def _with_header(change: Callable[[dict], object]) -> Damage:
  """A safetensors file whose header says something else."""

  def damage(folder, rng):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    change(header)
    header = json.dumps(header).encode()
    path.write_bytes(safetensors_file(header, whole[end:]))

  return damage


def _header_cases() -> Iterator[tuple[str, Damage]]:
  def one(**fields):
    return _with_header(lambda x: x[_Q].update(fields))

  for dtype in ("F8_E4M3", "U64", "X", 5, None, "F64", "BOOL"):
    yield f"dtype {dtype}", one(dtype=dtype)
  for shape in ([2**40, 2**40], [-1, 8], [8], "8", [8.5, 8], [2**63], None):
    yield f"shape {shape}", one(shape=shape)
  for offsets in ([0, 2**62], [-4, 4], [9, 3], [0], None, "ab", [0.5, 1]):
    yield f"offsets {offsets}", one(data_offsets=offsets)
  yield "a list", _with_header(lambda x: x.update({_Q: []}))
  yield "no tensors", _with_header(lambda x: x.clear())
  yield "overlap", one(data_offsets=[0, 8 * 8 * 4])
  for length in (0, 1, 2**63, 2**64 - 1, 10**8 + 1, 10**7):
    data = length.to_bytes(8, "little") + b"{}"
    yield f"a header of {length}", _text("model.safetensors", data)
  for header in (b"[]", b"3", b"\xff", b'{"a":' * 1000, b'{"a":1,"a":2}'):
    data = safetensors_file(header, bytes(64))
    yield f"header {header[:9]!r}", _text("model.safetensors", data)


def _cut(name: str) -> Damage:
  def damage(folder, rng):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: rng.randrange(len(data))])

  return damage


def _index(value) -> Damage:
  """A folder whose tensors are where an index says."""

  def damage(folder, rng):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    shutil.copy(folder / "part.safetensors", folder.parent / "away.safetensors")
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / "model.safetensors.index.json").write_text(text)

  return damage


def _index_cases() -> Iterator[tuple[str, Damage]]:
  for name in (
    *("../away.safetensors", "/etc/passwd", "gone.safetensors", "", ".", ".."),
    *("part.safetensors/../part.safetensors", "a\0b", 5, None, [], {}, True),
  ):
    yield f"shard {name!r}", _index({"weight_map": {"shared.weight": name}})
  for value in ({}, [], "x", {"weight_map": []}, {"weight_map": {}}, 3):
    yield f"index {value!r}", _index(value)
  yield (
    "an index of a pipe",
    lambda folder, rng: (
      _index({"weight_map": {"a": "pipe"}})(folder, rng),
      os.mkfifo(folder / "pipe"),
    ),
  )

  def twice(folder, rng):
    _index({"weight_map": {"a": "part.safetensors", "b": "b.safetensors"}})(
      folder, rng
    )
    shutil.copy(folder / "part.safetensors", folder / "b.safetensors")

  yield "a tensor in two shards", twice


def _tokenizer_cases() -> Iterator[tuple[str, Damage]]:
  whole = spiece()
  for name, data in (
    ("empty", b""),
    ("text", b"hello\n" * 99),
    ("zeros", bytes(999)),
    ("half", whole[: len(whole) // 2]),
    ("a length beyond it", b"\x0a\xff\xff\xff\xff\x0f" + whole),
    (
      "without the unknown piece",
      whole.replace(b"<unk>\x15\0\0\0\0\x18\2", b""),
    ),
    ("with a piece twice", whole + whole[:18]),
    ("with a wild normaliser", whole + _normaliser(0xFFFFFC00)),
    ("with a wild leaf", whole + _normaliser(0xFFFFFFFF)),
    ("with a short normaliser", whole + b"\x1a\x06\x12\x04\xff\xff\xff\x7f"),
  ):
    yield f"spiece.model is {name}", _text("spiece.model", data)
  for target in ("/etc/passwd", "/dev/zero", "nowhere", "/"):
    yield f"spiece.model -> {target}", _is_link("spiece.model", target)
  for name in ("spiece.model", "tokenizer_config.json"):
    yield f"{name} is a folder", _is_folder(name)
    yield f"{name} is a pipe", _is_pipe(name)
  for value in ("[]", "{", b"\xff", '{"extra_ids": -1}', '{"extra_ids": "9"}'):
    yield f"tokenizer_config {value!r}", _text("tokenizer_config.json", value)
  yield "extra_ids 10**9", _text("tokenizer_config.json", '{"extra_ids": 1e9}')
  for value in (
    *("{", "[]", '{"model": 3}', '{"model": {"vocab": [3]}}'),
    '{"model": {"vocab": [["a", "b"]]}}',
    '{"model": {"vocab": [["<unk>", 0]], "unk_id": 7}}',
    '{"model": {"vocab": [["<unk>", 0]], "unk_id": 0}, "added_tokens": [3]}',
    '{"model": {"vocab": [["<unk>", 1e999]], "unk_id": 0}}',
  ):
    yield f"tokenizer.json {value[:60]}", _alone(value)


def _normaliser(unit: int) -> bytes:
  """A normaliser whose table leads elsewhere, as a field of the model."""
  units = unit.to_bytes(4, "little") * 256
  charsmap = len(units).to_bytes(4, "little") + units + b"a\0"
  size = len(charsmap)
  field = b"\x12" + bytes([size & 127 | 128, size >> 7]) + charsmap
  size = len(field)
  return b"\x1a" + bytes([size & 127 | 128, size >> 7]) + field


def _alone(text: str) -> Damage:
  def damage(folder, rng):
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.json").write_text(text)

  return damage


def _with_zarray(**fields) -> Damage:
  def damage(folder, rng):
    path = folder / "target.token_embedder.embedding" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return damage


def _of_embedding(name: str, damage) -> Damage:
  return lambda folder, rng: damage(
    folder / "target.token_embedder.embedding", rng
  )


def _zarr_cases() -> Iterator[tuple[str, Damage]]:
  big = 10**9
  yield "huge", _with_zarray(shape=[big, 8], chunks=[big, 8])
  yield "huge, no chunks", _with_zarray(shape=[big, big], chunks=[1, 1])
  yield "huge chunks", _with_zarray(chunks=[big, big])
  for fields in (
    *({"shape": [-1, 8]}, {"shape": "x"}, {"chunks": [0, 8]}, {"dtype": "|O"}),
    *({"dtype": "<i4"}, {"dtype": 3}, {"zarr_format": 9}, {"order": "X"}),
    *({"compressor": {"id": "x"}}, {"compressor": {"id": "zlib"}}),
    {"filters": [{"id": "delta"}]},
    *({"shape": [48]}, {"shape": [0, 8]}, {"shape": [2**62, 2**62]}),
  ):
    yield f".zarray {fields}", _with_zarray(**fields)
  yield (
    "no chunk",
    lambda folder, rng: (
      folder / "target.token_embedder.embedding/0.0"
    ).write_bytes(b""),
  )
  yield "a short chunk", _cut("target.token_embedder.embedding/0.0")
  yield "a pipe", _is_pipe("target.token_embedder.embedding/0.0")
  yield (
    "a pipe for metadata",
    _is_pipe("target.token_embedder.embedding/.zarray"),
  )
  yield (
    "no array",
    lambda folder, rng: shutil.rmtree(
      folder / "target.token_embedder.embedding"
    ),
  )

  def away(path):
    def damage(folder, rng):
      shutil.copytree(
        folder / "target.token_embedder.embedding", folder.parent / "away"
      )
      shutil.rmtree(folder / "target.token_embedder.embedding")
      _spec(path)(folder, rng)

    return damage

  yield "an array elsewhere", away("../elsewhere")
  yield "an array at the root", away("/etc")


def _spec(path) -> Damage:
  """The embedding is where a specification of TensorStore's says."""

  def damage(folder, rng):
    import msgpack

    data = (folder / "checkpoint").read_bytes()
    tree = msgpack.unpackb(data, strict_map_key=False)
    tree["optimizer"]["target"]["token_embedder"]["embedding"] = {
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": path},
      "metadata": {},
    }
    (folder / "checkpoint").write_bytes(msgpack.packb(tree))

  return damage


def _tree(target) -> Damage:
  return lambda folder, rng: write_msgpack(folder, target)


def _msgpack_cases() -> Iterator[tuple[str, Damage]]:
  zeros = np.zeros((8, 8), np.float32)
  for target in (
    *({}, zeros, 3, "x", {"encoder": zeros}, {"token_embedder": 3}),
    {"token_embedder": {"embedding": np.zeros(4, np.float32)}},
    {"token_embedder": {"embedding": np.zeros((0, 8), np.float32)}},
    {"encoder": {"encoder": {"x": np.float32(3)}}},
    {"encoder": {"encoder": {"x": np.zeros((1, 10**6, 0), np.float32)}}},
    {"encoder": {"encoder": {"x": np.zeros((1, 10**6, 1), np.uint8)}}},
    {"token_embedder": {"embedding": "PLACEHOLDER://../../etc"}},
    {"token_embedder": {"embedding": "PLACEHOLDER://"}},
  ):
    yield f"tree {str(target)[:50]!r}", _tree(target)
  for path in (None, 5, [], {}, "../..", "/", ""):
    yield f"an array at {path!r}", _spec(path)
  array = b"\x93\x91\x04\xa7float32\xc4\x10" + bytes(16)
  for name, data in (
    ("a list of 2**32", b"\x81\xa1a\xdd\xff\xff\xff\xff"),
    ("a map of 2**32", b"\x81\xa1a\xdf\xff\xff\xff\xff"),
    ("bytes of 2**32", b"\x81\xa1a\xc6\xff\xff\xff\xff"),
    ("an extension of 2**32", b"\x81\xa1a\xc9\xff\xff\xff\xff\x01"),
    ("deep", b"\x81\xa1a" * 100_000),
    ("deep lists", b"\x81\xa1a" + b"\xdc\x00\x10" * 100_000),
    ("900 deep", b"\x81\xa1a" * 900 + b"\xc0"),
    ("an unknown extension", b"\x81\xa1a\xd4\x09\x00"),
    ("objects", _array_of(b"\xa1O")),
    ("a structure", _array_of(b"\xa9f4,f4,f4x")),
    ("no dtype", _array_of(b"\x05")),
    ("complex", _array_of(b"\xa9complex64")),
    ("a shape of -1", _array_of(b"\xa7float32", b"\x91\xff")),
    ("a shape of text", _array_of(b"\xa7float32", b"\x91\xa14")),
    ("a wrong shape", _array_of(b"\xa7float32", b"\x91\x05")),
    ("an array as key", b"\x81\xc7" + bytes([len(array), 1]) + array + b"\0"),
    ("chunks of nothing", b"\x81\xba__msgpack_chunked_array__\xc3"),
  ):
    yield name, _text("checkpoint", data)
  yield "cut", _cut("checkpoint")


def _array_of(dtype: bytes, shape: bytes = b"\x91\x04") -> bytes:
  data = b"\x93" + shape + dtype + b"\xc4\x10" + bytes(16)
  return b"\x81\xa6target\x81\xa1a\xc7" + bytes([len(data), 1]) + data


def _with_model_json(change: Callable[[dict], object]) -> Damage:
  def damage(folder, rng):
    path = folder / "model.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

  return damage


def _with_metadata(change: Callable[[dict], object]) -> Damage:
  def damage(folder, rng):
    path = folder / "checkpoint_0" / "params" / "_METADATA"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

  return damage


def _run_cases() -> Iterator[tuple[str, Damage]]:
  for field, value in (
    *(("vocab_size", 10**12), ("emb_dim", "8"), ("num_encoder_layers", 10**9)),
    *(("num_encoder_layers", 2), ("mlp_activations", "relu"), ("head", 3)),
    *(("mlp_activations", []), ("lora", []), ("head", {"kind": "x"})),
    *(("lora", {"rank": 0}), ("lora", {"rank": 4}), ("dtype", "float16")),
    *(
      ("dtype", 3),
      ("dtype", None),
      ("scan_layers", "no"),
      ("remat_policy", 3),
    ),
    *(("position_encoding", []), ("attention_scale", float("nan"))),
    *(("eos_token_id", 48), ("later_version", 1), ("layer_norm_epsilon", 0)),
    *(("attention_implementation", 7), ("scale_decoder_outputs", "x")),
    *(("logits_via_embedding", False), ("num_decoder_layers", 0)),
  ):
    yield (
      f"model.{field}={value!r}",
      _with_model_json(lambda x, f=field, v=value: x["model"].update({f: v})),
    )
  for model in (None, [], "x", {}, {"vocab_size": 48}):
    yield (
      f"model={model!r}",
      _with_model_json(lambda x, m=model: x.update(model=m)),
    )
  for vocabulary in (
    *(3, [], {"kind": "x"}, {"kind": "sentencepiece", "extra_ids": 100}),
    *({"kind": "byte"}, {"kind": "byte", "extra_ids": 10**9}),
  ):
    yield (
      f"vocabulary={vocabulary!r}",
      _with_model_json(lambda x, v=vocabulary: x.update(vocabulary=v)),
    )
  yield "own_head=3", _with_model_json(lambda x: x.update(own_head=3))
  for text in ("", "{", "[]", b"\xff", "[" * 99_999):
    yield f"model.json {text[:9]!r}", _text("model.json", text)
    yield (
      f"_METADATA {text[:9]!r}",
      _text("checkpoint_0/params/_METADATA", text),
    )
  yield "model.json is gone", lambda f, rng: (f / "model.json").unlink()
  for key in (
    *("x", "('a',)", "()", "3", "['a']", "('../../x',)", "((((1,),),),)"),
    *("(" * 9999, "-" * 999 + "1", "('a', 'b'", "__import__('os')"),
  ):
    yield (
      f"an array {key[:20]}",
      _with_metadata(lambda x, k=key: x["tree_metadata"].update({k: {}})),
    )
  for tree in (None, [], 3, {}, {"('a',)": 3}):
    yield (
      f"tree_metadata={tree!r}",
      _with_metadata(lambda x, t=tree: x.update(tree_metadata=t)),
    )
  yield "cut", _cut("checkpoint_0/params/_METADATA")
  yield "a pipe", _is_pipe("checkpoint_0/params/manifest.ocdbt")
  yield "config.gin is a pipe", _is_pipe("config.gin")
  yield "metrics.csv is a folder", _is_folder("metrics.csv")
  tasks = (3, [], {"arguments": 3}, {"asks": 3}, {"name": []}, {"asks": [3]})
  for task in tasks:
    change = lambda x, t=task: x.update(task=t)
    yield f"task={task!r}", _with_model_json(change)


# ---- All of them -------------------------------------------------------------


def _flip(folder: pathlib.Path, rng: random.Random) -> None:
  """Changes a file of the folder at a few places, or in length."""
  paths = sorted(p for p in folder.rglob("*") if p.is_file())
  path = rng.choice(paths)
  path.write_bytes(mutated(path.read_bytes(), rng))


def mutated(data: bytes, rng: random.Random) -> bytes:
  """The bytes, some of them others."""
  found = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4, 8))):
    at = rng.randrange(len(found) + 1)
    how = rng.randrange(7)
    size = rng.choice((1, 2, 4, 8))
    if how == 0 and at < len(found):
      found[at] ^= 1 << rng.randrange(8)
    elif how == 1:
      found[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255))])
    elif how == 2:
      found[at : at + size] = rng.randbytes(size)
    elif how == 3:
      number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
      number %= 256**size
      found[at : at + size] = number.to_bytes(
        size, rng.choice(("little", "big"))
      )
    elif how == 4:
      del found[at : at + rng.choice((1, 4, 64, len(found)))]
    elif how == 5:
      other = rng.randrange(len(found) + 1)
      found[at:at] = found[other : other + rng.choice((1, 4, 64))]
    else:
      digits = [i for i, c in enumerate(found) if 48 <= c <= 57]
      if digits:
        found[rng.choice(digits)] = rng.choice(b'0123456789-.e"')
  return bytes(found)


def cases(seed: int) -> list[Case]:
  """All that is listed here, and changes at random that `seed` draws."""
  found = [
    *(Case(name, "safetensors", x) for name, x in _config_cases()),
    *(Case(name, "safetensors", x) for name, x in _tensor_cases()),
    *(Case(name, "safetensors", x) for name, x in _header_cases()),
    *(Case(name, "safetensors", x) for name, x in _index_cases()),
    *(Case(name, "safetensors", x) for name, x in _tokenizer_cases()),
    *(Case(name, "zarr", x) for name, x in _zarr_cases()),
    *(Case(name, "t5x", x) for name, x in _msgpack_cases()),
    *(Case(name, "run", x) for name, x in _run_cases()),
  ]
  for file, kind in (
    ("config.json", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("pytorch_model.bin", "bin"),
  ):
    found.append(Case(f"{file} is a folder", kind, _is_folder(file)))
    found.append(Case(f"{file} is a pipe", kind, _is_pipe(file)))
    found.append(
      Case(f"{file} -> /dev/zero", kind, _is_link(file, "/dev/zero"))
    )
    found.append(Case(f"{file} is cut", kind, _cut(file)))
  for name, damage in torch_files.cases(tensors()):
    found.append(Case(name, "bin", damage))
  gin = b"TRAIN_STEPS = 1" + b" " * 300_000 + b"x\n\xff = 3\nFROZEN = \n"
  found.append(
    Case("a wide config.gin", "run", _text("config.gin", gin), False)
  )
  rng = random.Random(seed)
  for kind in KINDS:
    for _ in range(5):
      number = rng.randrange(2**32)
      damage = lambda folder, _, n=number: _flip(folder, random.Random(n))
      found.append(Case(f"bytes changed by {number}", kind, damage, False))
  return found
