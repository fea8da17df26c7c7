"""How likely a language model finds a target: teacher forcing, no search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.inference import batches

# Positions whose logits over the vocabulary are in memory at a time.
_POSITIONS = 16


def make_score_step(model: Any, partitioner: Partitioner):
  """(params, batch) -> float32 (B,), the log-likelihood of each row's target.

  Natural logarithm, summed over the target's real tokens. Logits are float32.
  """
  config = model.config

  def of_positions(kernel_MV, hidden_BM, target_B):
    logits_BV = jnp.dot(
      hidden_BM,
      kernel_MV.astype(hidden_BM.dtype),
      preferred_element_type=jnp.float32,
    )
    chosen_B1 = jnp.take_along_axis(logits_BV, target_B[:, None], axis=1)
    return chosen_B1[:, 0] - jax.nn.logsumexp(logits_BV, axis=1)

  def score(params, batch):
    target_BL = batch["decoder_target_tokens"]
    hidden_BLM = model.apply(
      {"params": params},
      batch["encoder_input_tokens"],
      batch["decoder_input_tokens"],
      target_BL,
      project=False,
    )
    kernel_MV = model.output_kernel(params)
    log_p_LB = jax.lax.map(
      lambda x: of_positions(kernel_MV, *x),
      (jnp.swapaxes(hidden_BLM, 0, 1), target_BL.T),
      batch_size=_POSITIONS,
    )
    real_LB = target_BL.T != config.pad_token_id
    return jnp.where(real_LB, log_p_LB, 0.0).sum(axis=0)

  return partitioner.jit(score, out_shardings=partitioner.replicated)


class Scorer:
  """Log-likelihoods of targets, compiled once a shape.

  Attributes:
    model: a language model.
    batch_size: most rows a batch.
  """

  def __init__(self, model: Any, partitioner: Partitioner, batch_size: int):
    self.model, self.batch_size = model, batch_size
    self._partitioner = partitioner
    self._shapes = batches.Shapes(batch_size)
    self._score = make_score_step(model, partitioner)

  def __call__(
    self, params: Any, examples: Iterable[Mapping[str, Any]]
  ) -> np.ndarray:
    """float64 (N,), in the order of the examples.

    Args:
      params: of the model.
      examples: with `inputs` and `targets`, token ids with their end, unpadded.
        Batches hold rows of about one length.
    """
    rows = list(examples)
    longest = lambda i: max(len(rows[i]["inputs"]), len(rows[i]["targets"]))
    order = sorted(range(len(rows)), key=longest)
    found = np.zeros(len(rows))
    for group in batches.group(order, longest, self.batch_size):
      found[group] = self._scores(params, [rows[i] for i in group])
    return found

  def _scores(self, params, rows) -> np.ndarray:
    config = self.model.config
    lengths = {
      side: max(len(row[side]) for row in rows)
      for side in ("inputs", "targets")
    }
    height, _ = self._shapes.of([max(lengths.values())] * len(rows))
    height = self._partitioner.round_up(height)

    def padded(side):
      shape = height, batches.padded_length(lengths[side])
      ids = [row[side] for row in rows]
      return batches.padded(ids, shape, config.pad_token_id)

    targets = padded("targets")
    starts = np.full((height, 1), config.decoder_start_token_id, np.int32)
    batch = {
      "encoder_input_tokens": padded("inputs"),
      "decoder_input_tokens": np.concatenate([starts, targets[:, :-1]], axis=1),
      "decoder_target_tokens": targets,
    }
    placed = self._partitioner.to_devices(batch, 0, height)
    return np.asarray(self._score(params, placed), np.float64)[: len(rows)]
