"""Which implementation of attention each chip takes, and that it compiles.

  python tools/compile_matrix.py v4 v5e v5p v6e v7x           (libtpu)
  python tools/compile_matrix.py a100 a10 l4 h100 b200   (jax 0.11, cuda plugin)

No chip is needed: forward and backward of a layer with T5's bias, packed, are
compiled by the chip's own compiler with `implementation=None`. On TPUs by the
tokens a chip holds, on GPUs by head dimension and dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fat5_jax.planning import chips
from tools import static_kernel_report as report

# Rows x tokens a row, on one chip: 8k, 128k and 1M tokens.
TPU_SHAPES = (
  (16, 512),
  (1, 8192),
  (256, 512),
  (1, 131072),
  (2048, 512),
  (32, 32768),
  (1, 2**20),
)
GPU_LENGTH, HEADS = 4096, 4
DIMS, DTYPES = (64, 128, 256), ("bfloat16", "float32")


def cases(target: str, quick: bool):
  """Options of report.layer."""
  if target in report.TPUS:
    for batch, length in TPU_SHAPES[-3:] if quick else TPU_SHAPES:
      yield dict(batch=batch, length=length)
    return
  for dim in DIMS:
    for dtype in DTYPES:
      yield dict(batch=1, length=GPU_LENGTH, dim=dim, dtype=dtype)


def compile_one(target: str, options: dict) -> dict:
  """A row: what was taken, why not another, and what came of it."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels import RelativeBuckets
  from pallas_kernels.flash_attention import api

  options = dict(dim=report.HEAD_DIM, dtype="bfloat16") | options
  function, shapes = report.layer(None, heads=HEADS, packed=True, **options)
  taken = []

  def traced(*arguments):
    x = jax.ShapeDtypeStruct(
      (options["batch"], options["length"], HEADS, options["dim"]),
      jnp.dtype(options["dtype"]),
    )
    position = RelativeBuckets(jnp.zeros((HEADS, 32)), bidirectional=True)
    taken.append(api.best(x, x, position.lowered()))
    return function(*arguments)

  start = time.monotonic()
  try:
    compiled = report.compile_for(target, traced, *shapes)
    memory = compiled.memory_analysis().temp_size_in_bytes
    outcome = dict(compiles=True, temporary_bytes=memory)
  except Exception as error:  # A row says so; the others go on.
    lines = str(error).splitlines() or [type(error).__name__]
    outcome = dict(compiles=False, error=lines[0][:200])
  [(name, reasons)] = taken
  return dict(
    target=target,
    **options,
    implementation=name,
    reasons=reasons,
    seconds=round(time.monotonic() - start, 1),
    **outcome,
  )


def show(row: dict) -> None:
  shape = f"{row['batch']:,} x {row['length']:,}"
  result = "compiles" if row["compiles"] else f"FAILS: {row['error']}"
  print(
    f"| {row['target']} | {shape} | {row['dim']} | {row['dtype']} |"
    f" {row['implementation']} | {'; '.join(row['reasons'])} | {result} |",
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("targets", nargs="+", choices=[*report.TPUS, *chips.GPUS])
  parser.add_argument("--json", metavar="FILE", help="also write rows there")
  parser.add_argument("--quick", action="store_true", help="1M tokens alone")
  arguments = parser.parse_args()
  chips.prepare_environment([])
  print("| chip | rows x tokens | head dim | dtype | takes | why | |")
  print("|---|---|---|---|---|---|---|")
  rows = []
  for target in arguments.targets:
    for options in cases(target, arguments.quick):
      rows.append(compile_one(target, options))
      show(rows[-1])
  if arguments.json:
    with open(arguments.json, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)
  if not all(row["compiles"] for row in rows):
    sys.exit("something that None takes does not compile, see above")


if __name__ == "__main__":
  main()
