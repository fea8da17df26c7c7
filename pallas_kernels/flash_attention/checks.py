"""What the arguments of attention must be, said by name."""

from __future__ import annotations

import math
import numbers
import typing

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import positions
from pallas_kernels.flash_attention.blocked import LEAST_ID
from pallas_kernels.flash_attention.positions import AtPositions, FullBias

_INT32 = np.iinfo(np.int32)


def _wrong(name: str, expected: str):
  return ValueError(f"flash_attention: {name} must be {expected}")


def segment_ids(name: str, ids):
  """int32 ids, or None; kernels keep the two least numbers for themselves."""
  if ids is None:
    return None
  if not isinstance(ids, jax.Array):
    ids = np.asarray(ids)
    integers = ids.dtype == bool or np.issubdtype(ids.dtype, np.integer)
    if integers and ids.size:
      least, most = int(ids.min()), int(ids.max())
      if least < _INT32.min or most > _INT32.max:
        raise _wrong(name, f"of 32 bits; there are {least} to {most}")
  ids = jnp.asarray(ids)
  if ids.dtype != bool and not jnp.issubdtype(ids.dtype, jnp.integer):
    raise _wrong(name, f"integers, it is {ids.dtype}")
  return jnp.maximum(ids.astype(jnp.int32), LEAST_ID)


def scale(value) -> float:
  """A positive number, known when the program is compiled."""
  try:
    number = float(value)
  except (TypeError, ValueError, jax.errors.JAXTypeError):
    raise _wrong("scale", f"a number, not {type(value).__name__}") from None
  if not (number > 0 and math.isfinite(number)):
    raise _wrong("scale", f"positive, it is {number}")
  return number


def offset(value):
  """An integer of 32 bits, or a traced one."""
  if isinstance(value, numbers.Integral):
    if not _INT32.min <= value <= _INT32.max:
      raise _wrong("q_offset", f"of 32 bits, it is {value}")
    return int(value)
  dtype = getattr(value, "dtype", None)
  integer = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
  if not integer or value.size != 1:
    raise _wrong("q_offset", f"one integer, it is {value!r}")
  return value.reshape(())


def position(value) -> None:
  """A position of this package, with arrays of its axes, or None."""
  if value is None:
    return
  kinds = typing.get_args(positions.Position)
  if not isinstance(value, kinds):
    names = ", ".join(k.__name__ for k in kinds)
    raise _wrong("position", f"one of {names}, not {type(value).__name__}")
  if isinstance(value, AtPositions) and not hasattr(value.bias, "between"):
    raise _wrong(
      "AtPositions.bias", f"RelativeBuckets, Alibi or Fire, not {value.bias!r}"
    )
  for path, leaf in jax.tree_util.tree_leaves_with_path(value):
    name = next(key.name for key in path[::-1] if hasattr(key, "name"))
    axes = len(positions.axes(name))
    if not hasattr(leaf, "shape") or len(leaf.shape) != axes:
      raise _wrong(
        f"{type(value).__name__}'s array {name}",
        f"of {axes} axes, not {getattr(leaf, 'shape', leaf)}",
      )


def shapes(q, k, v, position, q_segment_ids, kv_segment_ids) -> None:
  """Whether they fit together."""

  def fail(name, array, expected):
    raise ValueError(
      f"flash_attention: {name} has shape {array.shape}, expected {expected}"
    )

  if q.ndim != 4:
    fail("q_BQHD", q, "(batch, queries, heads, head_dim)")
  batch, queries, heads, head_dim = q.shape
  if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
    fail("k_BKHD", k, f"({batch}, keys, heads, {head_dim})")
  if heads % max(k.shape[2], 1) or bool(heads) != bool(k.shape[2]):
    fail("k_BKHD", k, f"a number of heads that divides {heads}")
  for name, array in (("q_BQHD", q), ("k_BKHD", k), ("v_BKHD", v)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f"flash_attention: {name} is {array.dtype}, it must be a float"
      )
  if v.dtype != k.dtype:
    raise ValueError(f"flash_attention: v_BKHD is {v.dtype}, k_BKHD {k.dtype}")
  if v.shape != k.shape:
    fail("v_BKHD", v, f"that of k_BKHD, {k.shape}")
  if isinstance(position, FullBias):
    sizes = ((1, batch), (1, heads), (queries,), (k.shape[1],))
    shape = position.bias_BHQK.shape
    if any(a not in b for a, b in zip(shape, sizes)):
      fail(
        "FullBias.bias_BHQK",
        position.bias_BHQK,
        f"(1 or {batch}, 1 or {heads}, {queries}, {k.shape[1]})",
      )
  elif isinstance(position, AtPositions):
    sides = position.q_positions_BQ, position.kv_positions_BK
    for name, array, length in zip(
      ("q_positions_BQ", "kv_positions_BK"), sides, (queries, k.shape[1])
    ):
      if array.shape not in ((1, length), (batch, length)):
        fail(f"AtPositions.{name}", array, f"(1 or {batch}, {length})")
    if sides[0].shape[0] != sides[1].shape[0]:
      fail("AtPositions.kv_positions_BK", sides[1], "as many rows as queries")
  if (
    position is not None
    and not isinstance(position, FullBias)
    and position.num_heads != heads
  ):
    raise ValueError(
      f"flash_attention: position has {position.num_heads} heads, "
      f"q_BQHD has {heads}"
    )
  for name, ids, length in (
    ("q_segment_ids", q_segment_ids, queries),
    ("kv_segment_ids", kv_segment_ids, k.shape[1]),
  ):
    if ids is not None and ids.shape != (batch, length):
      fail(name, ids, f"({batch}, {length})")
