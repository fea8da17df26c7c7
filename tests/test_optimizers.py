"""Adafactor and the schedules mean what they mean in T5X."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fat5_jax import checkpoints, optimizers


def random_tree(seed, layers=3):
  rng = np.random.default_rng(seed)
  leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "embedding": leaf(150, 130),
    "encoder": {
      "norm": leaf(130),
      **{
        f"layers_{i}": {"wi": leaf(130, 140), "scale": leaf(130)}
        for i in range(layers)
      },
    },
  }


def run(optimizer, params, steps=4, scale=lambda i: 10.0 ** (i - 2)):
  state = optimizer.init(params)
  for i in range(steps):
    grads = jax.tree.map(lambda x, i=i: x * scale(i), random_tree(i + 10))
    if "layers" in params["encoder"]:
      grads = checkpoints.stack_layers(grads)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_adafactor_equals_optax_where_both_exist():
  expected, _ = run(optax.adafactor(0.01, decay_rate=0.8), random_tree(0))
  found, _ = run(optimizers.adafactor(0.01), random_tree(0))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_adafactor_keeps_rows_and_columns_only():
  state = optimizers.adafactor(0.01).init(random_tree(0))[0]
  slots = [
    s["embedding"].shape for s in (state.m, state.v_row, state.v_col, state.v)
  ]
  assert slots == [(1,), (130,), (150,), (1,)]
  assert state.v["encoder"]["norm"].shape == (130,)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_scanned_layers_train_as_a_loop_does(beta1):
  optimizer = optimizers.adafactor(0.01, beta1=beta1)
  looped, loop_state = run(optimizer, random_tree(0))
  scanned, scan_state = run(optimizer, checkpoints.stack_layers(random_tree(0)))
  for a, b in (
    (looped, checkpoints.unstack_layers(scanned)),
    (loop_state, checkpoints.unstack_layers(scan_state)),
  ):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [optimizers.adafactor, optimizers.adamw])
def test_global_norm_clipping_bounds_what_the_optimizer_sees(make):
  """One huge gradient cannot poison the second moments."""
  optimizer = make(0.01, global_norm_clip_threshold=1.0)
  params = random_tree(0)
  state = optimizer.init(params)
  huge = jax.tree.map(lambda x: 1e8 * jnp.ones_like(x), params)
  _, state = optimizer.update(huge, state, params)
  moments = [
    x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  assert max(float(jnp.max(x)) for x in moments) <= 1.0


def rate(step, **settings):
  return float(optimizers.create_learning_rate_scheduler(**settings)(step))


def test_schedules_by_hand():
  assert rate(7, factors="constant", base_learning_rate=0.001) == pytest.approx(
    0.001
  )
  warm = dict(factors="constant * linear_warmup", base_learning_rate=2.0)
  assert rate(50, warmup_steps=100, **warm) == pytest.approx(1.0)
  t5 = dict(
    factors="constant * rsqrt_decay", base_learning_rate=1.0, warmup_steps=10000
  )
  assert rate(5, **t5) == pytest.approx(0.01)
  assert rate(40000, **t5) == pytest.approx(0.005)
  norm = dict(
    factors="constant * rsqrt_normalized_decay",
    base_learning_rate=1.0,
    warmup_steps=100,
  )
  assert rate(100, **norm) == pytest.approx(1.0)
  assert rate(400, **norm) == pytest.approx(0.5)
  assert rate(
    45,
    factors="constant * decay_every",
    base_learning_rate=1.0,
    steps_per_decay=20,
    decay_factor=0.5,
  ) == pytest.approx(0.25)
  assert rate(
    150,
    factors="constant * cosine_decay",
    base_learning_rate=1.0,
    warmup_steps=100,
    steps_per_cycle=100,
  ) == pytest.approx(0.5)
  linear = dict(
    factors="linear_decay",
    base_learning_rate=1.0,
    warmup_steps=100,
    decay_factor=0.001,
  )
  assert rate(600, **linear) == pytest.approx(0.5)
  assert rate(5000, **linear) == pytest.approx(1e-8)
  assert rate(110, factors="constant", base_learning_rate=1.0, step_offset=100)


def test_an_unknown_factor_names_the_nearest():
  with pytest.raises(ValueError, match="linear_warmup"):
    optimizers.create_learning_rate_scheduler("constant * linear_warmupp")
