"""What may come next, by the tokens so far: Hugging Face's rules, and a trie.

A constraint is a function (log_p (N, V), tokens (N, 1 + L), index) -> log_p.
The tokens stand at 0 (the start) to `index`; the next one will be at index + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fat5_jax.inference.search.ask import Constraint

_NEVER = -jnp.inf


def all_of(constraints: Sequence[Constraint]) -> Constraint | None:
  """One after the other; None for none."""
  if not constraints:
    return None

  def constraint(log_p_NV, tokens_NL, index):
    for one in constraints:
      log_p_NV = one(log_p_NV, tokens_NL, index)
    return log_p_NV

  return constraint


def _so_far(tokens_NL: jax.Array, index: Any) -> jax.Array:
  """bool (1, 1 + L): the places of tokens that are there."""
  return jnp.arange(tokens_NL.shape[1])[None] <= index


def _marked(
  shape: tuple[int, int], tokens_NK: jax.Array, which_NK: jax.Array
) -> jax.Array:
  """bool (N, V): the tokens of each row that are marked."""
  # What is not marked is put beyond the vocabulary, where it is dropped.
  places_NK = jnp.where(which_NK, tokens_NK, shape[1])
  rows_N1 = jnp.arange(shape[0])[:, None]
  return jnp.zeros(shape, bool).at[rows_N1, places_NK].set(True, mode="drop")


def repetition_penalty(penalty: float) -> Constraint:
  """Tokens that are there count less (Keskar et al. 2019, "CTRL", 4.1).

  The start counts as there; a negative value is multiplied, a positive divided.
  """

  def constraint(log_p_NV, tokens_NL, index):
    seen_NL = jnp.broadcast_to(_so_far(tokens_NL, index), tokens_NL.shape)
    seen_NV = _marked(log_p_NV.shape, tokens_NL, seen_NL)
    less_NV = jnp.where(log_p_NV < 0, log_p_NV * penalty, log_p_NV / penalty)
    return jnp.where(seen_NV, less_NV, log_p_NV)

  return constraint


def no_repeated_ngrams(size: int) -> Constraint:
  """No `size` tokens come a second time (the start counts as one)."""

  def constraint(log_p_NV, tokens_NL, index):
    length = tokens_NL.shape[1]
    if length < size:
      return log_p_NV
    # The last size - 1 tokens against those before every place.
    same_NL = jnp.ones(tokens_NL.shape, bool)
    place_L = jnp.arange(length)
    for back in range(1, size):
      last_N = jax.lax.dynamic_index_in_dim(
        tokens_NL, jnp.maximum(index + 1 - back, 0), 1, keepdims=True
      )
      before_NL = jnp.roll(tokens_NL, back, axis=1)
      same_NL &= (before_NL == last_N) & (place_L[None] >= back)
    same_NL &= _so_far(tokens_NL, index) & (index + 1 >= size)
    banned_NV = _marked(log_p_NV.shape, tokens_NL, same_NL)
    return jnp.where(banned_NV, _NEVER, log_p_NV)

  return constraint


def min_length(count: int, eos_id: int) -> Constraint:
  """No end before `count` tokens."""

  def constraint(log_p_NV, tokens_NL, index):
    del tokens_NL
    is_end_V = jnp.arange(log_p_NV.shape[1]) == eos_id
    return jnp.where((index < count) & is_end_V[None], _NEVER, log_p_NV)

  return constraint


def forced_first(token: int, place: int = 0) -> Constraint:
  """The token of a place is this one, which costs nothing."""

  def constraint(log_p_NV, tokens_NL, index):
    del tokens_NL
    only_V = jnp.where(jnp.arange(log_p_NV.shape[1]) == token, 0.0, _NEVER)
    return jnp.where(index == place, only_V[None], log_p_NV)

  return constraint


def only_known(vocab_size: int) -> Constraint:
  """None of the rows with which an embedding is padded."""

  def constraint(log_p_NV, tokens_NL, index):
    del tokens_NL, index
    known_V = jnp.arange(log_p_NV.shape[1]) < vocab_size
    return jnp.where(known_V[None], log_p_NV, _NEVER)

  return constraint


class Trie:
  """Texts as paths of tokens.

  Attributes:
    tokens: int32 (nodes, most children), what leads on from a node; -1 fills.
    nodes: int32 likewise, where that leads.
  """

  def __init__(self, texts: Sequence[Sequence[int]]):
    """`texts`: token ids, each with its end of sequence."""
    children: list[dict[int, int]] = [{}]
    for text in texts:
      node = 0
      for token in text:
        if token not in children[node]:
          children[node][token] = len(children)
          children.append({})
        node = children[node][token]
    width = max(map(len, children))
    self.tokens = np.full((len(children), width), -1, np.int32)
    self.nodes = np.full((len(children), width), -1, np.int32)
    for node, found in enumerate(children):
      self.tokens[node, : len(found)] = list(found)
      self.nodes[node, : len(found)] = list(found.values())


def only_paths(trie: Trie, prompt: int = 0) -> Constraint:
  """Answers, after `prompt` tokens, are those of a trie (De Cao et al. 2021,
  "Autoregressive Entity Retrieval", 3.1)."""
  tokens_TC, nodes_TC = jnp.asarray(trie.tokens), jnp.asarray(trie.nodes)

  def constraint(log_p_NV, tokens_NL, index):
    def follow(place, node_N):
      token_N = jax.lax.dynamic_index_in_dim(
        tokens_NL, place, 1, keepdims=False
      )
      is_it_NC = tokens_TC[node_N] == token_N[:, None]
      next_N = jnp.where(is_it_NC, nodes_TC[node_N], 0).sum(axis=1)
      # What has left the paths (it is at its end) may go anywhere.
      return jnp.where(is_it_NC.any(axis=1), next_N, -1)

    root_N = jnp.zeros((tokens_NL.shape[0],), jnp.int32)
    node_N = jax.lax.fori_loop(
      prompt + 1,
      index + 1,
      lambda place, node_N: jnp.where(node_N < 0, -1, follow(place, node_N)),
      root_N,
    )
    ahead_NC = tokens_TC[node_N]
    allowed_NV = _marked(log_p_NV.shape, ahead_NC, ahead_NC >= 0)
    inside_N1 = (node_N >= 0)[:, None] & (ahead_NC >= 0).any(
      axis=1, keepdims=True
    )
    return jnp.where(inside_N1 & ~allowed_NV, _NEVER, log_p_NV)

  return constraint
