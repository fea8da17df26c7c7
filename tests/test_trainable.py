"""Choosing what trains: frozen means constant, free of state and of work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_heads import CONFIG, batch_of, text

from fat5_jax import optimizers, trees
from fat5_jax.errors import UserError
from fat5_jax.models import factory, initial, layer_stack
from fat5_jax.models.config import HeadConfig, LoRAConfig
from fat5_jax.training import steps, trainable

HEAD = HeadConfig("enct5", num_labels=3)


def setup(pattern=None, frozen=None, lora=None, **multipliers):
  model = factory.create(CONFIG, HEAD, lora)
  params = jax.jit(initial.init_params, static_argnums=(0, 1))(model, 0)
  chosen = trainable.choose(params, pattern, frozen)
  optimizer = optimizers.adamw(0.01, **multipliers)
  moving, _ = trainable.split(params, chosen)
  step = steps.make_train_step(model, optimizer, seed=0, trains=chosen)
  state = steps.TrainState(jnp.int32(0), params, optimizer.init(moving))
  return state, step, chosen


BATCH = batch_of(text(), np.array([0, 2, 1, 1]))


@pytest.mark.parametrize(
  "pattern,frozen",
  [
    (r"^(prompt_embedder|classifier)/", None),  # EncT5's prompt alone.
    (None, r"^(token_embedder|encoder)/"),
    (r"^decoder/", r"layer_norm"),
  ],
)
def test_frozen_parameters_stay_bit_for_bit(pattern, frozen):
  state, step, chosen = setup(pattern, frozen)
  after, sums = jax.jit(step)(state, BATCH)
  after, sums = jax.jit(step)(after, BATCH)
  before, now = trees.flatten(state.params), trees.flatten(after.params)
  assert np.isfinite(sums["loss"])
  moved = {p for p in before if not np.array_equal(before[p], now[p])}
  assert moved <= chosen
  # One prompt attends to itself alone: its query, key and bias do nothing.
  idle = {
    p for p in chosen - moved if "self_attention" in p or "relpos" in p[1]
  }
  assert moved | idle == chosen


def test_frozen_parameters_have_no_state_and_cost_no_gradient():
  def size_and_flops(pattern):
    state, step, chosen = setup(pattern)
    state_size = sum(x.size for x in jax.tree.leaves(state.opt_state))
    params = trees.flatten(state.params)
    assert state_size == 1 + 2 * sum(params[path].size for path in chosen)
    cost = jax.jit(step).lower(state, BATCH).compile().cost_analysis()
    return state_size, cost["flops"]

  whole, whole_flops = size_and_flops(None)
  head, head_flops = size_and_flops(r"^classifier/")
  assert head < whole / 20
  # The backward pass is two thirds of a step's work.
  assert head_flops < 0.45 * whole_flops


def test_lora_trains_its_matrices_and_the_head_alone():
  state, step, chosen = setup(
    r"lora_|^head/|^classifier/|^prompt_embedder/", lora=LoRAConfig()
  )
  names = {trees.name_of(path) for path in chosen}
  assert "encoder/layers_0/attention/query/lora_a" in names
  assert "classifier/bias" in names and "prompt_embedder/embedding" in names
  assert not any(name.endswith("query/kernel") for name in names)
  after, _ = jax.jit(step)(state, BATCH)
  query = lambda s: s.params["encoder"]["layers_0"]["attention"]["query"]
  assert np.array_equal(query(state)["kernel"], query(after)["kernel"])
  assert not np.array_equal(query(state)["lora_b"], query(after)["lora_b"])


def test_a_lora_target_that_is_none_is_an_error():
  with pytest.raises(ValueError, match="'q' ends in no projection"):
    LoRAConfig(targets=("q", "v"))
  config = CONFIG.replace(lora=LoRAConfig(targets=("wi_0",)))
  model = factory.create(config, HEAD)
  params = jax.eval_shape(lambda: initial.init_params(model, 0))
  with pytest.raises(UserError, match="'wi_0'"):
    trainable.check_lora(params, model.config)


def test_microbatches_of_a_frozen_model_are_the_whole_batch():
  state, step, chosen = setup(r"^decoder/")
  model = factory.create(CONFIG, HEAD)
  optimizer = optax.sgd(0.1)
  states = []
  for parts in (1, 2):
    step = steps.make_train_step(
      model,
      optimizer,
      seed=0,
      trains=chosen,
      num_microbatches=parts,
      loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    )
    start = state._replace(
      opt_state=optimizer.init(trainable.split(state.params, chosen)[0])
    )
    states.append(jax.jit(step)(start, BATCH)[0].params)
  for a, b in zip(*map(jax.tree.leaves, states)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_learning_rate_of_its_own_for_a_pattern():
  params = {"head": {"kernel": jnp.ones(3)}, "body": {"kernel": jnp.ones(3)}}
  grads = jax.tree.map(jnp.ones_like, params)
  for make in (optimizers.adamw, optimizers.adafactor):
    optimizer = make(0.1, learning_rate_multipliers={"^head/": 5.0, "body": 0})
    plain = make(0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_allclose(
      updates["head"]["kernel"], 5 * expected["head"]["kernel"], rtol=1e-6
    )
    assert not updates["body"]["kernel"].any()
  with pytest.raises(UserError, match="no regular expression"):
    optimizers.adamw(0.1, learning_rate_multipliers={"(": 2.0})
  with pytest.raises(UserError, match="'lora_'"):
    optimizers.adamw(0.1, learning_rate_multipliers={"lora_": 2.0}).init(params)


@pytest.mark.parametrize(
  "pattern,frozen,match",
  [
    ("clasifier", None, "matches no parameter"),
    (None, "deocder", "FROZEN = 'deocder' matches no parameter"),
    ("(", None, "no regular expression"),
    ("encoder", ".", "nothing"),
  ],
)
def test_a_pattern_that_does_nothing_is_an_error(pattern, frozen, match):
  params = jax.eval_shape(
    lambda: initial.init_params(factory.create(CONFIG, HEAD), 0)
  )
  with pytest.raises(UserError, match=match):
    trainable.choose(params, pattern, frozen)


def test_scanned_layers_go_together_or_say_so():
  params = jax.eval_shape(
    lambda: layer_stack.stack(
      initial.init_params(factory.create(CONFIG, HEAD), 0)
    )
  )
  chosen = trainable.choose(params, r"layers_\d+/mlp", None)
  assert ("encoder", "layers", "mlp", "wo", "kernel") in chosen
  with pytest.raises(UserError, match="SCAN_LAYERS"):
    trainable.choose(params, r"encoder/layers_1", None)


@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"label_smoothing": 0.1}])
def test_options_that_an_objective_has_not_are_refused(options):
  head = HeadConfig(
    "sequence_classification", num_labels=1, problem_type="regression"
  )
  with pytest.raises(ValueError, match="regression has neither"):
    steps.make_train_step(
      factory.create(CONFIG, head), optax.sgd(0.1), seed=0, **options
    )
  with pytest.raises(ValueError, match="NUM_MICROBATCHES"):
    steps.make_train_step(
      factory.create(CONFIG, HeadConfig("embedding")),
      optax.sgd(0.1),
      seed=0,
      num_microbatches=2,
    )
