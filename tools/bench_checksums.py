"""What a checkpoint's checksums cost, beside saving and reading it.

  python tools/bench_checksums.py [--gib 1 --rounds 3] [--folder DIR]

A state of that size, parameters and two slots, is saved and read with the
checksums and without them, in turns; the medians count. A save that a training
run does not wait for takes this long in the background. "Cold" is a read after
the system was asked to forget the files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time

from fat5_jax import checkpoints
from fat5_jax.checkpoints import checkpointer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def make_state(gib: float):
  """(parameters, optimizer): random float32, tensors of 16 MiB."""
  import jax.numpy as jnp
  import numpy as np

  count = max(1, round(gib * 2**30 / 2**24 / 3))
  rng = np.random.default_rng(0)
  array = lambda: jnp.asarray(rng.standard_normal((2048, 2048), np.float32))
  names = [f"kernel_{n}" for n in range(count)]
  params = {name: array() for name in names}
  return params, {s: {name: array() for name in names} for s in ("m", "v")}


def forget(folder: str) -> None:
  """Asks the system to keep none of a folder's files in memory."""
  for where, _, names in os.walk(folder):
    for name in names:
      with open(os.path.join(where, name), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gib", type=float, default=1.0)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", help="on the disk to measure (a new one)")
  flags = parser.parse_args()

  import logging

  from fat5_jax.checkpoints import integrity
  from fat5_jax.convert import orbax_files

  logging.getLogger("absl").setLevel(logging.ERROR)
  params, slots = make_state(flags.gib)
  times: dict[str, list[float]] = {}

  def timed(what, function):
    begin = time.perf_counter()
    function()
    times.setdefault(what, []).append(time.perf_counter() - begin)

  def save(folder):
    config = checkpoints.SaveCheckpointConfig()
    with checkpointer.Checkpointer(folder, config) as saver:
      saver.save(1, params, slots, {})

  def read(folder):
    for item in ("params", "optimizer"):
      path = os.path.join(folder, "checkpoint_1", item)
      for leaf in orbax_files.read_item(path).values():
        leaf.read()

  def check(folder):
    integrity._problem.cache_clear()
    step = os.path.join(folder, "checkpoint_1")
    assert integrity.problem(step) is None

  seal = integrity.write
  for _ in range(flags.rounds):
    for what, write in (("save, no checksums", lambda _: None), ("save", seal)):
      with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        integrity.write = write
        timed(what, lambda folder=folder: save(folder))
        if what != "save":
          continue
        size = sum(
          os.path.getsize(os.path.join(where, name))
          for where, _, names in os.walk(folder)
          for name in names
        )
        timed("read", lambda folder=folder: read(folder))
        timed("check", lambda folder=folder: check(folder))
        forget(folder)
        timed("read, cold", lambda folder=folder: read(folder))
        forget(folder)
        timed("check, cold", lambda folder=folder: check(folder))
  integrity.write = seal
  free = shutil.disk_usage(flags.folder or tempfile.gettempdir()).free
  print(
    f"{size / 2**30:.2f} GiB on disk, {flags.rounds} rounds,"
    f" {os.cpu_count()} cores, {free / 2**30:.0f} GiB free\n"
  )
  print("| | seconds | GiB/s |\n|---|---|---|")
  for what, found in times.items():
    middle = statistics.median(found)
    print(f"| {what} | {middle:.2f} | {size / 2**30 / middle:.2f} |")


if __name__ == "__main__":
  main()
