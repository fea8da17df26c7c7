"""What a row costs each kind of head, and what the head says of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fat5_jax.errors import UserError
from fat5_jax.objectives import losses
from fat5_jax.objectives.objective import Objective

_PAIR = ("encoder_input", "decoder_target")


class _Labelled(Objective):
  """Of a head whose batches bring `labels` (B, K) and `label_weights`."""

  def label_weights(self, batch):
    """Labels below 0 (-100 is customary) count for nothing."""
    weights_BK = batch["label_weights"].astype(jnp.float32)
    return weights_BK * self.counts(batch)

  def counts(self, batch):
    return batch["labels"] >= 0

  def outputs(self, model, params, batch, options, side="encoder_input"):
    return model.apply({"params": params}, batch[f"{side}_tokens"], **options)

  def costs(self, outputs, labels_BK):
    """(loss, z-loss, whether it is right or None) of every label, (B, K)."""
    raise NotImplementedError

  def parts(self, model, params, batch, weights_BK, options):
    outputs = self.outputs(model, params, batch, options)
    return _sums(weights_BK, *self.costs(outputs, batch["labels"]))

  def predict(self, model, params, batch):
    outputs = self.outputs(model, params, batch, {})
    return self.answer(outputs, batch)

  def answer(self, outputs, batch):
    """What `outputs` say of every row, (B, K)."""
    del batch
    return outputs


class SingleLabel(_Labelled):
  """One class a row; it says its number, and the probability of each."""

  def costs(self, outputs, labels_BK):
    return self.choose(outputs[:, None], labels_BK)

  def choose(self, logits_BKV, labels_BK):
    """The costs of a choice between V classes."""
    loss_BK, z_BK = losses.cross_entropy(
      logits_BKV,
      labels_BK,
      z_loss=self.z_loss,
      label_smoothing=self.label_smoothing,
    )
    return loss_BK, z_BK, jnp.argmax(logits_BKV, axis=-1) == labels_BK

  def answer(self, outputs, batch):
    best = jnp.argmax(outputs, axis=-1).astype(jnp.float32)
    return jnp.concatenate([best[:, None], jax.nn.softmax(outputs)], axis=1)


class Tags(SingleLabel):
  """A class a token; it says the class of each, and its probability."""

  def costs(self, outputs, labels_BK):
    return self.choose(outputs, labels_BK)

  def answer(self, outputs, batch):
    best_BL = jnp.argmax(outputs, axis=-1).astype(jnp.float32)
    probability_BL = jax.nn.softmax(outputs).max(axis=-1)
    return jnp.stack([best_BL, probability_BL], axis=-1)


class Spans(SingleLabel):
  """The first and the last token of an answer; it says both, their score (the
  sum of their logits), their probability among the tokens of the row, and the
  score of no answer, which is that of the first token of the row.

  Positions beyond the row count for nothing. The batch it predicts has
  `answerable` (B, L), 1 where an answer may be.
  """

  def counts(self, batch):
    labels_BK = batch["labels"]
    return (labels_BK >= 0) & (
      labels_BK < batch["encoder_input_tokens"].shape[1]
    )

  def costs(self, outputs, labels_BK):
    return self.choose(jnp.swapaxes(outputs, 1, 2), labels_BK)  # (B, 2, L)

  def answer(self, outputs, batch):
    most = self.config.head.max_answer_tokens
    return _best_spans(outputs, batch["answerable"], most)


class MultiLabel(_Labelled):
  """Any of the classes; it says the probability of each."""

  def __post_init__(self):
    self.refuse_classes_options()

  def costs(self, outputs, labels_BK):
    # softplus(x) - x y: sigmoid cross-entropy that cannot overflow.
    loss_BK = jax.nn.softplus(outputs) - outputs * labels_BK
    right_BK = (outputs > 0) == (labels_BK > 0.5)
    return loss_BK, jnp.zeros_like(loss_BK), right_BK

  def answer(self, outputs, batch):
    return jax.nn.sigmoid(outputs)


class Regression(_Labelled):
  """Numbers, of which any is a label; it says them."""

  def __post_init__(self):
    self.refuse_classes_options()

  def label_weights(self, batch):
    return batch["label_weights"].astype(jnp.float32)

  def costs(self, outputs, labels_BK):
    loss_BK = jnp.square(outputs - labels_BK)
    return loss_BK, jnp.zeros_like(loss_BK), None


class Contrastive(SingleLabel):
  """Texts that belong together, of which it says the vectors.

  The other rows' partners are the wrong answers (Sentence-T5, section 3).
  """

  def check_microbatches(self, count):
    if count > 1:
      raise UserError(
        "NUM_MICROBATCHES: an embedding's wrong answers are the rest of its"
        " batch, so splitting it changes the objective"
      )

  def label_weights(self, batch):
    both = [batch[f"{side}_tokens"] for side in _PAIR]
    pad = self.config.pad_token_id
    real_B = jnp.stack([(x != pad).any(axis=1) for x in both])
    return real_B.all(axis=0).astype(jnp.float32)[:, None]

  def parts(self, model, params, batch, weights_BK, options):
    one_BM, other_BM = (
      self.outputs(model, params, batch, options, side) for side in _PAIR
    )
    scale = self.config.head.similarity_scale
    similarity_BB = scale * one_BM @ other_BM.T
    missing_B = weights_BK[:, 0] == 0
    logits = jnp.where(missing_B[None, :], -1e9, similarity_BB)[:, None]
    labels_BK = jnp.arange(len(other_BM))[:, None]
    return _sums(weights_BK, *self.choose(logits, labels_BK))

  def answer(self, outputs, batch):
    return outputs


def _sums(weights_BK, loss_BK, z_BK, right_BK):
  counted = (weights_BK != 0).astype(jnp.float32)
  cross_entropy = losses.weighted_sum(loss_BK, weights_BK)
  z = losses.weighted_sum(z_BK, weights_BK)
  found = {
    "loss": cross_entropy + z,
    "cross_entropy": cross_entropy,
    "z_loss": z,
    "token_loss": losses.weighted_sum(loss_BK, counted),
  }
  if right_BK is not None:
    found["correct"] = losses.weighted_sum(right_BK, counted)
  return found


def _best_spans(logits_BL2, answerable_BL, max_tokens: int) -> jax.Array:
  """(first, last, score, probability, score of none) of the best span a row,
  (B, 5)."""
  none_B = logits_BL2[:, 0].sum(axis=-1)
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
  score_B = pick(best_per_size)
  totals_B2 = jax.nn.logsumexp(logits_BL2, axis=1)
  probability_B = jnp.exp(score_B - totals_B2.sum(axis=1))
  columns = (first_B, first_B + more_B, score_B, probability_B, none_B)
  return jnp.stack([c.astype(jnp.float32) for c in columns], axis=1)
