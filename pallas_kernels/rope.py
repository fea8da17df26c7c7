"""Rotary position embeddings: queries and keys, turned before attention.

Outside of the kernel, so that every implementation takes them: XLA fuses the
turn with what stands before it, and a cache holds keys that are turned already.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Of xPos: how much the slowest pair is left at (its gamma).
_GAMMA = 0.4


def rotate(
  x_BLHD: jax.Array,
  positions_BL: jax.Array,
  *,
  dims: int,
  base: float = 10_000.0,
  interleaved: bool = False,
  exponents_BL: jax.Array | None = None,
) -> jax.Array:
  """Pair n of every head, turned by `position * base^(-2 n / dims)`.

  RoFormer, arXiv:2104.09864. The product of a query and a key that are turned
  depends on the difference of their positions alone. Angles are float32: at
  position 131,072 they are exact to 0.01.

  Args:
    x_BLHD: queries or keys.
    positions_BL: of its tokens; the batch axis may be 1.
    dims: how many of a head's numbers are turned, the first; even.
    base: of the wavelengths.
    interleaved: whether a pair are neighbours (GPT-J), or one number of each
      half (GPT-NeoX, LLaMA).
    exponents_BL: of xPos (arXiv:2212.10554), as positions_BL: pair n is also
      multiplied by `((2 n / dims + 0.4) / 1.4)^exponent`; a key's exponents
      have the opposite sign of a query's. None is none.

  Returns:
    As x_BLHD, in its dtype; computed in float32.
  """
  share_P = 2 * np.arange(dims // 2) / dims
  frequency_P = (base**-share_P).astype(np.float32)
  angle_BL1P = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_P
  cos, sin = jnp.cos(angle_BL1P), jnp.sin(angle_BL1P)
  if exponents_BL is not None:
    shrink_P = ((share_P + _GAMMA) / (1 + _GAMMA)).astype(np.float32)
    scale = shrink_P ** exponents_BL[:, :, None, None].astype(jnp.float32)
    cos, sin = cos * scale, sin * scale
  turned, rest = x_BLHD[..., :dims].astype(jnp.float32), x_BLHD[..., dims:]
  if interleaved:
    a, b = turned[..., 0::2], turned[..., 1::2]
  else:
    a, b = jnp.split(turned, 2, axis=-1)
  pair = a * cos - b * sin, a * sin + b * cos
  if interleaved:
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape)
  else:
    turned = jnp.concatenate(pair, axis=-1)
  return jnp.concatenate([turned.astype(x_BLHD.dtype), rest], axis=-1)
