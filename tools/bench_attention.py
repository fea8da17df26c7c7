"""Attention with T5's bias: ours beside every peer this machine has.

  python tools/bench_attention.py                      (on a GPU or TPU)
  python tools/bench_attention.py --lengths 512 --batch-tokens 512 --rounds 1

All sides see the same inputs in one run. Time is the best of --rounds means;
TFLOP/s count 4 B H Q K D forward (half of it if causal) and 2.5 times that
backward, whatever a side computes. Memory is what a side allocates beside its
arguments, forward and backward. The error is that of the output and of the
bias gradient, relative to float32. Needs jax; with torch and a CUDA device its
attentions join, and tokamax where it can be imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import dataclasses
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import RelativeBuckets, flash_attention
from pallas_kernels.flash_attention import positions, relative_bias, tiling

HEADER = (
  "| length | causal | side | forward ms | TFLOP/s | backward ms | TFLOP/s |"
  " with bias gradient ms | TFLOP/s | memory MiB | error |"
  " bias gradient error |"
)


@dataclasses.dataclass
class Shape:
  batch: int
  length: int
  heads: int
  dim: int
  causal: bool

  @property
  def flops(self) -> float:
    pairs = self.length**2 / (2 if self.causal else 1)
    return 4 * self.batch * self.heads * pairs * self.dim


@dataclasses.dataclass
class Result:
  """Seconds, bytes, arrays as numpy; None where a side cannot do it."""

  forward: float
  backward: float | None = None
  backward_bias: float | None = None
  memory: int | None = None
  output: np.ndarray | None = None
  dtable: np.ndarray | None = None


def inputs(shape: Shape):
  """float32 numpy q, k, v, do (B, L, H, D), table (H, 32), bfloat16-exact."""
  rng = np.random.default_rng(0)
  size = (shape.batch, shape.length, shape.heads, shape.dim)
  arrays = [rng.normal(size=size) * shape.dim**-0.25 for _ in range(4)]
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


# --- jax ---------------------------------------------------------------------


def position(table, shape: Shape):
  return RelativeBuckets(table, bidirectional=not shape.causal)


def dense_bias(table, shape: Shape, dtype):
  """(1, H, L, L): what a side without our bias needs."""
  bias = position(table, shape).lowered()
  diagonals = bias.window(1 - shape.length, 2 * shape.length - 1)
  tile = relative_bias.toeplitz(diagonals, shape.length, shape.length)
  return tile[None].astype(dtype)


def ours(implementation, with_bias, shape):
  def attention(q, k, v, table):
    return flash_attention(
      q,
      k,
      v,
      position=position(table, shape) if with_bias else None,
      causal=shape.causal,
      implementation=implementation,
    )

  return attention


def jax_dot_product(implementation, shape):
  def attention(q, k, v, table):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      bias=dense_bias(table, shape, q.dtype),
      is_causal=shape.causal,
      scale=1.0,
      implementation=implementation,
    )

  return attention


def jax_pallas_gpu(shape):
  from jax.experimental.pallas.ops.gpu import attention as gpu_attention

  def attention(q, k, v, table):
    del table
    return gpu_attention.mha(q, k, v, None, sm_scale=1.0, causal=shape.causal)

  return attention


def jax_pallas_tpu(shape):
  from jax.experimental.pallas.ops.tpu import flash_attention as tpu

  names = (
    "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv"
    " block_k_dkv block_q_dkv block_k_major_dq block_k_dq block_q_dq"
  ).split()
  block = min(512, shape.length)
  sizes = tpu.BlockSizes(**dict.fromkeys(names, block), block_b=1)

  def attention(q, k, v, table):
    del table
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    o = tpu.flash_attention(
      swap(q), swap(k), swap(v), causal=shape.causal, block_sizes=sizes
    )
    return swap(o)

  return attention


def tokamax_side(shape):
  import tokamax

  def attention(q, k, v, table):
    return tokamax.dot_product_attention(
      q,
      k,
      v,
      bias=dense_bias(table, shape, q.dtype),
      is_causal=shape.causal,
      scale=1.0,
    )

  return attention


def jax_sides(shape: Shape, platform: str):
  """name -> (attention(q, k, v, table), whether the table matters)."""
  sides = {"ours, chunked": (ours("chunked", True, shape), True)}
  kernels = {"tpu": ["mosaic_tpu"], "gpu": ["mosaic_gpu", "triton"]}
  for name in kernels.get(platform, []):
    sides[f"ours, {name}"] = ours(name, True, shape), True
    sides[f"ours, {name}, no bias"] = ours(name, False, shape), False
  sides["jax.nn xla + bias"] = jax_dot_product("xla", shape), True
  if platform == "gpu":
    sides["jax.nn cudnn + bias"] = jax_dot_product("cudnn", shape), True
    sides["jax pallas gpu, no bias"] = jax_pallas_gpu, False
    sides["tokamax + bias"] = tokamax_side, True
  if platform == "tpu":
    sides["jax pallas tpu, no bias"] = jax_pallas_tpu, False
    sides["tokamax + bias"] = tokamax_side, True
  return sides


def run_jax(attention, has_bias, shape, arrays, dtype, rounds) -> Result:
  q, k, v, do, table = (jnp.asarray(x) for x in arrays)
  q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))

  def loss(q, k, v, table):
    product = attention(q, k, v, table) * do
    return product.astype(jnp.float32).sum()

  wait = jax.block_until_ready
  compile_ = lambda f: jax.jit(f).lower(q, k, v, table).compile()
  forward = compile_(attention)
  seconds = measure(forward, (q, k, v, table), wait, rounds)
  result = Result(seconds, output=np.asarray(forward(q, k, v, table), float))
  backward = compile_(jax.grad(loss, argnums=(0, 1, 2)))
  both = measure(backward, (q, k, v, table), wait, rounds)
  result.backward = max(both - seconds, 0)
  result.memory = backward.memory_analysis().temp_size_in_bytes
  if has_bias:
    whole = compile_(jax.grad(loss, argnums=(0, 1, 2, 3)))
    both = measure(whole, (q, k, v, table), wait, rounds)
    result.backward_bias = max(both - seconds, 0)
    result.memory = whole.memory_analysis().temp_size_in_bytes
    result.dtable = np.asarray(whole(q, k, v, table)[3], float)
  return result


# --- torch -------------------------------------------------------------------


def torch_sides(shape: Shape):
  """name -> (attention(q, k, v (B, H, L, D), table), table matters)."""
  import torch
  from torch.nn import functional
  from torch.nn.attention import SDPBackend, sdpa_kernel
  from torch.nn.attention.flex_attention import (
    create_block_mask,
    flex_attention,
  )

  length = shape.length
  buckets = positions.distance_buckets(32, 128, not shape.causal)
  offsets = np.arange(1 - length, length)
  index = torch.tensor(buckets[np.clip(offsets, -128, 128) + 128]).cuda().long()
  rows = torch.arange(length, device="cuda")
  place = rows[None] - rows[:, None] + length - 1

  def sdpa(backend, with_bias):
    def attention(q, k, v, table):
      mask = None
      if with_bias:
        mask = table[:, index[place]][None].to(q.dtype)
        if shape.causal:
          mask = mask.masked_fill(rows[None] > rows[:, None], -math.inf)
      with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(
          q,
          k,
          v,
          attn_mask=mask,
          is_causal=shape.causal and not with_bias,
          scale=1.0,
        )

    return attention

  block_mask = None
  if shape.causal:
    block_mask = create_block_mask(
      lambda b, h, i, j: j <= i, None, None, length, length, device="cuda"
    )
  flex = torch.compile(flex_attention, dynamic=False)

  def flex_vector(q, k, v, table):
    vector = table[:, index]
    score = lambda s, b, h, i, j: s + vector[h, j - i + length - 1]
    return flex(q, k, v, score_mod=score, block_mask=block_mask, scale=1.0)

  def flex_gather(q, k, v, table):
    score = lambda s, b, h, i, j: s + table[h, index[j - i + length - 1]]
    return flex(q, k, v, score_mod=score, block_mask=block_mask, scale=1.0)

  return {
    "torch SDPA efficient + bias": (
      sdpa(SDPBackend.EFFICIENT_ATTENTION, True),
      True,
    ),
    "torch SDPA cudnn + bias": (sdpa(SDPBackend.CUDNN_ATTENTION, True), True),
    "torch SDPA flash, no bias": (
      sdpa(SDPBackend.FLASH_ATTENTION, False),
      False,
    ),
    "torch Flex, distance vector": (flex_vector, True),
    "torch Flex, bucket gather": (flex_gather, True),
  }


def run_torch(attention, has_bias, shape, arrays, dtype, rounds) -> Result:
  import torch

  kind = getattr(torch, dtype)
  cuda = lambda x: torch.tensor(x).cuda()
  q, k, v, do = (
    cuda(x).to(kind).transpose(1, 2).contiguous() for x in arrays[:4]
  )
  table = cuda(arrays[4])
  wait = lambda _: torch.cuda.synchronize()

  def forward():
    with torch.no_grad():
      return attention(q, k, v, table)

  def backward(with_table):
    leaves = [q, k, v] + [table] * with_table
    for x in leaves:
      x.requires_grad_(True)
      x.grad = None
    o = attention(q, k, v, table)
    found = torch.autograd.grad(o, leaves, do)
    for x in leaves:
      x.requires_grad_(False)
    return found

  seconds = measure(forward, (), wait, rounds)
  result = Result(
    seconds, output=forward().transpose(1, 2).float().cpu().numpy()
  )
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  both = measure(lambda: backward(False), (), wait, rounds)
  result.backward = max(both - seconds, 0)
  if has_bias:
    both = measure(lambda: backward(True), (), wait, rounds)
    result.backward_bias = max(both - seconds, 0)
    result.dtable = backward(True)[3].float().cpu().numpy()
  result.memory = torch.cuda.max_memory_allocated() - before
  return result


# --- the table ---------------------------------------------------------------


def reference(shape: Shape, arrays):
  """(output, gradient of the table) in float32."""
  attention = ours("chunked", True, shape)
  result = run_jax(attention, True, shape, arrays, "float32", 0)
  return result.output, result.dtable


def show(name: str, shape: Shape, result: Result, exact) -> None:
  def timed(seconds, factor):
    if seconds is None:
      return "- | -"
    rate = factor * shape.flops / max(seconds, 1e-9) / 1e12
    return f"{seconds * 1e3:.3f} | {rate:.1f}"

  def error(found, expected):
    if found is None:
      return "-"
    return f"{np.linalg.norm(found - expected) / np.linalg.norm(expected):.1e}"

  memory = "-" if result.memory is None else f"{result.memory / 2**20:,.1f}"
  biased = result.dtable is not None
  print(
    f"| {shape.length} | {'yes' if shape.causal else 'no'} | {name} |"
    f" {timed(result.forward, 1)} | {timed(result.backward, 2.5)} |"
    f" {timed(result.backward_bias, 2.5)} | {memory} |"
    f" {error(result.output, exact[0]) if biased else '-'} |"
    f" {error(result.dtable, exact[1])} |",
    flush=True,
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
  parser.add_argument("--only", default="", help="sides whose name has this")
  arguments = parser.parse_args()

  platform = jax.default_backend()
  print(f"{tiling.device_kind()}, jax {jax.__version__}, {arguments.dtype}\n")
  print(HEADER)
  print("|---" * HEADER.count(" | ") + "|---|")
  for length in arguments.lengths:
    for causal in (False, True):
      batch = max(1, arguments.batch_tokens // length)
      shape = Shape(batch, length, arguments.heads, arguments.head_dim, causal)
      arrays = inputs(shape)
      exact = reference(shape, arrays)
      sides = [
        (name, run_jax, side, has_bias)
        for name, (side, has_bias) in jax_sides(shape, platform).items()
      ]
      if platform == "gpu":
        try:
          sides += [
            (name, run_torch, *side)
            for name, side in torch_sides(shape).items()
          ]
        except ImportError as error:
          print(f"(no torch: {error})", file=sys.stderr)
      for name, run, side, has_bias in sides:
        if arguments.only not in name:
          continue
        try:
          if side in (jax_pallas_gpu, jax_pallas_tpu, tokamax_side):
            side = side(shape)
          result = run(
            side, has_bias, shape, arrays, arguments.dtype, arguments.rounds
          )
        except Exception as error:
          # One side that cannot run must not end the comparison.
          reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
          print(
            f"| {length} | {'yes' if causal else 'no'} | {name} | {reason} |"
          )
          continue
        show(name, shape, result, exact)


if __name__ == "__main__":
  main()
