"""Which tokens of a text are noise, and how a text looks without them.

T5's span corruption (Raffel et al. 2020, 3.1.4).
"""

from __future__ import annotations

import numpy as np
import seqio

from fat5_jax.data.vocabularies import piece_id
from fat5_jax.errors import UserError

# Tokens of the shortest text that something can be asked about.
SHORTEST = 2
# The id of byte 255, and how many from there on ByT5 takes.
_LAST_BYTE, _BYTE_SENTINELS = 258, 100


def random_spans_helper(
  inputs_length: int,
  noise_density: float,
  mean_noise_span_length: float,
  extra_tokens_per_span_inputs: int = 1,
  extra_tokens_per_span_targets: int = 1,
) -> tuple[int, int]:
  """T5's (tokens of text, tokens of targets) that fill inputs of a length.

  Both ends of sequence are counted. 512 inputs at 0.15 and 3 are (568, 114).
  """

  def sizes(length):
    noise = round(length * noise_density)
    spans = round(noise / mean_noise_span_length)
    return (
      length - noise + spans * extra_tokens_per_span_inputs + 1,
      noise + spans * extra_tokens_per_span_targets + 1,
    )

  length = inputs_length - 1
  while sizes(length + 1)[0] <= inputs_length:
    length += 1
  inputs, targets = sizes(length)
  # T5 makes both sides equal where half of the text is noise.
  if noise_density == 0.5 and targets > inputs:
    return length - 1, targets - 1
  return length, targets


def span_counts(
  lengths_N: np.ndarray,
  noise_density: float,
  mean_noise_span_length: float,
  max_spans: int,
) -> tuple[np.ndarray, np.ndarray]:
  """(noise tokens, noise spans) of texts of these lengths, int64 (N,) each.

  T5's, in its float32; at least one of both, and no more spans than there are
  tokens to tell them apart.
  """
  lengths_N = np.maximum(lengths_N, SHORTEST)
  noise_N = np.round(lengths_N * np.float32(noise_density)).astype(np.int64)
  noise_N = np.clip(noise_N, 1, lengths_N - 1)
  spans_N = np.round(noise_N / np.float32(mean_noise_span_length))
  most_N = np.minimum(np.minimum(noise_N, lengths_N - noise_N), max_spans)
  return noise_N, np.clip(spans_N.astype(np.int64), 1, most_N)


def random_spans_noise_mask(
  length: int, noise: int, spans: int, rng: np.random.Generator
) -> np.ndarray:
  """T5's noise mask, bool (length,): spans of text and of noise take turns.

  The first is of text. All masks of so many noise tokens and spans are equally
  likely.
  """
  parts = np.empty((spans, 2), np.int64)
  parts[:, 0] = _segmentation(length - noise, spans, rng)
  parts[:, 1] = _segmentation(noise, spans, rng)
  return np.repeat(np.tile([False, True], spans), parts.ravel())


def _segmentation(
  items: int, segments: int, rng: np.random.Generator
) -> np.ndarray:
  """Lengths of segments, each at least 1, that are so many items together."""
  ends = rng.permutation(items - 1)[: segments - 1] + 1
  return np.diff(np.sort(ends), prepend=0, append=items)


def sentinels(vocabulary: seqio.Vocabulary) -> np.ndarray:
  """The ids of <extra_id_0>, <extra_id_1>, ...: T5 counts down from the last.

  Where a SentencePiece model has them as pieces of its own, the ids of those;
  ByT5's are bytes (arXiv:2105.13626, 3.1), the last of which no text has.
  """
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return _LAST_BYTE - np.arange(_BYTE_SENTINELS, dtype=np.int32)
  extra = vocabulary.extra_ids
  if extra:
    return vocabulary.vocab_size - 1 - np.arange(extra, dtype=np.int32)
  found: list[int] = []
  while (
    number := piece_id(vocabulary, f"<extra_id_{len(found)}>")
  ) is not None:
    found.append(number)
  return np.array(found, np.int32)


def span_to_unique_sentinel(
  tokens: np.ndarray, hidden: np.ndarray, sentinel_ids: np.ndarray
) -> np.ndarray:
  """Tokens with each span of hidden ones as one sentinel, in order.

  T5's noise_span_to_unique_sentinel; with the mask inverted, its targets.

  Args:
    tokens, hidden: (length,) each.
    sentinel_ids: of the first, the second, ...

  Raises:
    UserError: if there are more spans than sentinels.
  """
  first = hidden.copy()
  first[1:] &= ~hidden[:-1]
  spans = int(first.sum())
  if spans > len(sentinel_ids):
    raise UserError(
      f"{spans} spans of noise, and the vocabulary has {len(sentinel_ids)}"
      " sentinels (extra_ids)"
    )
  found = tokens.copy()
  found[first] = sentinel_ids[:spans]
  return found[first | ~hidden]
