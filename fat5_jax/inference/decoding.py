"""Predictions of a batch; generation over a key/value cache.

A search takes `step(tokens_B1, cache, index) -> (logits_B1V, cache)` and
returns tokens; greedy is one, beam search and sampling are others to come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fat5_jax import objectives
from fat5_jax.distributed.sharding import Partitioner

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


def make_predict_step(
  model: Any, partitioner: Partitioner, max_length: int | None
):
  """(params, batch) -> predictions of every row, on every host.

  Tokens (B, max_length) of a language model; of a head what its objective says
  of a row, which needs no length.
  """
  if model.config.is_language_model:

    def predict(params, batch):
      tokens = batch["encoder_input_tokens"]
      return generate(model, params, tokens, max_length)

  else:
    objective = objectives.of(model.config)

    def predict(params, batch):
      return objective.predict(model, params, batch)

  return partitioner.jit(predict, out_shardings=partitioner.replicated)
