"""Pre-training objectives: from tokens of a text to what is asked and answered.

T5's span corruption and prefix language modelling (Raffel et al. 2020, 3.1.4),
UL2's mixture of denoisers (Tay et al. 2022) with the seven that FAT5 has. Plain
numpy: what happens to a piece of text is known from its length and a seed, so
it is known which go together before any of them is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import seqio

from fat5_jax.data.files import listed, shown
from fat5_jax.errors import UserError, nearest

# Tokens of the shortest text that something can be asked about.
_SHORTEST = 2
# The id of byte 255, and how many from there on ByT5 takes.
_LAST_BYTE, _BYTE_SENTINELS = 258, 100


# ---- Masks -------------------------------------------------------------------


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
  lengths_N = np.maximum(lengths_N, _SHORTEST)
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


# ---- Tokens ------------------------------------------------------------------


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


def piece_id(vocabulary: seqio.Vocabulary, piece: str) -> int | None:
  """The id of a piece of a SentencePiece model; None where it has none."""
  tokenizer = getattr(vocabulary, "tokenizer", None)
  if not hasattr(tokenizer, "piece_to_id"):
    return None
  number = tokenizer.piece_to_id(piece)
  return number if tokenizer.id_to_piece(number) == piece else None


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


# ---- Denoisers ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
  """Spans of a text are asked for; a sentinel stands for each.

  Attributes:
    noise_density: share of the tokens that are in spans (UL2's r).
    mean_noise_span_length: tokens of a span (UL2's mu).
    max_spans: no more of them; None is as many as there are sentinels.
    prefix: text before the inputs, UL2's mode token.
    rate: how often it is drawn in a mixture.
  """

  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  max_spans: int | None = None
  prefix: str = ""
  rate: float = 1.0

  def __post_init__(self):
    _check_number(self, "noise_density", 0, 1)
    _check_number(self, "mean_noise_span_length", 0)
    _check_rate(self)
    if self.max_spans is not None and self.max_spans < 1:
      raise UserError(f"max_spans = {self.max_spans!r} must be at least 1")

  def counts(self, lengths_N: np.ndarray, most: int):
    most = most if self.max_spans is None else min(most, self.max_spans)
    return span_counts(
      lengths_N, self.noise_density, self.mean_noise_span_length, most
    )

  def sizes(
    self, lengths_N: np.ndarray, draws_N: np.ndarray, sentinel_ids: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of (inputs, targets) of texts of these lengths."""
    del draws_N
    noise_N, spans_N = self.counts(lengths_N, len(sentinel_ids))
    return lengths_N - noise_N + spans_N, noise_N + spans_N

  def longest(self, inputs: int, targets: int, sentinel_ids) -> int:
    """The longest text whose sides have at most so many tokens; 0 for none."""
    # Neither side gets shorter with a longer text.
    lengths_N = np.arange(_SHORTEST, inputs + targets + 1)
    asked_N, answered_N = self.sizes(lengths_N, lengths_N, sentinel_ids)
    fits_N = (asked_N <= inputs) & (answered_N <= targets)
    return int(lengths_N[fits_N].max(initial=0))

  def apply(
    self,
    tokens: np.ndarray,
    draw: float,
    rng: np.random.Generator,
    sentinel_ids: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of a text, without its prefix and its ends."""
    del draw
    length = np.array([len(tokens)])
    noise, spans = self.counts(length, len(sentinel_ids))
    mask = random_spans_noise_mask(
      len(tokens), int(noise[0]), int(spans[0]), rng
    )
    return (
      span_to_unique_sentinel(tokens, mask, sentinel_ids),
      span_to_unique_sentinel(tokens, ~mask, sentinel_ids),
    )

  def describe(self) -> str:
    return (
      f"spans of {self.mean_noise_span_length:g} tokens,"
      f" {self.noise_density:.0%} noise"
    )


@dataclasses.dataclass(frozen=True)
class PrefixLM:
  """A text's beginning is given, the rest is asked for.

  Attributes:
    prefix_share: of the text; None draws the place (T5's prefix_lm), 0 asks for
      all of it: a language model.
    with_sentinel: whether both sides have <extra_id_0> at the place, as the
      sequential denoiser of FAT5 has.
    prefix: text before the inputs, UL2's mode token.
    rate: how often it is drawn in a mixture.
  """

  prefix_share: float | None = None
  with_sentinel: bool = False
  prefix: str = ""
  rate: float = 1.0

  def __post_init__(self):
    if self.prefix_share is not None:
      _check_number(self, "prefix_share", 0, 1, closed=True)
    _check_rate(self)

  def _given(self, lengths_N: np.ndarray, draws_N: np.ndarray) -> np.ndarray:
    """Tokens of the beginnings; of each text one at least is left."""
    if self.prefix_share is None:
      return 1 + (draws_N * (lengths_N - 1)).astype(np.int64)
    given_N = np.round(lengths_N * self.prefix_share).astype(np.int64)
    return np.minimum(given_N, lengths_N - 1)

  def sizes(
    self, lengths_N: np.ndarray, draws_N: np.ndarray, sentinel_ids: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of (inputs, targets) of texts of these lengths."""
    del sentinel_ids
    given_N = self._given(lengths_N, draws_N)
    return (
      given_N + self.with_sentinel,
      lengths_N - given_N + self.with_sentinel,
    )

  def longest(self, inputs: int, targets: int, sentinel_ids) -> int:
    """The longest text whose sides have at most so many tokens; 0 for none."""
    if self.with_sentinel and not len(sentinel_ids):
      return 0
    lengths_N = np.arange(_SHORTEST, inputs + targets + 2)
    fits_N = np.ones(len(lengths_N), bool)
    # A drawn place may be the first as well as the last.
    for draw in (0.0, np.nextafter(1.0, 0.0)):
      draws_N = np.full(len(lengths_N), draw)
      asked_N, answered_N = self.sizes(lengths_N, draws_N, sentinel_ids)
      fits_N &= (asked_N <= inputs) & (answered_N <= targets)
    return int(lengths_N[fits_N].max(initial=0))

  def apply(
    self,
    tokens: np.ndarray,
    draw: float,
    rng: np.random.Generator,
    sentinel_ids: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of a text, without its prefix and its ends."""
    del rng
    given = int(self._given(np.array([len(tokens)]), np.array([draw]))[0])
    mark = sentinel_ids[: int(self.with_sentinel)]
    return (
      np.concatenate([tokens[:given], mark]),
      np.concatenate([mark, tokens[given:]]),
    )

  def describe(self) -> str:
    if self.prefix_share is None:
      return "what follows a beginning of any length"
    if not self.prefix_share:
      return "the whole text"
    return f"what follows the first {self.prefix_share:.0%}"


Denoiser = SpanCorruption | PrefixLM
_KINDS = {"span_corruption": SpanCorruption, "prefix_lm": PrefixLM}


def _check_number(
  where: Any, name: str, least: float, most: float = np.inf, closed=False
) -> None:
  value = getattr(where, name)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  inside = is_number and (
    least <= value <= most if closed else least < value < most
  )
  if not inside:
    bounds = f"{least:g} and {most:g}" if most < np.inf else f"above {least:g}"
    raise UserError(
      f"{name} = {shown(value)} must be a number"
      f" {'between ' * (most < np.inf)}{bounds}"
    )


def _check_rate(where: Denoiser) -> None:
  _check_number(where, "rate", 0)
  if not isinstance(where.prefix, str):
    raise UserError(f"prefix = {shown(where.prefix)} is no text")


# What FAT5 was pre-trained on (catie-aq/flashT5, examples/fat5-fr): regular,
# sequential and extreme denoisers, told apart by their mode token.
_FAT5_UL2 = (
  SpanCorruption(0.15, 3.0, prefix="[R]", rate=0.165),
  SpanCorruption(0.15, 8.0, prefix="[R]", rate=0.165),
  PrefixLM(0.25, with_sentinel=True, prefix="[S]", rate=0.34),
  SpanCorruption(0.5, 3.0, prefix="[X]", rate=0.0825),
  SpanCorruption(0.15, 8.0, prefix="[X]", rate=0.0825),
  SpanCorruption(0.15, 64.0, prefix="[X]", rate=0.0825),
  SpanCorruption(0.5, 64.0, prefix="[X]", rate=0.0825),
)
OBJECTIVES: dict[str, tuple[Denoiser, ...]] = {
  "span_corruption": (SpanCorruption(),),
  "prefix_lm": (PrefixLM(),),
  "causal_lm": (PrefixLM(0.0),),
  "ul2": _FAT5_UL2,
}


def find(objective: Any) -> tuple[Denoiser, ...]:
  """The denoisers of a name of OBJECTIVES, or of what describes them.

  Args:
    objective: a name; or a mapping, or several, of a denoiser's attributes and
      `kind`, 'span_corruption' (where it is left out) or 'prefix_lm'.

  Raises:
    UserError: for anything else.
  """
  if isinstance(objective, str):
    if objective not in OBJECTIVES:
      raise UserError(
        f"objective {objective!r} is unknown.{nearest(objective, OBJECTIVES)}"
        f" Known: {', '.join(OBJECTIVES)}; or describe denoisers, [{{'kind':"
        " 'span_corruption', 'noise_density': 0.15}, ...]"
      )
    return OBJECTIVES[objective]
  several = [objective] if isinstance(objective, Mapping) else objective
  if not isinstance(several, Sequence) or not several:
    raise UserError(f"objective = {shown(objective)} names no denoiser")
  return tuple(_described(one) for one in several)


def _described(given: Any) -> Denoiser:
  if not isinstance(given, Mapping):
    raise UserError(
      f"objective: {shown(given)} is no denoiser; one is {{'kind':"
      " 'span_corruption', 'noise_density': 0.15, ...}"
    )
  fields = dict(given)
  kind = fields.pop("kind", "span_corruption")
  if kind not in _KINDS:
    raise UserError(
      f"objective: kind {shown(kind)} is not one of {listed(_KINDS)}"
    )
  known = [field.name for field in dataclasses.fields(_KINDS[kind])]
  for name in fields:
    if name not in known:
      raise UserError(
        f"objective: a denoiser of kind {kind!r} has no {name!r}."
        f"{nearest(name, known)} It has {', '.join(known)}"
      )
  return _KINDS[kind](**fields)


# ---- A text of any length ----------------------------------------------------


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
    found = denoiser.longest(
      inputs - 1 - len(prefix), targets - 1, self._sentinels
    )
    if found < _SHORTEST:
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
    keep = columns[2] - columns[1] >= _SHORTEST
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
      f"{denoiser.describe()}, of {longest:,} tokens"
      for denoiser, share, longest in zip(
        self._denoisers, 100 * (self._shares - before), self.longest
      )
    )


def _prefix(vocabulary: seqio.Vocabulary, text: str) -> np.ndarray:
  """The ids of a mode token: a piece of its own, or the text's."""
  if not text:
    return np.zeros(0, np.int32)
  number = piece_id(vocabulary, text)
  ids = vocabulary.encode(text) if number is None else [number]
  return np.array(ids, np.int32)
