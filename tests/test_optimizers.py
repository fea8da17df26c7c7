"""Adafactor and the schedules mean what they mean in T5X."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_adafactor

from fat5_jax import optimizers, trees
from fat5_jax.errors import UserError
from fat5_jax.models import layer_stack

stack = jax.jit(layer_stack.stack)
unstack = jax.jit(layer_stack.unstack)


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
  update = jax.jit(optimizer.update)
  for i in range(steps):
    grads = jax.tree.map(lambda x, i=i: x * scale(i), random_tree(i + 10))
    if "layers" in params["encoder"]:
      grads = stack(grads)
    updates, state = update(grads, state, params)
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
  scanned, scan_state = run(optimizer, stack(random_tree(0)))
  for a, b in (
    (looped, unstack(scanned)),
    (loop_state, unstack(scan_state)),
  ):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


# ---- T5X's equations, in float64 ---------------------------------------------

HEAD_DIM = 4


def small_t5(rng, d=130, i=140, f=160, layers=2):
  """Arrays of a few of T5's parameters by their paths, some of them large."""
  shapes = {("token_embedder", "embedding"): (150, d)}
  shapes[("encoder", "relpos_bias", "rel_embedding")] = (2, 32)
  for n in range(layers):
    layer = ("encoder", f"layers_{n}")
    shapes |= {
      (*layer, "attention", "query", "kernel"): (d, i),
      (*layer, "attention", "out", "kernel"): (i, d),
      (*layer, "mlp", "wo", "kernel"): (f, d),
      (*layer, "pre_mlp_layer_norm", "scale"): (d,),
    }
  sizes = {"rel_embedding": 1e-5, "scale": 3.0, "embedding": 1.0}
  return {
    k: rng.normal(size=shape) * sizes.get(k[-1], 0.05)
    for k, shape in shapes.items()
  }


def as_float32(flat, scan):
  tree = trees.nest({k: jnp.asarray(x, jnp.float32) for k, x in flat.items()})
  return stack(tree) if scan else tree


def assert_close(tree, expected, tolerance=1e-5):
  """Against each tensor's largest element."""
  found = trees.flatten(unstack(tree))
  assert found.keys() == expected.keys()
  for path, wanted in expected.items():
    error = np.abs(np.asarray(found[path], np.float64) - wanted).max()
    assert error <= tolerance * np.abs(wanted).max(), (path, error)


WARM = dict(
  factors="constant * linear_warmup", base_learning_rate=0.02, warmup_steps=10
)
WARM_RATE = lambda n: max(0.02 * min(1.0, n / 10), 1e-8)


def train_both(seed, scan, poison=lambda n, grads: grads, lead=0, **settings):
  """(our parameters, state, the oracle's parameters, slots) after 20 steps."""
  rng = np.random.default_rng(seed)
  params = small_t5(rng)
  theirs = dict(settings)
  if "multiply_by_parameter_scale" in theirs:
    theirs["scaled"] = theirs.pop("multiply_by_parameter_scale")
  made = {k: theirs[k] for k in ("factored", "beta1") if k in theirs}
  slots = {k: t5x_adafactor.init(x.shape, **made) for k, x in params.items()}
  optimizer = optimizers.adafactor(
    optimizers.create_learning_rate_scheduler(**WARM), **settings
  )
  ours = as_float32(params, scan)
  # Float32 keeps of the parameters what it can; both begin there.
  params = {k: x.astype(np.float32).astype(float) for k, x in params.items()}
  state = optimizer.init(ours)
  update = jax.jit(optimizer.update)
  for n in range(20):
    # From 1e-12 to 1e12, and of very different sizes in one tensor.
    size = 10.0 ** rng.integers(-12, 13)
    grads = {
      k: (rng.normal(size=x.shape) ** 5 * size).astype(np.float32).astype(float)
      for k, x in params.items()
    }
    grads = poison(n, grads)
    updates, state = update(as_float32(grads, scan), state, ours)
    ours = optax.apply_updates(ours, updates)
    for k in params:
      params[k], slots[k] = t5x_adafactor.update(
        params[k], slots[k], grads[k], WARM_RATE(n), n, **theirs
      )
  return ours, state, params, slots


SETTINGS = {
  "plain": {},
  "momentum": dict(beta1=0.9),
  "decay": dict(weight_decay_rate=0.01, max_parameter_scale=0.5),
  "unfactored": dict(beta1=0.9, factored=False, weight_decay_rate=0.003),
  "all": dict(
    beta1=0.5,
    weight_decay_rate=0.7,
    weight_decay_rate_lr_exponent=1.5,
    decay_rate=0.6,
    clipping_threshold=0.3,
    max_parameter_scale=1.5,
  ),
  "absolute": dict(
    multiply_by_parameter_scale=False,
    weight_decay_rate_lr_exponent=2.0,
    clipping_threshold=None,
  ),
}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", SETTINGS)
def test_adafactor_is_t5x_s(name, scan):
  """20 steps with warm-up; gradients from 1e-12 to 1e12."""
  ours, state, params, slots = train_both(3, scan, **SETTINGS[name])
  assert_close(ours, params)
  for slot in ("m", "v", "v_row", "v_col"):
    found = getattr(state[0], slot)
    assert_close(found, {k: x[slot] for k, x in slots.items()})


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_a_nan_is_skipped_as_t5x_skips_it(scan):
  """One NaN, in a factored, then in a full second moment; inf in another."""

  def poison(n, grads):
    if n in (5, 6, 11):
      layer = ("encoder", f"layers_{n % 2}")
      where = {
        5: (*layer, "mlp", "wo", "kernel"),
        6: (*layer, "pre_mlp_layer_norm", "scale"),
        11: (*layer, "attention", "query", "kernel"),
      }[n]
      grads[where].flat[7] = np.inf if n == 11 else np.nan
    return grads

  settings = dict(beta1=0.9, weight_decay_rate=0.01, skip_nan_updates=True)
  with np.errstate(invalid="ignore", divide="ignore"):
    ours, state, params, slots = train_both(4, scan, poison, **settings)
  finite = {
    k: x for k, x in params.items() if np.isfinite(slots[k]["v_row"]).all()
  }
  assert len(params) - len(finite) == 1, "an infinite moment stays, as in T5X"
  assert all(np.isfinite(x).all() for x in params.values())
  assert_close(ours, params)
  for k in finite:
    for slot in ("m", "v", "v_row", "v_col"):
      tree = unstack(getattr(state[0], slot))
      found = trees.flatten(tree)[k]
      assert_close({"x": found}, {("x",): slots[k][slot]})
  # Without the switch the parameter is lost.
  with np.errstate(invalid="ignore", divide="ignore"):
    ours, *_ = train_both(4, scan, poison)
  assert not all(np.isfinite(x).all() for x in jax.tree.leaves(ours))


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_factor_rules_are_those_of_t5x_s_scanned_layers(scan):
  """The oracle trains in T5X's scanned layout, below 128 a side too."""
  rng = np.random.default_rng(5)
  # Joined heads are narrower than the model, the MLP is as wide.
  params = small_t5(rng, d=24, i=8, f=24, layers=3)
  ours = as_float32(params, scan)
  optimizer = optimizers.adafactor(
    0.01,
    beta1=0.9,
    weight_decay_rate=0.01,
    logical_factor_rules=optimizers.standard_logical_factor_rules(),
  )
  state = optimizer.init(ours)
  update = jax.jit(optimizer.update)
  theirs = t5x_adafactor.scanned(params, HEAD_DIM)
  kinds = {
    k: t5x_adafactor.standard_kinds(k, x.shape) for k, x in theirs.items()
  }
  slots = {
    k: t5x_adafactor.init(x.shape, kinds[k], beta1=0.9)
    for k, x in theirs.items()
  }
  query = ("encoder", "encoder", "attention", "query", "kernel")
  assert slots[query]["v_row"].shape == (24, 3)
  assert slots[query]["v_col"].shape == (3, 2, 4)
  for n in range(20):
    grads = {k: rng.normal(size=x.shape) ** 3 for k, x in params.items()}
    updates, state = update(as_float32(grads, scan), state, ours)
    ours = optax.apply_updates(ours, updates)
    grads = t5x_adafactor.scanned(grads, HEAD_DIM)
    for k in theirs:
      theirs[k], slots[k] = t5x_adafactor.update(
        *(theirs[k], slots[k], grads[k], 0.01, n, kinds[k]),
        beta1=0.9,
        weight_decay_rate=0.01,
      )
  found = trees.flatten(unstack(ours))
  found = {k: np.asarray(x) for k, x in found.items()}
  assert_close(trees.nest(t5x_adafactor.scanned(found, HEAD_DIM)), theirs)
  wo = ("encoder", "layers_1", "mlp", "wo", "kernel")
  tree = unstack(state[0].v)
  assert trees.flatten(tree)[wo].shape == (1,), "factored, small as it is"
  embedding = state[0].v["token_embedder"]["embedding"]
  assert embedding.shape == (150, 24), (
    "T5X's rules leave matrices to their size"
  )


@pytest.mark.parametrize(
  "rules,message",
  [
    ({"embedd": "row"}, "'embedd'.*'embed'"),
    ({"embed": "rows"}, "'rows'"),
    ({"layers": "none"}, "'layers' is a batch"),
    ({"embed": "row", "layers": "batch"}, "have no 'joined_kv'"),
  ],
)
def test_factor_rules_that_make_no_sense_are_errors(rules, message):
  params = as_float32(small_t5(np.random.default_rng(0)), False)
  with pytest.raises(UserError, match=message):
    optimizers.adafactor(0.1, logical_factor_rules=rules).init(params)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_hyper_parameters_by_pattern(scan):
  """The first pattern decides; each parameter trains as T5X's with its own."""
  by_name = lambda *rules: optimizers.HParamMap([*rules, (".*", None)])
  rng = np.random.default_rng(6)
  params = small_t5(rng)
  ours = as_float32(params, scan)
  optimizer = optimizers.adafactor(
    0.01,
    multiply_by_parameter_scale=optimizers.HParamMap(
      [("rel_embedding$", False), ("layer_norm/|embedding", True), (".", False)]
    ),
    factored=optimizers.HParamMap([(r"layers_\d+/mlp/", False), (".", True)]),
    weight_decay_rate=by_name(("kernel$", 0.02)),
    beta1=by_name((r"query", 0.9), ("kernel$", 0.5)),
  )
  state = optimizer.init(ours)
  update = jax.jit(optimizer.update)
  own = {
    k: dict(
      scaled=k[-1] in ("scale", "embedding"),
      factored="mlp" not in k,
      weight_decay_rate=0.02 if k[-1] == "kernel" else None,
      beta1={"query": 0.9, "out": 0.5, "wo": 0.5}.get(k[-2]),
    )
    for k in params
  }
  slots = {
    k: t5x_adafactor.init(
      x.shape, factored=own[k]["factored"], beta1=own[k]["beta1"]
    )
    for k, x in params.items()
  }
  for n in range(5):
    grads = {k: rng.normal(size=x.shape) for k, x in params.items()}
    updates, state = update(as_float32(grads, scan), state, ours)
    ours = optax.apply_updates(ours, updates)
    for k in params:
      params[k], slots[k] = t5x_adafactor.update(
        params[k], slots[k], grads[k], 0.01, n, **own[k]
      )
  assert_close(ours, params)
  for slot in ("m", "v", "v_row", "v_col"):
    found = getattr(state[0], slot)
    assert_close(found, {k: x[slot] for k, x in slots.items()})


@pytest.mark.parametrize(
  "rules,message",
  [
    (
      [("kernel", 0.1), ("biass", 0.2), (".", 0)],
      "'biass' is the first match of no",
    ),
    ([("kernel", 0.1)], "no pattern of weight_decay_rate is in"),
    ([("(", 0.1)], "no regular expression"),
    ([("layers_0", 0.1), (".", 0)], "SCAN_LAYERS"),
  ],
)
def test_a_map_of_hyper_parameters_covers_all_and_no_more(rules, message):
  params = as_float32(small_t5(np.random.default_rng(0)), True)
  with pytest.raises(UserError, match=message):
    optimizers.adafactor(
      0.1, weight_decay_rate=optimizers.HParamMap(rules)
    ).init(params)


def test_multipliers_scale_all_that_a_step_adds():
  """Momentum's and decay's share too; the slots do not know of it."""
  settings = dict(beta1=0.9, weight_decay_rate=0.01)
  params, state = run(optimizers.adafactor(0.1, **settings), random_tree(0))
  grads = random_tree(77)
  plain = optimizers.adafactor(0.1, **settings)
  scaled = optimizers.adafactor(
    0.1, learning_rate_multipliers={"wi": 3.0, "scale|norm": 0}, **settings
  )
  updates, slots = plain.update(grads, state, params)
  found, found_slots = scaled.update(
    grads, (*state, optax.EmptyState()), params
  )
  factors = {"embedding": 1, "norm": 0, "wi": 3, "scale": 0}
  updates, found = trees.flatten(updates), trees.flatten(found)
  for path, x in updates.items():
    np.testing.assert_allclose(found[path], factors[path[-1]] * x, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(found_slots), jax.tree.leaves(slots)):
    np.testing.assert_array_equal(a, b)


# ---- One clock ---------------------------------------------------------------


@pytest.mark.parametrize("make", [optimizers.adafactor, optimizers.adamw])
def test_the_rate_follows_the_run_s_step_and_slots_their_own_updates(make):
  """At step 1000 with fresh slots: the rate of 1000, the moments of a first."""
  decaying = optimizers.create_learning_rate_scheduler(
    "constant * rsqrt_decay", base_learning_rate=1.0, warmup_steps=10
  )
  params, grads = random_tree(0), random_tree(1)
  optimizer, at_once = make(decaying), make(1000**-0.5)
  state = optimizer.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(at_once.init(params))
  found, state = optimizer.update(grads, state, params, step=jnp.int32(1000))
  expected, _ = at_once.update(grads, at_once.init(params), params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
  assert list(map(int, counts)) == [1]
  assert float(optimizer.learning_rate(1000)) == pytest.approx(1000**-0.5)


def test_adamw_is_optax_s_where_there_is_no_other_step():
  schedule = optax.exponential_decay(0.1, 2, 0.5)
  settings = dict(b1=0.8, b2=0.95, weight_decay=0.01)
  expected, _ = run(optax.adamw(schedule, **settings), random_tree(0))
  ours = optimizers.adamw(schedule, not_decayed=None, **settings)
  found, _ = run(ours, random_tree(0))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-6)


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


@pytest.mark.parametrize(
  "factors, later",
  [
    ("constant * linear_warmup", 2.0),
    ("constant * rsqrt_decay", 2.0 / 10),
    ("constant * rsqrt_normalized_decay", 2.0 / 10),
    ("constant * linear_warmup * linear_to_end", 1.0),
    ("constant * cosine_decay", 2.0),
    ("linear_decay", 1.0),
  ],
)
def test_without_warm_up_the_first_step_has_the_whole_rate(factors, later):
  settings = dict(factors=factors, base_learning_rate=2.0, warmup_steps=0)
  settings |= dict(total_steps=200, decay_factor=0.005, steps_per_cycle=10**9)
  assert rate(0, **settings) == pytest.approx(2.0)
  assert rate(100, **settings) == pytest.approx(later)


def test_an_unknown_factor_names_the_nearest():
  with pytest.raises(ValueError, match="linear_warmup"):
    optimizers.create_learning_rate_scheduler("constant * linear_warmupp")
