"""Times block sizes on this chip and prints rows for tiling.py.

  python tools/tune_attention.py
  python tools/tune_attention.py --length 8192 --head-dims 64

Every candidate runs forward and backward of a T5 layer with the gradient of
the bias; one that does not compile or spills out of memory is left out, with
the reason. Nothing is written: paste the rows it prints into
pallas_kernels/flash_attention/tiling.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax

from pallas_kernels.flash_attention import tiling
from tools.bench_attention import Shape, inputs, ours, run_jax


def tpu_candidates(head_dim: int):
  """(label, what to set) for the table of TPUs."""
  names = ("best", "most") if head_dim <= 128 else ("wide",)
  for block in (256, 512, 1024):

    def apply(block=block):
      sizes = {n: block for n in names}
      tiling._TPU[tiling.device_kind()] = tiling._tpu_row()._replace(**sizes)

    yield f"{block}", apply


def mosaic_candidates(head_dim: int):
  row = 64 if head_dim <= 64 else 128
  for parts in itertools.product((1, 2), repeat=4):

    def apply(parts=parts):
      tiling._MOSAIC_GPU[row] = tiling.MosaicParts(*parts)

    yield str(tiling.MosaicParts(*parts)), apply


def triton_candidates(head_dim: int):
  row = next(limit for limit in tiling._TRITON if head_dim <= limit)
  for block, part, warps in itertools.product((64, 128), (32, 64), (4, 8)):

    def apply(blocks=(block, part, warps)):
      _, float32 = tiling._TRITON[row]
      tiling._TRITON[row] = (tiling.TritonBlocks(*blocks), float32)

    yield str(tiling.TritonBlocks(block, part, warps)), apply


CANDIDATES = {
  "mosaic_tpu": tpu_candidates,
  "mosaic_gpu": mosaic_candidates,
  "triton": triton_candidates,
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
  arguments = parser.parse_args()
  implementations = [
    name for name in tiling.preferred(arguments.length) if name in CANDIDATES
  ]
  if not implementations:
    sys.exit(f"{tiling.device_kind()} has no kernel whose blocks can be tuned")
  print(f"{tiling.device_kind()}, jax {jax.__version__}\n")
  for name, head_dim in itertools.product(implementations, arguments.head_dims):
    shape = Shape(
      arguments.batch, arguments.length, arguments.heads, head_dim, False
    )
    arrays, found = inputs(shape), []
    print(f"{name}, head dimension {head_dim}")
    for label, apply in CANDIDATES[name](head_dim):
      apply()
      try:
        result = run_jax(
          ours(name, True, shape),
          True,
          shape,
          arrays,
          "bfloat16",
          arguments.rounds,
        )
      except Exception as error:
        print(f"  {label}: {type(error).__name__}, {str(error)[:80]!r}")
        continue
      total = result.forward + result.backward_bias
      found.append((total, label))
      print(
        f"  {label}: forward {result.forward * 1e3:.3f} ms, backward"
        f" {result.backward_bias * 1e3:.3f} ms",
        flush=True,
      )
    if found:
      print(f"  best: {min(found)[1]}\n")


if __name__ == "__main__":
  main()
