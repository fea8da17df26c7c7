"""Long inputs, a chunk of queries at a time.

dq of a chunk stays in VMEM, and the list of a chunk's visits in scalar memory.
dq and o of a chunk are whole after one call; dk, dv and the bias add up.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.flash_attention import tiling
from pallas_kernels.flash_attention.blocked import (
  PADDING_QUERY,
  Cotangents,
  Operands,
  Plan,
)
from pallas_kernels.flash_attention.tpu.backward import backward as _backward
from pallas_kernels.flash_attention.tpu.forward import forward as _forward
from pallas_kernels.flash_attention.tpu.tiles import head_group, wide
from pallas_kernels.manual_axes import vary_together


def forward(x: Operands, *, plan: Plan, for_gradient: bool):
  """blocked.Kernels.forward."""
  count, size = _chunks(x, plan, tiling.tpu_visits() * plan.bq)
  if count == 1:
    return _forward(x, plan, for_gradient)
  whole = _wide(x)

  def one(part):
    o, rest, lse = _forward(_narrow(whole, part, x), plan, for_gradient)
    return wide(o), None if rest is None else wide(rest), lse

  o, rest, lse = lax.map(one, _parts(x, plan, count, size))
  joined = functools.partial(_joined, like=x.q)
  return joined(o), joined(rest), _join(lse, 2, x.q.shape[1])


def backward(x: Operands, y: Cotangents, *, plan: Plan, need_dbias: bool):
  """blocked.Kernels.backward."""
  heads, dim = x.q.shape[2:]
  limit = tiling.tpu_query_chunk(dim * head_group(heads, dim))
  count, size = _chunks(x, plan, limit)
  if count == 1:
    return _backward(x, y, plan, need_dbias)
  whole, parts = _wide(x), _parts(x, plan, count, size)
  rows = {
    "do": _split(wide(y.do), 1, count, size),
    # Appended queries see nothing: e^(s - inf) is 0.
    "lse": _split(y.lse, 2, count, size, jnp.inf),
    "delta": _split(y.delta, 2, count, size),
  }

  def one(carry, parts_and_rows):
    part, row = parts_and_rows
    dk, dv, dbias = carry
    x_part = _narrow(whole, part, x)
    row["do"] = row["do"].reshape(x_part.q.shape)
    dq, dk, dv, more = _backward(
      x_part, y._replace(**row), plan, need_dbias, (dk, dv)
    )
    return (dk, dv, jax.tree.map(jnp.add, dbias, more)), wide(dq)

  dbias = jax.tree.map(jnp.zeros_like, x.bias) if need_dbias else None
  zeros = (jnp.zeros(z.shape, jnp.float32) for z in (whole.k, whole.v))
  start = vary_together((*zeros, dbias), like=x.q)
  (dk, dv, dbias), dq = lax.scan(one, start, (parts, rows))
  dk, dv = (
    g.astype(z.dtype).reshape(z.shape) for g, z in ((dk, x.k), (dv, x.v))
  )
  return _joined(dq, like=x.q), dk, dv, dbias


def _wide(x: Operands) -> Operands:
  """With keys and values as (B, K, H * D).

  Through a loop go wide arrays: the compiler would pad 12 heads of 64 to 16 of
  128.
  """
  return x._replace(k=wide(x.k), v=wide(x.v))


def _narrow(whole: Operands, part: dict, x: Operands) -> Operands:
  """The Operands of a chunk."""
  segments = x.segments
  if segments is not None:
    ids = {n: part[n] for n in ("q_BQ", "q_range_BI3")}
    segments = segments._replace(**ids)
  batch, _, heads, dim = x.q.shape
  return x._replace(
    q=part["q"].reshape(batch, -1, heads, dim),
    k=whole.k.reshape(x.k.shape),
    v=whole.v.reshape(x.v.shape),
    shift=part["shift"],
    segments=segments,
  )


def _chunks(x: Operands, plan: Plan, limit: int) -> tuple[int, int]:
  """(number of chunks, queries of one) at most `limit` and a list of visits."""
  batch, queries = x.q.shape[:2]
  blocks, nk = queries // plan.bq, x.k.shape[1] // plan.bk
  most = max(1, min(limit // plan.bq, tiling.tpu_visits() // (batch * nk)))
  count = -(-blocks // most)
  return count, -(-blocks // count) * plan.bq


def _parts(x: Operands, plan: Plan, count: int, size: int) -> dict:
  """What differs between the chunks of Operands, stacked."""
  parts = {
    "q": _split(wide(x.q), 1, count, size),
    "shift": x.shift + jnp.arange(count) * (size // plan.unit),
  }
  if plan.masked:
    ids, extent = x.segments.q_BQ, x.segments.q_range_BI3
    # Appended queries match nothing, and no extent of keys meets theirs.
    parts["q_BQ"] = _split(ids, 1, count, size, PADDING_QUERY)
    blocks = size // plan.bq
    most = jnp.iinfo(jnp.int32).max
    parts["q_range_BI3"] = _split(extent, 1, count, blocks, most)
  return parts


def _split(x, axis: int, count: int, size: int, fill=0):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, count * size - x.shape[axis])
  x = jnp.pad(x, widths, constant_values=fill)
  x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _join(chunks, axis: int, length: int):
  """The reverse of `_split`, without what it appended."""
  x = jnp.moveaxis(chunks, 0, axis)
  x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  return lax.slice_in_dim(x, 0, length, axis=axis)


def _joined(chunks, like):
  """(B, Q, H, D) of chunks of (B, size, H * D), or None."""
  if chunks is None:
    return None
  return _join(chunks, 1, like.shape[1]).reshape(like.shape)
