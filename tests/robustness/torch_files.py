"""PyTorch `.bin` files by hand, whole and hostile: zip and pickle opcodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import io
import pathlib
import struct
from typing import Any, NamedTuple
import zipfile

import numpy as np


class Name(NamedTuple):
  """What GLOBAL asks for."""

  module: str
  name: str


class Call(NamedTuple):
  """REDUCE."""

  function: Any
  arguments: Any


class Stored(NamedTuple):
  """BINPERSID."""

  pid: Any


class Built(NamedTuple):
  """BUILD."""

  value: Any
  state: Any


class Raw(NamedTuple):
  """Opcodes as they are."""

  code: bytes


TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
TABLE = Name("collections", "OrderedDict")
FLOATS = Name("torch", "FloatStorage")


def opcodes(value: Any) -> bytes:
  """A value, or one of the above, as it stands in a pickle."""
  if isinstance(value, Raw):
    return value.code
  if isinstance(value, Name):
    return f"c{value.module}\n{value.name}\n".encode()
  if isinstance(value, Call):
    return opcodes(value.function) + opcodes(value.arguments) + b"R"
  if isinstance(value, Stored):
    return opcodes(value.pid) + b"Q"
  if isinstance(value, Built):
    return opcodes(value.value) + opcodes(value.state) + b"b"
  if value is None:
    return b"N"
  if isinstance(value, bool):
    return b"\x88" if value else b"\x89"
  if isinstance(value, int):
    size = value.bit_length() // 8 + 1
    data = value.to_bytes(size, "little", signed=True)
    return b"\x8a" + bytes([size]) + data
  if isinstance(value, float):
    return b"G" + struct.pack(">d", value)
  if isinstance(value, str):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data
  if isinstance(value, tuple):
    return b"(" + b"".join(map(opcodes, value)) + b"t"
  if isinstance(value, list):
    return b"](" + b"".join(map(opcodes, value)) + b"e"
  inside = b"".join(opcodes(k) + opcodes(v) for k, v in value.items())
  return opcodes(Call(TABLE, ())) + b"(" + inside + b"u"


def storage(key: Any, size: Any, kind: Any = FLOATS) -> Stored:
  return Stored(("storage", kind, key, "cpu", size))


def tensor(where: Any, offset: Any, shape: Any, strides: Any) -> Call:
  return Call(TENSOR, (where, offset, shape, strides, False, {}))


def records(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """A table of tensors, each in a storage of its own."""
  found = {}
  for number, (name, array) in enumerate(arrays.items()):
    steps = tuple(n // array.itemsize for n in array.strides)
    where = storage(str(number), array.size)
    found[name] = tensor(where, 0, array.shape, steps)
  return found


def pickled(value: Any) -> bytes:
  return b"\x80\x02" + opcodes(value) + b"."


def write(
  path: pathlib.Path,
  arrays: Mapping[str, np.ndarray],
  data: bytes | None = None,
  compression: int = zipfile.ZIP_STORED,
  more: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a file of the arrays; `data` is another pickle of them."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("it/data.pkl", data or pickled(records(arrays)))
    for number, array in enumerate(arrays.values()):
      archive.writestr(f"it/data/{number}", array.tobytes())
    archive.writestr("it/version", b"3\n")
    for name, content in (more or {}).items():
      archive.writestr(name, content)


def _hostile() -> Iterator[tuple[str, Any]]:
  """(what, instead of a tensor of 8 x 8 whose storage is `0`)."""
  here = storage("0", 64)
  square, steps = (8, 8), (8, 1)
  for offset in (1, 64, 2**31, 2**62, 2**64, -1, -64, True, 0.0, "0", None, ()):
    yield f"offset {offset!r}", tensor(here, offset, square, steps)
  for shape in (
    *((9, 8), (2**31, 2**31), (2**62, 4), (-8, -8), (8.0, 8), (True, 8)),
    *(("8", 8), (8,), (), [8, 8], 8, None, "ab", (8, (8,)), (0, 2**64)),
    (0, 2**62, 2**62),
  ):
    yield f"shape {shape!r}", tensor(here, 0, shape, steps)
  for strides in (
    *((9, 1), (2**62, 1), (-8, -1), (8.0, 1), (8,), (), [8, 1], None, "ab"),
    *((True, 1), (2**61, 2**61), ({}, 1)),
  ):
    yield f"strides {strides!r}", tensor(here, 0, square, strides)
  yield "a million of one number", tensor(here, 0, (1000, 1000), (0, 0))
  yield "10**18 of one number", tensor(here, 0, (10**9, 10**9), (0, 0))
  yield "65 axes", tensor(here, 0, (1,) * 65, (1,) * 65)
  for size in (10**9, 65, -1, 64.0, True, None, "64", 2**64):
    yield f"a storage of {size!r}", tensor(storage("0", size), 0, square, steps)
  for key in ("gone", "../data.pkl", "", 0, None, ("0",), "0\0", "/etc/passwd"):
    yield f"storage {key!r}", tensor(storage(key, 64), 0, square, steps)
  for kind in (
    *(TABLE, TENSOR, PARAMETER, None, "FloatStorage", 3, (), {}),
    *(Name("torch", "ByteStorage"), Name("torch", "load")),
    *(Name("torch", "LongStorage"), Name("numpy", "float32")),
  ):
    where = storage("0", 32, kind)
    yield f"a storage of {kind!r}", tensor(where, 0, (4, 8), steps)
  for pid in (
    (),
    ("storage",),
    "storage",
    None,
    3,
    {},
    ("x", FLOATS, "0", "", 1),
  ):
    yield f"record {pid!r}", tensor(Stored(pid), 0, square, steps)
  # What Python's unpickler would make or change.
  attributes = {"key": "it/data/0", "entry": "it/data/0", "size": 10**9}
  faked = Built({}, attributes)
  yield "a table with a storage's attributes", tensor(faked, 0, square, steps)
  whole = tensor(here, 0, square, steps)
  for state in ({"shape": (10**6,)}, (None, {"shape": (10**6,)}), 3):
    yield f"a tensor changed by {state!r:.20}", Built(whole, state)
    changed = Built(here, state)
    yield (
      f"a storage changed by {state!r:.20}",
      tensor(changed, 0, square, steps),
    )
    changed = Call(Built(TENSOR, state), (here, 0, square, steps))
    yield f"a function changed by {state!r:.20}", changed
  yield "a tensor as a storage", tensor(whole, 0, square, steps)
  yield "a parameter of nothing", Call(PARAMETER, ())
  yield "a parameter of a table", Call(PARAMETER, ({},))
  yield "a table of a tensor", Call(TABLE, (whole,))
  yield "a storage called", Call(FLOATS, ("0",))
  yield "a tensor called", Call(whole, ())
  for name in (
    *(Name("builtins", "eval"), Name("os", "system"), Name("", "")),
    *(Name("torch._utils", "_rebuild_tensor"), Name("collections", "deque")),
    Name("fat5_jax.convert.torch_file", "load"),
  ):
    yield f"{name.module}.{name.name}", Call(name, ("print(1)",))
  yield "NEWOBJ", Raw(opcodes(TABLE) + b")\x81")
  yield "INST", Raw(b"(iposix\nsystem\n")
  yield "OBJ", Raw(b"(" + opcodes(TABLE) + b"o")
  yield "EXT1", Raw(b"\x82\x01")
  yield "a memo of 2**32", Raw(opcodes(whole) + b"r\xff\xff\xff\xff")
  yield "nothing memoized", Raw(b"h\x07")
  yield "an item of a tensor", Raw(opcodes(whole) + b"K\x00K\x01s")
  yield "an item of a tuple", Raw(b")K\x00K\x01s")
  yield "a list appended to a tensor", Raw(opcodes(whole) + b"K\x01a")
  yield "no mark", Raw(b"t")
  yield "too few", Raw(b"R" * 20)
  yield "bytes of 2**63", Raw(b"\x8e" + b"\xff" * 7 + b"\x7f")
  yield "a text of 2**63", Raw(b"\x8d" + b"\xff" * 7 + b"\x7f")
  yield "a frame of 2**63", Raw(b"\x95" + b"\xff" * 8)
  yield "deep tuples", Raw(b"(" * 50_000 + b"t" * 50_000)
  yield "deep lists", Raw(b"]" * 50_000 + b"a" * 49_999)
  bomb = b")" + b"".join(b"q%c(h%ch%ct" % (n, n, n) for n in range(60))
  yield "a tuple of 2**60", Raw(bomb)
  yield "a tuple of 2**60 as a key", Raw(b"}" + bomb + b"Ns")
  yield (
    "a tuple of 2**60 as a record",
    tensor(Stored(Raw(bomb)), 0, square, steps),
  )
  for value in (None, 3, "x", [], (), {}, {"a": whole}):
    yield f"{value!r:.30} instead of a tensor", value


def cases(
  arrays: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, Callable[[pathlib.Path, Any], None]]]:
  """(what is broken, what does so to the file of a folder)."""
  name = "encoder.block.0.layer.0.SelfAttention.q.weight"
  # First, so that its storage is `0`.
  arrays = {name: arrays[name], **arrays}
  table = records(arrays)

  def with_pickle(data: bytes, **options):
    return lambda folder, rng: write(
      folder / "pytorch_model.bin", arrays, data, **options
    )

  for what, value in _hostile():
    yield what, with_pickle(pickled(table | {name: value}))
  for what, value in (
    *(("a list", []), ("nothing", None), ("a tensor", table[name])),
    *(("a table of a table", {"model": table}), ("a key of 3", {3: None})),
    ("a table with NaN as key", {float("nan"): table[name]}),
  ):
    yield f"{what} instead of the table", with_pickle(pickled(value))
  twice = opcodes(name) + opcodes(table[name]) + b"s."
  yield "a tensor twice", with_pickle(pickled(table)[:-1] + twice)
  for data in (b"x", b".", b"\x80\x02", b"\x80\xff.", bytes(99), b"\xff" * 99):
    yield f"pickle {data[:5]!r}", with_pickle(data)
  yield "no end", with_pickle(pickled(table)[:-1])
  yield (
    "compressed",
    with_pickle(pickled(table), compression=zipfile.ZIP_DEFLATED),
  )
  bomb = io.BytesIO()
  with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("it/data.pkl", bytes(50_000_000))
  yield (
    "a bomb",
    lambda folder, rng: (folder / "pytorch_model.bin").write_bytes(
      bomb.getvalue()
    ),
  )
  for entry in ("two/data.pkl", "../data.pkl"):
    yield f"also {entry}", with_pickle(pickled(table), more={entry: b"."})
  yield "big-endian", with_pickle(pickled(table), more={"it/byteorder": b"big"})
  whole = io.BytesIO()
  write(whole, arrays)
  whole = whole.getvalue()
  central = whole.index(b"PK\1\2")

  def with_entry(at: int, data: bytes):
    """Other bytes in the first entry of the central directory."""
    changed = bytearray(whole)
    changed[central + at : central + at + len(data)] = data
    return lambda folder, rng: (folder / "pytorch_model.bin").write_bytes(
      changed
    )

  yield "encrypted", with_entry(8, b"\x01\x00")
  yield "an unknown compression", with_entry(10, b"\x63\x00")
  yield "a wrong checksum", with_entry(16, b"abcd")
  yield "4 GiB stored", with_entry(20, b"\xf0\xff\xff\xff" * 2)
  yield "4 GiB packed in nothing", with_entry(24, b"\xf0\xff\xff\xff")
  yield "an entry elsewhere", with_entry(42, b"\xff\xff\xff\x7f")
  yield "an extra field beyond", with_entry(30, b"\xff\xff")
  yield "a name of another", with_entry(46, b"it/data.pkx")
  yield (
    "an entry twice",
    lambda folder, rng: (folder / "pytorch_model.bin").write_bytes(
      whole.replace(b"it/data/1", b"it/data/0")
    ),
  )
