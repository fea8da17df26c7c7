"""T5's layer norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(
  x: jax.Array, scale_M: jax.Array, *, epsilon: float = 1e-6
) -> jax.Array:
  """x / sqrt(mean(x^2) + epsilon) * scale, without mean or bias.

  The statistics and the product are float32. XLA makes one pass of it, and on a
  TPU part of the matrix product that follows, which a kernel would prevent.

  Args:
    x: (..., M), any float type.
    scale_M: float32 (M,).
    epsilon: keeps a row of zeros finite.

  Returns:
    float32, shaped as x.
  """
  x = x.astype(jnp.float32)
  variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + epsilon) * scale_M
