"""Broken model folders, from a list and from a seed.

`cases(seed)` lists what is broken about copies of the folders that
whole_folders.py makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import json
import os
import pathlib
import random
import shutil

import checkpoint_cases
import file_damage as damage_of
import ml_dtypes
import numpy as np
import safetensors.numpy
import torch_files
import whole_folders


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
  damage: damage_of.Damage
  nonsense: bool = True


# ---- What is broken ----------------------------------------------------------

_NUMBERS = ("12", [], {}, True, -1, 2.5, 1e308, float("nan"), 2**31, 10**30)
_INTS = (
  *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"),
  *("num_decoder_layers", "relative_attention_num_buckets"),
  "relative_attention_max_distance",
)
_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def _with_config(**fields) -> damage_of.Damage:
  def damage(folder, rng):
    (folder / "config.json").write_text(
      json.dumps(whole_folders.CONFIG | fields)
    )

  return damage


def _config_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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
    ("UTF-16", json.dumps(whole_folders.CONFIG).encode("utf-16")),
    ("deep", "[" * 200_000),
    ("deep objects", '{"a":' * 50_000),
    ("a huge integer", '{"vocab_size": ' + "9" * 5000 + "}"),
    ("two values", json.dumps(whole_folders.CONFIG)[:-1] + ', "d_model": 9}'),
  ):
    yield f"config.json is {name}", damage_of.text("config.json", text)


def _with_tensors(change: Callable[[dict], object]) -> damage_of.Damage:
  """A safetensors file of other tensors."""

  def damage(folder, rng):
    found = dict(whole_folders.tensors())
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


def _tensor_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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


def _with_header(change: Callable[[dict], object]) -> damage_of.Damage:
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


def _header_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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
    yield f"a header of {length}", damage_of.text("model.safetensors", data)
  for header in (b"[]", b"3", b"\xff", b'{"a":' * 1000, b'{"a":1,"a":2}'):
    data = safetensors_file(header, bytes(64))
    yield f"header {header[:9]!r}", damage_of.text("model.safetensors", data)


def _index(value) -> damage_of.Damage:
  """A folder whose tensors are where an index says."""

  def damage(folder, rng):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    shutil.copy(folder / "part.safetensors", folder.parent / "away.safetensors")
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / "model.safetensors.index.json").write_text(text)

  return damage


def _index_cases() -> Iterator[tuple[str, damage_of.Damage]]:
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


def _tokenizer_cases() -> Iterator[tuple[str, damage_of.Damage]]:
  whole = whole_folders.spiece()
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
    yield f"spiece.model is {name}", damage_of.text("spiece.model", data)
  for target in ("/etc/passwd", "/dev/zero", "nowhere", "/"):
    yield f"spiece.model -> {target}", damage_of.is_link("spiece.model", target)
  for name in ("spiece.model", "tokenizer_config.json"):
    yield f"{name} is a folder", damage_of.is_folder(name)
    yield f"{name} is a pipe", damage_of.is_pipe(name)
  for value in ("[]", "{", b"\xff", '{"extra_ids": -1}', '{"extra_ids": "9"}'):
    yield (
      f"tokenizer_config {value!r}",
      damage_of.text("tokenizer_config.json", value),
    )
  yield (
    "extra_ids 10**9",
    damage_of.text("tokenizer_config.json", '{"extra_ids": 1e9}'),
  )
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


def _alone(text: str) -> damage_of.Damage:
  def damage(folder, rng):
    (folder / "spiece.model").unlink()
    (folder / "tokenizer.json").write_text(text)

  return damage


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
    *(Case(name, "zarr", x) for name, x in checkpoint_cases.zarr_cases()),
    *(Case(name, "t5x", x) for name, x in checkpoint_cases.msgpack_cases()),
    *(Case(name, "run", x) for name, x in checkpoint_cases.run_cases()),
  ]
  for file, kind in (
    ("config.json", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("pytorch_model.bin", "bin"),
  ):
    found.append(Case(f"{file} is a folder", kind, damage_of.is_folder(file)))
    found.append(Case(f"{file} is a pipe", kind, damage_of.is_pipe(file)))
    found.append(
      Case(f"{file} -> /dev/zero", kind, damage_of.is_link(file, "/dev/zero"))
    )
    found.append(Case(f"{file} is cut", kind, damage_of.cut(file)))
  for name, damage in torch_files.cases(whole_folders.tensors()):
    found.append(Case(name, "bin", damage))
  gin = b"TRAIN_STEPS = 1" + b" " * 300_000 + b"x\n\xff = 3\nFROZEN = \n"
  found.append(
    Case("a wide config.gin", "run", damage_of.text("config.gin", gin), False)
  )
  rng = random.Random(seed)
  for kind in whole_folders.KINDS:
    for _ in range(5):
      number = rng.randrange(2**32)
      damage = lambda folder, _, n=number: _flip(folder, random.Random(n))
      found.append(Case(f"bytes changed by {number}", kind, damage, False))
  return found
