"""The model: names, invariances, and what may not change its function."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fat5_jax import trees
from fat5_jax.models import initial, layer_stack, layers
from fat5_jax.models.config import T5Config
from fat5_jax.models.t5 import Transformer
from fat5_jax.objectives import losses
from fat5_jax.training import steps

# One worker compiles what they share.
pytestmark = pytest.mark.xdist_group("t5")

CONFIG = T5Config(
  vocab_size=67,
  emb_dim=24,
  num_heads=3,
  head_dim=8,
  num_encoder_layers=2,
  num_decoder_layers=2,
  mlp_dim=40,
  mlp_activations=("gelu", "linear"),
  relative_attention_num_buckets=8,
  relative_attention_max_distance=20,
  dtype="float32",
)


@functools.partial(
  jax.jit, static_argnames=("config", "method", "cache_length")
)
def apply(config, params, *args, method="__call__", **kwargs):
  return Transformer(config).apply(
    {"params": params}, *args, method=method, **kwargs
  )


@functools.lru_cache
def init(config, seed=0):
  model = Transformer(config.replace(scan_layers=False))
  params = jax.jit(initial.init_params, static_argnums=(0, 1))(model, seed)

  # A fresh table is almost flat; positions must matter here.
  def widen(path, x):
    return x * 5 if "rel_embedding" in jax.tree_util.keystr(path) else x

  params = jax.tree_util.tree_map_with_path(widen, params)
  return layer_stack.stack(params) if config.scan_layers else params


def sentences(count, seed=0):
  """(inputs, targets) of two lengths each, in turn."""
  rng = np.random.default_rng(seed)
  lengths = ((13, 4), (5, 8))
  return [
    (rng.integers(2, 67, inputs), rng.integers(2, 67, targets))
    for inputs, targets in itertools.islice(itertools.cycle(lengths), count)
  ]


def padded(examples, inputs=16, targets=12):
  """One example a row."""
  x = np.zeros((len(examples), inputs), np.int32)
  y = np.zeros((len(examples), targets), np.int32)
  for row, (a, b) in enumerate(examples):
    x[row, : len(a)], y[row, : len(b)] = a, b
  return {
    "encoder_input_tokens": x,
    "decoder_target_tokens": y,
    "decoder_input_tokens": np.pad(y, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": (y != 0).astype(np.int32),
  }


def packed(examples):
  """All examples in one row, with segments and positions."""
  parts = {
    "encoder": [a for a, _ in examples],
    "decoder": [b for _, b in examples],
  }
  row = {}
  for side, sequences in parts.items():
    row[f"{side}_segment_ids"] = np.concatenate(
      [np.full(len(s), i + 1) for i, s in enumerate(sequences)] + [[0, 0, 0]]
    )
    row[f"{side}_positions"] = np.concatenate(
      [np.arange(len(s)) for s in sequences] + [[0, 0, 0]]
    )
  pad = [[0, 0, 0]]
  row["encoder_input_tokens"] = np.concatenate(parts["encoder"] + pad)
  row["decoder_target_tokens"] = np.concatenate(parts["decoder"] + pad)
  row["decoder_input_tokens"] = np.concatenate(
    [np.r_[0, s[:-1]] for s in parts["decoder"]] + pad
  )
  row["decoder_loss_weights"] = row["decoder_target_tokens"] != 0
  return {k: np.asarray(v, np.int32)[None] for k, v in row.items()}


@functools.partial(jax.jit, static_argnames="config")
def all_token_losses(config, params, batch):
  arguments = {k: v for k, v in batch.items() if k != "decoder_loss_weights"}
  logits = Transformer(config).apply({"params": params}, **arguments)
  return losses.cross_entropy(logits, batch["decoder_target_tokens"])[0]


def token_losses(config, params, batch):
  loss_BL = all_token_losses(config, params, batch)
  return np.asarray(loss_BL)[batch["decoder_loss_weights"] != 0]


@pytest.mark.parametrize("per_layer,tied", [(False, False), (True, True)])
def test_alone_padded_or_packed_an_example_has_one_loss(per_layer, tied):
  config = CONFIG.replace(
    relative_attention_per_layer=per_layer, logits_via_embedding=tied
  )
  params, examples = init(config), sentences(3)
  alone = np.concatenate(
    [
      token_losses(config, params, padded([e], len(e[0]), len(e[1])))
      for e in examples
    ]
  )
  together = token_losses(config, params, padded(examples, 23, 17))
  in_one_row = token_losses(config, params, packed(examples))
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(in_one_row, alone, rtol=1e-5, atol=1e-5)


VARIANTS = {
  "scan": dict(scan_layers=True),
  "remat minimal": dict(remat_policy="minimal"),
  "remat gathered": dict(remat_policy="gathered"),
  "remat full": dict(remat_policy="full"),
  "remat but for names": dict(remat_policy=("attention", "wi")),
  "scan and remat": dict(scan_layers=True, remat_policy="full"),
  "dense attention": dict(attention_implementation="reference"),
}


@functools.lru_cache
def loss_and_grads(config):
  batch = packed(sentences(4))

  def objective(params):
    loss_BL = all_token_losses(config, params, batch)
    return losses.weighted_sum(loss_BL, batch["decoder_loss_weights"])

  loss, grads = jax.jit(jax.value_and_grad(objective))(init(config))
  return loss, layer_stack.unstack(grads)


@pytest.mark.parametrize(
  "variant,per_layer",
  [*((v, False) for v in VARIANTS), ("scan and remat", True)],
)
def test_how_it_runs_changes_neither_loss_nor_gradient(variant, per_layer):
  base = CONFIG.replace(relative_attention_per_layer=per_layer)
  loss, grads = loss_and_grads(base)
  found_loss, found = loss_and_grads(base.replace(**VARIANTS[variant]))
  assert found_loss == pytest.approx(float(loss), rel=1e-5)
  for path, grad in trees.flatten(grads).items():
    other = trees.flatten(found)[path]
    assert np.abs(other - grad).max() <= 2e-5 * max(np.abs(grad).max(), 1), path


def test_padding_tokens_do_not_reach_real_ones():
  params = init(CONFIG)
  batch = padded(sentences(3))
  config = CONFIG
  before = token_losses(config, params, batch)
  wild = dict(params)
  wild["token_embedder"] = {
    "embedding": params["token_embedder"]["embedding"].at[0].multiply(50.0)
  }
  # Token 0 is also the decoder's start, so compare the encoder alone.
  x = batch["encoder_input_tokens"]
  plain = apply(config, params, x, method="encode")
  loud = apply(config, wild, x, method="encode")
  np.testing.assert_allclose(
    np.asarray(plain)[x != 0], np.asarray(loud)[x != 0], rtol=1e-6, atol=1e-6
  )
  assert np.isfinite(before).all()


def test_a_row_of_padding_is_harmless():
  params = init(CONFIG)
  batch = padded(sentences(2))
  empty = {
    k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()
  }
  np.testing.assert_allclose(
    token_losses(CONFIG, params, empty),
    token_losses(CONFIG, params, batch),
    rtol=1e-6,
    atol=1e-6,
  )


def test_the_decoder_is_causal():
  params = init(CONFIG)
  batch = padded(sentences(1), 16, 8)
  y = np.array(batch["decoder_input_tokens"])
  changed = y.copy()
  changed[0, 5] = 66 - changed[0, 5]
  x = batch["encoder_input_tokens"]
  a = apply(CONFIG, params, x, y)
  b = apply(CONFIG, params, x, changed)
  assert np.array_equal(a[:, :5], b[:, :5])
  assert not np.allclose(a[:, 5:], b[:, 5:])


def test_decoding_with_a_cache_equals_the_whole_row():
  params = init(CONFIG)
  batch = padded(sentences(3), 16, 10)
  x, y = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
  whole = apply(CONFIG, params, x, y)
  segments = (x != 0).astype(np.int32)
  encoded = apply(CONFIG, params, x, method="encode")
  decode = functools.partial(
    apply, CONFIG, params, method="decode", cache_length=10
  )
  # Four tokens at once, then one by one.
  first, cache = decode(encoded, segments, y[:, :4])
  parts = [first]
  for i in range(4, 10):
    logits, cache = decode(
      None, segments, y[:, i : i + 1], cache=cache, index=i
    )
    parts.append(logits)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5
  )


def test_parameter_names_and_shapes_are_t5xs():
  """A public interface: converters and users' patterns rely on it."""
  names = {
    "/".join(path): leaf.shape
    for path, leaf in trees.flatten(init(CONFIG)).items()
  }
  encoder_layer = {
    "attention/query/kernel": (24, 24),
    "attention/key/kernel": (24, 24),
    "attention/value/kernel": (24, 24),
    "attention/out/kernel": (24, 24),
    "pre_attention_layer_norm/scale": (24,),
    "mlp/wi_0/kernel": (24, 40),
    "mlp/wi_1/kernel": (24, 40),
    "mlp/wo/kernel": (40, 24),
    "pre_mlp_layer_norm/scale": (24,),
  }
  decoder_layer = {
    k.replace("attention/", "self_attention/").replace(
      "pre_attention", "pre_self_attention"
    ): v
    for k, v in encoder_layer.items()
  }
  decoder_layer["pre_cross_attention_layer_norm/scale"] = (24,)
  for k in ("query", "key", "value", "out"):
    decoder_layer[f"encoder_decoder_attention/{k}/kernel"] = (24, 24)
  expected = {
    "token_embedder/embedding": (67, 24),
    "encoder/relpos_bias/rel_embedding": (3, 8),
    "encoder/encoder_norm/scale": (24,),
    "decoder/relpos_bias/rel_embedding": (3, 8),
    "decoder/decoder_norm/scale": (24,),
    "decoder/logits_dense/kernel": (24, 67),
  }
  for i in range(2):
    expected |= {f"encoder/layers_{i}/{k}": v for k, v in encoder_layer.items()}
  for i in range(2):
    expected |= {f"decoder/layers_{i}/{k}": v for k, v in decoder_layer.items()}
  assert names == expected


def test_dropout_masks_are_shared_along_the_length():
  config = CONFIG.replace(dropout_rate=0.5)
  params = init(config)
  x = padded(sentences(2))["encoder_input_tokens"]

  @jax.jit
  def noisy(seed):
    return Transformer(config).apply(
      {"params": params},
      x,
      method="encode",
      enable_dropout=True,
      rngs={"dropout": jax.random.key(seed)},
    )

  assert np.array_equal(noisy(0), noisy(0))
  assert not np.array_equal(noisy(0), noisy(1))
  mask = layers.Dropout(config, True).apply(
    {}, jnp.ones((2, 16, 24)), rngs={"dropout": jax.random.key(0)}
  )
  assert len(np.unique(mask)) == 2
  assert (mask == mask[:, :1]).all()
  assert np.array_equal(
    apply(config, params, x, method="encode"),
    apply(CONFIG, params, x, method="encode"),
  )


def test_a_token_beyond_the_embedding_gives_nan_not_another_token():
  params = init(CONFIG)
  x = np.array([[5, 6, 67, 1]], np.int32)
  out = apply(CONFIG, params, x, method="encode")
  assert np.isnan(out).any()


def test_positions_that_contradict_the_segments_raise():
  batch = packed(sentences(2))
  batch.pop("decoder_loss_weights")
  batch["encoder_positions"] = batch["encoder_positions"] * 2
  with pytest.raises(ValueError, match="encoder_positions"):
    Transformer(CONFIG).apply({"params": init(CONFIG)}, **batch)


def test_float16_is_refused_with_the_reason():
  with pytest.raises(ValueError, match="65504.*bfloat16"):
    CONFIG.replace(dtype="float16")


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(mlp_activations=("relu6",)), "relu6"),
    (dict(remat_policy="all"), "none, minimal, gathered, full"),
    (dict(dropout_rate=1.0), "dropout_rate"),
    (dict(num_heads=0), "num_heads"),
  ],
)
def test_impossible_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    CONFIG.replace(**change)


def test_microbatches_do_not_change_the_update():
  import optax

  batch = padded(sentences(8))
  # Unequal microbatches: the second half has few tokens.
  batch["decoder_loss_weights"][5:, 1:] = 0
  config = CONFIG.replace(
    num_encoder_layers=1,
    num_decoder_layers=1,
    attention_implementation="reference",
  )
  model, params = Transformer(config), init(config)
  optimizer = optax.sgd(0.1)

  def run(num_microbatches, factor):
    step = steps.make_train_step(
      model,
      optimizer,
      seed=0,
      z_loss=1e-4,
      loss_normalizing_factor=factor,
      num_microbatches=num_microbatches,
    )
    state = steps.TrainState(jnp.int32(0), params, optimizer.init(params))
    state, sums = jax.jit(step)(state, batch)
    return state.params, sums["loss"]

  for factor in (None, "NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"):
    expected, loss = run(None, factor)
    found, micro_loss = run(4, factor)
    assert micro_loss == pytest.approx(float(loss), rel=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_fresh_parameters_are_drawn_by_one_layer_of_each_stack():
  """XLA fuses all draws of a shape, which a GPU compiles for many minutes."""

  def draws(layers):
    config = CONFIG.replace(
      num_encoder_layers=layers, num_decoder_layers=layers
    )
    fresh = lambda: initial.init_params(Transformer(config), 0)
    return str(jax.make_jaxpr(fresh)()).count("random_fold_in")

  assert draws(2) == draws(5) > 10


def test_fresh_parameters_do_not_depend_on_the_layout():
  scanned, looped = (
    jax.jit(lambda c=c: initial.init_params(Transformer(c), 0))()
    for c in (CONFIG.replace(scan_layers=x) for x in (True, False))
  )
  jax.tree.map(
    np.testing.assert_array_equal, layer_stack.unstack(scanned), looped
  )
  layers = looped["encoder"]
  assert (
    layers["layers_0"]["mlp"]["wo"]["kernel"]
    != layers["layers_1"]["mlp"]["wo"]["kernel"]
  ).all()
