"""Flash attention in Pallas (Triton): Ampere and Ada, and Hopper's fallback.

Upstream has deprecated this backend of Pallas since jax 0.11; when it goes, so
does this file, and nothing else. Forward, dq, (dk, dv) and the near tiles of
the bias are a kernel each, without atomics.
"""

from __future__ import annotations

import functools
import types

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked, tiling
from pallas_kernels.flash_attention.blocked import LOG2E, Cotangents, Operands
from pallas_kernels.flash_attention.gpu_common import (
  Span,
  bias_gradient,
  bias_operands,
  dbias_splits,
  id_operands,
  key_spans,
  longest_first,
  near_then_far,
  pairs_of_tile,
  query_spans,
)

_LOWEST = -1e30
# Tests set this to run on a CPU.
INTERPRETED = False


def _exp(x):
  """e^x; jnp.exp2 spends a third of a kernel's instructions on denormals."""
  x *= LOG2E
  if INTERPRETED:
    return jnp.exp2(x)
  [y] = plt.elementwise_inline_asm(
    "ex2.approx.ftz.f32 $0, $1;",
    args=[x],
    constraints="=f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )
  return y


def _dot(a, b):
  # float32 inputs ask for float32 products, not TensorFloat-32.
  full = a.dtype == jnp.float32
  precision = lax.Precision.HIGHEST if full else lax.Precision.DEFAULT
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(a, b, plan):
  s = _dot(a, b.T)
  return s if plan.scale == 1.0 else s * plan.scale


def _blocks(q) -> tiling.TritonBlocks:
  return tiling.triton_blocks(q.shape[3], q.dtype == jnp.float32)


def _call(name, kernel, grid, inputs, outputs, stages: int):
  """pallas_call with operands by name, name -> (array or struct, BlockSpec)."""
  names = [*inputs, *outputs]
  arrays, in_specs = zip(*inputs.values())
  out_shape, out_specs = zip(*outputs.values())
  axes = jax.typeof(inputs["q"][0]).manual_axis_type
  results = pl.pallas_call(
    lambda *refs: kernel(types.SimpleNamespace(**dict(zip(names, refs)))),
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes)
      for x in out_shape
    ],
    compiler_params=plt.CompilerParams(
      num_warps=_blocks(inputs["q"][0]).warps, num_stages=stages
    ),
    interpret=INTERPRETED,
    name=name,
  )(*arrays)
  return dict(zip(outputs, results))


def _inputs(x: Operands, spans, plan, *, transposed=False):
  """Inputs for a grid (block, head, batch), all of a head's rows at hand.

  Blocks next to each other along the first axis start one after the other.
  """
  whole = lambda x: pl.BlockSpec(
    (None, x.shape[1], None, x.shape[3]), lambda n, h, b: (b, 0, h, 0)
  )
  inputs = {name: (z, whole(z)) for name, z in zip("qkv", (x.q, x.k, x.v))}
  block = (lambda n: n) if transposed else _query_block(plan, spans.shape[1])
  inputs["spans"] = (
    spans,
    pl.BlockSpec((None, None, 4), lambda n, h, b: (b, block(n), 0)),
  )
  inputs["shift"] = (x.shift[None], pl.BlockSpec((1,), lambda n, h, b: (0,)))
  for name, z in bias_operands(x, plan, transposed=transposed).items():
    rest = z.shape[1:]
    inputs[name] = (
      z,
      pl.BlockSpec(
        (None, *rest), lambda n, h, b, rest=rest: (h, *(0,) * len(rest))
      ),
    )
  for name, z in id_operands(x.segments).items():
    if name in ("q_ids", "kv_ids"):
      inputs[name] = (
        z,
        pl.BlockSpec((None, z.shape[1]), lambda n, h, b: (b, 0)),
      )
  return inputs


def _query_block(plan, nq: int):
  """The program's number -> the block of queries it takes."""
  return functools.partial(longest_first, plan, nq=nq)


def _rows(x, size: int, index):
  """Block spec of a (B, L, H, D) array: this program's rows of a head."""
  return pl.BlockSpec((None, size, None, x.shape[3]), index)


def _tile(r, plan, i, j, within):
  index = j - i - r.shift[0] - plan.first
  return r.tiles[index, :, within]


def _far(r, plan, is_before, query, key, keys: int):
  """What far tiles add: (to every pair a number, to each of `keys` another).

  Args:
    r: refs.
    plan: the geometry of tiles.
    is_before: whether the keys are before the near ones.
    query: positions of the queries; with tails the first number is one a query.
    key: position of the first key.
    keys: in the tile.
  """
  side = lambda ref: jnp.where(is_before, ref[0], ref[1])
  if not plan.tails:
    return side(r.constants), None
  slope = side(r.slopes)
  distance = _distance(r, plan, query, key)
  steps = jnp.arange(keys).astype(jnp.float32)
  return side(r.constants) + slope * distance, slope * steps


def _with_far(r, plan, s, is_before, query, columns):
  """Scores of a far tile, queries down, with its bias."""
  each, by_key = _far(r, plan, is_before, query, columns.start, columns.size)
  if by_key is None:
    return s + each
  return s + each[:, None] + by_key[None]


def _distance(r, plan, query, key):
  """From queries to a key, less the phase of q_offset; float32."""
  return (key - query - r.shift[0] * plan.unit).astype(jnp.float32)


def _forward(x: Operands, *, plan, for_gradient):
  q = x.q
  batch, queries, heads, dim = q.shape
  block, part = plan.bq, _blocks(q).part
  parts = block // part
  nq, nk = queries // block, x.k.shape[1] // block
  query_block = _query_block(plan, nq)

  def kernel(r):
    i = query_block(pl.program_id(0))
    span = Span(r.spans, block)
    rows = pl.ds(i * block, block)
    positions = i * block + jnp.arange(block)
    q_tile = r.q[rows, :]

    def step(near, t, carry):
      o, m, l = carry
      j, within, columns = span.part(t, parts)
      s = _scores(q_tile, r.k[columns, :], plan)
      if near:
        s += _tile(r, plan, i, j, within)
      elif plan.biased:
        s = _with_far(r, plan, s, j < span.near, positions, columns)
      if plan.masked:
        same = r.q_ids[rows][:, None] == r.kv_ids[columns][None]
        s = jnp.where(same, s, -jnp.inf)
      m_new = jnp.maximum(m, s.max(axis=1))
      p = _exp(s - m_new[:, None])
      shrink = _exp(m - m_new)
      p = p.astype(q.dtype)
      # The sum of what is multiplied: a key that takes all then gives o = v.
      l = l * shrink + p.astype(jnp.float32).sum(axis=1)
      v_tile = r.v[columns, :]
      if plan.masked:
        # Padding may hold anything, and 0 * NaN is NaN.
        real = (r.kv_ids[columns] != 0)[:, None]
        v_tile = jnp.where(real, v_tile, jnp.zeros((), v_tile.dtype))
      pv = _dot(p, v_tile)
      return o * shrink[:, None] + pv, m_new, l

    carry = (
      jnp.zeros((block, dim), jnp.float32),
      jnp.full((block,), _LOWEST, jnp.float32),
      jnp.zeros((block,), jnp.float32),
    )
    o, m, l = near_then_far(plan, span, parts, step, carry)
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    r.o[...], rest = blocked.rounded(o / l[:, None], q.dtype)
    if for_gradient:
      if rest is not None:
        r.rest[...] = rest
      r.lse[...] = jnp.where(seen, m + jnp.log(l), 0.0)

  outputs = {
    "o": (
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      _rows(q, block, lambda n, h, b: (b, query_block(n), h, 0)),
    )
  }
  if for_gradient:
    if q.dtype != jnp.float32:
      outputs["rest"] = outputs["o"]
    outputs["lse"] = (
      jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
      pl.BlockSpec((None, None, block), lambda n, h, b: (b, h, query_block(n))),
    )
  spans = key_spans(plan, x.segments, x.shift, batch, nq, nk)
  out = _call(
    "flash_attention_forward",
    kernel,
    (nq, heads, batch),
    _inputs(x, spans, plan),
    outputs,
    stages=2,
  )
  return out["o"], out.get("rest"), out.get("lse")


def _dq(inputs, plan, need_dbias):
  """(dq, sums over the far keys as bias_gradient wants them)."""
  q = inputs["q"][0]
  batch, queries, heads, dim = q.shape
  block, part = plan.bq, _blocks(q).part
  parts = block // part
  centred = "k_mean" in inputs
  far_names = ("before", "after") if need_dbias else ()
  if plan.tails:
    far_names += tuple(f"{name}_by_distance" for name in far_names)
  query_block = _query_block(plan, queries // block)

  def kernel(r):
    i = query_block(pl.program_id(0))
    span = Span(r.spans, block)
    rows = pl.ds(i * block, block)
    positions = i * block + jnp.arange(block)
    q_tile, do_tile = r.q[rows, :], r.do[rows, :]
    lse, delta = r.lse[rows], r.delta[rows]

    def step(near, t, carry):
      dq, row_sums, far = carry
      j, within, columns = span.part(t, parts)
      k_tile = r.k[columns, :]
      s = _scores(q_tile, k_tile, plan)
      is_before = j < span.near
      if near:
        s += _tile(r, plan, i, j, within)
      elif plan.biased:
        s = _with_far(r, plan, s, is_before, positions, columns)
      if plan.masked:
        same = r.q_ids[rows][:, None] == r.kv_ids[columns][None]
        s = jnp.where(same, s, -jnp.inf)
      p = _exp(s - lse[:, None])
      ds = p * (_dot(do_tile, r.v[columns, :].T) - delta[:, None])
      if need_dbias and not near:
        sums = [ds.sum(axis=1)]
        if plan.tails:
          steps = jnp.arange(columns.size).astype(jnp.float32)
          distance = _distance(r, plan, positions, columns.start)
          sums.append(sums[0] * distance + (ds * steps[None]).sum(axis=1))
        by_side = [
          jnp.where(mine, x, 0.0)
          for x in sums
          for mine in (is_before, jnp.logical_not(is_before))
        ]
        far = tuple(map(jnp.add, far, by_side))
      ds = (ds * plan.scale).astype(q.dtype)
      if centred:
        row_sums += ds.astype(jnp.float32).sum(axis=1)
      return dq + _dot(ds, k_tile), row_sums, far

    zero = jnp.zeros((block,), jnp.float32)
    carry = jnp.zeros((block, dim), jnp.float32), zero, (zero,) * len(far_names)
    dq, row_sums, far = near_then_far(plan, span, parts, step, carry)
    if centred:
      dq -= row_sums[:, None] * r.k_mean[...][None]
    r.dq[...] = dq.astype(q.dtype)
    for name, x in zip(far_names, far):
      getattr(r, name)[...] = x

  outputs = {
    "dq": (
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      _rows(q, block, lambda n, h, b: (b, query_block(n), h, 0)),
    )
  }
  row = (
    jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    pl.BlockSpec((None, None, block), lambda n, h, b: (b, h, query_block(n))),
  )
  outputs |= dict.fromkeys(far_names, row)
  grid = (queries // block, heads, batch)
  out = _call("flash_attention_dq", kernel, grid, inputs, outputs, stages=2)
  if not need_dbias:
    return out["dq"], None
  return out["dq"], jnp.stack([out[name] for name in far_names], axis=2)


def _dkv(inputs, plan):
  """(dk, dv): transposed tiles, keys down and queries across."""
  q, k = inputs["q"][0], inputs["k"][0]
  batch, keys, heads, dim = k.shape
  block, part = plan.bk, _blocks(q).part
  parts = block // part

  def kernel(r):
    j = pl.program_id(0)
    span = Span(r.spans, block)
    rows = pl.ds(j * block, block)
    k_tile, v_tile = r.k[rows, :], r.v[rows, :]

    def step(near, t, carry):
      dk, dv = carry
      i, within, columns = span.part(t, parts)
      q_tile, do_tile = r.q[columns, :], r.do[columns, :]
      s_KQ = _scores(k_tile, q_tile, plan)
      if near:
        s_KQ += _tile(r, plan, i, j, within)
      elif plan.biased:
        # Queries before the near ones see these keys after themselves.
        queries_here = columns.start + jnp.arange(columns.size)
        each, by_key = _far(
          r, plan, i >= span.near, queries_here, j * block, block
        )
        s_KQ += each if by_key is None else each[None] + by_key[:, None]
      if plan.masked:
        same = r.kv_ids[rows][:, None] == r.q_ids[columns][None]
        s_KQ = jnp.where(same, s_KQ, -jnp.inf)
      p_KQ = _exp(s_KQ - r.lse[columns][None])
      dv += _dot(p_KQ.astype(q.dtype), do_tile)
      ds_KQ = p_KQ * (_dot(v_tile, do_tile.T) - r.delta[columns][None])
      dk += _dot((ds_KQ * plan.scale).astype(q.dtype), q_tile)
      return dk, dv

    zero = jnp.zeros((block, dim), jnp.float32)
    dk, dv = near_then_far(plan, span, parts, step, (zero, zero))
    r.dk[...], r.dv[...] = dk.astype(k.dtype), dv.astype(k.dtype)

  out = (
    jax.ShapeDtypeStruct(k.shape, k.dtype),
    _rows(k, block, lambda j, h, b: (b, j, h, 0)),
  )
  out = _call(
    "flash_attention_dkv",
    kernel,
    (keys // block, heads, batch),
    inputs,
    {"dk": out, "dv": out},
    stages=2,
  )
  return out["dk"], out["dv"]


def _dtiles(inputs, plan, splits):
  """float32 (H, near, splits, bq, bk): dS of the near tiles, summed.

  One program a head, part of a near tile and split of the pairs of blocks that
  have it.
  """
  q, k = inputs["q"][0], inputs["k"][0]
  batch, queries, heads, dim = q.shape
  block, part = plan.bq, _blocks(q).part
  parts = block // part
  nq, nk = queries // block, k.shape[1] // block

  def kernel(r):
    n, split = pl.program_id(0) // parts, pl.program_id(2)
    start = lax.rem(pl.program_id(0), parts) * part
    pairs, place = pairs_of_tile(n, r.shift[0], plan, batch, nq, nk)
    share = (pairs + splits - 1) // splits
    bias_tile = r.tiles[n, :, pl.ds(start, part)]

    def step(t, dtile):
      b, i, j = place(split * share + t)
      rows, columns = pl.ds(i * block, block), pl.ds(j * block + start, part)
      s = _scores(r.q[b, rows, :], r.k[b, columns, :], plan) + bias_tile
      if plan.masked:
        same = r.q_ids[b, rows][:, None] == r.kv_ids[b, columns][None]
        s = jnp.where(same, s, -jnp.inf)
      p = _exp(s - r.lse[b, rows][:, None])
      dp = _dot(r.do[b, rows, :], r.v[b, columns, :].T)
      return dtile + p * (dp - r.delta[b, rows][:, None])

    total = jnp.clip(pairs - split * share, 0, share)
    r.dtile[...] = lax.fori_loop(
      0, total, step, jnp.zeros((block, part), jnp.float32)
    )

  def every_row(name, x):
    """All batch rows of a head: this kernel's programs cross them."""
    shape = [*x.shape]
    head = {"tiles": 0, "lse": 1, "delta": 1}.get(name, 2)
    if name in ("q_ids", "kv_ids", "shift"):
      return pl.BlockSpec(tuple(shape), lambda n, h, s: (0,) * len(shape))
    shape[head] = None
    index = lambda n, h, s: tuple(
      h if axis == head else 0 for axis in range(len(shape))
    )
    return pl.BlockSpec(tuple(shape), index)

  wanted = "q k v do lse delta tiles shift q_ids kv_ids".split()
  out = _call(
    "flash_attention_dbias",
    kernel,
    (plan.near * parts, heads, splits),
    {
      n: (inputs[n][0], every_row(n, inputs[n][0]))
      for n in wanted
      if n in inputs
    },
    {
      "dtile": (
        jax.ShapeDtypeStruct(
          (heads, plan.near, splits, block, block), jnp.float32
        ),
        pl.BlockSpec(
          (None, None, None, block, part),
          lambda n, h, s: (h, n // parts, s, 0, lax.rem(n, parts)),
        ),
      )
    },
    stages=1,
  )
  return out["dtile"]


def _backward(x: Operands, y: Cotangents, *, plan, need_dbias):
  batch, queries, heads, _ = x.q.shape
  nq, nk = queries // plan.bq, x.k.shape[1] // plan.bk

  def inputs(make_spans, transposed):
    spans = make_spans(plan, x.segments, x.shift, batch, nq, nk)
    found = _inputs(x, spans, plan, transposed=transposed)
    row = pl.BlockSpec((None, None, queries), lambda n, h, b: (b, h, 0))
    found |= {"lse": (y.lse, row), "delta": (y.delta, row)}
    found["do"] = (y.do, found["q"][1])
    return found

  by_query, by_key = inputs(key_spans, False), inputs(query_spans, True)
  if y.k_mean is not None:
    by_query["k_mean"] = (
      y.k_mean,
      pl.BlockSpec((None, None, y.k_mean.shape[2]), lambda n, h, b: (b, h, 0)),
    )
  dq, far_BHNQ = _dq(by_query, plan, need_dbias)
  dk, dv = _dkv(by_key, plan)
  if not need_dbias:
    return dq, dk, dv, None
  splits = dbias_splits(heads, plan, batch * nq)
  dtiles = _dtiles(by_query, plan, splits)
  return dq, dk, dv, bias_gradient(x, plan, dtiles, far_BHNQ)


_KERNELS = blocked.Kernels(_forward, _backward)


def unsupported(q_BQHD, k_BKHD, bias) -> str | None:
  """Why these arguments cannot run here, or None."""
  if not tiling.chip_is("NVIDIA"):
    return f"it runs on NVIDIA GPUs, this is {tiling.device_kind()}"
  capability = tiling.compute_capability()
  if (0, 0) < capability < (8, 0):
    number = ".".join(map(str, capability))
    return f"it needs compute capability 8.0, Ampere; this GPU has {number}"
  return blocked.unsupported(q_BQHD, k_BKHD, bias)


def attention(q_BQHD, k_BKHD, *operands, **settings) -> jax.Array:
  """Same function as reference.attention, on Ampere and later."""
  dim = q_BQHD.shape[3]
  block = _blocks(q_BQHD).block
  return blocked.attention(
    _KERNELS,
    q_BQHD,
    k_BKHD,
    *operands,
    **settings,
    bq=block,
    bk=block,
    # Triton's tensors have powers of two on every side.
    head_dim=max(16, 1 << (dim - 1).bit_length()),
  )
