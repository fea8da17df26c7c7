"""What happens to a checkpoint on a disk: twelve ways, and any bytes."""

from __future__ import annotations

from collections.abc import Callable
import os
import random
import shutil


def files(folder: str, part: str = "") -> list[str]:
  """All files below a folder whose path has `part`, ascending by size."""
  found = [
    os.path.join(where, name)
    for where, _, names in os.walk(folder)
    for name in names
  ]
  return sorted((f for f in found if part in f), key=os.path.getsize)


def flip(path: str, rng: random.Random, count: int = 1) -> None:
  """Other bytes of the same number."""
  with open(path, "r+b") as file:
    size = os.path.getsize(path)
    for _ in range(count):
      at = rng.randrange(size)
      file.seek(at)
      byte = file.read(1)[0]
      file.seek(at)
      file.write(bytes([byte ^ rng.randrange(1, 256)]))


def _cut(path: str, rng: random.Random) -> None:
  os.truncate(path, rng.randrange(os.path.getsize(path)))


def _largest(step: str, item: str) -> str:
  """An item's file of arrays; what only merges leave behind is not read."""
  return [f for f in files(os.path.join(step, item)) if "/d/" in f][-1]


def _empty(step: str, rng: random.Random) -> None:
  shutil.rmtree(step)
  os.mkdir(step)


def _one_file_lost(step: str, rng: random.Random) -> None:
  os.unlink(rng.choice(files(os.path.join(step, "params"))))


# Of a whole step's folder, each with its generator of numbers.
WAYS: dict[str, Callable[[str, random.Random], None]] = {
  "metadata missing": lambda s, r: os.unlink(f"{s}/params/_METADATA"),
  "metadata cut": lambda s, r: _cut(f"{s}/params/_METADATA", r),
  "manifest missing": lambda s, r: os.unlink(f"{s}/optimizer/manifest.ocdbt"),
  "manifest cut": lambda s, r: _cut(f"{s}/params/manifest.ocdbt", r),
  "params missing": lambda s, r: shutil.rmtree(f"{s}/params"),
  "optimizer missing": lambda s, r: shutil.rmtree(f"{s}/optimizer"),
  "data missing": lambda s, r: shutil.rmtree(f"{s}/data"),
  "position cut": lambda s, r: _cut(f"{s}/data/metadata", r),
  "arrays cut": lambda s, r: _cut(_largest(s, "params"), r),
  "arrays flipped": lambda s, r: flip(_largest(s, "params"), r),
  "a file lost": _one_file_lost,
  "empty folder": _empty,
}
