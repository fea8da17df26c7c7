"""Answers drawn at random from what the model finds likely."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fat5_jax.inference.search.ask import Ask, Found
from fat5_jax.inference.search.greedy import walk


def sample(
  ask: Ask,
  seeds_B: jax.Array,
  *,
  samples: int = 1,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
) -> Found:
  """Answers whose tokens are drawn one after the other.

  What is drawn depends on the row's own seed, the number of the sample and the
  position: not on the rows beside it. Scores are sums of the model's own
  log-probabilities, whatever the temperature; answers stand as they were drawn.

  Args:
    ask: what is asked.
    seeds_B: uint32, a row's own: its number among all rows.
    samples: answers to a row.
    temperature: what logits are divided by, above 0.
    top_k: draw among that many most likely tokens (ties stay); None among all.
    top_p: draw among the most likely tokens whose probabilities, after the
      others' going, first sum up to this much (Holtzman et al. 2020, "The
      Curious Case of Neural Text Degeneration", section 3.1); None among all.
    seed: of all rows together.
  """
  fold = jax.vmap(jax.random.fold_in, in_axes=(0, 0))
  keys_B = fold(
    jnp.broadcast_to(jax.random.key(seed), (ask.batch_size,)), seeds_B
  )
  way_N = jnp.tile(jnp.arange(samples), ask.batch_size)
  keys_N = fold(jnp.repeat(keys_B, samples), way_N)

  def choose(logits_NV, index):
    logits_NV = kept(logits_NV / temperature, top_k, top_p)
    draw = lambda key: jax.random.uniform(jax.random.fold_in(key, index))
    return at_quantile(jax.nn.softmax(logits_NV), jax.vmap(draw)(keys_N))

  return walk(ask, samples, choose)


def kept(
  logits_NV: jax.Array, top_k: int | None, top_p: float | None
) -> jax.Array:
  """Logits, those that are not drawn among at minus infinity."""
  if top_k is not None and top_k < logits_NV.shape[-1]:
    least_N1 = jax.lax.top_k(logits_NV, top_k)[0][:, -1:]
    logits_NV = jnp.where(logits_NV >= least_N1, logits_NV, -jnp.inf)
  if top_p is not None and top_p < 1:
    p_NV = jax.nn.softmax(logits_NV)
    logits_NV = jnp.where(
      p_NV >= _nucleus_threshold(p_NV, top_p), logits_NV, -jnp.inf
    )
  return logits_NV


def _nucleus_threshold(p_NV: jax.Array, top_p: float) -> jax.Array:
  """(N, 1): the largest value that keeps at least `top_p` of a row.

  Without sorting the vocabulary: the bits of a float that is not negative are
  in its order, so 31 halvings find the value itself.
  """

  def halve(_, bounds):
    low_N1, high_N1 = bounds
    middle_N1 = low_N1 + (high_N1 - low_N1 + 1) // 2
    value_N1 = jax.lax.bitcast_convert_type(middle_N1, jnp.float32)
    mass_N1 = jnp.where(p_NV >= value_N1, p_NV, 0).sum(axis=1, keepdims=True)
    enough_N1 = mass_N1 >= top_p
    return (
      jnp.where(enough_N1, middle_N1, low_N1),
      jnp.where(enough_N1, high_N1, middle_N1 - 1),
    )

  low_N1 = jnp.zeros((p_NV.shape[0], 1), jnp.int32)
  most_N1 = p_NV.max(axis=1, keepdims=True)
  high_N1 = jax.lax.bitcast_convert_type(most_N1, jnp.int32)
  low_N1, _ = jax.lax.fori_loop(0, 31, halve, (low_N1, high_N1))
  return jax.lax.bitcast_convert_type(low_N1, jnp.float32)


def at_quantile(p_NV: jax.Array, u_N: jax.Array) -> jax.Array:
  """The token at which the cumulative probability first exceeds u in [0, 1).

  One number a row instead of one a token, and never a token of probability 0.
  """
  total_NV = jnp.cumsum(p_NV, axis=1)
  whole_N = total_NV[:, -1]
  # A product that rounds up to the whole would be beyond all tokens.
  place_N = jnp.minimum(u_N * whole_N, jnp.nextafter(whole_N, 0.0))
  return (total_NV > place_N[:, None]).argmax(axis=1)
