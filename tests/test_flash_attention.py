"""Every implementation of attention equals its definition."""

import contextlib
import functools
import os
import re
import subprocess
import sys
import types

from attention_suite import (
  CASES,
  Case,
  check,
  gradients,
  kernel_attention,
  make_inputs,
  supported,
)
from conftest import with_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  Alibi,
  DistanceVector,
  FullBias,
  RelativeBuckets,
  flash_attention,
)
from pallas_kernels.flash_attention import (
  blocked,
  chunked,
  positions,
  relative_bias,
  tiling,
)


@contextlib.contextmanager
def tpu_interpreter():
  """Runs TPU kernels here; memory nobody wrote is NaN, and races fail."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  from jax.experimental.pallas import tpu as pltpu

  parameters = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan"
  )
  with pltpu.force_tpu_interpret_mode(parameters):
    yield
  assert not interpret_pallas_call.races.races_found


@contextlib.contextmanager
def gpu_interpreter():
  """Runs Mosaic GPU kernels here; races fail."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
  import jax.experimental.pallas.mosaic_gpu as plgpu

  from pallas_kernels.flash_attention import mosaic

  parameters = plgpu.InterpretGPUParams(detect_races=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mosaic, "CONFIG", mosaic.Config(interpreted=True))
    with plgpu.force_gpu_interpret_mode(parameters):
      yield
  assert not interpret_pallas_call.get_races().races_found


@contextlib.contextmanager
def triton_interpreter():
  from pallas_kernels.flash_attention import gpu_triton

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gpu_triton, "INTERPRETED", True)
    yield


OLD_JAX = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)
CONTEXTS = {
  "reference": contextlib.nullcontext,
  "chunked": contextlib.nullcontext,
  "mosaic_tpu": tpu_interpreter,
  "triton": triton_interpreter,
}
if not OLD_JAX:
  # test_compiled_kernels.py runs these where jax is new enough, in two halves.
  CONTEXTS["mosaic_gpu"] = gpu_interpreter
if jax.default_backend() != "cpu":
  # On a chip (JAX_PLATFORMS=cuda or tpu) its kernels run as they are.
  on_chip = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}
  CONTEXTS = dict.fromkeys(
    ("reference", "chunked", *on_chip[jax.default_backend()]),
    contextlib.nullcontext,
  )
# All implementations of a case by one worker, which computes its oracle once.
SUITE = [
  pytest.param(i, name, marks=pytest.mark.xdist_group(name))
  for name in CASES
  for i in CONTEXTS
]
if half := os.environ.get("FAT5_JAX_HALF"):
  SUITE = [x for x in SUITE if x.values[0] == "mosaic_gpu"][int(half) :: 2]


TPU_CHIPS = dict(tiling._TPU)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks that short inputs meet several of, with odd ends."""
  # Kernels that another test has traced with its own.
  blocked._run.clear_cache()
  monkeypatch.setattr(chunked, "BLOCK", 128)
  # Interpreters stand in for the chips.
  monkeypatch.setattr(tiling, "chip_is", lambda maker: True)
  small = tiling.TpuBlocks(vmem=2**24, best=256, most=256, wide=128)
  monkeypatch.setattr(tiling, "_TPU", {"TPU v4": small})


@pytest.mark.parametrize("implementation,name", SUITE)
def test_equals_the_definition(implementation, name):
  case = supported(implementation, CASES[name])
  if case is None:
    # It must say so, not compute something else.
    with pytest.raises(NotImplementedError, match=f"'{implementation}' cannot"):
      check(implementation, CASES[name])
    return
  with CONTEXTS[implementation]():
    check(implementation, case)


@pytest.mark.parametrize("implementation", CONTEXTS)
def test_two_runs_are_bitwise_equal(implementation):
  case = Case(200, 260, batch=2, segments="packed")
  run = lambda: gradients(kernel_attention(case, implementation), case)
  with CONTEXTS[implementation]():
    for once, again in zip(run(), run()):
      assert np.array_equal(once, again)


@pytest.mark.skipif("mosaic_tpu" not in CONTEXTS, reason="no TPU")
def test_queries_beyond_vmem_are_taken_in_chunks(monkeypatch):
  monkeypatch.setattr(tiling, "tpu_query_chunk", lambda width: 256)
  with CONTEXTS["mosaic_tpu"]():
    check("mosaic_tpu", Case(600, 300, batch=2, segments="packed"))
    check("mosaic_tpu", Case(700, 700, heads=1, causal=True))


@pytest.mark.skipif("mosaic_tpu" not in CONTEXTS, reason="no TPU")
def test_lists_of_visits_beyond_scalar_memory_are_taken_in_chunks(monkeypatch):
  # Batch rows x query blocks x key blocks are 12.
  monkeypatch.setattr(tiling, "tpu_visits", lambda: 4)
  with CONTEXTS["mosaic_tpu"]():
    check("mosaic_tpu", Case(600, 300, batch=2, segments="packed"))


@pytest.mark.skipif("triton" not in CONTEXTS, reason="no Triton")
def test_layers_of_one_shape_share_one_kernel():
  """An unrolled model of 12 layers has 36 attentions and compiles 3."""
  case = Case(130, 130)
  (q, k, v, table), _, _ = make_inputs(case)
  attend = kernel_attention(case, "triton")

  def layers(q, k, v):
    for _ in range(3):
      q = attend(q, k, v, table, None, None, 0)
    return q.astype(jnp.float32).sum()

  with CONTEXTS["triton"]():
    text = jax.jit(jax.grad(layers)).lower(q, k, v).as_text()
  assert len(re.findall(r"func private @_run", text)) == 2  # And its gradient.
  assert len(re.findall(r"call @_run", text)) == 6


def outer_equations(jaxpr):
  """Of a jaxpr and those it calls, kernels left out."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("pallas_call", "core_map", "mpmd_map"):
      continue
    yield eqn
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from outer_equations(inner)


@pytest.mark.parametrize(
  "implementation",
  [x for x in ("triton", "mosaic_tpu", "mosaic_gpu") if x in CONTEXTS],
)
def test_the_forward_pass_takes_queries_keys_and_values_as_they_are(
  implementation,
):
  # Padding is emptied where it would hurt, not by a pass over each array.
  x = jnp.zeros((2, 512, 2, 64), jnp.bfloat16)
  ids = jnp.ones((2, 512), jnp.int32)
  attend = functools.partial(flash_attention, implementation=implementation)
  jaxpr = jax.make_jaxpr(
    lambda q, k, v: attend(q, k, v, q_segment_ids=ids, kv_segment_ids=ids)
  )(x, x, x)
  names = {
    eqn.primitive.name
    for eqn in outer_equations(jaxpr.jaxpr)
    if any(v.aval.size >= x.size for v in eqn.outvars)
  }
  moves = {"reshape", "custom_vjp_call", "jit", "custom_vmap_call"}
  assert names <= moves, names


def small_inputs(queries=40, keys=40, heads=2, dim=16):
  rng = np.random.default_rng(0)
  shapes = [(2, n, heads, dim) for n in (queries, keys, keys)]
  arrays = [jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in shapes]
  return *arrays, jnp.asarray(rng.normal(size=(heads, 32)), jnp.float32)


def test_decoding_one_query_at_an_offset_equals_the_whole():
  q, k, v, table = small_inputs()
  attend = functools.partial(
    flash_attention,
    position=RelativeBuckets(table, bidirectional=False),
    causal=True,
  )
  whole = attend(q, k, v)
  step = jax.jit(lambda q, i: attend(q, k, v, q_offset=i))
  for i in (0, 15, 16, 39):
    one = step(q[:, i : i + 1], i)
    np.testing.assert_allclose(one, whole[:, i : i + 1], rtol=2e-5, atol=2e-6)


def test_decoding_against_a_long_cache_has_no_loop():
  q, k, v, table = small_inputs(1, 16_000)
  position = RelativeBuckets(table, bidirectional=False)
  step = jax.jit(
    lambda q, i: flash_attention(
      q, k, v, position=position, causal=True, q_offset=i
    )
  )
  assert "while" not in step.lower(q, 9_000).as_text()


@pytest.mark.parametrize(
  "implementation",
  [x for x in ("chunked", "triton", "mosaic_tpu") if x in CONTEXTS],
)
def test_vmap_and_remat(implementation):
  q, k, v, table = small_inputs()

  def loss(q, k, v, table):
    position = RelativeBuckets(table, bidirectional=True)
    o = flash_attention(
      q, k, v, position=position, implementation=implementation
    )
    return jnp.sum(o**2)

  many = lambda x: jnp.stack([x, 2 * x, -x])
  arrays = [many(q), many(k), many(v), many(table)]
  grad = lambda f: jax.grad(f, argnums=(0, 1, 2, 3))
  # The TPU interpreter's callbacks may not stand inside a checkpoint.
  remat = loss if implementation == "mosaic_tpu" else jax.checkpoint(loss)
  with CONTEXTS[implementation]():
    found = jax.jit(jax.vmap(grad(remat)))(*arrays)
    one = jax.jit(grad(loss))
    expected = [one(*(x[n] for x in arrays)) for n in range(3)]
  for f, *e in zip(found, *expected):
    e = jnp.stack(e)
    assert jnp.linalg.norm(f - e) <= 1e-5 * jnp.linalg.norm(e)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from pallas_kernels import RelativeBuckets, flash_attention

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
array = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
arrays = [array(4, 60, 2, 16) for _ in range(3)] + [array(2, 32)]
ids = jnp.asarray(rng.integers(0, 3, (4, 60)))

def attend(q, k, v, table, ids):
  return flash_attention(
    q, k, v, position=RelativeBuckets(table, bidirectional=True),
    q_segment_ids=ids, kv_segment_ids=ids, implementation="chunked",
  )

def gradients(f):
  loss = lambda *x: jnp.sum(f(*x, ids) ** 2)
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

rows = P("data")
for check in (True, False):
  sharded = jax.shard_map(
    attend, mesh=mesh, in_specs=(rows, rows, rows, P(), rows), out_specs=rows,
    check_vma=check,
  )
  for a, b in zip(gradients(sharded), gradients(attend)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
"""


def test_under_shard_map_the_gradient_of_a_shared_table_is_summed():
  program = [sys.executable, "-c", SHARDED]
  subprocess.run(program, env=with_devices(2), check=True)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_full_bias_and_its_gradient(implementation):
  q, k, v, table = small_inputs(200, 150)
  position = RelativeBuckets(table, bidirectional=True)
  vector_HR = position.lowered().vector_HR
  dense = lambda vector_HR: relative_bias.toeplitz(
    positions.DistanceVector(vector_HR).lowered().window(-199, 349), 200, 150
  )[None]

  def loss(make, parameters, implementation):
    o = flash_attention(
      q, k, v, position=make(parameters), implementation=implementation
    )
    return jnp.sum(o**2)

  expected = jax.grad(lambda x: loss(DistanceVector, x, "reference"))(vector_HR)
  full = jax.grad(
    lambda x: loss(lambda y: FullBias(dense(y)), x, implementation)
  )(vector_HR)
  np.testing.assert_allclose(full, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sort", ["buckets", "a bias a row", "one for all"])
def test_row_by_row_is_all_rows_at_once(monkeypatch, sort):
  """A CPU takes a batch that does not fit its cache one row at a time."""
  monkeypatch.setattr(tiling, "chip_is", lambda maker: False)
  q, k, v, table = small_inputs(200, 150)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 200)))
  make, parameter = FullBias, jnp.ones((1 + (sort == "a bias a row"), 2, 1, 1))
  parameter = parameter * jnp.arange(200.0)[:, None] * jnp.ones(150) / 100
  if sort == "buckets":
    make, parameter = (
      functools.partial(RelativeBuckets, bidirectional=True),
      table,
    )

  def loss(q, k, v, parameter):
    o = flash_attention(
      q,
      k,
      v,
      position=make(parameter),
      q_segment_ids=ids,
      kv_segment_ids=ids[:, :150],
      implementation="chunked",
    )
    return jnp.sum(o**2)

  def run(cache_bytes):
    monkeypatch.setattr(chunked, "_CACHE_BYTES", cache_bytes)
    return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, parameter)

  for found, expected in zip(run(1), run(2**40)):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_a_bias_that_is_not_differentiated_costs_no_gradient():
  (q, k, v, table), seen = small_inputs(), []
  kernels = blocked.Kernels(
    lambda x, **_: (x.q, None, jnp.zeros((2, 2, 40))),
    lambda x, _, *, need_dbias, plan: (
      (seen.append(need_dbias), (x.q, x.k, x.v, x.bias))[1]
    ),
  )

  def loss(q, table, stop):
    bias = RelativeBuckets(table, bidirectional=True).lowered()
    bias = jax.lax.stop_gradient(bias) if stop else bias
    plan = blocked.make_plan(
      bias,
      0,
      queries=40,
      keys=40,
      bq=40,
      bk=40,
      causal=False,
      masked=False,
      scale=1.0,
    )
    operands = (q, k, v, bias, None, jnp.int32(0))
    return blocked._attention(kernels, plan, *operands).sum()

  for stop in (True, False):
    jax.grad(functools.partial(loss, stop=stop), argnums=(0, 1))(q, table)
  assert seen == [False, True]


@pytest.mark.parametrize(
  "num_buckets,max_distance", [(32, 128), (32, 20), (8, 16), (6, 9), (64, 500)]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_transformers(num_buckets, max_distance, bidirectional):
  torch = pytest.importorskip("torch")
  from transformers.models.t5.modeling_t5 import T5Attention

  distance = np.arange(-4096, 4097)
  expected = T5Attention._relative_position_bucket(
    torch.tensor(distance), bidirectional, num_buckets, max_distance
  ).numpy()
  for buckets in (
    positions.distance_buckets(num_buckets, max_distance, bidirectional),
    positions.near_buckets(num_buckets, max_distance, bidirectional),
  ):
    radius = len(buckets) // 2
    found = buckets[np.clip(distance, -radius, radius) + radius]
    assert np.array_equal(found, expected)


def test_t5_buckets_saturate_before_max_distance():
  assert len(positions.near_buckets(32, 128, True)) == 2 * 91 + 1
  assert len(positions.near_buckets(32, 128, False)) == 2 * 113 + 1


def test_alibi_slopes_are_those_of_the_paper():
  np.testing.assert_allclose(Alibi.slopes(8), 2.0 ** -np.arange(1, 9))
  assert len(set(Alibi.slopes(12))) == 12
  # Each half of FAT5's asymmetric heads has those of as many heads.
  before, after = np.asarray(Alibi.of(16, "asymmetric").slopes_H2).T
  seen, hidden = 2.0 ** -np.arange(1, 9), [np.inf] * 8
  np.testing.assert_allclose(before, [*seen, *hidden])
  np.testing.assert_allclose(after, [*hidden, *seen])


def test_diagonal_sums_transpose_toeplitz():
  rng = np.random.default_rng(0)
  diagonals = jnp.asarray(rng.normal(size=(3, 7 + 5 - 1)), jnp.float32)
  tile = jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32)
  expanded = relative_bias.toeplitz(diagonals, 7, 5)
  for i in range(7):
    for j in range(5):
      assert np.array_equal(expanded[:, i, j], diagonals[:, j - i + 6])
  np.testing.assert_allclose(
    jnp.vdot(expanded, tile),
    jnp.vdot(diagonals, relative_bias.diagonal_sums(tile)),
    rtol=1e-5,
  )


def test_memory_is_linear_in_length():
  def temporary_bytes(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((2, 32), jnp.float32)

    def objective(q, k, v, t):
      position = RelativeBuckets(t, bidirectional=True)
      return flash_attention(q, k, v, position=position).sum()

    grad = jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3)))
    compiled = grad.lower(x, x, x, table).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  at_8k, at_16k = temporary_bytes(8192), temporary_bytes(16384)
  assert at_16k < 2.2 * at_8k


@pytest.mark.parametrize(
  "kind,queries,expected",
  [
    ("TPU v5 lite", 512, "mosaic_tpu"),
    ("NVIDIA H200", 512, "mosaic_gpu"),
    ("NVIDIA A100-SXM4-80GB", 512, "triton"),
    ("NVIDIA B200", 512, "triton"),
    ("NVIDIA H200", 1, "chunked"),
    ("NVIDIA H200", 2, "mosaic_gpu"),
    ("TPU v5 lite", 16, "chunked"),
    ("cpu", 512, "chunked"),
  ],
)
def test_each_chip_prefers_its_kernel(monkeypatch, kind, queries, expected):
  device = types.SimpleNamespace(device_kind=kind)
  monkeypatch.setattr(tiling, "_device", lambda: device)
  assert tiling.preferred(queries)[0] == expected


@pytest.mark.parametrize(
  "device,capability",
  [
    (dict(device_kind="NVIDIA L40S", compute_capability="8.9"), (8, 9)),
    # Compiling for a chip that is not here, its name is all there is.
    (dict(device_kind="NVIDIA L40S"), (8, 9)),
    (dict(device_kind="NVIDIA A10G"), (8, 6)),
    (dict(device_kind="NVIDIA A100-SXM4-40GB"), (8, 0)),
    (dict(device_kind="NVIDIA GeForce RTX 4090"), (8, 9)),
    (dict(device_kind="NVIDIA RTX A6000"), (8, 6)),
    (dict(device_kind="NVIDIA GH200 480GB"), (9, 0)),
    (dict(device_kind="NVIDIA Something New"), (0, 0)),
    # Not a Hopper, whatever it is called.
    (dict(device_kind="NVIDIA H100", compute_capability="12.0"), (12, 0)),
  ],
)
def test_a_gpu_is_known_by_its_compute_capability(
  monkeypatch, device, capability
):
  monkeypatch.setattr(
    tiling, "_device", lambda: types.SimpleNamespace(**device)
  )
  assert tiling.compute_capability() == capability
  assert tiling.is_hopper() == (capability == (9, 0))


def test_a_fallback_is_a_warning_with_its_reason(monkeypatch, caplog):
  device = types.SimpleNamespace(device_kind="TPU v4")
  monkeypatch.setattr(tiling, "_device", lambda: device)
  q, k, v, _ = small_inputs()
  with caplog.at_level("INFO", logger="pallas_kernels"):
    full = FullBias(jnp.zeros((1, 2, 40, 40)))
    flash_attention(q, k, v, position=full)
  [record] = caplog.records
  assert record.levelname == "WARNING"
  assert record.message.startswith("attention: chunked (not mosaic_tpu: ")
  assert "dense" in record.message


def test_none_leaves_to_xla_what_a_tpu_kernel_cannot_load(monkeypatch):
  from pallas_kernels.flash_attention import api

  device = types.SimpleNamespace(device_kind="TPU v5 lite")
  monkeypatch.setattr(tiling, "_device", lambda: device)
  like = lambda dtype: jax.ShapeDtypeStruct((1, 512, 2, 64), dtype)
  half, low, full = map(like, (jnp.float16, jnp.bfloat16, jnp.float32))
  for q, k, reason in (
    (half, half, "float16"),
    (low, full, "keys float32"),
    (full, low, "keys bfloat16"),
  ):
    name, [said] = api.best(q, k, None)
    assert name == "chunked" and reason in said
  assert api.best(low, low, None) == ("mosaic_tpu", [])


@pytest.mark.parametrize("kind", TPU_CHIPS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tpu_blocks_compute_little_that_nobody_needs(monkeypatch, kind, dim):
  """At most a fifth more pairs than the lengths have in whole lanes of 128."""
  monkeypatch.setattr(tiling, "_TPU", TPU_CHIPS)
  device = types.SimpleNamespace(device_kind=kind)
  monkeypatch.setattr(tiling, "_device", lambda: device)
  whole = lambda length, block: -(-length // block) * block
  for queries in range(512, 4097, 64):
    for keys in (queries, 640, 1920):
      bq, bk = tiling.tpu_blocks(queries, keys, dim, 91, 1 + (dim == 64))
      padded = whole(queries, bq) * whole(keys, bk)
      assert 5 * padded <= 6 * whole(queries, 128) * whole(keys, 128)


def packed_ids(rng, batch, length, document):
  """(B, L) ids of documents of about that length, the end of a row padding."""
  ids = np.zeros((batch, length), np.int32)
  for row in ids:
    sizes = rng.integers(document // 2, document * 3 // 2, length)
    ends = np.cumsum(sizes)
    row[:] = 1 + np.searchsorted(ends, np.arange(length), side="right")
    row[ends[ends < length][-1] :] = 0
  return ids


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bq,bk", [(512, 512), (1024, 1024), (512, 256)])
def test_packed_rows_visit_only_tiles_that_hold_a_visible_pair(causal, bq, bk):
  from pallas_kernels.flash_attention import gpu_common
  from pallas_kernels.flash_attention.tpu import visits

  batch, length = 2, 32768
  ids = packed_ids(np.random.default_rng(0), batch, length, 512)
  bias = RelativeBuckets(jnp.zeros((2, 32)), bidirectional=not causal).lowered()
  plan = blocked.make_plan(
    bias,
    0,
    queries=length,
    keys=length,
    bq=bq,
    bk=bk,
    causal=causal,
    masked=True,
    scale=1.0,
  )
  nq, nk = length // bq, length // bk
  expected = set()
  for b in range(batch):
    starts = np.flatnonzero(np.diff(ids[b], prepend=0, append=0))
    for start, end in zip(starts, starts[1:]):
      if ids[b, start] == 0:
        continue
      for i in range(start // bq, (end - 1) // bq + 1):
        for j in range(start // bk, (end - 1) // bk + 1):
          # Keys and queries of this document in the tile, first and last.
          first_key = max(start, j * bk)
          last_query = min(end, (i + 1) * bq) - 1
          if not causal or first_key <= last_query:
            expected.add((b, i, j))
  segments = blocked.make_segments(jnp.asarray(ids), jnp.asarray(ids), plan)
  shift = jnp.int32(0)
  for keys_stay in (False, True):
    found = visits.make_visits(
      plan, segments, shift, batch, nq, nk, keys_stay=keys_stay
    )
    count = int(found.count)
    places = found.numbering.unpack(np.asarray(found.entries_N)[1 : count + 1])
    b, i, j = (places[0], places[2], places[1]) if keys_stay else places
    visited = set(zip(b.tolist(), i.tolist(), j.tolist()))
    assert len(visited) == count and expected <= visited
    # What is more are visits of rows that hold padding alone.
    assert count <= 1.3 * len(expected)
    assert count - len(expected) <= batch * max(nq, nk) // 8
    assert np.asarray(found.entries_N)[count + 1] == np.iinfo(np.int32).max
  if bq == bk:
    for spans in (gpu_common.key_spans, gpu_common.query_spans):
      count = int(spans(plan, segments, shift, batch, nq, nk)[..., 3].sum())
      assert len(expected) <= count <= 1.3 * len(expected)


def test_a_named_implementation_that_cannot_run_says_why():
  q, k, v, table = small_inputs()
  reason = "jax 0.11" if OLD_JAX else "16-bit floats"
  with pytest.raises(NotImplementedError, match=reason):
    flash_attention(q, k, v, implementation="mosaic_gpu")
  with pytest.raises(NotImplementedError, match="reference, chunked"):
    flash_attention(q, k, v, implementation="cuda")
  full = FullBias(jnp.zeros((1, 2, 40, 40)))
  with pytest.raises(NotImplementedError, match="'mosaic_tpu' .*dense"):
    flash_attention(q, k, v, position=full, implementation="mosaic_tpu")


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "triton"])
def test_a_kernel_for_another_chip_says_so(monkeypatch, implementation):
  monkeypatch.setattr(tiling, "chip_is", lambda maker: False)
  q, k, v, _ = small_inputs()
  with pytest.raises(NotImplementedError, match=r"runs on .*, this is"):
    flash_attention(q, k, v, implementation=implementation)


@pytest.mark.parametrize("shape", ["batch", "queries", "keys"])
@pytest.mark.parametrize("implementation", [None, *CONTEXTS])
def test_an_empty_axis_gives_zeros(implementation, shape):
  q, k, v, table = small_inputs()
  q, k, v = {
    "batch": (q[:0], k[:0], v[:0]),
    "queries": (q[:, :0], k, v),
    "keys": (q, k[:, :0], v[:, :0]),
  }[shape]

  def loss(q, k, v, table):
    position = RelativeBuckets(table, bidirectional=True)
    o = flash_attention(
      q, k, v, position=position, implementation=implementation
    )
    return o.sum(), o

  grad = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
  gradients, o = grad(q, k, v, table)
  assert o.shape == q.shape and not o.any()
  for x, dx in zip((q, k, v, table), gradients):
    assert dx.shape == x.shape and not dx.any()


@pytest.mark.parametrize("implementation", [None, *CONTEXTS])
@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_an_error(implementation, scale):
  q, k, v, _ = small_inputs()
  with pytest.raises(ValueError, match="scale"):
    flash_attention(q, k, v, scale=scale, implementation=implementation)


def test_shapes_that_do_not_fit_name_the_argument():
  q, k, v, table = small_inputs()
  with pytest.raises(ValueError, match="v_BKHD"):
    flash_attention(q, k, v[:, :5])
  with pytest.raises(ValueError, match="kv_segment_ids"):
    flash_attention(q, k, v, kv_segment_ids=jnp.ones((2, 4), jnp.int32))
  with pytest.raises(ValueError, match="max_distance"):
    position = RelativeBuckets(table, bidirectional=False, max_distance=4)
    flash_attention(q, k, v, position=position)
  with pytest.raises(ValueError, match="bias_BHQK"):
    flash_attention(q, k, v, position=FullBias(jnp.zeros((1, 2, 40, 4))))
  with pytest.raises(ValueError, match="odd"):
    flash_attention(q, k, v, position=DistanceVector(jnp.zeros((2, 8))))


@pytest.mark.parametrize(
  "name,wrong",
  [
    ("scale", dict(scale=0.0)),
    ("scale", dict(scale=float("inf"))),
    ("scale", dict(scale=None)),
    ("q_offset", dict(q_offset=2.5)),
    ("q_offset", dict(q_offset=None)),
    ("q_offset", dict(q_offset=2**31)),
    ("q_offset", dict(q_offset=jnp.zeros(2, jnp.int32))),
    ("position", dict(position=jnp.zeros((2, 32)))),
    ("RelativeBuckets", dict(position=RelativeBuckets(jnp.zeros(32), True))),
    ("Alibi", dict(position=Alibi(jnp.zeros(2)))),
    ("DistanceVector", dict(position=DistanceVector([[0.0], [0.0]]))),
    ("q_segment_ids", dict(q_segment_ids=np.full((2, 40), 0.5))),
    ("q_segment_ids", dict(q_segment_ids=np.full((2, 40), 2**32))),
    ("kv_segment_ids", dict(kv_segment_ids=[[1] * 4] * 2)),
  ],
)
def test_a_wrong_argument_is_named(name, wrong):
  q, k, v, _ = small_inputs()
  with pytest.raises(ValueError, match=f"flash_attention: {name}"):
    flash_attention(q, k, v, **wrong)


def test_wrong_arrays_are_named():
  q, k, v, _ = small_inputs()
  with pytest.raises(ValueError, match="q_BQHD is int32"):
    flash_attention(q.astype(jnp.int32), k, v)
  with pytest.raises(ValueError, match="v_BKHD is bfloat16, k_BKHD float32"):
    flash_attention(q, k, v.astype(jnp.bfloat16))
  with pytest.raises(ValueError, match="k_BKHD"):
    flash_attention(q, k[:, :, :0], v[:, :, :0])
  assert flash_attention(*(x[:, :, :0] for x in (q, k, v))).size == 0
  with pytest.raises(NotImplementedError, match="does not exist"):
    flash_attention(q[:, :0], k, v, implementation="cuda")


@pytest.mark.parametrize("implementation", CONTEXTS)
def test_ids_at_the_ends_of_32_bits_are_ids(implementation):
  rng = np.random.default_rng(0)
  q, k, v, _ = small_inputs(160, 300, dim=64)
  q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
  least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
  q_ids = rng.choice([least, 7, most], (2, 160)).astype(np.int32)
  kv_ids = rng.choice([least, 7, most], (2, 300)).astype(np.int32)
  q_ids[0], kv_ids[0, ::2] = least + 1, least + 1
  # The least three are one.
  small = lambda ids: np.where(ids < 0, 1, np.where(ids == 7, 2, 3))

  # Jitted: on two cores an operation of its own, dispatched while a callback of
  # the TPU's interpreter computes, can wait for it forever.
  @jax.jit
  def gradients(q_ids, kv_ids):
    attend = lambda *x: flash_attention(
      *x,
      q_segment_ids=q_ids,
      kv_segment_ids=kv_ids,
      implementation=implementation,
    )
    return jax.vjp(attend, q, k, v)[1](q)

  with CONTEXTS[implementation]():
    found = gradients(q_ids, kv_ids)
    expected = gradients(small(q_ids), small(kv_ids))
  for f, e in zip(found, expected):
    assert np.array_equal(f, e) and np.asarray(e, np.float32).any()


def test_small_gradients_survive_float16():
  q, k, v, _ = (x.astype(jnp.float16) for x in small_inputs(512, 512, dim=64))
  do = q * jnp.float16(1e-3)

  def gradients(*inputs):
    attend = functools.partial(flash_attention, implementation="chunked")
    return jax.vjp(attend, *inputs[:3])[1](inputs[3])

  found = gradients(q, k, v, do)
  expected = gradients(*(x.astype(jnp.float32) for x in (q, k, v, do)))
  for f, e in zip(found, expected):
    error = jnp.linalg.norm(f.astype(jnp.float32) - e)
    assert error <= 3e-3 * jnp.linalg.norm(e)
