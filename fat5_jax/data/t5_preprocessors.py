"""T5's pre-training steps under T5's names, for tasks of SeqIO's own.

  seqio.TaskRegistry.add(
    "c4_v220_span_corruption",
    source=...,
    preprocessors=[
      functools.partial(
        seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}
      ),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      t5_preprocessors.span_corruption,
      seqio.preprocessors.append_eos_after_trim,
    ],
    ...
  )

What they do to tokens is in denoising, in numpy; so are functions of a
person's own for `denoise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax.data import denoising
from fat5_jax.errors import UserError

Lengths = Mapping[str, int]
Features = Mapping[str, seqio.Feature]
# (tokens of a text, share of noise, generator) to a mask.
NoiseMaskFn = Callable[[int, float, np.random.Generator], np.ndarray]
# (tokens, mask, vocabulary) to tokens.
TokensFn = Callable[[np.ndarray, np.ndarray, seqio.Vocabulary], np.ndarray]

# Tokens that T5 takes of a text, texts that it joins before it cuts.
_CHUNK, _JOINED = 65_536, 128


# ---- Numpy: masks, and what becomes of tokens --------------------------------


def random_spans_noise_mask(
  length: int,
  noise_density: float,
  rng: np.random.Generator,
  mean_noise_span_length: float = 3.0,
) -> np.ndarray:
  """Spans of noise, of any number; see denoising.random_spans_noise_mask."""
  if not noise_density:
    return np.zeros(length, bool)
  counts = denoising.span_counts(
    np.array([length]), noise_density, mean_noise_span_length, length
  )
  noise, spans = (int(count[0]) for count in counts)
  mask = denoising.random_spans_noise_mask(max(length, 2), noise, spans, rng)
  return mask[:length]


def iid_noise_mask(
  length: int, noise_density: float, rng: np.random.Generator
) -> np.ndarray:
  """Each token by itself."""
  return rng.random(length) < noise_density


def random_prefix_noise_mask(
  length: int, noise_density: float, rng: np.random.Generator
) -> np.ndarray:
  """The beginning, from one token to all but one.

  Raises:
    UserError: for a share other than 0.5, which is what it has.
  """
  if noise_density != 0.5:
    raise UserError("random_prefix_noise_mask has noise_density = 0.5")
  return np.arange(length) < rng.integers(min(1, length - 1), max(length, 1))


def noise_span_to_unique_sentinel(tokens, noise_mask, vocabulary):
  return denoising.span_to_unique_sentinel(
    tokens, noise_mask, denoising.sentinels(vocabulary)
  )


def nonnoise_span_to_unique_sentinel(tokens, noise_mask, vocabulary):
  return noise_span_to_unique_sentinel(tokens, ~noise_mask, vocabulary)


def drop_noise_tokens(tokens, noise_mask, vocabulary):
  del vocabulary
  return tokens[~noise_mask]


def drop_nonnoise_tokens(tokens, noise_mask, vocabulary):
  del vocabulary
  return tokens[noise_mask]


# ---- Steps of SeqIO's --------------------------------------------------------


def select_random_chunk(
  dataset: tf.data.Dataset,
  output_features: Features | None = None,
  sequence_length: Lengths | None = None,
  max_length: int | None = None,
  feature_key: str = "targets",
) -> tf.data.Dataset:
  """One of a text's chunks of `max_length` tokens; texts without any go.

  Raises:
    UserError: if neither that nor the task's lengths say how long they are.
  """
  if max_length is None:
    if not (sequence_length or {}).get(feature_key):
      raise UserError(
        f"select_random_chunk of {feature_key!r}: set max_length, or its"
        " TASK_FEATURE_LENGTHS"
      )
    ends = output_features is not None and output_features[feature_key].add_eos
    max_length = sequence_length[feature_key] - int(ends)

  @seqio.map_over_dataset(num_seeds=1)
  def chosen(example, seed):
    tokens = example[feature_key]
    size = tf.size(tokens)
    chunks = -(-size // max_length)
    start = max_length * tf.random.stateless_uniform(
      [], seed, maxval=chunks, dtype=tf.int32
    )
    return example | {feature_key: tokens[start : start + max_length]}

  return chosen(dataset.filter(lambda x: tf.size(x[feature_key]) > 0))


def reduce_concat_tokens(
  dataset: tf.data.Dataset, feature_key: str = "targets", batch_size: int = 128
) -> tf.data.Dataset:
  """Texts joined, so many at a time; nothing else of them is kept."""

  def joined(batch):
    return {feature_key: tf.boolean_mask(batch, batch != 0)}

  dataset = dataset.map(lambda x: x[feature_key])
  return dataset.padded_batch(batch_size, [-1]).map(joined)


def split_tokens(
  dataset: tf.data.Dataset,
  max_tokens_per_segment: int,
  min_tokens_per_segment: int | None = None,
  feature_key: str = "targets",
  passthrough_feature_keys: Sequence[str] = (),
) -> tf.data.Dataset:
  """A text's tokens in segments; of a length that is drawn a text where there
  is a least one, on a logarithmic scale.

  Nothing else of it is kept but what is to be passed through.
  """

  @seqio.map_over_dataset(num_seeds=1)
  def split(example, seed):
    tokens, length = example[feature_key], max_tokens_per_segment
    if min_tokens_per_segment is not None:
      low, high = np.log(min_tokens_per_segment), np.log(length)
      length = tf.cast(
        tf.exp(tf.random.stateless_uniform([], seed, low, high)), tf.int32
      )
    ends = tf.range(0, tf.size(tokens), length)
    rows = tf.RaggedTensor.from_row_starts(tokens, tf.cast(ends, tf.int64))
    others = {
      key: tf.repeat(example[key][None], tf.size(ends), axis=0)
      for key in passthrough_feature_keys
    }
    return others | {feature_key: rows}

  dataset = dataset.filter(lambda x: tf.size(x[feature_key]) > 0)
  return split(dataset).unbatch()


def split_tokens_to_inputs_length(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  **options: Any,
) -> tf.data.Dataset:
  """split_tokens at the length of the inputs, room left for their end."""
  ends = output_features["inputs"].add_eos
  most = sequence_length["inputs"] - int(ends)
  return split_tokens(dataset, most, **options)


def denoise(
  dataset: tf.data.Dataset,
  output_features: Features,
  noise_density: float,
  noise_mask_fn: NoiseMaskFn,
  inputs_fn: TokensFn,
  targets_fn: TokensFn | None = None,
  input_feature_key: str = "inputs",
) -> tf.data.Dataset:
  """`inputs` and `targets` from the tokens of `targets` and a mask of noise.

  Without `targets_fn` the targets are the whole text.
  """
  vocabulary = output_features["targets"].vocabulary
  if vocabulary != output_features[input_feature_key].vocabulary:
    raise UserError("denoise needs one vocabulary of inputs and targets")

  def made(tokens, seed):
    rng = np.random.default_rng(seed.astype(np.uint32))
    mask = noise_mask_fn(len(tokens), noise_density, rng)
    found = inputs_fn(tokens, mask, vocabulary)
    kept = (
      tokens if targets_fn is None else targets_fn(tokens, mask, vocabulary)
    )
    return found.astype(tokens.dtype), kept.astype(tokens.dtype)

  @seqio.map_over_dataset(num_seeds=1)
  def apply(example, seed):
    tokens = example["targets"]
    sides = tf.numpy_function(made, [tokens, seed], [tokens.dtype] * 2)
    for side in sides:
      side.set_shape([None])
    return example | {input_feature_key: sides[0], "targets": sides[1]}

  return apply(dataset)


def span_corruption(
  dataset: tf.data.Dataset,
  sequence_length: Lengths,
  output_features: Features,
  mean_noise_span_length: float = 3.0,
  noise_density: float = 0.15,
  input_feature_key: str = "inputs",
  merge_examples_to_reduce_padding: bool = True,
  reserved_for_packing: int | None = None,
) -> tf.data.Dataset:
  """T5's objective; fills the inputs exactly where texts are merged.

  Raises:
    UserError: if the targets have less room than that needs.
  """
  inputs = sequence_length[input_feature_key] - (reserved_for_packing or 0)
  length, targets = denoising.random_spans_helper(
    inputs, noise_density, mean_noise_span_length
  )
  if sequence_length["targets"] < targets:
    raise UserError(
      f"TASK_FEATURE_LENGTHS: inputs of {inputs} tokens make targets of"
      f" {targets}, and there is room for {sequence_length['targets']}"
    )
  dataset = select_random_chunk(dataset, max_length=_CHUNK)
  if merge_examples_to_reduce_padding:
    dataset = reduce_concat_tokens(dataset, batch_size=_JOINED)
  return denoise(
    split_tokens(dataset, length),
    output_features,
    noise_density,
    functools.partial(
      random_spans_noise_mask, mean_noise_span_length=mean_noise_span_length
    ),
    noise_span_to_unique_sentinel,
    nonnoise_span_to_unique_sentinel,
    input_feature_key,
  )


def prefix_lm(
  dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
  """The beginning of a text, of any length, to what follows it."""
  dataset = select_random_chunk(dataset, max_length=_CHUNK)
  dataset = split_tokens_to_inputs_length(
    dataset, sequence_length, output_features
  )
  return denoise(
    dataset,
    output_features,
    0.5,
    random_prefix_noise_mask,
    drop_nonnoise_tokens,
    drop_noise_tokens,
  )


def as_preprocessor(layout: Any) -> Callable[..., tf.data.Dataset]:
  """The step of SeqIO's that asks what a task of pretraining.py asks.

  `layout`: layouts.Corpus.
  """

  def ask(dataset, sequence_length, output_features):
    objective = layout.objective(output_features, sequence_length)

    def made(tokens, seed):
      found = objective.examples([tokens], seed.astype(np.uint32), False)
      columns = []
      for side in ("inputs", "targets"):
        values = [example[side] for example in found]
        columns.append(np.concatenate([*values, np.zeros(0, np.int32)]))
        columns.append(np.array([len(value) for value in values], np.int64))
      return [c.astype(np.int64) for c in columns]

    @seqio.map_over_dataset(num_seeds=1)
    def apply(example, seed):
      columns = tf.numpy_function(
        made, [example["inputs"], seed], [tf.int64] * 4
      )
      for column in columns:
        column.set_shape([None])
      return {
        side: tf.RaggedTensor.from_row_lengths(tf.cast(ids, tf.int32), sizes)
        for side, ids, sizes in (
          ("inputs", *columns[:2]),
          ("targets", *columns[2:]),
        )
      }

    return apply(dataset).unbatch()

  return ask
