"""The chunked loss is the loss of whole logits, and so are its gradients."""

import subprocess
import sys

from conftest import with_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fat5_jax.objectives import losses
from pallas_kernels import linear_cross_entropy


@pytest.fixture
def example():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 50, (37,)))
  weights = jnp.asarray(rng.integers(0, 3, (37,)) / 2, jnp.float32)
  return array(37, 16), array(16, 50), targets, weights


def whole(x, kernel, targets, weights, **options):
  logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
  loss, z = losses.cross_entropy(logits, targets, **options)
  correct = (logits.argmax(axis=-1) == targets) & (weights != 0)
  return (
    losses.weighted_sum(loss + z, weights),
    losses.weighted_sum(loss, weights),
    losses.weighted_sum(z, weights),
    losses.weighted_sum(loss, weights != 0),
    correct.sum(),
  )


@pytest.mark.parametrize("chunk", [8, 37, None])
@pytest.mark.parametrize("options", [{}, dict(z_loss=0.1, label_smoothing=0.2)])
def test_equals_the_loss_of_whole_logits(example, chunk, options):
  def objective(function, x, kernel):
    sums = function(x, kernel, *example[2:], **options)
    return sums[0], sums

  gradient = lambda f: jax.jit(
    jax.grad(lambda x, k: objective(f, x, k), argnums=(0, 1), has_aux=True)
  )(*example[:2])
  chunked = lambda *a, **o: linear_cross_entropy(*a, **o, chunk=chunk)
  (dx, dkernel), sums = gradient(chunked)
  (dx_whole, dkernel_whole), sums_whole = gradient(whole)
  np.testing.assert_allclose(jnp.stack(sums), jnp.stack(sums_whole), rtol=1e-5)
  np.testing.assert_allclose(dx, dx_whole, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(dkernel, dkernel_whole, rtol=1e-4, atol=1e-6)


def test_of_equal_greatest_logits_the_first_is_the_answer(example):
  """Small whole numbers: most rows have several."""
  x, kernel = (jnp.round(a) for a in example[:2])
  targets = (x @ kernel).argmax(axis=-1)
  equal = (x @ kernel == (x @ kernel).max(axis=-1, keepdims=True)).sum(axis=-1)
  assert (equal > 1).sum() > 5
  for moved in (targets, targets + 1, example[2]):
    arguments = (x, kernel, moved, example[3])
    found = linear_cross_entropy(*arguments, chunk=8).correct
    assert found == whole(*arguments)[4]


def test_bfloat16_error_is_that_of_the_naive_version(example):
  x, kernel, targets, weights = example

  def grads(function, dtype):
    loss = lambda x, k: function(x.astype(dtype), k.astype(dtype))
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)

  dense = lambda x, k: whole(x, k, targets, weights)[0]
  chunked = lambda x, k: linear_cross_entropy(
    x, k, targets, weights, chunk=8
  ).loss
  exact = grads(dense, jnp.float32)
  naive, found = grads(dense, jnp.bfloat16), grads(chunked, jnp.bfloat16)
  for f, n, e in zip(found, naive, exact):
    assert jnp.linalg.norm(f - e) <= 2 * jnp.linalg.norm(n - e)


def test_a_token_of_weight_zero_may_hold_anything(example):
  x, kernel, targets, weights = example
  poisoned = jnp.where((weights == 0)[:, None], jnp.nan, x)
  loss = lambda x, k: linear_cross_entropy(
    x, k, targets, weights, z_loss=1e-4
  ).loss
  expected = jax.grad(loss, argnums=(0, 1))(x, kernel)
  found = jax.grad(loss, argnums=(0, 1))(poisoned, kernel)
  for f, e in zip(found, expected):
    np.testing.assert_array_equal(f, e)


def test_shapes_that_do_not_fit_are_named(example):
  x, kernel, targets, _ = example
  with pytest.raises(ValueError, match=r"targets_N \(5,\)"):
    linear_cross_entropy(x, kernel, targets[:5])


def test_memory_is_that_of_a_chunk():
  struct = jax.ShapeDtypeStruct
  x, kernel = struct((4096, 64), jnp.bfloat16), struct((64, 32128), jnp.float32)
  targets = struct((4096,), jnp.int32)
  loss = lambda x, k, t: linear_cross_entropy(x, k, t, chunk=256).loss
  grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
  memory = grad.lower(x, kernel, targets).compile().memory_analysis()
  # Some chunks of logits and float32 kernels; whole logits alone are 526 MB.
  assert memory.temp_size_in_bytes < 8 * 256 * 32128 * 4


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from pallas_kernels import linear_cross_entropy

mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(37, 16)), jnp.float32)
kernel = jnp.asarray(rng.normal(size=(16, 50)), jnp.float32)
targets = jnp.asarray(rng.integers(0, 50, 37))
options = dict(z_loss=0.1, label_smoothing=0.2, chunk=8)
whole = lambda x, k: linear_cross_entropy(x, k, targets, **options)
grad = lambda f: jax.jit(
  jax.value_and_grad(lambda x, k: f(x, k).loss, argnums=(0, 1))
)(x, kernel)
for check in (True, False):
  sharded = jax.shard_map(
    lambda x, k: linear_cross_entropy(
      x, k, targets, vocab_axis="model", **options
    ),
    mesh=mesh,
    in_specs=(P(), P(None, "model")),
    out_specs=P(),
    check_vma=check,
  )
  for a, k in ((x, kernel), (jnp.round(x), jnp.round(kernel))):
    np.testing.assert_array_equal(
      jax.jit(sharded)(a, k).correct, whole(a, k).correct
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    grad(sharded), grad(whole),
  )
"""


def test_a_sharded_vocabulary_gives_the_same():
  program = [sys.executable, "-c", SHARDED]
  subprocess.run(program, env=with_devices(2), check=True)
