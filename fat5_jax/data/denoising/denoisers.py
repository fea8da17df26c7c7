"""Denoisers: what is asked about a text, and what is the answer.

T5's span corruption and prefix language modelling, UL2's mixture (Tay et al.
2022) as FAT5 has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from fat5_jax.data.denoising import masks
from fat5_jax.data.files import listed, shown
from fat5_jax.errors import UserError, nearest


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
    most = self.max_spans
    if most is not None and (type(most) is not int or most < 1):
      raise UserError(
        f"max_spans = {shown(most)} must be a whole number, at least 1"
      )

  def counts(self, lengths_N: np.ndarray, most: int):
    most = most if self.max_spans is None else min(most, self.max_spans)
    return masks.span_counts(
      lengths_N, self.noise_density, self.mean_noise_span_length, most
    )

  def sizes(
    self, lengths_N: np.ndarray, draws_N: np.ndarray, sentinel_ids: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of (inputs, targets) of texts of these lengths."""
    del draws_N
    noise_N, spans_N = self.counts(lengths_N, len(sentinel_ids))
    return lengths_N - noise_N + spans_N, noise_N + spans_N

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
    mask = masks.random_spans_noise_mask(
      len(tokens), int(noise[0]), int(spans[0]), rng
    )
    return (
      masks.span_to_unique_sentinel(tokens, mask, sentinel_ids),
      masks.span_to_unique_sentinel(tokens, ~mask, sentinel_ids),
    )

  def describe(self, length: int = 0, sentinels: int = 0) -> str:
    """For a person; of a text of so many tokens, what becomes of it."""
    found = (
      f"spans of {self.mean_noise_span_length:g} tokens,"
      f" {self.noise_density:.0%} noise"
    )
    if length:
      whole = np.array([length])
      shape = self.noise_density, self.mean_noise_span_length
      _, asked = masks.span_counts(whole, *shape, length)
      noise, spans = self.counts(whole, sentinels)
      if spans < asked:
        mean = float(noise[0] / spans[0])
        found += f" (in {spans[0]} spans at most, so of {mean:.1f} tokens)"
    return found


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

  def describe(self, length: int = 0, sentinels: int = 0) -> str:
    del length, sentinels
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
  if not isinstance(kind, str) or kind not in _KINDS:
    raise UserError(
      f"objective: kind {shown(kind)} is not one of {listed(_KINDS)}"
    )
  known = [field.name for field in dataclasses.fields(_KINDS[kind])]
  for name in fields:
    if not isinstance(name, str) or name not in known:
      raise UserError(
        f"objective: a denoiser of kind {kind!r} has no {name!r}."
        f"{nearest(name, known)} It has {', '.join(known)}"
      )
  return _KINDS[kind](**fields)
