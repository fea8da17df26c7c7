"""Mutates model folders and reads them, many times a process.

Of the four formats of tensors the bytes; of every folder the values in its JSON
files.
"""

from __future__ import annotations

import copy
import json
import pathlib
import random
import time

import model_folders
import torch_files
import whole_folders

from fat5_jax import checkpoints
from fat5_jax.checkpoints import reference

TENSORS = ("bin", "safetensors", "t5x", "zarr", "run")
JSON = ("safetensors", "zarr", "run", *whole_folders.OTHER_KINDS)
KINDS = (*TENSORS, *(f"json of {kind}" for kind in JSON))
_NAME = "encoder.block.0.layer.0.SelfAttention.q.weight"


class _Fuzzed:
  """A folder of a kind; `mutate` damages it anew, `read` reads all of it."""

  def __init__(self, kind: str, folder: pathlib.Path):
    self._kind, self._folder = kind, folder
    whole_folders.make(kind, folder)
    self._files = {
      path: path.read_bytes()
      for path in folder.rglob("*")
      if path.is_file() and path.suffix != ".json"
    }
    self._changed: list[pathlib.Path] = []
    arrays = dict(list(whole_folders.tensors().items())[:3])
    self._arrays = {_NAME: whole_folders.tensors()[_NAME], **arrays}
    self._pickle = torch_files.pickled(torch_files.records(self._arrays))

  def mutate(self, rng: random.Random) -> None:
    for path in self._changed:
      path.write_bytes(self._files[path])
    # A pickle in a zip file, a header before its data: kept consistent, or few
    # mutations reach what lies behind the checks of the whole.
    inside = rng.random() < 0.7
    if self._kind in ("zarr", "run"):
      path = rng.choice(sorted(self._files))
    else:
      (path,) = (p for p in self._files if p.name != "spiece.model")
    self._changed = [path]
    data = self._files[path]
    if self._kind == "bin" and inside:
      changed = model_folders.mutated(self._pickle, rng)
      torch_files.write(path, self._arrays, changed)
    elif self._kind == "safetensors" and inside:
      end = 8 + int.from_bytes(data[:8], "little")
      header = model_folders.mutated(data[8:end], rng)
      path.write_bytes(model_folders.safetensors_file(header, data[end:]))
    else:
      path.write_bytes(model_folders.mutated(data, rng))

  def read(self) -> None:
    """Reads every tensor; each is no larger than what holds it."""
    from fat5_jax.convert import orbax_files, t5x, tensor_files, torch_file

    if self._kind == "bin":
      path = self._folder / "pytorch_model.bin"
      leaves = torch_file.load(str(path))
    elif self._kind == "safetensors":
      path = self._folder / "model.safetensors"
      leaves = tensor_files.read_safetensors(str(path))
    elif self._kind == "run":
      path = self._folder / "checkpoint_0" / "params"
      leaves = orbax_files.read_item(str(path))
    else:
      path = self._folder / "checkpoint"
      _, leaves = t5x.open_model(str(self._folder))
    for leaf in leaves.values():
      array = leaf.read()
      assert array.shape == leaf.shape
      if self._kind not in ("zarr", "run"):
        assert array.nbytes <= path.stat().st_size, "more than the file holds"
      # Touches every byte: reading beyond the file would end the process.
      array.tobytes()


_NONSENSE = (
  *(None, True, False, 0, 1, 2, -1, 3, 7, 64, 2**31, 10**30, 0.5, -1.5, 1e308),
  *(float("nan"), float("inf"), "", "x", "8", "../x", "/", [], {}, [1], ["a"]),
  *({"a": 1}, [[]], "relu", "t5", "a\n" * 99, [None], {"": None}, "\ud800"),
)


class _FuzzedJson:
  """A folder of a kind; `mutate` changes values in one of its JSON files."""

  def __init__(self, kind: str, folder: pathlib.Path):
    whole_folders.make(kind, folder)
    self._folder = folder / "it" if kind == "peft" else folder
    self._files = {
      path: path.read_text()
      for path in sorted(self._folder.rglob("*"))
      if path.suffix == ".json" or path.name in ("_METADATA", ".zarray")
    }
    self._changed = None

  def mutate(self, rng: random.Random) -> None:
    if self._changed:
      self._changed.write_text(self._files[self._changed])
    self._changed = path = rng.choice(list(self._files))
    value = json.loads(self._files[path])
    for _ in range(rng.choice((1, 1, 2, 3))):
      value = _other(value, rng)
    path.write_text(json.dumps(value))

  def read(self) -> None:
    from fat5_jax.data import vocabularies

    source = reference.find(str(self._folder))
    reference.own_head_record(source)
    reference.open_params(source)
    try:
      checkpoints.vocabulary_of(source.path)
    except vocabularies.OtherTokenizerError:
      pass


def _other(value, rng: random.Random):
  """The JSON with a value changed, taken out or added somewhere."""
  if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
    return copy.deepcopy(rng.choice(_NONSENSE))
  keys = list(value) if isinstance(value, dict) else range(len(value))
  key = rng.choice(keys)
  how = rng.random()
  if how < 0.1:
    del value[key]
  elif how < 0.15 and isinstance(value, dict):
    name = rng.choice(("x", "t5", "fat5_jax", "id2label", "head"))
    value[name] = copy.deepcopy(rng.choice(_NONSENSE))
  elif how < 0.2 and isinstance(value, dict):
    value[key] = copy.deepcopy(value[rng.choice(keys)])
  else:
    value[key] = _other(value[key], rng)
  return value


def run(kind: str, seed: int, seconds: float) -> None:
  """Fuzzes for a while; prints what it does, so that a crash has a name."""
  from fat5_jax.errors import UserError

  folder = pathlib.Path("folder").absolute()
  if kind in TENSORS:
    fuzzed = _Fuzzed(kind, folder)
  else:
    fuzzed = _FuzzedJson(kind.removeprefix("json of "), folder)
  end, number, refused = time.monotonic() + seconds, 0, 0
  while time.monotonic() < end:
    fuzzed.mutate(random.Random(f"{seed} {kind} {number}"))
    pathlib.Path("number").write_text(json.dumps(number))
    try:
      fuzzed.read()
    except UserError as e:
      refused += 1
      assert len(str(e)) < 3000, "a long message"
    except BaseException:
      print(f"mutation {number}", flush=True)
      raise
    number += 1
  print(f"{number} mutations, {refused} refused, {number - refused} read")
