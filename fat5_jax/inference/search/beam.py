"""Beam search, by the rules of Hugging Face's `generate` or of T5X.

Both keep W live beams and the W best finished answers, and extend all live
beams by the 2 W best tokens together, so that W of them go on even where W end
at once. They differ in what ends, what an answer's length is worth, and when a
row is done:

- "hf": a score is log p / length ** penalty, the prompt not counted; only the
  best W of the 2 W may end; at the last position all do. A row is done as
  `early_stopping` says: True with W answers; False once the best live beam,
  scored at its present length, is worse than all W of them; "never" likewise,
  but scored at the greatest length where that is worth more.
- "t5x": log p / ((5 + length) / 6) ** penalty (Wu et al. 2016, "Google's Neural
  Machine Translation System", equation 14); a row is done when the best live
  beam, scored at the greatest length, is worse than all W answers. Where none
  ended, the live beams are the answers, their scores as they are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fat5_jax.inference.search import top
from fat5_jax.inference.search.ask import Ask, Found

Rule = Literal["hf", "t5x"]
EarlyStopping = bool | Literal["never"]
# A place without an answer: worse than any.
_NONE = -1e9


class _State(NamedTuple):
  """`index` is the position of the last token; token 0 is the start."""

  index: jax.Array
  live_BWL: jax.Array
  live_scores_BW: jax.Array
  done_BWL: jax.Array
  done_scores_BW: jax.Array
  is_done_BW: jax.Array
  open_B: jax.Array
  ways_BW: jax.Array


def beam_search(
  ask: Ask,
  *,
  num_beams: int,
  returned: int = 1,
  length_penalty: float = 1.0,
  early_stopping: EarlyStopping = False,
  rule: Rule = "hf",
) -> Found:
  """The best `returned` of `num_beams` answers that a search finds.

  Args:
    ask: what is asked.
    num_beams: beams that live at a time.
    returned: answers to a row, at most `num_beams`.
    length_penalty: above 0 favours long answers, below 0 short ones.
    early_stopping: when a row is done, by Hugging Face's rule.
    rule: whose.
  """
  size = num_beams
  is_hf = rule == "hf"
  prompt_B1 = ask.prompt_lengths()[:, None]
  rank_K = jnp.arange(2 * size)

  def worth(length):
    """What a score of that many tokens is divided by."""
    length = jnp.asarray(length, jnp.float32)
    if is_hf:
      return jnp.maximum(length - prompt_B1, 1.0) ** length_penalty
    return ((5.0 + length) / 6.0) ** length_penalty

  def candidates(state: _State, logits_N1V):
    """(scores, ways, tokens), (B, 2 W) each, the best first."""
    logits_NV = logits_N1V[:, -1].astype(jnp.float32)
    log_p_NV = logits_NV - jax.nn.logsumexp(logits_NV, -1, keepdims=True)
    tokens_NL = state.live_BWL.reshape(-1, state.live_BWL.shape[-1])
    log_p_NV = ask.constrained(log_p_NV, tokens_NL, state.index)
    vocab = log_p_NV.shape[-1]
    log_p_BWV = log_p_NV.reshape(ask.batch_size, size, vocab)
    total_BWV = state.live_scores_BW[:, :, None] + log_p_BWV
    total_BC = total_BWV.reshape(ask.batch_size, -1)
    scores_BK, places_BK = top.top_k(total_BC, 2 * size)
    forced_B, is_forced_B = ask.forced(state.index)
    # Inside a prompt one beam lives, as at the start.
    one_BK = jnp.where(rank_K == 0, 0.0, -jnp.inf)[None]
    is_forced_B1 = is_forced_B[:, None]
    return (
      jnp.where(is_forced_B1, one_BK, scores_BK),
      jnp.where(is_forced_B1, 0, places_BK // vocab),
      jnp.where(is_forced_B1, forced_B[:, None], places_BK % vocab),
      is_forced_B1,
    )

  def advance(state: _State, logits_N1V) -> _State:
    scores_BK, ways_BK, tokens_BK, is_forced_B1 = candidates(state, logits_N1V)
    index = state.index + 1
    grown_BKL = _take(state.live_BWL, ways_BK)
    grown_BKL = jax.lax.dynamic_update_slice_in_dim(
      grown_BKL, tokens_BK[:, :, None].astype(jnp.int32), index, axis=2
    )
    ends_BK = (tokens_BK == ask.eos_id) & ~is_forced_B1
    if is_hf:
      ends_BK |= index == ask.max_length
    # Where little may follow, some of the best are none.
    counts_BK = ends_BK & state.open_B[:, None] & jnp.isfinite(scores_BK)
    if is_hf:
      counts_BK &= rank_K < size
    # What ends may become one of the best answers.
    told_BK = jnp.where(counts_BK, scores_BK / worth(index), _NONE)
    all_scores = jnp.concatenate([state.done_scores_BW, told_BK], axis=1)
    done_scores_BW, best_BW = jax.lax.top_k(all_scores, size)
    done_BWL = _take(
      jnp.concatenate([state.done_BWL, grown_BKL], axis=1), best_BW
    )
    is_done_BW = _take(
      jnp.concatenate([state.is_done_BW, counts_BK], axis=1), best_BW
    )
    # The others go on.
    going_BK = jnp.where(ends_BK, -jnp.inf, scores_BK)
    live_scores_BW, next_BW = jax.lax.top_k(going_BK, size)
    live_BWL = _take(grown_BKL, next_BW)
    open_B = state.open_B & may_improve(
      index, live_scores_BW[:, :1], done_scores_BW, is_done_BW
    )
    return _State(
      index,
      live_BWL,
      live_scores_BW,
      done_BWL,
      done_scores_BW,
      is_done_BW,
      open_B,
      _take(ways_BK, next_BW),
    )

  def may_improve(index, best_B1, done_scores_BW, is_done_BW):
    length = index
    if not is_hf:
      # T5X counts the start here.
      length = ask.max_length + 1
    elif early_stopping == "never" and length_penalty > 0:
      length = ask.max_length
    worst_B1 = done_scores_BW.min(axis=1, keepdims=True)
    worst_BW = jnp.where(is_done_BW, worst_B1, _NONE)
    found_B = (best_B1 / worth(length) > worst_BW).any(axis=1)
    if is_hf and early_stopping is True:
      found_B &= ~is_done_BW.all(axis=1)
    return found_B

  tokens_NL = ask.empty(size)
  shape = ask.batch_size, size
  start_BWL = tokens_NL.reshape(*shape, -1)
  state = _State(
    index=jnp.int32(0),
    live_BWL=start_BWL,
    # All beams are one at first: only one of them counts.
    live_scores_BW=jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),
    done_BWL=start_BWL,
    done_scores_BW=jnp.full(shape, _NONE),
    is_done_BW=jnp.zeros(shape, bool),
    open_B=jnp.ones((ask.batch_size,), bool),
    ways_BW=jnp.zeros(shape, jnp.int32),
  )
  logits, cache = ask.step(tokens_NL[:, :1], None, 0)
  state = advance(state, logits)

  def unfinished(carry):
    state, _ = carry
    return (state.index < ask.max_length) & state.open_B.any()

  def loop(carry):
    state, cache = carry
    token_BW1 = jax.lax.dynamic_slice_in_dim(state.live_BWL, state.index, 1, 2)
    cache = ask.reorder(cache, state.ways_BW)
    logits, cache = ask.step(token_BW1.reshape(-1, 1), cache, state.index)
    return advance(state, logits), cache

  state, _ = jax.lax.while_loop(unfinished, loop, (state, cache))
  any_done_B1 = state.is_done_BW.any(axis=1, keepdims=True)
  scores_BW = jnp.where(
    any_done_B1, state.done_scores_BW, state.live_scores_BW
  )[:, :returned]
  tokens_BWL = jnp.where(
    any_done_B1[:, :, None], state.done_BWL, state.live_BWL
  )[:, :returned, 1:]
  return Found(tokens_BWL, jnp.where(scores_BW == _NONE, -jnp.inf, scores_BW))


def _take(x_BK: jax.Array, places_BW: jax.Array) -> jax.Array:
  """Those of (B, K, ...) that (B, W) names: (B, W, ...)."""
  places = places_BW.reshape(*places_BW.shape, *(1,) * (x_BK.ndim - 2))
  return jnp.take_along_axis(x_BK, places, axis=1)
