"""A product of bfloat16 matrices and its gradients on this CPU, by form.

  python tools/bench_products.py

GFLOP/s of x @ kernel and of both gradients, each alone, in layers of T5 1.1
small and of a smaller one: in float32; of bfloat16 as jnp.matmul and its
gradient ask for it; and as pallas_kernels/bfloat16_product.py does.
Then the same of what chunked attention's backward sums over queries, from the
scores on: weights.T @ (gradient of the output), a tile of a row or of four.
"""

from __future__ import annotations

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp

from pallas_kernels import bfloat16_product

TILES = ((1, 8, 512, 64), (4, 3, 256, 64))
SHAPES = ((4096, 512, 1024), (4096, 512, 384), (2048, 256, 512))


def rate(function, flops: float, *operands) -> float:
  """GFLOP/s, the best of ten."""
  call = jax.jit(function)
  jax.block_until_ready(call(*operands))
  times = []
  for _ in range(10):
    begin = time.perf_counter()
    jax.block_until_ready(call(*operands))
    times.append(time.perf_counter() - begin)
  return flops / min(times) / 1e9


def main() -> None:
  plain = lambda x, k: jnp.matmul(x, k, preferred_element_type=x.dtype)
  ours = lambda x, k: bfloat16_product.matmul(x, k, x.dtype)
  sides = (
    ("float32", jnp.float32, plain),
    ("bfloat16, jnp.matmul", jnp.bfloat16, plain),
    ("bfloat16, ours", jnp.bfloat16, ours),
  )
  print("| rows, inputs, outputs | side | x @ kernel | of x | of the kernel |")
  print("|---|---|---|---|---|")
  for n, m, f in SHAPES:
    for name, dtype, product in sides:
      x, k, dy = (jnp.ones(s, dtype) for s in ((n, m), (m, f), (n, f)))
      of_x = lambda dy, x, k, p=product: jax.vjp(lambda x: p(x, k), x)[1](dy)
      of_k = lambda dy, x, k, p=product: jax.vjp(lambda k: p(x, k), k)[1](dy)
      flops = 2.0 * n * m * f
      rates = [rate(product, flops, x, k)]
      rates += [rate(g, flops, dy, x, k) for g in (of_x, of_k)]
      cells = " | ".join(f"{r:,.0f}" for r in rates)
      print(f"| {n:,} x {m} x {f} | {name} | {cells} |", flush=True)
  of_tiles()


def of_tiles() -> None:
  def einsum(expression, a, b):
    return jnp.einsum(expression, a, b, preferred_element_type=jnp.float32)

  def narrow(a, b):
    return jnp.swapaxes(einsum("bhqd,bhqk->bhdk", b, a), 2, 3)

  def as_it_lies(a, b):
    a = bfloat16_product.laid_out(jnp.swapaxes(a, 2, 3))
    return einsum("bhkq,bhqd->bhkd", a, b)

  print("\n| rows, heads, tile, width | side | of the keys |\n|---|---|---|")
  sides = (
    ("float32", jnp.float32, narrow),
    ("bfloat16, the narrow one transposed", jnp.bfloat16, narrow),
    ("bfloat16, the tile laid out", jnp.bfloat16, as_it_lies),
  )
  for batch, heads, length, width in TILES:
    scores = jnp.ones((batch, heads, length, length))
    flops = 2.0 * scores.size * width
    for name, dtype, product in sides:
      b = jnp.ones((batch, heads, length, width), dtype)
      step = lambda s, b, p=product: p(jnp.exp(s).astype(b.dtype), b)
      where = f"{batch} x {heads} x {length}^2 x {width}"
      found = rate(step, flops, scores, b)
      print(f"| {where} | {name} | {found:,.0f} |", flush=True)


if __name__ == "__main__":
  main()
