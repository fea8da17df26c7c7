"""Flash attention for TPU in Pallas (Mosaic): v4 to v7x.

Forward: one program a group of heads, batch row, query block and key block, the
key blocks last, with the online softmax in scratch. Backward: one fused kernel
of five matrix products a tile, transposed (keys down, queries across) so that
row statistics broadcast along sublanes; the gradient of a whole chunk of
queries stays in VMEM, and longer inputs are taken a chunk at a time.

The near tiles of the bias are expanded from their diagonals once a head, in
VMEM: no tile is ever in HBM. Their gradients are summed as whole tiles in VMEM,
over the batch and all blocks, and leave it as diagonals.

Heads of 64 lie two to a program, side by side in the 128 lanes, as the
projections leave them: nothing is transposed or padded in HBM.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.flash_attention import blocked, tiling
from pallas_kernels.flash_attention.blocked import LOG2E, Plan
from pallas_kernels.manual_axes import vary_together

LANES = 128
# The running maximum starts here rather than at -inf, so that a row that has
# seen no key yet subtracts a finite number from -inf.
_LOWEST = -1e30
_NT = (((1,), (1,)), ((), ()))  # a b^T
_NN = (((1,), (0,)), ((), ()))  # a b
_TN = (((0,), (0,)), ((), ()))  # a^T b


def _dot(a, b, dimensions):
  # float32 inputs ask for float32 products; the default is one bfloat16 pass.
  full = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    dimensions,
    precision=lax.Precision.HIGHEST if full else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


def _group(heads: int, head_dim: int) -> int:
  """Heads a program: two of 64 share the lanes where they pair up."""
  return 2 if head_dim == 64 and heads % 2 == 0 else 1


def _padded_head_dim(heads: int, head_dim: int) -> int:
  if head_dim <= 64 and heads % 2 == 0:
    return 64
  return -(-head_dim // LANES) * LANES


def _rows8(diagonals_HTL, rows: int, columns: int):
  """Diagonals as `_expand` takes them: (H, tiles, 8, lanes).

  Entry [i, j] of a tile is x[(j - i) % lanes]: lane m of x holds local distance
  m of a tile's first row and, from the end backwards, -1, -2, ... Row r of the
  eight is x rotated right by r.
  """
  lanes = -(-(rows + columns) // LANES) * LANES
  missing = lanes - diagonals_HTL.shape[-1]
  x = jnp.pad(diagonals_HTL, ((0, 0), (0, 0), (0, missing)))
  return jnp.stack(
    [jnp.roll(x, r - (rows - 1), axis=-1) for r in range(8)], axis=2
  )


def _expand(x_8L, rows: int, columns: int):
  """The (rows, columns) Toeplitz tile, doubling its rows from eight."""
  size = 8
  while size < rows:
    x_8L = jnp.concatenate([x_8L, pltpu.roll(x_8L, size, axis=1)], axis=0)
    size *= 2
  return x_8L[:rows, :columns]


def _collapse(tile, lanes: int):
  """The transpose of `_expand`: (8, lanes) sums along diagonals."""
  rows, columns = tile.shape
  size = 8
  while size < rows:
    size *= 2
  x = jnp.pad(tile, ((0, size - rows), (0, lanes - columns)))
  while size > 8:
    size //= 2
    x = x[:size] + pltpu.roll(x[size:], lanes - size, axis=1)
  return x


def _visible(q_range, kv_range, b, i, j):
  """(some pair of the tile may match, all pairs do), from block extents."""
  at = lambda ref, block, entry: ref[b, block, entry]
  some = (at(q_range, i, 0) <= at(kv_range, j, 1)) & (
    at(kv_range, j, 0) <= at(q_range, i, 1)
  )
  return some, at(q_range, i, 2) == at(kv_range, j, 2)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """What one visit has to do, and where it is."""

  has_tile: bool
  has_constant: bool
  masked: bool
  step: jax.Array
  offset: jax.Array
  near: jax.Array


def _visit(r, plan: Plan, b, i, j, body) -> None:
  """Runs body(_Tile) as tile (i, j) needs it; an invisible tile runs none."""
  step = plan.step(i, j, r.offset[0])
  offset = step * plan.unit - r.offset[1]
  near = (step >= plan.first) & (step <= plan.last)
  if not plan.biased:
    cases = [(True, False, False)]
  elif plan.tails:
    # Far tiles have a tile of their own too, one a side.
    cases = [(step <= plan.last if plan.causal else True, True, True)]
  else:
    far = step < plan.first if plan.causal else jnp.logical_not(near)
    cases = [(near, True, False), (far, False, True)]
  masks = [(True, False)]
  if plan.masked:
    some, whole = _visible(r.q_range, r.kv_range, b, i, j)
    masks = [(whole, False), (some & jnp.logical_not(whole), True)]
  for (sort, has_tile, has_constant), (visible, masked) in itertools.product(
    cases, masks
  ):
    condition = jnp.logical_and(sort, visible)
    tile = _Tile(has_tile, has_constant, masked, step, offset, near)
    if sort is True and visible is True:
      body(tile)
    else:
      pl.when(condition)(functools.partial(body, tile))


def _constant(constants, head, t: _Tile, plan: Plan):
  """The number a far tile adds to every score of a head."""
  side = jnp.where(t.step < plan.first, 0, 1)
  value = constants[head, side, 0]
  if plan.tails:
    value += constants[head, side, 1] * t.offset.astype(jnp.float32)
    value = jnp.where(t.near, 0.0, value)
  return value


def _lanes(x_RL, lanes: int):
  """A column held in all 128 lanes, `lanes` wide."""
  if lanes <= LANES:
    return x_RL[:, :lanes]
  return jnp.tile(x_RL, (1, lanes // LANES))


def _exp(x):
  return jnp.exp2(x * LOG2E)


def _scaled(x, scale: float):
  return x if scale == 1.0 else x * scale


def _column(ids_1L):
  """(L, 128): a row of ids turned into a column, held in all lanes."""
  wide = jnp.broadcast_to(ids_1L, (LANES, ids_1L.shape[1]))
  return jnp.transpose(wide)


def _call(
  name: str, kernel, grid, scalars, inputs, outputs, scratch, aliases=None
):
  """pallas_call with every operand by name.

  Args:
    name: of the kernel, in profiles and dumps.
    kernel: called with a namespace of refs.
    grid: number of programs an axis; the first is parallel over cores.
    scalars: name -> array, prefetched into SMEM and given to index maps.
    inputs: name -> (array, BlockSpec).
    outputs: name -> (ShapeDtypeStruct, BlockSpec).
    scratch: name -> scratch shape.
    aliases: name of an input -> name of the output that takes its memory.

  Returns:
    name -> output array.
  """
  names = [*scalars, *inputs, *outputs, *scratch]
  aliases = {
    names.index(x): list(outputs).index(y) for x, y in (aliases or {}).items()
  }
  arrays, in_specs = zip(*inputs.values())
  out_shape, out_specs = zip(*outputs.values())
  # Under shard_map an output varies over the mesh axes that inputs vary over.
  axes = jax.typeof(arrays[-1]).manual_axis_type
  results = pl.pallas_call(
    lambda *refs: kernel(types.SimpleNamespace(**dict(zip(names, refs)))),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=list(scratch.values()),
    ),
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes)
      for x in out_shape
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tiling.vmem_bytes(),
    ),
    input_output_aliases=aliases,
    name=name,
  )(*scalars.values(), *arrays)
  return dict(zip(outputs, results))


def _diagonals(diagonals_HTL, plan, transposed):
  """(H, tiles, 8, lanes) for tiles (bq, bk), or for their transposes."""
  if transposed:
    return _rows8(diagonals_HTL[..., ::-1], plan.bk, plan.bq)
  return _rows8(diagonals_HTL, plan.bq, plan.bk)


def _shared_operands(bias, segments, shift, phase, plan, group, *, transposed):
  """Scalars, and the inputs that do not depend on the visiting order."""
  scalars = {"offset": jnp.stack([shift, phase])}
  inputs = {}
  if plan.masked:
    scalars["q_range"] = segments.q_range_BI3
    scalars["kv_range"] = segments.kv_range_BJ3
  if plan.biased:
    diagonals = _diagonals(bias.diagonals_HTL, plan, transposed)
    inputs["constants"] = (
      bias.constants_H22,
      pl.BlockSpec(memory_space=pltpu.SMEM),
    )
    inputs["diagonals"] = (
      diagonals,
      pl.BlockSpec((group, *diagonals.shape[1:]), lambda h, *_: (h, 0, 0, 0)),
    )
  return scalars, inputs


def _expand_all(r, plan, group, rows, columns):
  for a in range(group):
    for t in range(plan.tiles):
      r.tiles[a, t] = _expand(r.diagonals[a, t], rows, columns)


def _flat(x):
  return x.reshape(*x.shape[:2], -1)


def _forward(q, k, v, bias, segments, shift, phase, plan: Plan, for_gradient):
  batch, queries, heads, dim = q.shape
  nq, nk = queries // plan.bq, k.shape[1] // plan.bk
  group = _group(heads, dim)
  paired = group == 2
  f32 = jnp.float32

  def q_block(h, b, i, j, *_):
    return b, i, h

  def k_block(h, b, i, j, offset, *_):
    # What is invisible is not fetched: the last visible block stays.
    visible = jnp.maximum(plan.key_blocks(i, offset[0], nk), 1)
    return b, jnp.minimum(j, visible - 1), h

  def kernel(r):
    h, b, i, j = (pl.program_id(axis) for axis in range(4))
    lanes = lambda a: slice(a * dim, (a + 1) * dim)

    if plan.biased:
      pl.when((b == 0) & (i == 0) & (j == 0))(
        lambda: _expand_all(r, plan, group, plan.bq, plan.bk)
      )

    @pl.when(j == 0)
    def _():
      r.m[...] = jnp.full(r.m.shape, _LOWEST, f32)
      if not paired:
        r.l[...] = jnp.zeros(r.l.shape, f32)
      r.sum[...] = jnp.zeros(r.sum.shape, f32)
      if plan.masked:
        r.column[...] = _column(r.q_ids[0])

    def tile(t: _Tile):
      for a in range(group):
        s = _dot(r.q[0, :, lanes(a)], r.k[0, :, lanes(a)], _NT)
        s = _scaled(s, plan.scale)
        if t.has_tile:
          s += r.tiles[a, plan.tile_index(t.step)]
        if t.has_constant:
          s += _constant(r.constants, h * group + a, t, plan)
        if t.masked:
          same = _lanes(r.column[...], plan.bk) == r.kv_ids[0]
          s = jnp.where(same, s, -jnp.inf)
        top = jnp.max(s, axis=1)[:, None]
        m_old = r.m[a]
        m_new = jnp.maximum(m_old, top)
        p = _exp(s - _lanes(m_new, plan.bk))
        shrink = _exp(m_old - m_new)
        r.m[a] = m_new
        if paired:
          # The lanes of the other head hold ones, and so the sum of P.
          mine = (
            lax.broadcasted_iota(jnp.int32, (plan.bk, LANES), 1) // dim == a
          )
          v_a = jnp.where(mine, r.v[0], 1)
        else:
          v_a = r.v[0, :, lanes(a)]
          r.l[a] = r.l[a] * shrink + jnp.sum(p, axis=1)[:, None]
        pv = _dot(p.astype(v.dtype), v_a, _NN)
        r.sum[a] = r.sum[a] * _lanes(shrink, pv.shape[1]) + pv

    _visit(r, plan, b, i, j, tile)

    @pl.when(j == nk - 1)
    def _():
      for a in range(group):
        if paired:
          other = r.sum[a, :, (1 - a) * dim : (1 - a) * dim + 1]
          l, sums = jnp.tile(other, (1, LANES)), r.sum[a, :, lanes(a)]
        else:
          l, sums = r.l[a], r.sum[a]
        seen = l > 0
        l = jnp.where(seen, l, 1.0)
        o, rest = blocked.rounded(sums / _lanes(l, dim), q.dtype)
        r.o[0, :, lanes(a)] = o
        if for_gradient:
          if rest is not None:
            r.rest[0, :, lanes(a)] = rest
          lse = jnp.where(seen, r.m[a] + jnp.log(l), 0.0)
          r.lse[0, a] = jnp.transpose(lse)[:1]

  scalars, inputs = _shared_operands(
    bias, segments, shift, phase, plan, group, transposed=False
  )
  q_spec = pl.BlockSpec((1, plan.bq, group * dim), q_block)
  k_spec = pl.BlockSpec((1, plan.bk, group * dim), k_block)
  inputs |= {"q": (_flat(q), q_spec)}
  inputs |= {"k": (_flat(k), k_spec), "v": (_flat(v), k_spec)}
  outputs = {"o": (jax.ShapeDtypeStruct(_flat(q).shape, q.dtype), q_spec)}
  scratch = {
    "m": pltpu.VMEM((group, plan.bq, LANES), f32),
    "sum": pltpu.VMEM((group, plan.bq, group * dim), f32),
  }
  if not paired:
    scratch["l"] = pltpu.VMEM((group, plan.bq, LANES), f32)
  if for_gradient:
    if q.dtype != f32:
      outputs["rest"] = outputs["o"]
    outputs["lse"] = (
      jax.ShapeDtypeStruct((batch, heads, 1, queries), f32),
      pl.BlockSpec((1, group, 1, plan.bq), lambda h, b, i, j, *_: (b, h, 0, i)),
    )
  if plan.biased:
    scratch["tiles"] = pltpu.VMEM((group, plan.tiles, plan.bq, plan.bk), f32)
  if plan.masked:
    inputs["q_ids"] = (
      segments.q_BQ[:, None],
      pl.BlockSpec((1, 1, plan.bq), lambda h, b, i, j, *_: (b, 0, i)),
    )
    inputs["kv_ids"] = (
      segments.kv_BK[:, None],
      pl.BlockSpec((1, 1, plan.bk), lambda h, b, i, j, *_: (b, 0, j)),
    )
    scratch["column"] = pltpu.VMEM((plan.bq, LANES), jnp.int32)
  out = _call(
    "flash_attention_forward",
    kernel,
    (heads // group, batch, nq, nk),
    scalars,
    inputs,
    outputs,
    scratch,
  )
  if not for_gradient:
    return out["o"].reshape(q.shape), None, None
  o, rest = (
    x if x is None else x.reshape(q.shape) for x in (out["o"], out.get("rest"))
  )
  return o, rest, out["lse"][:, :, 0]


def _backward_chunk(
  q,
  k,
  v,
  bias,
  segments,
  shift,
  phase,
  lse,
  delta,
  k_mean,
  do,
  plan,
  need_dbias,
  start,
):
  """(dq, dk, dv, dbias) from these queries; q, k, v, do are (B, L, H * D).

  `start` is None, or the float32 (dk, dv) of the queries before, to which these
  add theirs, in place.
  """
  batch, queries, _ = q.shape
  heads = lse.shape[1]
  dim = q.shape[2] // heads
  nq, nk = queries // plan.bq, k.shape[1] // plan.bk
  group = _group(heads, dim)
  width = group * dim
  f32 = jnp.float32

  def q_index(i, j, offset):
    # What does not see these keys is not fetched.
    return jnp.minimum(
      jnp.maximum(i, plan.first_query_block(j, offset[0], nq)), nq - 1
    )

  def q_block(h, b, j, i, offset, *_):
    return b, q_index(i, j, offset), h

  def row_block(h, b, j, i, offset, *_):
    return b, h, 0, q_index(i, j, offset)

  def k_block(h, b, j, i, *_):
    return b, j, h

  def kernel(r):
    h, b, j, i = (pl.program_id(axis) for axis in range(4))
    lanes = lambda a: slice(a * dim, (a + 1) * dim)
    first = (b == 0) & (j == 0) & (i == 0)
    last = (b == batch - 1) & (j == nk - 1) & (i == nq - 1)
    rows = pl.ds(pl.multiple_of(i * plan.bq, plan.bq), plan.bq)

    if plan.biased:

      @pl.when(first)
      def _():
        _expand_all(r, plan, group, plan.bk, plan.bq)
        if need_dbias:
          r.dtiles[...] = jnp.zeros(r.dtiles.shape, f32)
          r.dfar[...] = jnp.zeros(r.dfar.shape, f32)

    @pl.when((j == 0) & (i == 0))
    def _():
      r.dq_sum[...] = jnp.zeros(r.dq_sum.shape, f32)

    @pl.when(i == 0)
    def _():
      for a in range(group):
        if start is None:
          r.dk_sum[a] = jnp.zeros(r.dk_sum.shape[1:], f32)
          r.dv_sum[a] = jnp.zeros(r.dv_sum.shape[1:], f32)
        else:
          r.dk_sum[a] = r.dk_start[0, :, lanes(a)]
          r.dv_sum[a] = r.dv_start[0, :, lanes(a)]
      if plan.masked:
        r.column[...] = _column(r.kv_ids[0])
      if k_mean is not None:
        r.k_centred[...] = (r.k[0].astype(f32) - r.k_mean[0]).astype(k.dtype)

    def tile(t: _Tile):
      dq = []
      for a in range(group):
        q_a, do_a = r.q[0, :, lanes(a)], r.do[0, :, lanes(a)]
        k_a, v_a = r.k[0, :, lanes(a)], r.v[0, :, lanes(a)]
        s_KQ = _scaled(_dot(k_a, q_a, _NT), plan.scale)
        if t.has_tile:
          s_KQ += r.tiles[a, plan.tile_index(t.step)]
        if t.has_constant:
          s_KQ += _constant(r.constants, h * group + a, t, plan)
        if t.masked:
          same = _lanes(r.column[...], plan.bq) == r.q_ids[0]
          s_KQ = jnp.where(same, s_KQ, -jnp.inf)
        p_KQ = _exp(s_KQ - r.lse[0, a])
        r.dv_sum[a] += _dot(p_KQ.astype(do.dtype), do_a, _NN)
        ds_KQ = p_KQ * (_dot(v_a, do_a, _NT) - r.delta[0, a])
        ds = _scaled(ds_KQ, plan.scale).astype(q.dtype)
        r.dk_sum[a] += _dot(ds, q_a, _NN)
        if k_mean is not None:
          k_a = r.k_centred[:, lanes(a)]
        dq.append(_dot(ds, k_a, _TN))
        if need_dbias:
          _add_dbias(r, a, ds_KQ, t)
      r.dq_sum[rows] += jnp.concatenate(dq, axis=1)

    def _add_dbias(r, a, ds_KQ, t):
      if t.has_tile:
        r.dtiles[a, plan.tile_index(t.step)] += ds_KQ
      if t.has_constant:
        side = jnp.where(t.step < plan.first, 0, 1)
        # Sublane groups only: the rest is summed outside.
        ds_8Q = ds_KQ.reshape(plan.bk // 8, 8, plan.bq).sum(axis=0)
        if plan.tails:
          ds_8Q = jnp.where(t.near, 0.0, ds_8Q)
          r.dfar[a, side, 1] += ds_8Q * t.offset.astype(f32)
        r.dfar[a, side, 0] += ds_8Q

    _visit(r, plan, b, i, j, tile)

    @pl.when(i == nq - 1)
    def _():
      for a in range(group):
        r.dk[0, :, lanes(a)] = r.dk_sum[a].astype(r.dk.dtype)
        r.dv[0, :, lanes(a)] = r.dv_sum[a].astype(r.dv.dtype)

    @pl.when((j == nk - 1) & (i == nq - 1))
    def _():
      r.dq[0] = r.dq_sum[...].astype(q.dtype)

    if need_dbias:

      @pl.when(last)
      def _():
        for a in range(group):
          for t in range(plan.tiles):
            x_8L = _collapse(r.dtiles[a, t], r.ddiagonals.shape[-1])
            r.ddiagonals[a, t] = x_8L

  scalars, inputs = _shared_operands(
    bias, segments, shift, phase, plan, group, transposed=True
  )
  q_spec = pl.BlockSpec((1, plan.bq, width), q_block)
  k_spec = pl.BlockSpec((1, plan.bk, width), k_block)
  row_spec = pl.BlockSpec((1, group, 1, plan.bq), row_block)
  inputs |= {
    "q": (q, q_spec),
    "k": (k, k_spec),
    "v": (v, k_spec),
    "do": (do, q_spec),
    "lse": (lse[:, :, None], row_spec),
    "delta": (delta[:, :, None], row_spec),
  }
  if k_mean is not None:
    inputs["k_mean"] = (
      k_mean[:, None],
      pl.BlockSpec((1, 1, width), lambda h, b, *_: (b, 0, h)),
    )
  aliases = {}
  if start is not None:
    inputs |= {
      "dk_start": (start[0], k_spec),
      "dv_start": (start[1], k_spec),
    }
    aliases = {"dk_start": "dk", "dv_start": "dv"}
  struct = jax.ShapeDtypeStruct
  outputs = {
    "dq": (
      struct(q.shape, q.dtype),
      pl.BlockSpec((1, queries, width), lambda h, b, j, i, *_: (b, 0, h)),
    ),
    "dk": (struct(k.shape, k.dtype if start is None else f32), k_spec),
    "dv": (struct(v.shape, v.dtype if start is None else f32), k_spec),
  }
  scratch = {
    "dq_sum": pltpu.VMEM((queries, width), f32),
    "dk_sum": pltpu.VMEM((group, plan.bk, dim), f32),
    "dv_sum": pltpu.VMEM((group, plan.bk, dim), f32),
  }
  if k_mean is not None:
    scratch["k_centred"] = pltpu.VMEM((plan.bk, width), k.dtype)
  if plan.biased:
    tiles = (plan.tiles, plan.bk, plan.bq)
    scratch["tiles"] = pltpu.VMEM((group, *tiles), f32)
  if need_dbias:
    far = (2, 1 + plan.tails, 8, plan.bq)
    outputs["dfar"] = (
      struct((heads, *far), f32),
      pl.BlockSpec((group, *far), lambda h, *_: (h, 0, 0, 0, 0)),
    )
    shape = inputs["diagonals"][0].shape
    outputs["ddiagonals"] = (struct(shape, f32), inputs["diagonals"][1])
    scratch["dtiles"] = pltpu.VMEM((group, *tiles), f32)
  if plan.masked:
    inputs["q_ids"] = (
      segments.q_BQ[:, None],
      pl.BlockSpec(
        (1, 1, plan.bq),
        lambda h, b, j, i, offset, *_: (b, 0, q_index(i, j, offset)),
      ),
    )
    inputs["kv_ids"] = (
      segments.kv_BK[:, None],
      pl.BlockSpec((1, 1, plan.bk), lambda h, b, j, i, *_: (b, 0, j)),
    )
    scratch["column"] = pltpu.VMEM((plan.bk, LANES), jnp.int32)
  out = _call(
    "flash_attention_backward",
    kernel,
    (heads // group, batch, nk, nq),
    scalars,
    inputs,
    outputs,
    scratch,
    aliases,
  )
  dbias = None
  if need_dbias:
    _, unroll = jax.vjp(lambda x: _diagonals(x, plan, True), bias.diagonals_HTL)
    dfar = out["dfar"].sum((3, 4))
    dbias = blocked.Bias(
      *unroll(out["ddiagonals"]),
      jnp.pad(dfar, ((0, 0), (0, 0), (0, 2 - dfar.shape[2]))),
    )
  return out["dq"], out["dk"], out["dv"], dbias


def _backward(
  q,
  k,
  v,
  bias,
  segments,
  shift,
  phase,
  lse,
  delta,
  k_mean,
  do,
  plan,
  need_dbias,
):
  if k_mean is not None:
    k_mean = k_mean.reshape(k_mean.shape[0], -1)
  shapes = [x.shape for x in (q, k, v)]
  limit = tiling.tpu_query_chunk(q.shape[3] * _group(*q.shape[2:]))
  q, k, v, do = map(_flat, (q, k, v, do))
  chunks = -(-q.shape[1] // limit)
  by_chunk = functools.partial(
    _backward_chunk, plan=plan, need_dbias=need_dbias
  )
  if chunks == 1:
    dq, dk, dv, dbias = by_chunk(
      q,
      k,
      v,
      bias,
      segments,
      shift,
      phase,
      lse,
      delta,
      k_mean,
      do,
      start=None,
    )
    return *map(jnp.reshape, (dq, dk, dv), shapes), dbias

  # dq of a chunk is whole after one call; dk, dv and the bias add up.
  blocks = -(-q.shape[1] // (chunks * plan.bq))
  size = blocks * plan.bq

  def split(x, axis, fill=0, size=size):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, chunks * size - x.shape[axis])
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  # Appended queries see nothing: 2^(s - inf) is 0.
  per_chunk = dict(
    q=split(q, 1),
    do=split(do, 1),
    lse=split(lse, 2, jnp.inf),
    delta=split(delta, 2),
    shift=shift + jnp.arange(chunks) * (size // plan.unit),
  )
  if plan.masked:
    per_chunk["ids"] = split(segments.q_BQ, 1)
    per_chunk["range"] = split(segments.q_range_BI3, 1, size=blocks)

  def one(carry, x):
    part = None
    if plan.masked:
      part = segments._replace(q_BQ=x["ids"], q_range_BI3=x["range"])
    dk, dv, dbias = carry
    dq, dk, dv, more = by_chunk(
      x["q"],
      k,
      v,
      bias,
      part,
      x["shift"],
      phase,
      x["lse"],
      x["delta"],
      k_mean,
      x["do"],
      start=(dk, dv),
    )
    return (dk, dv, jax.tree.map(jnp.add, dbias, more)), dq

  dbias = jax.tree.map(jnp.zeros_like, bias) if need_dbias else None
  dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (k, v))
  start = vary_together((dk, dv, dbias), like=q)
  (dk, dv, dbias), dq_chunks = lax.scan(one, start, per_chunk)
  dq = jnp.moveaxis(dq_chunks, 0, 1).reshape(q.shape[0], -1, q.shape[2])
  gradients = dq[:, : q.shape[1]], dk.astype(k.dtype), dv.astype(v.dtype)
  return *map(jnp.reshape, gradients, shapes), dbias


_KERNELS = blocked.Kernels(_forward, _backward)


def unsupported(q_BQHD, k_BKHD, bias) -> str | None:
  """Why these arguments cannot run here, or None."""
  if not tiling.chip_is("TPU"):
    return f"it runs on TPUs, this is {tiling.device_kind()}"
  reason = blocked.unsupported(q_BQHD, bias)
  if reason or _blocks(q_BQHD, k_BKHD, bias):
    return reason
  return (
    f"the near tiles of a bias of radius {bias.radius} do not fit VMEM; use "
    "'chunked'"
  )


def _blocks(q_BQHD, k_BKHD, bias) -> tuple[int, int] | None:
  _, queries, heads, dim = q_BQHD.shape
  return tiling.tpu_blocks(
    queries,
    k_BKHD.shape[1],
    dim,
    None if bias is None else bias.radius,
    _group(heads, _padded_head_dim(heads, dim)),
  )


def attention(q_BQHD, k_BKHD, v_BKHD, bias, *operands, **settings) -> jax.Array:
  """Same function as reference.attention, on a TPU."""
  _, _, heads, dim = q_BQHD.shape
  bq, bk = _blocks(q_BQHD, k_BKHD, bias)
  return blocked.attention(
    _KERNELS,
    q_BQHD,
    k_BKHD,
    v_BKHD,
    bias,
    *operands,
    **settings,
    bq=bq,
    bk=bk,
    head_dim=_padded_head_dim(heads, dim),
  )
