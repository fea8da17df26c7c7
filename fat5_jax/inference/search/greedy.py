"""One token after the other: the most likely, or what `choose` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fat5_jax.inference.search import top
from fat5_jax.inference.search.ask import Ask, Found

# (logits (N, V) that are allowed, index) -> tokens (N,).
Choose = Callable[[jax.Array, Any], jax.Array]


def greedy_search(ask: Ask) -> Found:
  """The most likely token, one after the other; one answer a row."""
  return walk(ask, 1, lambda logits_NV, _: top.argmax(logits_NV))


def walk(ask: Ask, ways: int, choose: Choose) -> Found:
  """Answers that never look back, until every one has its end.

  Scores are sums of the log-probabilities of the chosen tokens, as the model
  gives them.

  Args:
    ask: what is asked.
    ways: answers to a row.
    choose: a token for each.
  """
  lengths_N = jnp.repeat(ask.prompt_lengths(), ways)

  def advance(index, tokens_NL, done_N, scores_N, logits_N1V):
    logits_NV = logits_N1V[:, -1].astype(jnp.float32)
    allowed_NV = ask.constrained(logits_NV, tokens_NL, index)
    token_N = choose(allowed_NV, index).astype(jnp.int32)
    chosen_N = jnp.take_along_axis(logits_NV, token_N[:, None], 1)[:, 0]
    gained_N = chosen_N - jax.nn.logsumexp(logits_NV, axis=-1)
    counts_N = ~done_N & (index >= lengths_N)
    scores_N += jnp.where(counts_N, gained_N, 0.0)
    forced_B, is_forced_B = ask.forced(index)
    is_forced_N = jnp.repeat(is_forced_B, ways)
    token_N = jnp.where(is_forced_N, jnp.repeat(forced_B, ways), token_N)
    token_N = jnp.where(done_N, ask.pad_id, token_N)
    tokens_NL = jax.lax.dynamic_update_slice_in_dim(
      tokens_NL, token_N[:, None], index + 1, axis=1
    )
    done_N |= (token_N == ask.eos_id) & ~is_forced_N
    return index + 1, tokens_NL, done_N, scores_N

  # The first step makes the cache, whose structure the loop then carries.
  tokens_NL = ask.empty(ways)
  rows = tokens_NL.shape[0]
  logits, cache = ask.step(tokens_NL[:, :1], None, 0)
  none_N = jnp.zeros((rows,), bool)
  state = advance(
    jnp.int32(0), tokens_NL, none_N, jnp.zeros((rows,), jnp.float32), logits
  )

  def unfinished(carry):
    (index, _, done_N, _), _ = carry
    return (index < ask.max_length) & ~done_N.all()

  def loop(carry):
    state, cache = carry
    index, tokens_NL = state[:2]
    token_N1 = jax.lax.dynamic_slice_in_dim(tokens_NL, index, 1, axis=1)
    logits, cache = ask.step(token_N1, cache, index)
    return advance(*state, logits), cache

  (_, tokens_NL, _, scores_N), _ = jax.lax.while_loop(
    unfinished, loop, (state, cache)
  )
  shape = ask.batch_size, ways
  return Found(
    tokens_NL[:, 1:].reshape(*shape, ask.max_length), scores_N.reshape(shape)
  )
