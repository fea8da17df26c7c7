"""Mutates the four formats of tensors and reads them, many times a process."""

from __future__ import annotations

import json
import pathlib
import random
import time

import model_folders
import torch_files

KINDS = ("bin", "safetensors", "t5x", "zarr")
_NAME = "encoder.block.0.layer.0.SelfAttention.q.weight"


class _Fuzzed:
  """A folder of a kind; `mutate` damages it anew, `read` reads all of it."""

  def __init__(self, kind: str, folder: pathlib.Path):
    self._kind, self._folder = kind, folder
    model_folders.make(kind, folder)
    self._files = {
      path: path.read_bytes()
      for path in folder.rglob("*")
      if path.is_file() and path.suffix != ".json"
    }
    self._changed: list[pathlib.Path] = []
    arrays = dict(list(model_folders.tensors().items())[:3])
    self._arrays = {_NAME: model_folders.tensors()[_NAME], **arrays}
    self._pickle = torch_files.pickled(torch_files.records(self._arrays))

  def mutate(self, rng: random.Random) -> None:
    for path in self._changed:
      path.write_bytes(self._files[path])
    # A pickle in a zip file, a header before its data: kept consistent, or few
    # mutations reach what lies behind the checks of the whole.
    inside = rng.random() < 0.7
    if self._kind == "zarr":
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
    from fat5_jax.convert import t5x, tensor_files, torch_file

    if self._kind == "bin":
      path = self._folder / "pytorch_model.bin"
      leaves = torch_file.load(str(path))
    elif self._kind == "safetensors":
      path = self._folder / "model.safetensors"
      leaves = tensor_files.read_safetensors(str(path))
    else:
      path = self._folder / "checkpoint"
      _, leaves = t5x.open_model(str(self._folder))
    for leaf in leaves.values():
      array = leaf.read()
      assert array.shape == leaf.shape
      if self._kind != "zarr":
        assert array.nbytes <= path.stat().st_size, "more than the file holds"
      # Touches every byte: reading beyond the file would end the process.
      array.tobytes()


def run(kind: str, seed: int, seconds: float) -> None:
  """Fuzzes for a while; prints what it does, so that a crash has a name."""
  from fat5_jax.errors import UserError

  fuzzed = _Fuzzed(kind, pathlib.Path("folder"))
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
