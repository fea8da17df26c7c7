"""bfloat16 parameters that lose no small update, through whole runs too."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from test_train import (  # noqa: F401
  assert_equal_bit_for_bit,
  final_state,
  folder,
  trains,
)
import torch

from fat5_jax import macros, optimizers, trees
from fat5_jax.checkpoints import export
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.models import factory
from fat5_jax.models.config import T5Config
from fat5_jax.training.program import Program

STEPS = 2000


def parameters_and_updates(seed=0):
  """Of 512 numbers from 1e-6 to 1e3: updates of at most 1/600 of each.

  Some always go one way, some come and go; some rows end far from their start.
  """
  rng = np.random.default_rng(seed)
  start = rng.normal(size=512) * 10.0 ** rng.integers(-6, 4, 512)
  start = start.astype(jnp.bfloat16).astype(np.float32)
  share = 10.0 ** rng.uniform(-5, np.log10(1 / 600), 512) * np.abs(start)
  sign = rng.choice([-1, 0, 1], size=512)
  noise = rng.uniform(-1, 1, (STEPS, 512))
  return start, (share * np.where(sign, sign, noise)).astype(np.float32)


def summed(start, updates, optimizer):
  """(parameters, compensation) of bfloat16 parameters after all updates."""
  params = jnp.asarray(start, jnp.bfloat16)

  @jax.jit
  def run(params, state):
    def step(carry, update):
      params, state = carry
      # SGD at a rate of 1: the gradient is the update turned round.
      added, state = optimizer.update(-update, state, params)
      return (optax.apply_updates(params, added), state), None

    return jax.lax.scan(step, (params, state), jnp.asarray(updates))[0]

  params, state = run(params, optimizer.init(params))
  assert params.dtype == jnp.bfloat16
  as_numbers = lambda x: np.asarray(x).astype(np.float64)
  return as_numbers(params), state


def torch_kahan(start, updates):
  """Kahan's four lines with everything in bfloat16."""
  p = torch.tensor(start).bfloat16()
  lack = torch.zeros_like(p)
  for update in torch.tensor(updates):
    lack += update.bfloat16()
    before = p.clone()
    p += lack
    lack += before - p
  return p.double().numpy() + lack.double().numpy()


def test_a_sum_of_small_updates_is_within_kahan_s_bound():
  """n (2^-17 + 2^-23) of the largest value; without compensation, it stalls."""
  start, updates = parameters_and_updates()
  path = start + np.cumsum(updates, axis=0, dtype=np.float64)
  largest = np.maximum(np.abs(path).max(axis=0), np.abs(start))
  bound = STEPS * (2.0**-17 + 2.0**-23) * largest
  kahan = optimizers.Compensated(optax.sgd(1.0))
  params, state = summed(start, updates, kahan)
  lack = np.asarray(state.compensation).astype(np.float64)
  assert state.compensation.dtype == jnp.bfloat16
  assert (np.abs(lack) <= 2.0**-8 * np.abs(params)).all()
  error = np.abs(params + lack - path[-1])
  assert (error <= bound).all()
  theirs = np.abs(torch_kahan(start, updates) - path[-1])
  rms = lambda x: np.sqrt(np.mean((x / largest) ** 2))
  assert rms(error) <= rms(theirs), "Kahan's with all of it in bfloat16"

  naive, _ = summed(start, updates, optax.sgd(1.0))
  assert (np.abs(naive - path[-1]) > bound).mean() > 0.7
  far = np.abs(path[-1] - start) > 0.1 * np.abs(start)
  assert far.mean() > 0.4
  assert (naive == start)[far].all(), "not a bit has moved"


@pytest.mark.parametrize(
  "start, updates",
  [
    # Nearly vanishes; from nothing; far beyond itself; and all the way back.
    (1.0, [-(1 - 3 * 2.0**-22), 2.0**-30]),
    (0.0, [2.0**-60, 3 * 2.0**-67]),
    (1 + 2.0**-7, [2.0**20]),
    (1 + 2.0**-7, [2.0**-10, 2.0**20, -(2.0**20), -(2.0**-10)]),
  ],
)
def test_the_caller_s_addition_gives_the_rounded_sum(start, updates):
  kahan = optimizers.Compensated(optax.sgd(1.0))
  params, state = summed(
    np.float64([start]), np.float32(updates)[:, None], kahan
  )
  lack = np.asarray(state.compensation).astype(np.float64)
  assert params == (params + lack).astype("bfloat16").astype(np.float64)
  largest = max(abs(start), *np.abs(start + np.cumsum(updates)))
  error = params + lack - (start + sum(updates))
  assert np.abs(error) <= len(updates) * (2.0**-17 + 2.0**-23) * largest


def test_float32_parameters_begin_with_all_that_16_bits_and_16_hold():
  """A checkpoint's float32 weights lose 2^-17 of themselves at most."""
  exact = np.random.default_rng(0).normal(size=4096).astype(np.float32)
  kahan = optimizers.Compensated(optax.identity())
  lack = kahan.init(jnp.asarray(exact)).compensation
  kept = exact.astype(jnp.bfloat16).astype(np.float64)
  kept += np.asarray(lack).astype(np.float64)
  assert (np.abs(kept - exact) <= 2.0**-17 * np.abs(exact)).all()


def test_the_optimizer_inside_sees_float32_and_the_whole_sum():
  seen = []

  def update(grads, state, params):
    seen.append((grads, params))
    return jax.tree.map(jnp.zeros_like, grads), state

  spy = optax.GradientTransformation(lambda params: params, update)
  kahan = optimizers.Compensated(spy)
  exact = jnp.float32([1.0 + 2.0**-10])
  state = kahan.init(exact)
  assert state.inner.dtype == jnp.float32
  kahan.update(jnp.bfloat16([3.0]), state, exact.astype(jnp.bfloat16))
  ((grads, params),) = seen
  assert grads.dtype == params.dtype == jnp.float32
  assert params == exact


# ---- Whole runs --------------------------------------------------------------

KAHAN = "--gin.PARAMETER_DTYPE=bfloat16"
ADAMW = ("--gin_file=adamw.gin", "--gin.SCHEDULE=constant")
QUICK = (
  "--gin.CHECKPOINT_PERIOD=2",
  "--gin.config.T5Config.num_encoder_layers=1",
  "--gin.LOGGERS=[]",
)


@pytest.fixture
def train(folder, trains):  # noqa: F811
  (folder / "adamw.gin").write_text("include 'optimizers/adamw.gin'\n")
  return lambda model_dir, *flags: trains(model_dir, *ADAMW, *QUICK, *flags)


def whole(model_dir, step):
  """(float64 parameters with their compensation, optimizer state) on disk."""
  params, state = final_state(model_dir, step)
  flat = trees.flatten(params)
  lack = {}
  if isinstance(state, dict) and "compensation" in state:
    lack = trees.flatten(state["compensation"])
    state = state["inner"]
  return {
    k: x.astype(np.float64) + (lack[k].astype(np.float64) if lack else 0.0)
    for k, x in flat.items()
  }, state


def test_a_run_goes_on_bit_for_bit_average_and_all(train):
  """The average is float32, the parameters are 16 bits and 16 bits."""
  flags = ("--gin.TRAIN_STEPS=4", "--gin.EMA_DECAY=0.9")
  train("run", *flags, KAHAN)
  params, state = final_state("run", 4)
  shutil.rmtree("run/checkpoint_4")
  with pytest.raises(AssertionError, match="EMA_DECAY, PARAMETER_DTYPE"):
    train("run", *flags)
  text = train("run", *flags, KAHAN)
  assert "going on from step 2" in text
  assert_equal_bit_for_bit((params, state), final_state("run", 4))

  types = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree)}
  assert types(params) == {"float32"}, "the average is what is kept"
  live = state["inner"]["average"]
  assert types(live) == types(state["compensation"]) == {"bfloat16"}
  average, live = trees.flatten(params), trees.flatten(live)
  assert all(np.any(live[k] != average[k].astype("bfloat16")) for k in average)


def test_float32_to_bfloat16_and_back_loses_2_to_the_minus_17(train):
  """Weights, optimizer and step; what is exported is what bfloat16 holds."""
  train("first", "--gin.TRAIN_STEPS=2")
  # No steps more: what the others begin with.
  of = lambda path: f"--gin.INITIAL_CHECKPOINT_PATH={path}"
  for name, *flags in (("kahan", KAHAN, of("first")), ("back", of("kahan"))):
    flags += ("--gin.TRAIN_STEPS=2", "--gin.SCAN_LAYERS=True")
    text = train(name, *flags)
    assert "step 2" in text and "fresh" not in text
  (exact, slots), (kahan, its), (back, last) = (
    whole(name, 2) for name in ("first", "kahan", "back")
  )
  assert_equal_bit_for_bit(slots, its)
  assert_equal_bit_for_bit(slots, last)
  rounded = trees.flatten(final_state("kahan", 2)[0])
  for k, x in exact.items():
    assert (np.abs(kahan[k] - x) <= 2.0**-17 * np.abs(x)).all(), k
    np.testing.assert_array_equal(back[k], kahan[k])
    np.testing.assert_array_equal(rounded[k], x.astype("bfloat16"))
  assert any(np.any(kahan[k] != rounded[k].astype(float)) for k in exact)

  how = export.Export(check_transformers=False, say=lambda _: None)
  export.export("kahan", "hf", how)
  written = safetensors.numpy.load_file("hf/model.safetensors")
  np.testing.assert_array_equal(
    written["encoder.block.0.layer.1.DenseReluDense.wo.weight"].T,
    rounded["encoder", "layers_0", "mlp", "wo", "kernel"],
  )


TINY = T5Config(
  vocab_size=64,
  emb_dim=16,
  num_heads=2,
  head_dim=4,
  mlp_dim=24,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_activations=("relu",),
  dtype="float32",
  attention_implementation="reference",
)


def test_gradients_that_are_sums_over_tokens_are_rounded_once():
  """A thousand times one token; SGD at a rate of 1 tells the gradient."""
  model, one = factory.create(TINY), Partitioner(devices=jax.devices()[:1])
  tokens = np.random.default_rng(0).integers(2, 64, (4, 256)).astype(np.int32)
  batch = {
    "encoder_input_tokens": np.full_like(tokens, 5),
    "decoder_input_tokens": np.full_like(tokens, 7),
    "decoder_target_tokens": tokens,
    "decoder_loss_weights": np.ones_like(tokens),
  }

  def stepped(optimizer):
    program = Program(model, one, optimizer)
    params = program.init_state().params
    params = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params
    )
    before = jax.tree.map(np.asarray, params)
    placed = one.to_devices(batch, 0, len(tokens))
    state, _ = program.train_step(program.state_from(0, params), placed)
    wide = lambda x: np.asarray(x).astype(np.float64)
    flat = {k: wide(x) for k, x in trees.flatten(state.params).items()}
    if isinstance(state.opt_state, optimizers.CompensatedState):
      for k, x in trees.flatten(state.opt_state.compensation).items():
        flat[k] = flat[k] + wide(x)
    return trees.flatten(before), flat

  before, exact = stepped(optax.sgd(1.0))
  same, found = stepped(optimizers.Compensated(optax.sgd(1.0)))
  for k, x in before.items():
    np.testing.assert_array_equal(same[k], x)
    gradient = np.abs(exact[k] - x)
    bound = 2.0**-8 * gradient + 2.0**-16 * np.maximum(
      np.abs(exact[k]), np.abs(x)
    )
    # The order of a product's sums is the compiler's.
    bound += 2.0**-20 * gradient.max()
    assert (np.abs(found[k] - exact[k]) <= bound).all(), k
    assert gradient.max() > 0


def test_frozen_parameters_are_bfloat16_and_not_compensated():
  kahan = optimizers.Compensated(optimizers.muon(0.1))
  state = Program(
    factory.create(TINY), Partitioner(), kahan, trainable="^decoder/"
  ).abstract_state
  params = trees.flatten(state.params)
  assert {x.dtype.name for x in params.values()} == {"bfloat16"}
  lack = trees.flatten(state.opt_state.compensation)
  assert lack.keys() == {k for k in params if k[0] == "decoder"}


def test_other_types_are_refused():
  with pytest.raises(UserError, match="PARAMETER_DTYPE.*'float32', 'bfloat16'"):
    macros.check("PARAMETER_DTYPE", "float16", "here")
