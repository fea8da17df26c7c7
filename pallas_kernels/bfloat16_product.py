"""Products of bfloat16 matrices, in the forms that CPUs are fast at.

XLA's CPU backend has tiles of bfloat16 (AMX) for a product whose result is
float32 and whose left matrix lies with the contracted axis last. Other forms it
computes in float32, 2 to 5 times as slow (tools/bench_products.py).
"""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental import layout
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.manual_axes import vary_together


def matmul(x_NM: jax.Array, kernel_MF: jax.Array, output_dtype) -> jax.Array:
  """x @ kernel, (N, F); sums are float32 where XLA's are.

  On a CPU the gradients of bfloat16 operands are products of bfloat16 too, that
  of the result is rounded to it before.
  """
  if x_NM.dtype == kernel_MF.dtype == jnp.bfloat16 and on_cpu():
    return _matmul(*vary_together((x_NM, kernel_MF))).astype(output_dtype)
  return jnp.matmul(x_NM, kernel_MF, preferred_element_type=output_dtype)


def on_cpu() -> bool:
  return tiling.device_kind() == "cpu"


def laid_out(x: jax.Array) -> jax.Array:
  """x as it is, on a CPU moved so that it lies row by row.

  XLA hands a product a view of what is transposed, and then computes it in
  float32. (Of an array that is split over devices every one would get all.)
  """
  if not lays_out(x.dtype):
    return x
  order = layout.Layout(major_to_minor=tuple(range(x.ndim)))
  return layout.with_layout_constraint(x, order)


def lays_out(dtype) -> bool:
  """Whether `laid_out` moves such an array."""
  return dtype == jnp.bfloat16 and on_cpu() and jax.device_count() == 1


def sum_of_rows(x_NM: jax.Array, y_NF: jax.Array, precision=None) -> jax.Array:
  """float32 x.T @ y, (M, F)."""
  return lax.dot(
    laid_out(x_NM.T),
    y_NF,
    precision=precision,
    preferred_element_type=jnp.float32,
  )


@jax.custom_vjp
def _matmul(x_NM, kernel_MF):
  return lax.dot(x_NM, kernel_MF, preferred_element_type=jnp.float32)


def _forward(x_NM, kernel_MF):
  return _matmul(x_NM, kernel_MF), (x_NM, kernel_MF)


def _backward(residuals, dy_NF):
  x_NM, kernel_MF = residuals
  dy_NF = dy_NF.astype(jnp.bfloat16)
  dx_NM = lax.dot_general(
    dy_NF,
    kernel_MF,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  dkernel_MF = sum_of_rows(x_NM, dy_NF)
  return dx_NM.astype(jnp.bfloat16), dkernel_MF.astype(jnp.bfloat16)


_matmul.defvjp(_forward, _backward)
