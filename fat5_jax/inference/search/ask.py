"""What a search is asked, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]
# (log-probabilities (N, V), tokens so far (N, 1 + L), index) -> the same, with
# what may not come next at minus infinity.
Constraint = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Found(NamedTuple):
  """Answers of a batch, the best first.

  Attributes:
    tokens: int32 (B, S, L), each up to its end of sequence, then padding.
    scores: float32 (B, S), as the search compares them; minus infinity where
      there are fewer answers than were asked for.
  """

  tokens: jax.Array
  scores: jax.Array


@dataclasses.dataclass(frozen=True)
class Ask:
  """A batch of B rows to be answered, each in one or more ways (N in all).

  Attributes:
    step: logits of the token after `tokens_N1`, which stands at `index`; its
      cache is None in the first call and whatever it returned afterwards. The N
      rows are those of a batch's row after each other.
    reorder: (cache, ways_BW) -> the cache whose way w of a row is what way
      `ways_BW[., w]` of the same row was.
    batch_size: B.
    max_length: most tokens of an answer, its end and its prompt included.
    start_id: token before the first.
    eos_id: token that ends an answer; part of it.
    pad_id: fills up after its end.
    prompt_BP: tokens with which each answer begins, padded with `pad_id`, or
      None. They are free: no score counts them.
    constraint: what may come next, or None.
  """

  step: Step
  reorder: Callable[[Any, jax.Array], Any]
  batch_size: int
  max_length: int
  start_id: int
  eos_id: int
  pad_id: int
  prompt_BP: jax.Array | None = None
  constraint: Constraint | None = None

  def prompt_lengths(self) -> jax.Array:
    """int32 (B,)."""
    if self.prompt_BP is None:
      return jnp.zeros((self.batch_size,), jnp.int32)
    return (self.prompt_BP != self.pad_id).sum(axis=1, dtype=jnp.int32)

  def forced(self, index: Any) -> tuple[jax.Array, jax.Array]:
    """(token, whether it is forced), (B,) each, of the answers' position."""
    if self.prompt_BP is None:
      none = jnp.zeros((self.batch_size,), jnp.int32)
      return none, none > 0
    last = self.prompt_BP.shape[1] - 1
    place = jnp.minimum(index, last)
    token_B = jax.lax.dynamic_index_in_dim(
      self.prompt_BP, place, axis=1, keepdims=False
    )
    return token_B, (index <= last) & (token_B != self.pad_id)

  def empty(self, ways: int) -> jax.Array:
    """int32 (B * ways, 1 + max_length): the start, then padding."""
    shape = (self.batch_size * ways, 1 + self.max_length)
    tokens = jnp.full(shape, self.pad_id, jnp.int32)
    return tokens.at[:, 0].set(self.start_id)

  def constrained(
    self, log_p_NV: jax.Array, tokens_NL: jax.Array, index: Any
  ) -> jax.Array:
    if self.constraint is None:
      return log_p_NV
    return self.constraint(log_p_NV, tokens_NL, index)
