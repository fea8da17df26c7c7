"""Where tokens stand: rotary embeddings, FIRE, random places, and none."""

import functools

import fat5_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_t5 import CONFIG, apply, init, packed, padded, sentences, token_losses

from fat5_jax.models import layer_stack
from fat5_jax.models.positions import token_positions
from fat5_jax.models.t5 import Transformer
from pallas_kernels import rotate

# One worker compiles what they share.
pytestmark = pytest.mark.xdist_group("positions")

SMALL = CONFIG.replace(num_encoder_layers=1, num_decoder_layers=1)
ENCODINGS = {
  "rope": dict(position_encoding="rope"),
  # As FAT5: values too, and cross-attention.
  "rope of everything": dict(
    position_encoding="rope",
    rotary_scope="everything",
    rotary_fraction=0.5,
    rotary_interleaved=True,
    rotary_scale_base=32,
    max_positions=24,
  ),
  "fire": dict(position_encoding="fire", relative_attention_max_distance=5),
}


def random_heads(positions, heads=3, dim=32):
  rng = np.random.default_rng(0)
  shape = 1, len(positions), heads, dim
  return np.float32(rng.normal(size=shape))


def transformers_rope(family, x_BLHD, positions_L):
  """(ours' options, what transformers' own functions make of x)."""
  import torch
  from transformers.models.gpt_neox import modeling_gpt_neox as neox
  from transformers.models.gptj import modeling_gptj as gptj
  from transformers.models.llama import modeling_llama as llama

  x, positions = torch.tensor(x_BLHD), torch.tensor(positions_L)[None]
  if family == "gptj":
    table = gptj.create_sinusoidal_positions(int(positions.max()) + 1, 16)
    sin, cos = table[positions].chunk(2, dim=-1)
    y = gptj.apply_rotary_pos_emb(x[..., :16], sin, cos)
    y = torch.cat([y, x[..., 16:]], dim=-1)
    return dict(dims=16, interleaved=True), y
  module, name = {
    "llama": (llama, "Llama"),
    "gpt_neox": (neox, "GPTNeoX"),
  }[family]
  config = getattr(module, f"{name}Config")(
    hidden_size=96, num_attention_heads=3
  )
  cos, sin = getattr(module, f"{name}RotaryEmbedding")(config)(x, positions)
  x = x.swapaxes(1, 2)
  y, _ = module.apply_rotary_pos_emb(x, x, cos, sin)
  return dict(dims=cos.shape[-1]), y.swapaxes(1, 2)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj"])
def test_rotary_embeddings_are_those_of_transformers(family):
  """Both against float64: ours errs no more than twice as much."""
  positions = np.array([0, 1, 2, 7, 100, 101, 511, 2047])
  x = random_heads(positions)
  options, theirs = transformers_rope(family, x, positions)
  exact = fat5_model.turned(
    x[0], positions, options["dims"], 10_000, options.get("interleaved", False)
  )
  error = lambda y: np.linalg.norm(np.asarray(y)[0] - exact)
  ours = rotate(jnp.asarray(x), jnp.asarray(positions)[None], **options)
  assert error(ours) <= 2 * error(theirs) <= 1e-2 * np.linalg.norm(exact)
  half = rotate(jnp.asarray(x, "bfloat16"), positions[None], **options)
  assert half.dtype == jnp.bfloat16
  # One rounding of what goes in, one of what comes out.
  assert error(half.astype("float32")) <= 2**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("scale_base", [None, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_differences_of_positions_alone(
  scale_base, interleaved
):
  positions = np.arange(9)
  q, k = random_heads(positions), random_heads(positions)[:, ::-1]

  def scores(start):
    turn = functools.partial(rotate, dims=24, interleaved=interleaved)
    places = jnp.asarray(positions + start)[None]
    exponents = [None, None]
    if scale_base:
      exponents = [places / scale_base, -places / scale_base]
    a, b = (
      turn(jnp.asarray(x), places, exponents_BL=e)
      for x, e in zip((q, k), exponents)
    )
    return jnp.einsum("bqhd,bkhd->bhqk", a, b)

  here, there = scores(0), scores(40)
  np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-3)
  # And they do depend on those.
  assert not np.allclose(here[..., 0, 3], here[..., 3, 3], atol=0.1)


@pytest.mark.parametrize("name", ENCODINGS)
def test_padded_or_packed_an_example_has_one_loss(name):
  config = SMALL.replace(**ENCODINGS[name])
  params, examples = init(config), sentences(3)
  alone = token_losses(config, params, padded(examples))
  in_one_row = token_losses(config, params, packed(examples))
  np.testing.assert_allclose(in_one_row, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODINGS)
def test_two_beams_with_a_cache_equal_whole_rows(name):
  config = SMALL.replace(**ENCODINGS[name])
  params = init(config)
  batch = padded(sentences(4), 16, 8)
  x, y = batch["encoder_input_tokens"][:2], batch["decoder_input_tokens"]
  # Rows 0, 1 and 2, 3 of the decoder read one of the encoder each.
  whole = apply(config, params, np.repeat(x, 2, axis=0), y)
  segments = (x != 0).astype(np.int32)
  encoded = apply(config, params, x, method="encode")
  decode = functools.partial(
    apply, config, params, method="decode", cache_length=8
  )
  _, cache = decode(encoded, segments, y[::2, :1])
  cache = [
    layer | {"self": jax.tree.map(lambda z: np.repeat(z, 2, 0), layer["self"])}
    for layer in cache
  ]
  for i in range(1, 8):
    logits, cache = decode(
      None, segments, y[:, i : i + 1], cache=cache, index=i
    )
    np.testing.assert_allclose(logits[:, 0], whole[:, i], rtol=1e-4, atol=1e-5)


def test_fire_in_a_scan_has_the_gradients_of_a_loop():
  config = CONFIG.replace(**ENCODINGS["fire"])
  x = padded(sentences(2))["encoder_input_tokens"]

  def gradients(config):
    loss = lambda params: apply(config, params, x, method="encode")[
      ..., 0
    ].sum()
    grads = jax.jit(jax.grad(loss))(init(config))
    return layer_stack.unstack(grads["encoder"])

  loop, scan = gradients(config), gradients(config.replace(scan_layers=True))
  assert all(np.abs(x).max() > 0 for x in loop["relpos_bias"].values())
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, scan, loop)


def test_without_positions_an_encoder_reads_a_bag_of_tokens():
  config = SMALL.replace(position_encoding="none")
  params = init(config)
  assert "relpos_bias" not in params["encoder"]
  x = np.arange(2, 12)[None]
  order = np.random.default_rng(0).permutation(10)
  encoded = apply(config, params, x, method="encode")
  mixed = apply(config, params, x[:, order], method="encode")
  np.testing.assert_allclose(mixed, encoded[:, order], rtol=1e-4, atol=1e-5)


def test_random_positions_are_sorted_apart_and_start_at_0():
  config = CONFIG.replace(
    position_encoding="rope", randomized_positions=True, max_positions=64
  )
  draws = [
    np.asarray(token_positions(config, 16, key=jax.random.key(n))[0])
    for n in range(50)
  ]
  for drawn in draws:
    assert drawn[0] == 0 and (np.diff(drawn) > 0).all() and drawn[-1] < 64
  # Without the first, 15 of 16 sorted draws: their greatest is about 61.
  assert 55 < np.mean([drawn[-1] for drawn in draws]) < 64
  with pytest.raises(ValueError, match="65 tokens, and max_positions=64"):
    token_positions(config, 65, key=jax.random.key(0))


def test_positions_are_random_in_training_alone():
  config = SMALL.replace(max_positions=64)
  params = init(config)
  x = padded(sentences(2))["encoder_input_tokens"]

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def encode(config, training, seed):
    return Transformer(config).apply(
      {"params": params},
      x,
      method="encode",
      enable_dropout=training,
      rngs={"dropout": jax.random.key(seed)},
    )

  random = config.replace(randomized_positions=True)
  assert np.array_equal(encode(random, False, 0), encode(config, False, 0))
  assert not np.allclose(encode(random, True, 0), encode(random, True, 1))


def test_places_in_packed_rows_count_from_their_segment():
  ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]])
  places = functools.partial(token_positions, length=7, packed_ids_BL=ids)
  fire = CONFIG.replace(position_encoding="fire")
  found = places(fire)
  assert found.tolist() == [[0, 1, 2, 0, 1, 0, 1], [*range(7)]]
  # Where differences are all that is read, the row's own places do.
  rope = CONFIG.replace(position_encoding="rope")
  assert places(rope).tolist() == [[*range(7)]]
  assert places(CONFIG) is None


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(position_encoding="rope", rotary_fraction=0.4), "turns 3 numbers"),
    (dict(rotary_fraction=1.5), "rotary_fraction=1.5"),
    (dict(rotary_base=1), "rotary_base=1 must be more"),
    (dict(rotary_scale_base=-512), "rotary_scale_base=-512"),
    (dict(position_encoding="alibi", alibi_mode="asymmetric"), "num_heads=3"),
    (dict(position_encoding="none", randomized_positions=True), "'none' has"),
    (
      dict(
        position_encoding="rope",
        rotary_scope="everything",
        randomized_positions=True,
      ),
      "drawn apart",
    ),
    (dict(position_encoding="cope"), "t5, alibi, rope, fire, none"),
  ],
)
def test_impossible_positions_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    CONFIG.replace(**change)
