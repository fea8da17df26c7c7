"""The objective: cross-entropy, smoothing, z-loss and normalisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fat5_jax.objectives import losses


@pytest.fixture
def example():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(2, 5, 11)) * 3, jnp.float32)
  targets = jnp.asarray(rng.integers(1, 11, (2, 5)))
  return logits, targets


def test_cross_entropy_is_torchs(example):
  logits, targets = example
  found, z = losses.cross_entropy(logits, targets)
  expected = torch.nn.functional.cross_entropy(
    torch.tensor(np.asarray(logits)).reshape(-1, 11),
    torch.tensor(np.asarray(targets)).long().reshape(-1),
    reduction="none",
  )
  np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-5)
  assert not z.any()


def test_label_smoothing_is_the_divergence_from_the_smoothed_target(example):
  """T5X: mass over the V - 1 other tokens, entropy of the target removed."""
  logits, targets = example
  smoothing, vocab = 0.1, 11
  found, _ = losses.cross_entropy(logits, targets, label_smoothing=smoothing)
  target = np.full((2, 5, vocab), smoothing / (vocab - 1))
  np.put_along_axis(target, np.asarray(targets)[..., None], 1 - smoothing, -1)
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  expected = np.sum(target * (np.log(target) - log_p), axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  perfect, _ = losses.cross_entropy(
    jnp.log(target), targets, label_smoothing=smoothing
  )
  np.testing.assert_allclose(perfect, 0, atol=1e-5)


def test_z_loss_pulls_the_normaliser_to_one(example):
  logits, targets = example
  _, z = losses.cross_entropy(logits, targets, z_loss=0.01)
  np.testing.assert_allclose(
    z, 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2, rtol=1e-6
  )


def test_padding_may_hold_anything(example):
  logits, _ = example
  values = jnp.ones((2, 5)).at[0, 3].set(jnp.nan)
  weights = jnp.ones((2, 5)).at[0, 3].set(0)
  assert losses.weighted_sum(values, weights) == 9


WEIGHTS = jnp.asarray([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
  "factor,expected",
  [
    (None, 1),
    (233472, 233472),
    ("NUM_REAL_TARGET_TOKENS", 7),
    ("NUM_TOTAL_TARGET_TOKENS", 12),
    ("AVERAGE_PER_SEQUENCE", 3),
  ],
)
def test_normalising_factors_mean_what_they_mean_in_t5x(factor, expected):
  _, normaliser = losses.weights_and_normalizer(WEIGHTS, factor, SEGMENTS)
  assert normaliser == pytest.approx(expected)


def test_average_per_sequence_weighs_sequences_not_tokens():
  weights, _ = losses.weights_and_normalizer(
    WEIGHTS, "AVERAGE_PER_SEQUENCE", SEGMENTS
  )
  expected = [[1 / 3] * 3 + [1 / 2] * 2 + [0], [1 / 2] * 2 + [0] * 4]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_an_unknown_factor_names_the_known_ones():
  with pytest.raises(ValueError, match="NUM_REAL_TARGET_TOKENS"):
    losses.weights_and_normalizer(WEIGHTS, "MEAN")
