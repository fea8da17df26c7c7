"""What counts of targets and predictions tell of each class; no model in it.

The page (report.py) and the terminal (details.py) have their numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

# Guo et al. 2017, section 4.
BINS = 15


class ClassScores(NamedTuple):
  """What is right of a class, from 0 to 1; None where there is nothing.

  Attributes:
    targets: how often it is the target, its support.
    predicted: how often it is predicted.
  """

  name: str
  precision: float | None
  recall: float | None
  f1: float | None
  targets: int
  predicted: int


def scores(name: str, hits: int, targets: int, predicted: int) -> ClassScores:
  """Of a class that is the target `targets` times and right `hits` times."""
  return ClassScores(
    name,
    hits / predicted if predicted else None,
    hits / targets if targets else None,
    2 * hits / (targets + predicted) if targets + predicted else None,
    targets,
    predicted,
  )


def by_class(
  pairs: Mapping[tuple[Any, Any], int], names: Sequence[str]
) -> list[ClassScores]:
  """The scores of each name, in order.

  Args:
    pairs: how often a (target, prediction) came.
    names: the classes; whatever else stands in a pair is none of them.
  """
  hits, targets, predicted = (dict.fromkeys(names, 0) for _ in range(3))
  for (target, prediction), count in pairs.items():
    if target in targets:
      targets[target] += count
    if prediction in predicted:
      predicted[prediction] += count
    if target == prediction and target in hits:
      hits[target] += count
  return [scores(n, hits[n], targets[n], predicted[n]) for n in names]


def averages(
  table: Sequence[ClassScores], micro: bool = False
) -> dict[str, list[float]]:
  """[precision, recall, F1] by kind of average, as scikit-learn has them.

  "macro" is the mean of the classes, "weighted" that by their targets; what a
  class has not counts as 0. "micro", if asked for, is of all decisions
  together; where each row has one class it is the accuracy.
  """
  values_C3 = np.array(
    [[row.precision, row.recall, row.f1] for row in table], float
  )
  values_C3 = np.nan_to_num(values_C3).reshape(len(table), 3)
  weights_C = np.array([row.targets for row in table], float)
  found = {}
  if micro:
    hits = sum(round((row.recall or 0) * row.targets) for row in table)
    given = sum(row.predicted for row in table)
    _, *all_of_them, _, _ = scores("", hits, int(weights_C.sum()), given)
    found["micro"] = [x or 0.0 for x in all_of_them]
  total = weights_C.sum()
  found["macro"] = values_C3.mean(axis=0).tolist() if table else [0.0] * 3
  weighted_3 = weights_C @ values_C3 / total if total else np.zeros(3)
  found["weighted"] = weighted_3.tolist()
  return found


def confusion(
  pairs: Mapping[tuple[Any, Any], int], names: Sequence[str]
) -> list[list[int]]:
  """Counts, a row for each target and a column for each prediction."""
  return [[pairs.get((t, p), 0) for p in names] for t in names]


class Calibration:
  """How often the class of a probability is right (Guo et al. 2017, "On
  Calibration of Modern Neural Networks", equations 2 to 5)."""

  def __init__(self, bins: int = BINS):
    self._sums = np.zeros((bins, 3))

  def add(self, probability: float, is_right: bool) -> None:
    """A prediction, and the probability that it was given."""
    bins = len(self._sums)
    # The bin m holds ((m - 1) / bins, m / bins].
    place = min(max(math.ceil(probability * bins) - 1, 0), bins - 1)
    self._sums[place] += (1, probability, is_right)

  @property
  def count(self) -> int:
    return int(self._sums[:, 0].sum())

  def describe(self) -> dict[str, Any]:
    """`error`, the expected calibration error, from 0 to 1; mean `confidence`;
    `accuracy`; `bins` of (from, to, rows, mean probability, accuracy)."""
    count, mass, hits = self._sums.T
    total, bins = count.sum(), len(count)
    return {
      "error": float(np.abs(mass - hits).sum() / total),
      "confidence": float(mass.sum() / total),
      "accuracy": float(hits.sum() / total),
      "bins": [
        [i / bins, (i + 1) / bins, int(n), float(m / n), float(h / n)]
        for i, (n, m, h) in enumerate(self._sums)
        if n
      ],
    }
