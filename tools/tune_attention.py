"""Times block sizes on this chip, each knob alone, and prints the best.

  python tools/tune_attention.py
  python tools/tune_attention.py --length 8192 --head-dims 64

Beside the row of tiling.py, each candidate changes one number of it: on a chip
whose knobs are nearly independent that finds the best row in a fraction of the
runs that all combinations take. Every run is forward and backward of a T5 layer
with the gradient of the bias; one that does not compile or spills out of memory
is left out, with the reason. Nothing is written: put what was better into
pallas_kernels/flash_attention/tiling.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import itertools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax

from pallas_kernels.flash_attention import chunked, tiling
from tools.attention_sides import Shape, ours
from tools.bench_attention import inputs, run_jax

AS_IT_IS = "as in tiling.py"
# What else each knob may be.
_BLOCKS = {256: (512,), 512: (256, 1024), 1024: (512,)}
_TRITON = {"block": (64, 128), "part": (32, 64), "warps": (4, 8)}


def _tpu(head_dim: int):
  names = ("best", "most") if head_dim <= 128 else ("wide",)

  def apply(row):
    tiling._TPU[tiling.device_kind()] = row

  row = tiling._tpu_row()
  for block in _BLOCKS[getattr(row, names[0])]:
    yield f"block={block}", apply, row._replace(**dict.fromkeys(names, block))
  yield AS_IT_IS, apply, row


def _mosaic(head_dim: int):
  at = 64 if head_dim <= 64 else 128

  def apply(row):
    tiling._MOSAIC_GPU[at] = row

  row = tiling._MOSAIC_GPU[at]
  for name, parts in row._asdict().items():
    yield f"{name}={3 - parts}", apply, row._replace(**{name: 3 - parts})
  yield AS_IT_IS, apply, row


def _triton(head_dim: int):
  at = next(limit for limit in tiling._TRITON if head_dim <= limit)

  def apply(row):
    tiling._TRITON[at] = ([row], tiling._TRITON[at][1])

  row = tiling.triton_blocks(head_dim, float32=False)
  for name, values in _TRITON.items():
    for value in values:
      if value != getattr(row, name):
        yield f"{name}={value}", apply, row._replace(**{name: value})
  yield AS_IT_IS, apply, row


def _chunked(head_dim: int):
  del head_dim

  def apply(block):
    chunked.BLOCK = block

  for block in _BLOCKS[chunked.BLOCK]:
    yield f"block={block}", apply, block
  yield AS_IT_IS, apply, chunked.BLOCK


_KNOBS = {
  "mosaic_tpu": _tpu,
  "mosaic_gpu": _mosaic,
  "triton": _triton,
  "chunked": _chunked,
}


def tunable() -> list[str]:
  """The kernels of this chip, the one it prefers first."""
  return [name for name in tiling.preferred(512) if name != "chunked"]


def knobs(implementation: str, head_dim: int) -> dict[str, Callable]:
  """label -> what sets the blocks so; AS_IT_IS first, which sets them back."""
  found = {
    label: (lambda apply=apply, value=value: apply(value))
    for label, apply, value in _KNOBS[implementation](head_dim)
  }
  return {AS_IT_IS: found.pop(AS_IT_IS)} | found


def run_knob(
  implementation: str, label: str, shape: Shape, rounds: int = 5
) -> dict[str, float]:
  """Milliseconds with one knob turned, which is turned back."""
  turned = knobs(implementation, shape.dim)
  jax.clear_caches()  # Traces of other blocks.
  turned[label]()
  try:
    attention = ours(implementation, True, shape)
    result = run_jax(attention, True, shape, inputs(shape), "bfloat16", rounds)
  finally:
    turned[AS_IT_IS]()
    jax.clear_caches()
  return {
    "forward_ms": result.forward * 1e3,
    "backward_bias_ms": result.backward_bias * 1e3,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--heads", type=int, default=12)
  parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args()
  if not tunable():
    sys.exit(f"{tiling.device_kind()} has no kernel whose blocks can be tuned")
  print(f"{tiling.device_kind()}, jax {jax.__version__}\n")
  for name, head_dim in itertools.product(tunable(), flags.head_dims):
    shape = Shape(flags.batch, flags.length, flags.heads, head_dim)
    found = []
    print(f"{name}, head dimension {head_dim}")
    for label in knobs(name, head_dim):
      try:
        row = run_knob(name, label, shape, flags.rounds)
      except Exception as error:
        print(f"  {label}: {type(error).__name__}, {str(error)[:80]!r}")
        continue
      found.append((sum(row.values()), label))
      print(
        f"  {label}: forward {row['forward_ms']:.3f} ms, backward"
        f" {row['backward_bias_ms']:.3f} ms",
        flush=True,
      )
    if found:
      print(f"  best: {min(found)[1]}\n")


if __name__ == "__main__":
  main()
