"""Rows that pad: emptied, and appended."""

from __future__ import annotations

import jax.numpy as jnp


def without_padding(x, segment_ids_BL, axis: int = 1):
  """`x` with zeros where the id is 0, or False; ids may be None.

  Padding may hold anything, NaN too, and 0 * NaN is NaN.

  Args:
    x: (B, ..., L, ...) of four axes.
    segment_ids_BL: of its rows.
    axis: which one L is.
  """
  if segment_ids_BL is None:
    return x
  others = [a for a in (1, 2, 3) if a != axis]
  return jnp.where(jnp.expand_dims(segment_ids_BL != 0, others), x, 0)


def pad_to(x, multiple: int, axis: int):
  """Appends zeros so that the axis divides by `multiple`."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths)
