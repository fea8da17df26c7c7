"""Every implementation equals the dense float32 specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import RelativeBuckets, flash_attention
from pallas_kernels.flash_attention import api, chunked, relative_bias


def make_inputs(
  queries, keys, *, heads=4, kv_heads=2, dim=16, dtype=jnp.float32
):
  rng = np.random.default_rng(queries * 1000 + keys)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  q, k, v = (
    array(2, queries, heads, dim),
    array(2, keys, kv_heads, dim),
    array(2, keys, kv_heads, dim),
  )
  table = jnp.asarray(rng.normal(size=(heads, 8)), jnp.float32)
  do = array(2, queries, heads, dim)
  q_seg = jnp.asarray(np.sort(rng.integers(0, 3, (2, queries)))[:, ::-1])
  kv_seg = jnp.asarray(np.sort(rng.integers(0, 3, (2, keys)))[:, ::-1])
  return (q, k, v, table), do, (q_seg, kv_seg)


def gradients(implementation, arrays, do, segments, *, causal, q_offset=0):
  def objective(q, k, v, table):
    o = flash_attention(
      q,
      k,
      v,
      position=RelativeBuckets(
        table, bidirectional=not causal, max_distance=20
      ),
      causal=causal,
      q_segment_ids=None if segments is None else segments[0],
      kv_segment_ids=None if segments is None else segments[1],
      q_offset=q_offset,
      implementation=implementation,
    )
    return jnp.sum((do * o).astype(jnp.float32)), o

  grad = jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3), has_aux=True))
  grads, o = grad(*arrays)
  return [o, *grads]


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 16, so that short inputs meet several blocks and odd ends."""
  monkeypatch.setitem(
    api._IMPLEMENTATIONS,
    "chunked",
    functools.partial(chunked.attention, block=16),
  )


def relative_error(found, expected):
  found, expected = (np.asarray(x, np.float64) for x in (found, expected))
  # A gradient may be exactly zero (one visible key); inputs are of size one.
  floor = 1e-2 * np.sqrt(expected.size)
  return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), floor)


@pytest.mark.parametrize(
  "queries,keys", [(1, 45), (16, 16), (37, 45), (63, 16)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_reference(small_blocks, queries, keys, causal, packed):
  arrays, do, segments = make_inputs(queries, keys)
  segments = segments if packed else None
  expected = gradients("reference", arrays, do, segments, causal=causal)
  found = gradients("chunked", arrays, do, segments, causal=causal)
  for name, f, e in zip(("o", "dq", "dk", "dv", "dtable"), found, expected):
    assert relative_error(f, e) < 3e-5, name


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_error_is_that_of_the_naive_version(small_blocks, packed):
  arrays, do, segments = make_inputs(63, 45)
  segments = segments if packed else None
  expected = gradients("reference", arrays, do, segments, causal=False)
  low = tuple(x.astype(jnp.bfloat16) for x in arrays[:3]) + arrays[3:]
  low_do = do.astype(jnp.bfloat16)
  found = gradients("chunked", low, low_do, segments, causal=False)
  naive = gradients("reference", low, low_do, segments, causal=False)
  for name, f, n, e in zip("o dq dk dv dtable".split(), found, naive, expected):
    assert relative_error(f, e) <= 2 * relative_error(n, e), name


def test_decoding_one_query_at_an_offset(small_blocks):
  (q, k, v, table), do, _ = make_inputs(37, 37)
  position = RelativeBuckets(table, bidirectional=False, max_distance=20)
  whole = flash_attention(q, k, v, position=position, causal=True)
  step = jax.jit(
    lambda q, i: flash_attention(
      q, k, v, position=position, causal=True, q_offset=i
    )
  )
  for i in (0, 15, 16, 36):
    one = step(q[:, i : i + 1], i)
    np.testing.assert_allclose(one, whole[:, i : i + 1], rtol=2e-5, atol=2e-6)


def test_fully_masked_rows_give_zero_and_no_gradient(small_blocks):
  arrays, do, _ = make_inputs(20, 20)
  q_seg = jnp.ones((2, 20), jnp.int32).at[:, 5].set(0).at[:, 7].set(9)
  kv_seg = jnp.ones((2, 20), jnp.int32).at[0].set(0)
  for name in ("reference", "chunked"):
    o, dq, dk, dv, dtable = gradients(
      name, arrays, do, (q_seg, kv_seg), causal=False
    )
    for x in (o, dq, dk, dv, dtable):
      assert np.isfinite(x).all()
    assert not o[:, [5, 7]].any() and not dq[:, [5, 7]].any()
    assert not o[0].any() and not dk[0].any() and not dv[0].any()


def test_bucket_gradients_of_a_head_sum_to_zero(small_blocks):
  arrays, do, _ = make_inputs(37, 45)
  dtable = gradients("chunked", arrays, do, None, causal=False)[4]
  np.testing.assert_allclose(dtable.sum(axis=1), 0, atol=1e-5)


def test_two_runs_are_bitwise_equal(small_blocks):
  arrays, do, segments = make_inputs(37, 45)
  once = gradients("chunked", arrays, do, segments, causal=True)
  again = gradients("chunked", arrays, do, segments, causal=True)
  for a, b in zip(once, again):
    assert np.array_equal(a, b)


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
  buckets = relative_bias.distance_buckets(
    num_buckets, max_distance, bidirectional
  )
  found = buckets[np.clip(distance, -max_distance, max_distance) + max_distance]
  assert np.array_equal(found, expected)


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


def test_a_named_implementation_that_does_not_exist_raises():
  (q, k, v, _), _, _ = make_inputs(4, 4)
  with pytest.raises(NotImplementedError, match="reference, chunked"):
    flash_attention(q, k, v, implementation="cuda")


def test_shapes_that_do_not_fit_name_the_argument():
  (q, k, v, table), _, _ = make_inputs(4, 6)
  with pytest.raises(ValueError, match="v_BKHD"):
    flash_attention(q, k, v[:, :5])
  with pytest.raises(ValueError, match="kv_segment_ids"):
    flash_attention(q, k, v, kv_segment_ids=jnp.ones((2, 4), jnp.int32))
  with pytest.raises(ValueError, match="max_distance"):
    flash_attention(
      q,
      k,
      v,
      position=RelativeBuckets(table, bidirectional=False, max_distance=4),
    )
