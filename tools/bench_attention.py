"""Attention with T5's bias: ours beside every peer this machine has.

  python tools/bench_attention.py                      (on a GPU or TPU)
  python tools/bench_attention.py --lengths 512 --batch-tokens 512 --rounds 1

All sides see the same inputs in one run, with each row one sequence and packed
of four (--segments). Time is the best of --rounds means. The backward pass is
timed alone: one forward pass leaves what it needs (in jax the function that
jax.vjp returns, its arrays arguments of a program of its own; in torch the
graph of o, retained), and from it the gradients are computed again and again,
those of q, k, v, and those with the bias table's. TFLOP/s count 4 D a head and
pair that sees each other, and 2.5 times that backward, whatever a side does.

Memory is a side's greatest need over a forward and a backward pass, less its
arguments (q, k, v, the table, ids, do) and results (o and the gradients): what
the forward pass leaves for the backward one and both passes' scratch; a dense
bias that a side makes, and padding, are among it. In jax the compiler's figure
for one program that does both, as a training step is; in torch the peak of its
allocator. 0 is possible: a result not yet written can serve as scratch.

The error is that of the output and of the bias gradient, relative to float32.
Needs jax; with torch its attentions join, and tokamax where it can be imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import dataclasses
import functools
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import tiling
from tools import attention_sides
from tools.attention_sides import Shape

HEADER = (
  "| length | causal | packed | side | forward ms | TFLOP/s | backward ms |"
  " TFLOP/s | with bias gradient ms | TFLOP/s | memory MiB | error |"
  " bias gradient error |"
)


@dataclasses.dataclass
class Result:
  """Seconds, bytes, arrays as numpy; None where a side cannot do it."""

  forward: float
  backward: float | None = None
  backward_bias: float | None = None
  memory: int | None = None
  output: np.ndarray | None = None
  dtable: np.ndarray | None = None
  # Why there is no bias gradient, where there should be one.
  problem: str | None = None


@functools.lru_cache(maxsize=2)
def inputs(shape: Shape):
  """float32 numpy q, k, v, do (B, L, H, D), table (H, 32), bfloat16-exact."""
  rng = np.random.default_rng(0)
  size = (shape.batch, shape.length, shape.heads, shape.dim)
  arrays = [
    rng.standard_normal(size, np.float32) * shape.dim**-0.25 for _ in range(4)
  ]
  arrays = [np.array(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays]
  return *arrays, rng.normal(size=(shape.heads, 32)).astype(np.float32)


def measure(
  function: Callable, arguments, wait: Callable, rounds: int
) -> float:
  """Seconds a call: the best of `rounds` means over about 0.2 s each."""
  wait(function(*arguments))
  start = time.perf_counter()
  wait(function(*arguments))
  once = max(time.perf_counter() - start, 1e-6)
  calls = max(1, min(100, int(0.2 / once)))
  best = math.inf
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(calls):
      result = function(*arguments)
    wait(result)
    best = min(best, (time.perf_counter() - start) / calls)
  return best


def split_vjp(function: Callable, moving, fixed, do):
  """(o, vjp, compiled backward(vjp, do), bytes beside arguments and results).

  Of function(*moving, *fixed), the gradients those of `moving`. Forward and
  backward are two programs: the second's arguments are the arrays that the
  first left, so the compiler can move no work from one to the other. The bytes
  are of a third one that does both.
  """

  def forward(moving, fixed):
    return jax.vjp(lambda *moving: function(*moving, *fixed), *moving)

  def both(moving, fixed, do):
    o, vjp = forward(moving, fixed)
    return o, vjp(do)

  o, vjp = jax.jit(forward)(moving, fixed)
  backward = jax.jit(lambda vjp, do: vjp(do)).lower(vjp, do).compile()
  whole = jax.jit(both).lower(moving, fixed, do).compile()
  return o, vjp, backward, whole.memory_analysis().temp_size_in_bytes


def run_jax(
  attention, biased: bool, shape: Shape, arrays, dtype: str, rounds: int
) -> Result:
  q, k, v, do, table = (jnp.asarray(x) for x in arrays)
  q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
  ids = shape.segment_ids()
  ids = None if ids is None else jnp.asarray(ids)
  wait = jax.block_until_ready
  forward = jax.jit(attention).lower(q, k, v, table, ids).compile()
  seconds = measure(forward, (q, k, v, table, ids), wait, rounds)
  _, vjp, backward, memory = split_vjp(attention, (q, k, v), (table, ids), do)
  result = Result(seconds, measure(backward, (vjp, do), wait, rounds))
  result.memory = memory
  if biased:
    del vjp, backward
    o, vjp, backward, memory = split_vjp(
      attention, (q, k, v, table), (ids,), do
    )
    result.backward_bias = measure(backward, (vjp, do), wait, rounds)
    result.memory = memory
    result.dtable = np.asarray(backward(vjp, do)[3], np.float32)
    result.output = np.asarray(o, np.float32)
  return result


def run_torch(
  attention, biased: bool, shape: Shape, arrays, dtype: str, rounds: int
) -> Result:
  import torch

  device = attention_sides.torch_device()
  on_gpu = device == "cuda"
  put = lambda x: torch.tensor(x, device=device)
  q, k, v, do = (
    put(x).to(getattr(torch, dtype)).transpose(1, 2).contiguous()
    for x in arrays[:4]
  )
  table = put(arrays[4])
  ids = shape.segment_ids()
  ids = None if ids is None else put(ids)
  wait = lambda _: torch.cuda.synchronize() if on_gpu else None

  def forward():
    with torch.no_grad():
      return attention(q, k, v, table, ids)

  def graph(with_table):
    """(o, what to differentiate)."""
    leaves = [x.requires_grad_(True) for x in (q, k, v)]
    table.requires_grad_(with_table)
    return attention(q, k, v, table, ids), leaves + [table] * with_table

  def backward(o, leaves):
    return torch.autograd.grad(o, leaves, do, retain_graph=True)

  def peak(with_table):
    """Bytes beside arguments and results, once everything is compiled."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, leaves = graph(with_table)
    results = [o, *backward(o, leaves)]
    most = torch.cuda.max_memory_allocated() - before
    return max(0, most - sum(x.nbytes for x in results))

  result = Result(measure(forward, (), wait, rounds))
  result.backward = measure(backward, graph(False), wait, rounds)
  if on_gpu:
    result.memory = peak(False)
  if not biased:
    return result
  try:
    o, leaves = graph(True)
    result.backward_bias = measure(backward, (o, leaves), wait, rounds)
  except RuntimeError as error:
    # A kernel may take a bias and have no gradient of it.
    result.problem = str(error).splitlines()[0][:200]
    return result
  numpy = lambda x: x.detach().float().cpu().numpy()
  result.dtable = numpy(backward(o, leaves)[3])
  result.output = numpy(o.transpose(1, 2))
  del o, leaves
  if on_gpu:
    result.memory = peak(True)
  return result


# --- rows --------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _exact(shape: Shape):
  """(output, gradient of the table) in float32."""
  attention = attention_sides.ours("chunked", True, shape)
  result = run_jax(attention, True, shape, inputs(shape), "float32", 0)
  return result.output, result.dtable


def run_side(
  name: str, shape: Shape, dtype: str = "bfloat16", rounds: int = 5
) -> dict:
  """One side at one shape: milliseconds, TFLOP/s, MiB, errors.

  Raises:
    ImportError: where the side's package is not installed.
    Exception: whatever a side raises that cannot run.
  """
  side = attention_sides.sides(jax.default_backend())[name]
  run = {"jax": run_jax, "torch": run_torch}[side.framework]
  attention = side.make(shape)
  result = run(attention, side.biased, shape, inputs(shape), dtype, rounds)
  row = dataclasses.asdict(shape) | {"side": name, "dtype": dtype}
  for what, factor in (
    ("forward", 1),
    ("backward", 2.5),
    ("backward_bias", 2.5),
  ):
    seconds = getattr(result, what)
    if seconds is not None:
      row[f"{what}_ms"] = seconds * 1e3
      row[f"{what}_tflops"] = factor * shape.flops / max(seconds, 1e-9) / 1e12
  if result.problem:
    row["problem"] = result.problem
  if result.memory is not None:
    row["memory_mib"] = result.memory / 2**20
  if result.dtable is not None:
    for what, found, exact in zip(
      ("error", "dtable_error"), (result.output, result.dtable), _exact(shape)
    ):
      row[what] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
  return row


def line(row: dict) -> str:
  """A row of the table; one that failed has its `reason`."""
  yes = lambda name: "yes" if row[name] else "no"
  start = (
    f"| {row['length']} | {yes('causal')} | {yes('segments')} | {row['side']} |"
  )
  if "reason" in row:
    return f"{start} {row['reason']} |" + " |" * 8

  def number(name, form):
    return format(row[name], form) if name in row else "-"

  timed = " | ".join(
    f"{number(f'{what}_ms', '.3f')} | {number(f'{what}_tflops', '.1f')}"
    for what in ("forward", "backward", "backward_bias")
  )
  return (
    f"{start} {timed} | {number('memory_mib', ',.1f')} |"
    f" {number('error', '.1e')} | {number('dtable_error', '.1e')} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  lengths = [512, 1024, 2048, 4096, 8192, 16384]
  parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
  parser.add_argument("--batch-tokens", type=int, default=16384)
  parser.add_argument("--heads", type=int, default=12)
  parser.add_argument("--head-dim", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument(
    "--segments", choices=["both", "on", "off"], default="both"
  )
  parser.add_argument("--only", default="", help="sides whose name has this")
  flags = parser.parse_args()

  print(f"{tiling.device_kind()}, jax {jax.__version__}, {flags.dtype}\n")
  print(HEADER)
  print("|---" * (HEADER.count("|") - 1) + "|")
  segments = {"both": (False, True), "on": (True,), "off": (False,)}
  for length in flags.lengths:
    for causal in (False, True):
      for packed in segments[flags.segments]:
        batch = max(1, flags.batch_tokens // length)
        shape = Shape(
          batch, length, flags.heads, flags.head_dim, causal, packed
        )
        for name in attention_sides.sides(jax.default_backend()):
          if flags.only not in name:
            continue
          try:
            row = run_side(name, shape, flags.dtype, flags.rounds)
          except Exception as error:
            # One side that cannot run must not end the comparison.
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            row = dataclasses.asdict(shape) | {"side": name, "reason": reason}
          print(line(row), flush=True)


if __name__ == "__main__":
  main()
