"""Generation over a key/value cache.

A search takes `step(tokens_B1, cache, index) -> (logits_B1V, cache)` and
returns tokens; greedy is one, beam search and sampling are others to come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Step = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


def greedy_search(
  step: Step,
  batch_size: int,
  max_length: int,
  *,
  start_id: int,
  eos_id: int,
  pad_id: int,
) -> jax.Array:
  """The most likely token, one after the other.

  Stops as soon as every row has its end-of-sequence token.

  Args:
    step: logits of the token after `tokens_B1`, which stands at `index`; its
      cache is None in the first call and whatever it returned afterwards.
    batch_size: number of rows.
    max_length: most tokens a row gets.
    start_id: token before the first.
    eos_id: token that ends a row; part of the output.
    pad_id: fills the row after its end.

  Returns:
    int32 (batch_size, max_length).
  """

  def choose(logits_B1V, done_B):
    token_B = jnp.argmax(logits_B1V[:, -1], axis=-1).astype(jnp.int32)
    token_B = jnp.where(done_B, pad_id, token_B)
    return token_B, done_B | (token_B == eos_id)

  # The first step makes the cache, whose structure the loop then carries.
  start_B1 = jnp.full((batch_size, 1), start_id, jnp.int32)
  logits, cache = step(start_B1, None, 0)
  token_B, done_B = choose(logits, jnp.zeros((batch_size,), bool))
  tokens_BL = jnp.full((batch_size, max_length), pad_id, jnp.int32)
  tokens_BL = tokens_BL.at[:, 0].set(token_B)

  def unfinished(carry):
    index, _, _, done_B, _ = carry
    return (index < max_length) & ~done_B.all()

  def advance(carry):
    index, tokens_BL, token_B, done_B, cache = carry
    logits, cache = step(token_B[:, None], cache, index)
    token_B, done_B = choose(logits, done_B)
    tokens_BL = jax.lax.dynamic_update_slice_in_dim(
      tokens_BL, token_B[:, None], index, axis=1
    )
    return index + 1, tokens_BL, token_B, done_B, cache

  carry = (jnp.int32(1), tokens_BL, token_B, done_B, cache)
  return jax.lax.while_loop(unfinished, advance, carry)[1]


def generate(
  model: Any,
  params: Any,
  encoder_input_tokens: jax.Array,
  max_length: int,
  search: Callable[..., jax.Array] = greedy_search,
) -> jax.Array:
  """Output tokens (B, max_length) of an encoder-decoder.

  The encoder and the cross-attention keys and values run once.

  Args:
    model: has `config`, and methods `encode`, `decode` and `segments` (see
      models.t5.Transformer).
    params: its parameters.
    encoder_input_tokens: (B, K), padded with `config.pad_token_id`.
    max_length: most tokens a row gets, its end included.
    search: how tokens are chosen.
  """
  config = model.config
  variables = {"params": params}
  encoder_segment_ids = (encoder_input_tokens != config.pad_token_id).astype(
    jnp.int32
  )
  encoded_BKM = model.apply(
    variables, encoder_input_tokens, encoder_segment_ids, method="encode"
  )

  def step(tokens_B1, cache, index):
    return model.apply(
      variables,
      encoded_BKM if cache is None else None,
      encoder_segment_ids,
      tokens_B1,
      cache=cache,
      cache_length=max_length,
      index=index,
      method="decode",
    )

  return search(
    step,
    encoder_input_tokens.shape[0],
    max_length,
    start_id=config.decoder_start_token_id,
    eos_id=config.eos_token_id,
    pad_id=config.pad_token_id,
  )


def predict_labels(
  model, params: Any, batch: Mapping[str, jax.Array]
) -> jax.Array:
  """What a head says of every row, float32 (B, K).

  K is, for a single label, its number and its probability; for multi-label a
  probability each; for regression the numbers; for tags the label of each
  token; for spans the first token, the last, and their logits' sum; for an
  embedding the vector.

  Args:
    model: a head.
    params: its parameters.
    batch: `encoder_input_tokens` (B, L), and for spans `answerable` (B, L), 1
      where an answer may be.
  """
  head = model.config.head
  outputs = model.apply({"params": params}, batch["encoder_input_tokens"])
  if head.kind == "embedding" or head.problem_type == "regression":
    return outputs
  if head.problem_type == "multi_label_classification":
    return jax.nn.sigmoid(outputs)
  if head.kind == "question_answering":
    return _best_spans(outputs, batch["answerable"], head.max_answer_tokens)
  best = jnp.argmax(outputs, axis=-1).astype(jnp.float32)
  if head.kind == "token_classification":
    return best
  probability_B = jax.nn.softmax(outputs).max(axis=-1)
  return jnp.stack([best, probability_B], axis=1)


def _best_spans(logits_BL2, answerable_BL, max_tokens: int) -> jax.Array:
  """(first, last, score) of the best span a row, (B, 3)."""
  logits_BL2 = jnp.where(answerable_BL[..., None] != 0, logits_BL2, -1e9)
  start_BL, end_BL = logits_BL2[..., 0], logits_BL2[..., 1]
  length = start_BL.shape[1]
  scores = [
    # The span of `more` tokens after its first.
    start_BL[:, : length - more] + end_BL[:, more:]
    for more in range(min(max_tokens, length))
  ]
  best_per_size = jnp.stack([s.max(axis=1) for s in scores], axis=1)
  first_per_size = jnp.stack([s.argmax(axis=1) for s in scores], axis=1)
  more_B = best_per_size.argmax(axis=1)
  pick = lambda x: jnp.take_along_axis(x, more_B[:, None], axis=1)[:, 0]
  first_B = pick(first_per_size)
  columns = (first_B, first_B + more_B, pick(best_per_size))
  return jnp.stack([c.astype(jnp.float32) for c in columns], axis=1)
