"""Broken checkpoints of T5X (msgpack, zarr) and of our own runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import shutil

import file_damage as damage_of
import numpy as np
import whole_folders


def _with_zarray(**fields) -> damage_of.Damage:
  def damage(folder, rng):
    path = folder / "target.token_embedder.embedding" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return damage


def _of_embedding(name: str, damage) -> damage_of.Damage:
  return lambda folder, rng: damage(
    folder / "target.token_embedder.embedding", rng
  )


def zarr_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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
  yield "a short chunk", damage_of.cut("target.token_embedder.embedding/0.0")
  yield "a pipe", damage_of.is_pipe("target.token_embedder.embedding/0.0")
  yield (
    "a pipe for metadata",
    damage_of.is_pipe("target.token_embedder.embedding/.zarray"),
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


def _spec(path) -> damage_of.Damage:
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


def _tree(target) -> damage_of.Damage:
  return lambda folder, rng: whole_folders.write_msgpack(folder, target)


def msgpack_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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
    yield name, damage_of.text("checkpoint", data)
  yield "cut", damage_of.cut("checkpoint")


def _array_of(dtype: bytes, shape: bytes = b"\x91\x04") -> bytes:
  data = b"\x93" + shape + dtype + b"\xc4\x10" + bytes(16)
  return b"\x81\xa6target\x81\xa1a\xc7" + bytes([len(data), 1]) + data


def _with_model_json(change: Callable[[dict], object]) -> damage_of.Damage:
  def damage(folder, rng):
    path = folder / "model.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

  return damage


def _with_metadata(change: Callable[[dict], object]) -> damage_of.Damage:
  def damage(folder, rng):
    path = folder / "checkpoint_0" / "params" / "_METADATA"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))

  return damage


def run_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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
    yield f"model.json {text[:9]!r}", damage_of.text("model.json", text)
    yield (
      f"_METADATA {text[:9]!r}",
      damage_of.text("checkpoint_0/params/_METADATA", text),
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
  yield "cut", damage_of.cut("checkpoint_0/params/_METADATA")
  yield "a pipe", damage_of.is_pipe("checkpoint_0/params/manifest.ocdbt")
  yield "config.gin is a pipe", damage_of.is_pipe("config.gin")
  yield "metrics.csv is a folder", damage_of.is_folder("metrics.csv")
  tasks = (3, [], {"arguments": 3}, {"asks": 3}, {"name": []}, {"asks": [3]})
  for task in tasks:
    change = lambda x, t=task: x.update(task=t)
    yield f"task={task!r}", _with_model_json(change)
