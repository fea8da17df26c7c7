"""Rows that are left out, counted by what is wrong with them."""

from __future__ import annotations

import collections
import re

# Kinds of mistakes that are told apart; the rest is a number.
_KINDS = 4


class Skipped:
  """What skip_bad_rows leaves out of a split.

  Attributes:
    rows: how many.
  """

  def __init__(self):
    self.rows = 0
    self._counts: dict[str, int] = collections.Counter()
    self._first: dict[str, str] = {}

  def add(self, where: str, reason: str) -> None:
    """A row at a place, and what is wrong with it."""
    self.rows += 1
    # The same mistake of another value.
    kind = re.sub(r"'[^']*'|\d+", "", reason)
    self._counts[kind] += 1
    self._first.setdefault(kind, f"{reason} (first {where})")

  def describe(self, kept: int) -> str:
    """For a person, beside so many rows that are fine; most frequent first."""
    ranked = sorted(self._counts.items(), key=lambda item: -item[1])
    parts = [f"{n:,} x {self._first[kind]}" for kind, n in ranked[:_KINDS]]
    rest = sum(n for _, n in ranked[_KINDS:])
    parts += [f"{rest:,} others"] if rest else []
    return (
      f"left out {self.rows:,} bad rows of {self.rows + kept:,}:"
      f" {'; '.join(parts)}"
    )

  def merge(self, other: Skipped) -> None:
    """Adds what another part of the split left out."""
    self.rows += other.rows
    for kind, count in other._counts.items():
      self._counts[kind] += count
      self._first.setdefault(kind, other._first[kind])
