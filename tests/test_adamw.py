"""AdamW is torch's and FAT5's, Muon the SVD's; schedules end with the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_optimizers import as_float32, small_t5, unstack
import torch

from fat5_jax import optimizers, trees
from fat5_jax.errors import UserError
from fat5_jax.gin_config import parse
from fat5_jax.models import factory, initial
from fat5_jax.models.config import T5Config
import gin

SCANS = pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
STEPS = 12


def gradients(params, seed=1):
  """Of STEPS steps; from 1e-9 to 1e9, very different within a tensor."""
  rng = np.random.default_rng(seed)
  for _ in range(STEPS):
    size = 10.0 ** rng.integers(-9, 10)
    yield {
      k: (rng.normal(size=x.shape) ** 3 * size).astype(np.float32)
      for k, x in params.items()
    }


def start(seed=3):
  rng = np.random.default_rng(seed)
  return {k: x.astype(np.float32) for k, x in small_t5(rng).items()}


def ours(optimizer, params, scan):
  """(parameters, state) after the gradients."""
  tree = as_float32(params, scan)
  state = optimizer.init(tree)
  update = jax.jit(optimizer.update)
  for grads in gradients(params):
    updates, state = update(as_float32(grads, scan), state, tree)
    tree = optax.apply_updates(tree, updates)
  return trees.flatten(unstack(tree)), state


def theirs(params, dtype, step):
  """The parameters, as `step(n, name, p, g)` changes torch's; their ways."""
  found = {k: torch.tensor(x, dtype=dtype) for k, x in params.items()}
  ways = {k: np.zeros(x.shape) for k, x in params.items()}
  for n, grads in enumerate(gradients(params), start=1):
    for k, p in found.items():
      before = p.double().numpy(force=True).copy()
      step(n, k, p, torch.tensor(grads[k], dtype=dtype))
      ways[k] += np.abs(p.double().numpy() - before)
  return {k: p.double().numpy() for k, p in found.items()}, ways


def assert_as_close(found, params, step, b2):
  """Nearly as close as torch's own float32 to its float64: tensors of `found`.

  Torch takes 1 - b2^n in float64, optax in float32, where it is off by up to
  2^-24 / (1 - b2), and a step, by its root, by half of that.
  """
  exact, ways = theirs(params, torch.float64, step())
  naive, _ = theirs(params, torch.float32, step())
  for k, x in found.items():
    error = np.abs(np.asarray(x, np.float64) - exact[k]).max()
    bound = 2 * np.abs(naive[k] - exact[k]).max()
    bound += ways[k].max() * 2.0**-25 / (1 - b2)
    assert error <= bound, (k, error, bound)


def is_kept(name):
  return name[-1] in ("scale", "rel_embedding")


class ScaledAdamW:
  """FAT5's rule, from its description, in any of torch's types."""

  def __init__(self, rate, decay, b1=0.9, b2=0.999, eps=1e-6):
    self.rate, self.decay, self.b1, self.b2 = rate, decay, b1, b2
    self.eps, self.m, self.v = eps, {}, {}

  def __call__(self, n, name, p, g):
    m = self.m.setdefault(name, torch.zeros_like(p))
    v = self.v.setdefault(name, torch.zeros_like(p))
    m.mul_(self.b1).add_(g, alpha=1 - self.b1)
    v.mul_(self.b2).add_(g * g, alpha=1 - self.b2)
    mean, square = m / (1 - self.b1**n), v / (1 - self.b2**n)
    size = max(1e-3, p.square().mean().sqrt().item())
    taken_off = self.rate * (0 if is_kept(name) else self.decay) * p
    p -= self.rate * size * mean / (square.sqrt() + self.eps) + taken_off


@SCANS
def test_scaled_adamw_is_fat5_s(scan):
  """A tiny position table and large norms beside kernels; with decay."""
  optimizer = optimizers.adamw(
    0.02, eps=1e-6, weight_decay=0.1, multiply_by_parameter_scale=True
  )
  params = start()
  found, _ = ours(optimizer, params, scan)
  assert_as_close(found, params, lambda: ScaledAdamW(0.02, 0.1), b2=0.999)


class TorchAdamW:
  """torch.optim.AdamW, a parameter at a time, without decay where is_kept."""

  def __init__(self, decay, **settings):
    self.decay, self.settings, self.made = decay, settings, {}

  def __call__(self, n, name, p, g):
    if name not in self.made:
      decay = 0.0 if is_kept(name) else self.decay
      self.made[name] = torch.optim.AdamW(
        [p], weight_decay=decay, **self.settings
      )
    p.grad = g
    self.made[name].step()


@SCANS
def test_adamw_is_torch_s_and_keeps_norms_and_position_tables(scan):
  optimizer = optimizers.adamw(0.02, b2=0.99, weight_decay=0.5)
  params = start()
  found, _ = ours(optimizer, params, scan)
  settings = dict(lr=0.02, betas=(0.9, 0.99))
  assert_as_close(found, params, lambda: TorchAdamW(0.5, **settings), b2=0.99)


@pytest.mark.parametrize("make", [optimizers.adamw, optimizers.muon])
def test_bfloat16_state_forgets_no_squares(make):
  """At b2 = 0.999 they fall by a thousandth a step; the mean is 16 bits."""
  optimizer = make(1e-3, state_dtype="bfloat16")
  params = {"encoder": {"norm": jnp.ones(4)}}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for n in range(200):
    grads = jax.tree.map(lambda x, n=n: jnp.full_like(x, n == 0), params)
    _, state = update(grads, state, params)
  leaves = jax.tree.leaves(state)
  (mean,) = [x for x in leaves if x.dtype == jnp.bfloat16]
  (square,) = [x for x in leaves if x.shape == (4,) and x is not mean]
  assert mean.shape == (4,)
  np.testing.assert_allclose(square, 1e-3 * 0.999**199, rtol=1e-4)


def test_a_state_of_another_type_is_refused():
  with pytest.raises(UserError, match="state_dtype = 'float16'"):
    optimizers.adamw(0.1, state_dtype="float16")


# ---- Muon --------------------------------------------------------------------


def orthogonal(x):
  """What five of Muon's polynomials make of singular values, by the SVD."""
  u, s, v = np.linalg.svd(x, full_matrices=False)
  s = s / np.sqrt((s * s).sum())
  for _ in range(5):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return u @ (s[:, None] * v)


@SCANS
def test_muon_makes_singular_values_of_kernels_equal(scan):
  """Each layer's own, in float64; everything else is trained by AdamW."""
  settings = dict(weight_decay=0.3, b2=0.99)
  params = start()
  found, _ = ours(optimizers.muon(0.02, **settings), params, scan)
  exact = {k: x.astype(np.float64) for k, x in params.items()}
  means = {k: np.zeros_like(x) for k, x in exact.items()}
  for n, grads in enumerate(gradients(params), start=1):
    for k, x in exact.items():
      if k[-1] != "kernel":
        continue
      g = grads[k].astype(np.float64)
      means[k] = 0.95 * means[k] + 0.05 * g
      ahead = 0.95 * means[k] / (1 - 0.95 ** (n + 1))
      step = orthogonal(ahead + 0.05 * g / (1 - 0.95**n))
      step *= 0.2 * np.sqrt(max(x.shape))
      assert 0.1 < np.sqrt(np.mean(step**2)) < 0.3, "AdamW's size"
      exact[k] = x - 0.02 * (step + 0.3 * x)
  for k, wanted in exact.items():
    if k[-1] == "kernel":
      # Newton-Schulz multiplies rounding by at most 3.4445 a turn, 5 turns.
      error = np.abs(np.asarray(found[k], np.float64) - wanted).max()
      assert error <= STEPS * 0.02 * 3.4445**5 * 2**-23, (k, error)
  settings = dict(lr=0.02, betas=(0.9, 0.99))
  assert_as_close(
    {k: x for k, x in found.items() if k[-1] != "kernel"},
    params,
    lambda: TorchAdamW(0.3, **settings),
    b2=0.99,
  )


@SCANS
def test_muon_takes_the_matrices_of_attention_and_mlp_alone(scan):
  model = factory.create(
    T5Config(
      vocab_size=64,
      emb_dim=16,
      num_heads=2,
      head_dim=4,
      mlp_dim=24,
      num_encoder_layers=2,
      num_decoder_layers=1,
      mlp_activations=("gelu", "linear"),
      scan_layers=scan,
    )
  )
  params = initial.abstract_params(model)
  state = jax.eval_shape(optimizers.muon(0.1).init, params)[0]
  names = lambda tree: set(map("/".join, trees.flatten(tree)))
  layer = "layers" if scan else "layers_0"
  kernels = [f"attention/{x}" for x in ("query", "key", "value", "out")]
  mlp = ["mlp/wi_0", "mlp/wi_1", "mlp/wo"]
  wanted = {f"encoder/{layer}/{x}/kernel" for x in kernels + mlp}
  cross = [f"encoder_decoder_{x}" for x in kernels]
  own = [f"self_{x}" for x in kernels]
  wanted |= {f"decoder/{layer}/{x}/kernel" for x in own + cross + mlp}
  found = names(state.matrices[0].mu)
  if not scan:
    wanted |= {x.replace("_0/", "_1/", 1) for x in wanted if x[0] == "e"}
  assert found == wanted
  assert names(state.others[0].mu) == names(params) - wanted


# ---- Schedules ---------------------------------------------------------------


def schedule(factors, **settings):
  return optimizers.create_learning_rate_scheduler(
    factors, base_learning_rate=0.5, warmup_steps=10, **settings
  )


def assert_same_rates(found, expected, steps=range(130)):
  steps = np.array(steps)
  wanted = np.array([float(expected(n)) for n in steps])
  rates = jax.vmap(found)(jnp.array(steps))
  np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-7)


def test_a_cosine_falls_to_its_floor_at_the_end_of_the_run():
  cosine = "constant * linear_warmup * cosine_to_end"
  expected = optax.warmup_cosine_decay_schedule(0.0, 0.5, 10, 100, 0.05)
  found = schedule(cosine, total_steps=100, end_factor=0.1)
  assert_same_rates(found, expected)
  # Of a checkpoint at 1000, whose steps count.
  found = schedule(cosine, total_steps=1100, end_factor=0.1, step_offset=1000)
  assert_same_rates(lambda n: found(n + 1000), expected)


def test_warm_up_stable_decay():
  expected = optax.join_schedules(
    [
      optax.linear_schedule(0.0, 0.5, 10),
      optax.constant_schedule(0.5),
      optax.linear_schedule(0.5, 0.1, 20),
    ],
    [10, 80],
  )
  found = schedule(
    "constant * linear_warmup * linear_to_end",
    total_steps=100,
    decay_steps=20,
    end_factor=0.2,
  )
  assert_same_rates(found, expected)


@pytest.mark.parametrize(
  "settings, told",
  [
    ({}, "set TRAIN_STEPS"),
    (dict(total_steps=10), "from step 10 to step 10"),
    (dict(total_steps=100, decay_steps=101), "from step -1 to step 100"),
    (dict(total_steps=100, end_factor=1.5), "end_factor = 1.5"),
  ],
)
def test_a_fall_without_an_end_is_refused(settings, told):
  with pytest.raises(UserError, match=told):
    schedule("constant * cosine_to_end", **settings)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw_scaled", "muon"])
def test_from_gin_the_end_is_train_steps(name):
  gin.clear_config()
  try:
    parse.parse(
      ["runs/pretrain.gin", f"optimizers/{name}.gin"],
      [
        "TRAIN_STEPS = 400",
        "SCHEDULE = 'constant * linear_warmup * cosine_to_end'",
        "LEARNING_RATE = 0.5",
        "WARMUP_STEPS = 100",
      ],
      [],
      "none",
    )
    made = gin.get_configurable(f"optimizers.{name.split('_')[0]}")()
  finally:
    gin.clear_config()
  assert isinstance(made, optimizers.Optimizer)
  for step, rate in ((0, 1e-8), (50, 0.25), (100, 0.5), (250, 0.25), (400, 0)):
    assert float(made.learning_rate(step)) == pytest.approx(rate, abs=2e-8)
