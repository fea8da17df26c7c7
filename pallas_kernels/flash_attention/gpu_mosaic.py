"""Flash attention for Hopper in Pallas (Mosaic GPU).

Every kernel is three warpgroups: two compute 64 rows each, the third only loads
tiles into a ring of shared memory. Forward follows FlashAttention-3
(arXiv:2407.08608): a barrier lets one warpgroup do softmax while the other
multiplies. Backward is three kernels without atomics: dq, (dk, dv), and the
near tiles of the bias, which are few.

Each kernel has two loop bodies: one for near blocks, which reads a bias tile,
and one for far blocks, which adds a number.

Needs jax 0.11 (`plgpu.kernel` with warpgroup lowering), hence Python 3.12.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
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
  pairs_of_tile,
  query_spans,
)
from pallas_kernels.flash_attention.padding import without_padding
from pallas_kernels.manual_axes import vary_together

if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
  raise ImportError(
    "it needs jax 0.11 or later (and so Python 3.12); this is "
    f"{jax.__version__}"
  )
import jax.experimental.pallas.mosaic_gpu as plgpu

ROWS = 64  # Of one warpgroup: M of wgmma.
WARPGROUPS = 2
BLOCK = ROWS * WARPGROUPS
STAGES = 2
COPIES = 8  # Of a row sum that wgmma takes: its least N.
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 240, 24
_LOWEST = -1e30
_TILE = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _TILE.reduce(1), _TILE.reduce(0)
# The interpreter knows neither accumulators that start from a value nor wgmma
# operands in registers; tests set this and the kernels go without.
INTERPRETED = False


def _across(x_R, columns: int):
  """A value a row, for a whole tile."""
  return lax.broadcast_in_dim(x_R, (x_R.shape[0], columns), [0])


def _down(x_C, rows: int):
  """A value a column, for a whole tile."""
  return lax.broadcast_in_dim(x_C, (rows, x_C.shape[0]), [1])


def _scaled(s, plan):
  return s if plan.scale == 1.0 else s * plan.scale


def _exp(s, top):
  """e^(s - top): a multiply-add of each s, and top rounded once a row."""
  return jnp.exp2(s * LOG2E - top * LOG2E)


def _zeros(*shape):
  layout = _TILE if len(shape) == 2 else _PER_ROW
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _read(ref, layout):
  """Straight from global memory; the few values a warpgroup needs a tile."""
  return plgpu.load(ref, layout=layout, optimized=False)


def _products(*pairs):
  """a b^T of each pair of refs in shared memory, float32, waited for once."""

  def run(*accumulators):
    for accumulator, (a, b) in zip(accumulators, pairs):
      plgpu.wgmma(accumulator, a, b.T)
    return tuple(accumulator[...] for accumulator in accumulators)

  shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
  return pl.run_scoped(run, *(plgpu.ACC(s, jnp.float32) for s in shapes))


def _add_products(totals, left, rights, staging=None, then=lambda: None):
  """Each total + left @ right, left in registers; `then` runs meanwhile."""
  if INTERPRETED:
    staging[...] = left
    plgpu.commit_smem()

    def run(*accumulators):
      for accumulator, right in zip(accumulators, rights):
        plgpu.wgmma(accumulator, staging, right)
      then()
      return tuple(accumulator[...] for accumulator in accumulators)

    scopes = (plgpu.ACC(x.shape, jnp.float32) for x in totals)
    return tuple(map(jnp.add, totals, pl.run_scoped(run, *scopes)))

  def run(accumulators):
    for accumulator, right in zip(accumulators, rights):
      plgpu.wgmma(accumulator, left, right)
    then()

  return pl.run_state(run)(tuple(map(plgpu.ACC.init, totals)))


def _add_product(total, left, right, staging=None):
  return _add_products((total,), left, (right,), staging)[0]


def _slot(t):
  return lax.rem(t, jnp.asarray(STAGES, t.dtype))


def _ring(total, load, free):
  """The loading warpgroup: load(t, slot) for t < total, as slots get free."""
  for t in range(STAGES):
    pl.when(t < total)(functools.partial(load, jnp.int32(t), t))

  # Every arrival is waited for, so that no barrier ends in an odd phase.
  @pl.loop(0, total)
  def _(t):
    plgpu.barrier_wait(free.at[_slot(t)])
    pl.when(t + STAGES < total)(lambda: load(t + STAGES, _slot(t)))


def _call(name, kernel, grid, inputs, outputs, scratch):
  """plgpu.kernel on operands by name; kernel gets a dict of refs.

  grid maps axis name -> size; outputs, name -> ShapeDtypeStruct; scratch, name
  -> scratch type, None for what this variant does not need.
  """
  scratch = {n: x for n, x in scratch.items() if x is not None}
  names = [*inputs, *outputs, *scratch]
  results = plgpu.kernel(
    lambda *refs: kernel(dict(zip(names, refs))),
    out_type=list(outputs.values()),
    scratch_types=list(scratch.values()),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs.values())
  # plgpu.kernel forgets over which mesh axes its operands vary.
  return dict(zip(outputs, vary_together(results, like=inputs["q"])))


def _shared(dtype):
  """Makes scratch types: a matrix in shared memory as wgmma wants it."""
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return lambda *shape: plgpu.SMEM(shape, dtype, transforms=transforms)


def _arrivals(number):
  return plgpu.Barrier(num_arrivals=number, num_barriers=STAGES)


def _by_role(compute, load):
  wg = lax.axis_index("wg")

  @pl.when(wg < WARPGROUPS)
  def _():
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
    compute(wg)

  @pl.when(wg == WARPGROUPS)
  def _():
    plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")
    load()


def _masked(s, r, b, i, j, row_ids, column_ids):
  """Scores with -inf where ids differ; most tiles are all of one id.

  The ids come as refs, read only where they matter: no register holds them.
  """

  def mask(s):
    rows = _across(_read(row_ids, _PER_ROW), s.shape[1])
    columns = _down(_read(column_ids, _PER_COLUMN), s.shape[0])
    return jnp.where(rows == columns, s, -jnp.inf)

  whole = r["q_only"][b, i] == r["kv_only"][b, j]
  return lax.cond(whole, lambda s: s, mask, s)


def _forward(x: Operands, *, plan, for_gradient):
  q = x.q
  batch, queries, heads, dim = q.shape
  nq, nk = queries // BLOCK, x.k.shape[1] // BLOCK
  parts = tiling.mosaic_parts(dim).forward
  part = BLOCK // parts

  def kernel(r):
    h, i, b = (lax.axis_index(name) for name in ("heads", "queries", "batch"))
    span = Span(r["spans"].at[b, i], BLOCK)
    total = span.count * parts

    def compute(wg):
      q_s = r["q_s"].at[wg]
      rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)

      def in_turn():
        plgpu.barrier_arrive(r["turn"])
        plgpu.barrier_wait(r["turn"])

      ready = r["q_ready"].at[wg]
      plgpu.copy_gmem_to_smem(r["q"].at[b, rows, h], q_s, ready)
      plgpu.copy_gmem_to_smem(r["ones"], r["ones_s"].at[wg], ready)
      plgpu.barrier_wait(ready)
      if plan.biased:
        before, after = r["constants"][h, 0], r["constants"][h, 1]
      pl.when(total > 0)(lambda: plgpu.barrier_wait(r["k_ready"].at[0]))
      pl.when(wg == 1)(in_turn)

      def step(near, t, carry):
        o, m, l = carry
        slot = _slot(t)
        j, within, columns = span.part(t, parts)

        def scores(accumulator):
          plgpu.wgmma(accumulator, q_s, r["k_s"].at[slot].T)
          tile = None
          if near:
            index = j - i - r["shift"][0] - plan.first
            mine = pl.ds(wg * ROWS, ROWS)
            tile = _read(r["tiles"].at[h, index, mine, within], _TILE)
          in_turn()
          return accumulator[...], tile

        s, tile = pl.run_scoped(scores, plgpu.ACC((ROWS, part), jnp.float32))
        plgpu.barrier_arrive(r["k_free"].at[slot])
        if plan.masked:
          q_ids, kv_ids = r["q_ids"].at[b, rows], r["kv_ids"].at[b, columns]
          s = _masked(s, r, b, i, j, q_ids, kv_ids)
        s = _scaled(s, plan)
        if near:
          s += tile
          m_new = jnp.maximum(m, s.max(axis=1))
          p = _exp(s, _across(m_new, part))
        else:
          # Softmax does not see a constant: it moves the maximum instead.
          # Not m_new - c, which is not top where that wins. And c = -inf hides
          # the tile: m stays, and base is inf, so that every p is 0.
          c = jnp.where(j < span.near, before, after) if plan.biased else 0.0
          top = s.max(axis=1)
          base, m_new = jnp.maximum(m - c, top), jnp.maximum(m, top + c)
          p = _exp(s, _across(base, part))
        shrink = jnp.exp2((m - m_new) * LOG2E)
        p = p.astype(q.dtype)
        l = l * _across(shrink, COPIES)
        o = o * _across(shrink, dim)
        # Keeps the compiler from moving softmax into the other's turn.
        o, l, m_new, p = lax.optimization_barrier((o, l, m_new, p))
        plgpu.barrier_arrive(r["turn"])
        plgpu.barrier_wait(r["v_ready"].at[slot])
        plgpu.barrier_wait(r["turn"])

        def next_keys():
          pl.when(t + 1 < total)(
            lambda: plgpu.barrier_wait(r["k_ready"].at[_slot(t + 1)])
          )

        staging = r["p_s"].at[wg] if INTERPRETED else None
        # The sum of what is multiplied: a key that takes all gives o = v.
        rights = r["v_s"].at[slot], r["ones_s"].at[wg].T
        o, l = _add_products((o, l), p, rights, staging, next_keys)
        plgpu.barrier_arrive(r["v_free"].at[slot])
        return o, m_new, l

      lowest = plgpu.layout_cast(
        jnp.full((ROWS,), _LOWEST, jnp.float32), _PER_ROW
      )
      carry = _zeros(ROWS, dim), lowest, _zeros(ROWS, COPIES)
      start = 0
      if plan.biased:
        start = span.near_count * parts
        carry = lax.fori_loop(0, start, functools.partial(step, True), carry)
      o, m, l = lax.fori_loop(
        start, total, functools.partial(step, False), carry
      )
      pl.when(wg == 0)(in_turn)
      l = l.max(axis=1)  # All the same.
      seen = l > 0
      l = jnp.where(seen, l, 1.0)
      o, rest = blocked.rounded(o * _across(1.0 / l, dim), q.dtype)
      q_s[...] = o
      if for_gradient:
        lse = jnp.where(seen, m + jnp.log(l), 0.0)
        r["lse_s"].at[wg][...] = lse
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_s, r["o"].at[b, rows, h])
      if for_gradient:
        plgpu.copy_smem_to_gmem(r["lse_s"].at[wg], r["lse"].at[b, h, rows])
        # The same memory again, once it is read.
        plgpu.wait_smem_to_gmem(0)
        q_s[...] = rest
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, r["rest"].at[b, rows, h])
      plgpu.wait_smem_to_gmem(0)

    def load():
      def fetch(name, t, slot):
        *_, rows = span.part(t, parts)
        plgpu.copy_gmem_to_smem(
          r[name].at[b, rows, h],
          r[f"{name}_s"].at[slot],
          r[f"{name}_ready"].at[slot],
        )

      for t in range(STAGES):

        @pl.when(t < total)
        def _(t=t):
          fetch("k", jnp.int32(t), t)
          fetch("v", jnp.int32(t), t)

      @pl.loop(0, total)
      def _(t):
        for name in ("k", "v"):
          plgpu.barrier_wait(r[f"{name}_free"].at[_slot(t)])

          @pl.when(t + STAGES < total)
          def _(name=name):
            fetch(name, t + STAGES, _slot(t))

    _by_role(compute, load)

  # wgmma reads values from shared memory as they are, and 0 * NaN is NaN.
  v = without_padding(x.v, None if x.segments is None else x.segments.kv_BK)
  matrix = _shared(q.dtype)
  outputs = {"o": jax.ShapeDtypeStruct(q.shape, q.dtype)}
  if for_gradient:
    outputs["rest"] = outputs["o"]
    outputs["lse"] = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
  out = _call(
    "flash_attention_forward",
    kernel,
    {"heads": heads, "queries": nq, "batch": batch},
    {
      "q": q,
      "k": x.k,
      "v": v,
      "ones": jnp.ones((COPIES, part), q.dtype),
      "spans": key_spans(plan, x.segments, x.shift, batch, nq, nk),
      "shift": x.shift[None],
      **bias_operands(x.bias, plan),
      **id_operands(x.segments),
    },
    outputs,
    {
      "q_s": matrix(WARPGROUPS, ROWS, dim),
      "k_s": matrix(STAGES, part, dim),
      "v_s": matrix(STAGES, part, dim),
      "ones_s": matrix(WARPGROUPS, COPIES, part),
      "lse_s": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
      if for_gradient
      else None,
      "p_s": matrix(WARPGROUPS, ROWS, part) if INTERPRETED else None,
      "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
      "k_ready": _arrivals(1),
      "v_ready": _arrivals(1),
      "k_free": _arrivals(WARPGROUPS),
      "v_free": _arrivals(WARPGROUPS),
      "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
    },
  )
  return out["o"], out.get("rest"), out.get("lse")


def _dq(operands, plan, need_dbias):
  """(dq, sums of dS over the far keys before and after, (B, H, 2, Q)).

  One program a block of queries.
  """
  q = operands["q"]
  batch, queries, heads, dim = q.shape
  nq = queries // BLOCK
  parts = tiling.mosaic_parts(dim).dq
  part = BLOCK // parts

  def kernel(r):
    h, i, b = (lax.axis_index(name) for name in ("heads", "queries", "batch"))
    span = Span(r["spans"].at[b, i], BLOCK)
    total = span.count * parts

    def compute(wg):
      rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
      q_s, do_s = r["q_s"].at[wg], r["do_s"].at[wg]
      ready = r["rows_ready"].at[wg]
      plgpu.copy_gmem_to_smem(r["q"].at[b, rows, h], q_s, ready)
      plgpu.copy_gmem_to_smem(r["do"].at[b, rows, h], do_s, ready)
      plgpu.copy_gmem_to_smem(r["ones"], r["ones_s"].at[wg], ready)
      lse = _read(r["statistics"].at[b, h, 0, rows], _PER_ROW)
      delta = _read(r["statistics"].at[b, h, 1, rows], _PER_ROW)
      if plan.biased:
        before, after = r["constants"][h, 0], r["constants"][h, 1]
      plgpu.barrier_wait(ready)

      def step(near, t, carry):
        dq, row_sums, sums = carry
        slot = _slot(t)
        j, within, columns = span.part(t, parts)
        tile = None
        if near:
          index = j - i - r["shift"][0] - plan.first
          mine = pl.ds(wg * ROWS, ROWS)
          tile = _read(r["tiles"].at[h, index, mine, within], _TILE)
        plgpu.barrier_wait(r["kv_ready"].at[slot])
        k_s, v_s = r["k_s"].at[slot], r["v_s"].at[slot]
        s, dp = _products((q_s, k_s), (do_s, v_s))
        if plan.masked:
          q_ids, kv_ids = r["q_ids"].at[b, rows], r["kv_ids"].at[b, columns]
          s = _masked(s, r, b, i, j, q_ids, kv_ids)
        s = _scaled(s, plan)
        is_before = j < span.near
        top = lse
        if near:
          s = s + tile
        elif plan.biased:
          top = lse - jnp.where(is_before, before, after)
        p = _exp(s, _across(top, part))
        ds = p * (dp - _across(delta, part))
        if need_dbias and not near:
          far_sums = ds.sum(axis=1)
          sums = tuple(
            total + far_sums * jnp.where(mine, 1.0, 0.0)
            for total, mine in zip(sums, (is_before, j >= span.near))
          )
        ds = (ds if plan.scale == 1.0 else ds * plan.scale).astype(q.dtype)
        staging = r["ds_s"].at[wg] if INTERPRETED else None
        rights = k_s, r["ones_s"].at[wg].T
        dq, row_sums = _add_products((dq, row_sums), ds, rights, staging)
        plgpu.barrier_arrive(r["kv_free"].at[slot])
        return dq, row_sums, sums

      sums = (_zeros(ROWS), _zeros(ROWS)) if need_dbias else ()
      carry = _zeros(ROWS, dim), _zeros(ROWS, COPIES), sums
      start = 0
      if plan.biased:
        start = span.near_count * parts
        carry = lax.fori_loop(0, start, functools.partial(step, True), carry)
      dq, row_sums, sums = lax.fori_loop(
        start, total, functools.partial(step, False), carry
      )
      # See blocked.mean_key; all copies of a row's sum are the same.
      row_sums = row_sums.sum(axis=1) * (1 / COPIES)
      k_mean = _read(r["k_mean"].at[b, h], _PER_COLUMN)
      dq -= _across(row_sums, dim) * _down(k_mean, ROWS)
      q_s[...] = dq.astype(q.dtype)
      for side, x in enumerate(sums):
        r["far_s"].at[wg, side][...] = x
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_s, r["dq"].at[b, rows, h])
      for side in range(len(sums)):
        plgpu.copy_smem_to_gmem(
          r["far_s"].at[wg, side], r["far"].at[b, h, side, rows]
        )
      plgpu.wait_smem_to_gmem(0)

    def load():
      def fetch(t, slot):
        *_, rows = span.part(t, parts)
        ready = r["kv_ready"].at[slot]
        for name in ("k", "v"):
          plgpu.copy_gmem_to_smem(
            r[name].at[b, rows, h], r[f"{name}_s"].at[slot], ready
          )

      _ring(total, fetch, r["kv_free"])

    _by_role(compute, load)

  matrix = _shared(q.dtype)
  outputs = {"dq": jax.ShapeDtypeStruct(q.shape, q.dtype)}
  if need_dbias:
    outputs["far"] = jax.ShapeDtypeStruct(
      (batch, heads, 2, queries), jnp.float32
    )
  out = _call(
    "flash_attention_dq",
    kernel,
    {"heads": heads, "queries": nq, "batch": batch},
    operands | {"ones": jnp.ones((COPIES, part), q.dtype)},
    outputs,
    {
      "q_s": matrix(WARPGROUPS, ROWS, dim),
      "do_s": matrix(WARPGROUPS, ROWS, dim),
      "k_s": matrix(STAGES, part, dim),
      "v_s": matrix(STAGES, part, dim),
      "far_s": plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32)
      if need_dbias
      else None,
      "ones_s": matrix(WARPGROUPS, COPIES, part),
      "ds_s": matrix(WARPGROUPS, ROWS, part) if INTERPRETED else None,
      "rows_ready": plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
      "kv_ready": _arrivals(2),
      "kv_free": _arrivals(WARPGROUPS),
    },
  )
  return out["dq"], out.get("far")


def _dkv(operands, plan):
  """(dk, dv): one program a block of keys.

  Transposed, keys down and queries across, so that P^T and dS^T are the left
  operands that registers may hold.
  """
  q, k = operands["q"], operands["k"]
  batch, keys, heads, dim = k.shape
  parts = tiling.mosaic_parts(dim).dkv
  part = BLOCK // parts
  # S and dP wait for each other's product once, where both fit registers.
  together = dim <= 64

  def kernel(r):
    h, j, b = (lax.axis_index(name) for name in ("heads", "keys", "batch"))
    span = Span(r["spans"].at[b, j], BLOCK)
    total = span.count * parts

    def compute(wg):
      rows = pl.ds(j * BLOCK + wg * ROWS, ROWS)
      k_s, v_s, ready = r["k_s"].at[wg], r["v_s"].at[wg], r["rows_ready"].at[wg]
      plgpu.copy_gmem_to_smem(r["k"].at[b, rows, h], k_s, ready)
      plgpu.copy_gmem_to_smem(r["v"].at[b, rows, h], v_s, ready)
      plgpu.barrier_wait(ready)

      def step(near, t, carry):
        dk, dv = carry
        slot = _slot(t)
        i, within, columns = span.part(t, parts)
        plgpu.barrier_wait(r["q_ready"].at[slot])
        q_s, do_s = r["q_s"].at[slot], r["do_s"].at[slot]
        if together:
          s_KQ, dp_KQ = _products((k_s, q_s), (v_s, do_s))
        else:
          (s_KQ,) = _products((k_s, q_s))
        if plan.masked:
          q_ids, kv_ids = r["q_ids"].at[b, columns], r["kv_ids"].at[b, rows]
          s_KQ = _masked(s_KQ, r, b, i, j, kv_ids, q_ids)
        s_KQ = _scaled(s_KQ, plan)
        top = plgpu.load(r["statistics_s"].at[slot, 0], layout=_PER_COLUMN)
        if near:
          # Not read ahead: dk and dv leave no registers to hold it.
          index = j - i - r["shift"][0] - plan.first
          mine = pl.ds(wg * ROWS, ROWS)
          s_KQ += _read(r["tiles"].at[h, index, mine, within], _TILE)
        elif plan.biased:
          # Queries before the near ones see these keys after themselves.
          side = jnp.where(i < span.near, 1, 0)
          top = top - r["constants"][h, side]
        p_KQ = _exp(s_KQ, _down(top, ROWS))
        staging = r["p_s"].at[wg] if INTERPRETED else None
        dv = _add_product(dv, p_KQ.astype(q.dtype), do_s, staging)
        if not together:
          (dp_KQ,) = _products((v_s, do_s))
        delta = plgpu.load(r["statistics_s"].at[slot, 1], layout=_PER_COLUMN)
        ds_KQ = p_KQ * (dp_KQ - _down(delta, ROWS))
        if plan.scale != 1.0:
          ds_KQ = ds_KQ * plan.scale
        dk = _add_product(dk, ds_KQ.astype(q.dtype), q_s, staging)
        plgpu.barrier_arrive(r["q_free"].at[slot])
        return dk, dv

      carry = _zeros(ROWS, dim), _zeros(ROWS, dim)
      start = 0
      if plan.biased:
        start = span.near_count * parts
        carry = lax.fori_loop(0, start, functools.partial(step, True), carry)
      dk, dv = lax.fori_loop(
        start, total, functools.partial(step, False), carry
      )
      k_s[...] = dk.astype(k.dtype)
      v_s[...] = dv.astype(k.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(k_s, r["dk"].at[b, rows, h])
      plgpu.copy_smem_to_gmem(v_s, r["dv"].at[b, rows, h])
      plgpu.wait_smem_to_gmem(0)

    def load():
      def fetch(t, slot):
        *_, rows = span.part(t, parts)
        ready = r["q_ready"].at[slot]
        for name in ("q", "do"):
          plgpu.copy_gmem_to_smem(
            r[name].at[b, rows, h], r[f"{name}_s"].at[slot], ready
          )
        plgpu.copy_gmem_to_smem(
          r["statistics"].at[b, h, :, rows], r["statistics_s"].at[slot], ready
        )

      _ring(total, fetch, r["q_free"])

    _by_role(compute, load)

  matrix = _shared(q.dtype)
  out = _call(
    "flash_attention_dkv",
    kernel,
    {"heads": heads, "keys": keys // BLOCK, "batch": batch},
    operands,
    {
      "dk": jax.ShapeDtypeStruct(k.shape, k.dtype),
      "dv": jax.ShapeDtypeStruct(k.shape, k.dtype),
    },
    {
      "k_s": matrix(WARPGROUPS, ROWS, dim),
      "v_s": matrix(WARPGROUPS, ROWS, dim),
      "q_s": matrix(STAGES, part, dim),
      "do_s": matrix(STAGES, part, dim),
      "statistics_s": plgpu.SMEM((STAGES, 2, part), jnp.float32),
      "p_s": matrix(WARPGROUPS, ROWS, part) if INTERPRETED else None,
      "rows_ready": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
      "q_ready": _arrivals(3),
      "q_free": _arrivals(WARPGROUPS),
    },
  )
  return out["dk"], out["dv"]


def _dtiles(operands, plan, splits):
  """float32 (H, near, splits, bq, bk): dS of the near tiles, summed.

  One program a head, near tile and split of the (batch, query block) pairs: it
  recomputes their dS and keeps the sum in registers. No atomics.
  """
  q, k = operands["q"], operands["k"]
  batch, queries, heads, dim = q.shape
  nq, nk = queries // BLOCK, k.shape[1] // BLOCK
  parts = tiling.mosaic_parts(dim).dbias
  part = BLOCK // parts

  def kernel(r):
    h, n, split = (lax.axis_index(a) for a in ("heads", "tiles", "splits"))
    n, within = n // parts, lax.rem(n, parts) * part
    pairs, place = pairs_of_tile(n, r["shift"][0], plan, batch, nq, nk)
    share = (pairs + splits - 1) // splits
    start = split * share
    total = jnp.clip(pairs - start, 0, share)

    def compute(wg):
      mine = pl.ds(wg * ROWS, ROWS)

      def step(t, dtile):
        slot = _slot(t)
        b, i, j = place(start + t)
        rows = pl.ds(i * BLOCK + wg * ROWS, ROWS)
        columns = pl.ds(j * BLOCK + within, part)
        lse = _read(r["statistics"].at[b, h, 0, rows], _PER_ROW)
        delta = _read(r["statistics"].at[b, h, 1, rows], _PER_ROW)
        plgpu.barrier_wait(r["ready"].at[slot])
        s, dp = _products(
          (r["q_s"].at[slot, mine], r["k_s"].at[slot]),
          (r["do_s"].at[slot, mine], r["v_s"].at[slot]),
        )
        plgpu.barrier_arrive(r["free"].at[slot])
        if plan.masked:
          q_ids, kv_ids = r["q_ids"].at[b, rows], r["kv_ids"].at[b, columns]
          s = _masked(s, r, b, i, j, q_ids, kv_ids)
        # Read again a step: kept in registers, it would make others spill.
        tile = _read(r["tiles"].at[h, n, mine, pl.ds(within, part)], _TILE)
        s = _scaled(s, plan) + tile
        p = _exp(s, _across(lse, part))
        return dtile + p * (dp - _across(delta, part))

      r["dtiles"][h, n, split, mine, pl.ds(within, part)] = lax.fori_loop(
        0, total, step, _zeros(ROWS, part)
      )

    def load():
      def fetch(t, slot):
        b, i, j = place(start + t)
        rows = pl.ds(i * BLOCK, BLOCK)
        columns = pl.ds(j * BLOCK + within, part)
        for name, span in (
          ("q", rows),
          ("k", columns),
          ("do", rows),
          ("v", columns),
        ):
          plgpu.copy_gmem_to_smem(
            r[name].at[b, span, h], r[f"{name}_s"].at[slot], r["ready"].at[slot]
          )

      _ring(total, fetch, r["free"])

    _by_role(compute, load)

  matrix = _shared(q.dtype)
  out = _call(
    "flash_attention_dbias",
    kernel,
    {"heads": heads, "tiles": plan.near * parts, "splits": splits},
    operands,
    {
      "dtiles": jax.ShapeDtypeStruct(
        (heads, plan.near, splits, BLOCK, BLOCK), jnp.float32
      )
    },
    {
      **{f"{x}_s": matrix(STAGES, BLOCK, dim) for x in ("q", "do")},
      **{f"{x}_s": matrix(STAGES, part, dim) for x in ("k", "v")},
      "ready": _arrivals(4),
      "free": _arrivals(WARPGROUPS),
    },
  )
  return out["dtiles"]


def _backward(x: Operands, y: Cotangents, *, plan, need_dbias):
  batch, queries, heads, _ = x.q.shape
  nq, nk = queries // plan.bq, x.k.shape[1] // plan.bk
  shared = {
    "q": x.q,
    "k": x.k,
    "v": x.v,
    "do": y.do,
    "statistics": jnp.stack([y.lse, y.delta], axis=2),
    "shift": x.shift[None],
    **id_operands(x.segments),
  }
  spans = lambda make: make(plan, x.segments, x.shift, batch, nq, nk)
  by_query = {
    **shared,
    **bias_operands(x.bias, plan),
    "spans": spans(key_spans),
    "k_mean": y.k_mean,
  }
  by_key = {
    **shared,
    **bias_operands(x.bias, plan, transposed=True),
    "spans": spans(query_spans),
  }
  dq, far_BHSQ = _dq(by_query, plan, need_dbias)
  dk, dv = _dkv(by_key, plan)
  if not need_dbias:
    return dq, dk, dv, None
  splits = dbias_splits(heads, plan, batch * nq)
  dtiles = _dtiles(by_query, plan, splits)
  return dq, dk, dv, bias_gradient(dtiles, far_BHSQ)


_KERNELS = blocked.Kernels(_forward, _backward)


def unsupported(q_BQHD, k_BKHD, bias) -> str | None:
  """Why these arguments cannot run here, or None."""
  kind = tiling.device_kind()
  if not tiling.chip_is("NVIDIA"):
    return f"it runs on NVIDIA GPUs, this is {kind}"
  reason = blocked.unsupported(q_BQHD, bias)
  if reason:
    return reason
  if kind.startswith("NVIDIA") and not tiling.is_hopper():
    return f"its wgmma instructions are Hopper's, this is {kind}; use 'triton'"
  if q_BQHD.dtype not in (jnp.bfloat16, jnp.float16):
    return (
      f"wgmma multiplies 16-bit floats, the inputs are {q_BQHD.dtype}; use "
      "'triton' or 'chunked'"
    )
  if {q_BQHD.dtype, k_BKHD.dtype} != {q_BQHD.dtype}:
    return f"queries are {q_BQHD.dtype}, keys {k_BKHD.dtype}"
  if q_BQHD.shape[3] > 128:
    return "head dimensions above 128 leave no registers; use 'triton'"
  if bias is not None and bias.slopes_H2 is not None:
    return "ALiBi is not constant far away; use 'chunked'"
  return None


def attention(q_BQHD, k_BKHD, *operands, **settings) -> jax.Array:
  """Same function as reference.attention, on Hopper."""
  return blocked.attention(
    _KERNELS,
    q_BQHD,
    k_BKHD,
    *operands,
    **settings,
    bq=BLOCK,
    bk=BLOCK,
    head_dim=-(-q_BQHD.shape[3] // 64) * 64,
  )
