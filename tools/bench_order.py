"""How well a sorted file is shuffled, and whether hosts see one order.

  python tools/bench_order.py [--megabytes 2000]

Rows of 1,000 characters begin with their number, in order. They are prepared,
and two epochs of batches are read back on 1, 2 and 4 hosts, the numbers taken
out of the tokens. Printed are Spearman's rank correlations of the order with
the file's and of one epoch with the next, what every epoch misses or repeats,
and the memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
_DIGITS, _BATCH = 8, 4096


def write_rows(path: str, megabytes: float) -> int:
  count = int(megabytes * 1000)
  words = " of a file that is sorted" * 40
  with open(path, "w", encoding="utf-8") as file:
    for number in range(count):
      text = f"{number:0{_DIGITS}}{words}"[:970]
      file.write(f'{{"text": "{text}", "label": "{number % 7}"}}\n')
  return count


def numbers_of(batch) -> np.ndarray:
  """The rows' numbers, read from their first tokens, which are bytes."""
  digits = batch["encoder_input_tokens"][:, :_DIGITS] - 3 - ord("0")
  return digits @ 10 ** np.arange(_DIGITS - 1, -1, -1)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Of two orders of the same rows: of the place of a row in each."""
  ranks = [np.argsort(order) for order in (a, b)]
  return float(np.corrcoef(ranks)[0, 1])


def share(host: int, hosts: int):
  """Of the rows of a batch, a host's [first, end)."""
  return lambda rows: (rows * host // hosts, rows * (host + 1) // hosts)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--megabytes", type=float, default=2000)
  args = parser.parse_args()
  import seqio

  from fat5_jax.data import pipeline, sources, tasks

  with tempfile.TemporaryDirectory() as folder:
    os.environ["FAT5_JAX_CACHE"] = os.path.join(folder, "cache")
    path = os.path.join(folder, "sorted.jsonl")
    count = write_rows(path, args.megabytes)
    task = tasks.text_to_text(
      sources.Files({"train": path}),
      "{text}",
      "{label}",
      seqio.ByteVocabulary(0),
      name="sorted",
    )
    config = pipeline.DatasetConfig(
      task, {"inputs": 16, "targets": 4}, "train", _BATCH, shuffle=True
    )
    begin = time.monotonic()
    list(pipeline.prepare_all(config))
    print(
      f"{os.path.getsize(path) / 1e6:,.0f} MB, {count:,} rows: prepared in"
      f" {time.monotonic() - begin:.0f} s",
      flush=True,
    )
    orders = {}
    for hosts in (1, 2, 4):
      streams = [
        pipeline.train_batches(config, 384, own=share(host, hosts))
        for host in range(hosts)
      ]
      seen = [
        numbers_of(next(stream))
        for _ in range(-(-2 * count // _BATCH))
        for stream in streams
      ]
      orders[hosts] = np.concatenate(seen)[: 2 * count]
      for stream in streams:
        stream.close()
    first, second = orders[1][:count], orders[1][count:]
    file = np.arange(count)
    for name, epoch in (("first", first), ("second", second)):
      missing = count - len(np.unique(epoch))
      print(
        f"{name} epoch: correlation with the file"
        f" {correlation(epoch, file):+.4f}, {missing} rows missing"
      )
    print(f"of one epoch with the next: {correlation(first, second):+.4f}")
    for hosts in (2, 4):
      same = bool(np.array_equal(orders[hosts], orders[1]))
      print(f"{hosts} hosts read the order of one: {same}")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  print(f"peak memory {peak:,.0f} MB")


if __name__ == "__main__":
  main()
