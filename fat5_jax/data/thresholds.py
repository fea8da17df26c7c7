"""Where a decision is best drawn, found on rows whose targets are known."""

from __future__ import annotations

from collections.abc import Mapping
import math

import numpy as np


def best_f1(targets_N, probabilities_N) -> tuple[float, float]:
  """(threshold, F1 from 0 to 1) of the best decision `probability > threshold`.

  F1 is that of all decisions together; of as good ones, that nearest to 0.5.

  Args:
    targets_N: 0 or 1.
    probabilities_N: of 1, from 0 to 1.
  """
  targets_N = np.asarray(targets_N, bool).ravel()
  probabilities_N = np.asarray(probabilities_N, np.float64).ravel()
  order_N = np.argsort(-probabilities_N, kind="stable")
  sorted_N, hits_N = probabilities_N[order_N], targets_N[order_N].cumsum()
  # Between two that are alike no line can be drawn.
  below_N = np.append(sorted_N[1:], 0.0)
  ends = np.flatnonzero(sorted_N > below_N)
  thresholds = (sorted_N[ends] + below_N[ends]) / 2
  f1 = 2 * hits_N[ends] / (ends + 1 + targets_N.sum())
  if not len(ends):
    return 0.5, 0.0
  best = np.flatnonzero(f1 == f1.max())
  nearest = best[np.abs(thresholds[best] - 0.5).argmin()]
  return float(thresholds[nearest]), float(f1[nearest])


def best_no_answer(
  without: Mapping[str, float],
  answered: Mapping[str, float],
  has_answer: Mapping[str, bool],
  is_empty: Mapping[str, bool],
) -> tuple[float, float]:
  """(threshold, mean score from 0 to 1) of SQuAD 2.0's best threshold.

  A question whose `without` is above the threshold is left without an answer.
  As evaluate-v2.0.py, find_best_thresh, but where it is best to answer nothing
  the threshold is one that does.

  Args:
    without: how much better no answer scores than the best, by question.
    answered: exact match or F1 of the answer.
    has_answer: whether there is one.
    is_empty: whether the answer is empty anyway.
  """
  order = sorted(without, key=without.__getitem__)
  current = best = float(sum(not has_answer[q] for q in order))
  threshold = without[order[0]] - 1 if order else 0.0
  for place, question in enumerate(order):
    if has_answer[question]:
      current += answered[question]
    elif not is_empty[question]:
      current -= 1
    following = order[place + 1] if place + 1 < len(order) else None
    level = without[question]
    # Questions that are alike are answered together.
    if following is not None and without[following] == level:
      continue
    if current > best and not math.isclose(current, best):
      best, threshold = current, level
  return float(threshold), best / max(len(order), 1)
