"""A small text-to-text set worth learning: spoken dates and amounts to data.

"the twenty-third of May, 1984" -> "1984-05-23"
"forty-two euros and seven cents" -> "42.07 EUR"

Everything follows from a seed, and the validation rows never occur in training.
"""

from __future__ import annotations

from collections.abc import Iterator
import datetime
import random

_UNITS = (
  "zero one two three four five six seven eight nine ten eleven twelve"
  " thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = {
  "one": "first",
  "two": "second",
  "three": "third",
  "five": "fifth",
  "eight": "eighth",
  "nine": "ninth",
  "twelve": "twelfth",
  "twenty": "twentieth",
  "thirty": "thirtieth",
}
_CURRENCIES = (
  ("dollar", "USD"),
  ("euro", "EUR"),
  ("franc", "CHF"),
)


def cardinal(number: int) -> str:
  """An English cardinal below 100."""
  if number < 20:
    return _UNITS[number]
  tens, unit = divmod(number, 10)
  return _TENS[tens - 2] + (f"-{_UNITS[unit]}" if unit else "")


def ordinal(number: int) -> str:
  """An English ordinal below 100."""
  head, dash, last = cardinal(number).rpartition("-")
  return head + dash + _ORDINALS.get(last, f"{last}th")


def _suffixed(day: int) -> str:
  if day in (11, 12, 13):
    return f"{day}th"
  return f"{day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th') }"


def _date(rng: random.Random) -> tuple[str, str]:
  day = datetime.date(1900, 1, 1) + datetime.timedelta(rng.randrange(50000))
  month = day.strftime("%B")
  text = rng.choice(
    (
      f"the {ordinal(day.day)} of {month}, {day.year}",
      f"{month} the {ordinal(day.day)}, {day.year}",
      f"{month} {day.day}, {day.year}",
      f"{_suffixed(day.day)} of {month} {day.year}",
      f"{day.day} {month[:3]} {day.year}",
    )
  )
  return text, day.isoformat()


def _plural(count: int, noun: str) -> str:
  return f"{cardinal(count)} {noun}{'' if count == 1 else 's'}"


def _amount(rng: random.Random) -> tuple[str, str]:
  noun, code = rng.choice(_CURRENCIES)
  whole, cents = rng.randrange(1, 100), rng.randrange(1, 100)
  text = f"{_plural(whole, noun)} and {_plural(cents, 'cent')}"
  return text, f"{whole}.{cents:02d} {code}"


def rows(
  train_rows: int, validation_rows: int, seed: int, split: str
) -> Iterator[dict[str, str]]:
  """Rows with columns `text` and `value`, all texts distinct.

  Args:
    train_rows: size of the training set.
    validation_rows: size of the validation set, drawn first.
    seed: fixes everything.
    split: "train" or "validation".
  """
  rng = random.Random(seed)
  seen: set[str] = set()
  last = (
    validation_rows if split == "validation" else (validation_rows + train_rows)
  )
  while len(seen) < last:
    text, value = rng.choice((_date, _amount))(rng)
    if text in seen:
      continue
    seen.add(text)
    if split == "validation" or len(seen) > validation_rows:
      yield {"text": text, "value": value}
