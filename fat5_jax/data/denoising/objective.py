"""Texts of any length in examples, each with a denoiser that is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np
import seqio

from fat5_jax.data.denoising.denoisers import Denoiser, SpanCorruption
from fat5_jax.data.denoising.masks import SHORTEST, sentinels
from fat5_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segments:
  """Where examples lie in texts, and what happens to each; (N,) each.

  Attributes:
    texts: number of the text.
    begins, ends: of the tokens in it.
    kinds: number of the denoiser.
    draws: float64 in [0, 1).
    sizes_N2: tokens of inputs and of targets.
  """

  texts: np.ndarray
  begins: np.ndarray
  ends: np.ndarray
  kinds: np.ndarray
  draws: np.ndarray
  sizes_N2: np.ndarray

  def __len__(self) -> int:
    return len(self.texts)


class Objective:
  """Denoisers, bound to a vocabulary and to the lengths of both sides.

  Attributes:
    longest: tokens of the longest text that each denoiser takes.
  """

  def __init__(
    self,
    denoisers: Sequence[Denoiser],
    vocabulary: seqio.Vocabulary,
    limits: Mapping[str, int],
    text_length: int | None = None,
  ):
    """
    Args:
      denoisers: with their rates.
      vocabulary: of both sides.
      limits: tokens of `inputs` and of `targets`, their ends included.
      text_length: no example is of a longer text; None is what both hold.

    Raises:
      UserError: if a denoiser has no room there, or no sentinel.
    """
    self._denoisers, self._limits = tuple(denoisers), dict(limits)
    self._end = np.array([vocabulary.eos_id], np.int32)
    self._sentinels = sentinels(vocabulary)
    self._prefixes = [_prefix(vocabulary, d.prefix) for d in denoisers]
    self.longest = np.array(
      [self._longest(*pair) for pair in zip(denoisers, self._prefixes)]
    )
    if text_length is not None:
      self.longest = np.minimum(self.longest, text_length)
    shares = np.cumsum([d.rate for d in denoisers])
    self._shares = shares / shares[-1]

  def _longest(self, denoiser: Denoiser, prefix: np.ndarray) -> int:
    inputs, targets = self._limits["inputs"], self._limits["targets"]
    if not len(self._sentinels) and (
      isinstance(denoiser, SpanCorruption) or denoiser.with_sentinel
    ):
      raise UserError(
        f"the vocabulary has no sentinel, and a denoiser"
        f" ({denoiser.describe()}) needs some: VOCAB_EXTRA_IDS = 100"
      )
    # Neither side gets shorter with a longer text.
    lengths_N = np.arange(SHORTEST, inputs + targets)
    fits_N = np.ones(len(lengths_N), bool)
    # A place that is drawn may be the first as well as the last.
    for draw in (0.0, np.nextafter(1.0, 0.0)):
      draws_N = np.full(len(lengths_N), draw)
      asked_N, answered_N = denoiser.sizes(lengths_N, draws_N, self._sentinels)
      fits_N &= asked_N + len(prefix) + 1 <= inputs
      fits_N &= answered_N + 1 <= targets
    found = int(lengths_N[fits_N].max(initial=0))
    if found < SHORTEST:
      raise UserError(
        f"TASK_FEATURE_LENGTHS {self._limits} are too short for a denoiser"
        f" ({denoiser.describe()}, {len(prefix)} tokens before it)"
      )
    return found

  def cut(
    self,
    lengths: np.ndarray,
    seed: Sequence[int],
    epochs: np.ndarray | None = None,
  ) -> Segments:
    """Texts of these lengths in examples, each with a denoiser that is drawn.

    They are shuffled within the `epochs` of the texts, or stay in order.

    A text that is too long for one begins with an example of any length, so
    that its cuts are others every time. What is left of it and too short to ask
    about, a single token, is left out.
    """
    parts, rng = [], np.random.default_rng(seed)
    shortest = int(self.longest.min())
    for text, length in enumerate(np.asarray(lengths).tolist()):
      draws = rng.random(length // shortest + 2)
      kinds = np.searchsorted(self._shares, draws, side="right")
      ends = np.cumsum(self.longest[kinds])
      if length > ends[0]:
        ends -= rng.integers(ends[0])
      count = int(np.searchsorted(ends, length)) + 1
      ends = np.minimum(ends[:count], length)
      begins = np.concatenate([[0], ends[:-1]])
      parts.append((np.full(count, text), begins, ends, kinds[:count]))
    columns = (
      [np.concatenate(c) for c in zip(*parts)]
      if parts
      else [np.zeros(0, np.int64)] * 4
    )
    keep = columns[2] - columns[1] >= SHORTEST
    texts, begins, ends, kinds = (column[keep] for column in columns)
    if epochs is not None:
      order = np.lexsort((rng.random(len(texts)), epochs[texts]))
      texts, begins, ends, kinds = (
        column[order] for column in (texts, begins, ends, kinds)
      )
    draws = rng.random(len(texts))
    sizes_N2 = self._sizes(ends - begins, kinds, draws)
    return Segments(texts, begins, ends, kinds, draws, sizes_N2)

  def _sizes(self, lengths, kinds, draws) -> np.ndarray:
    sizes_N2 = np.zeros((len(lengths), 2), np.int64)
    for number, (denoiser, prefix) in enumerate(
      zip(self._denoisers, self._prefixes)
    ):
      here = kinds == number
      asked, answered = denoiser.sizes(
        lengths[here], draws[here], self._sentinels
      )
      sizes_N2[here, 0] = asked + len(prefix) + 1
      sizes_N2[here, 1] = answered + 1
    return sizes_N2

  def example(
    self,
    tokens: np.ndarray,
    segments: Segments,
    number: int,
    seed: Sequence[int],
  ) -> dict[str, np.ndarray]:
    """The example of a segment of a text; `seed` as in `cut`."""
    # A seed of its own: whatever else is read changes nothing.
    rng = np.random.default_rng([*seed, 1 + number])
    part = tokens[segments.begins[number] : segments.ends[number]]
    kind = segments.kinds[number]
    inputs, targets = self._denoisers[kind].apply(
      part, segments.draws[number], rng, self._sentinels
    )
    return {
      "inputs": np.concatenate([self._prefixes[kind], inputs, self._end]),
      "targets": np.concatenate([targets, self._end]),
    }

  def examples(
    self, texts: Sequence[np.ndarray], seed: Sequence[int], shuffle: bool
  ) -> list[dict[str, np.ndarray]]:
    """Those of texts, all of them."""
    lengths = np.array([len(text) for text in texts], np.int64)
    segments = self.cut(lengths, seed, 0 * lengths if shuffle else None)
    return [
      self.example(texts[text], segments, number, seed)
      for number, text in enumerate(segments.texts)
    ]

  def describe(self) -> str:
    """For a person: what is drawn how often, of texts how long."""
    before = np.concatenate([[0.0], self._shares[:-1]])
    return "; ".join(
      f"{share:.3g} % {denoiser.prefix + ' ' * bool(denoiser.prefix)}"
      f"{denoiser.describe(int(longest), len(self._sentinels))},"
      f" of {longest:,} tokens"
      for denoiser, share, longest in zip(
        self._denoisers, 100 * (self._shares - before), self.longest
      )
    )


def _prefix(vocabulary: seqio.Vocabulary, text: str) -> np.ndarray:
  """The ids of a mode token where a text begins with it.

  SentencePiece puts a space before one that is a piece of its own; who asks the
  model later in these words has it too, here and in transformers.
  """
  return np.array(vocabulary.encode(text) if text else [], np.int32)
