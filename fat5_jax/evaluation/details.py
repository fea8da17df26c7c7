"""What an evaluation tells besides its metrics: of each class, how sure the
model is, where it errs worst, and where a decision is best drawn.

Made of the rows that an evaluation writes, one after the other; for its
`<task>-<step>-details-<split>.json`, for the terminal and for report.html.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
import heapq
import math
from typing import Any

import numpy as np

from fat5_jax import console
from fat5_jax.data import metrics, thresholds
from fat5_jax.data.preprocessors import as_text
from fat5_jax.evaluation import classes
from fat5_jax.inference import heads
from fat5_jax.models.config import HeadConfig

# Beyond as many different answers, they are no classes.
MOST_CLASSES = 150
# Of the rows that are wrong, those that the details name.
_ERRORS = 50
# Classes, confusions and errors that the terminal shows.
_SHOWN_CLASSES, _SHOWN_PAIRS, _SHOWN_ERRORS = 10, 10, 5
# Characters of a class's name, where classes are texts.
_LABEL = 80
# Characters of a text that is kept.
_TEXT = 2000
# Of an answer that has none of the classes.
_NONE = ""


class Details:
  """Takes in rows of an evaluation; bounded but for a multi-label head's
  probabilities."""

  def __init__(self, head: HeadConfig | None):
    """`head`: of the model; None is a language model."""
    self._head = head
    self._is_multi = (
      head is not None and head.problem_type == "multi_label_classification"
    )
    self._is_single = (
      head is not None
      and head.kind in ("sequence_classification", "enct5")
      and head.problem_type == "single_label_classification"
    )
    self._pairs: collections.Counter = collections.Counter()
    self._words: dict[int, str] = {}
    self._sure = classes.Calibration()
    self._labels: list[Any] = []
    self._probabilities: list[np.ndarray] = []
    self._entities = _Entities()
    self._errors: list[tuple[float, int, dict[str, Any]]] = []
    self._has_long_targets = False
    self._count = 0

  def add(self, row: Mapping[str, Any]) -> None:
    """A row with `input`, `target`, `output` and `prediction`."""
    head = self._head
    self._count += 1
    if head is not None or len(self._pairs) <= MOST_CLASSES**2:
      self._pairs.update(self._classes_of(row))
    if self._is_multi:
      self._labels.append(value_of(row["target"]))
      self._probabilities.append(np.asarray(row["output"], np.float32))
    elif head is not None and head.kind == "token_classification":
      self._entities.add(row["target"], row["prediction"])
    sure = probability(row, head)
    if sure is None or value_of(row["target"]) < 0:
      return
    is_right = row["target"] == row["prediction"]
    self._sure.add(sure, is_right)
    if not is_right:
      error = (sure, -self._count, sample(row, head) | {"probability": sure})
      push = heapq.heappush
      if len(self._errors) >= _ERRORS:
        push = heapq.heappushpop
      push(self._errors, error)

  def found(self) -> dict[str, Any]:
    """As JSON holds it; empty where there is nothing to tell.

    `classes` (of classes.ClassScores) with their `averages`, `confusion`,
    `entities` with their averages, `calibration`, `threshold` and `errors`, the
    surest first.
    """
    found: dict[str, Any] = {}
    pairs = self._pairs if self._head is not None else self._in_words()
    if self._has_long_targets:
      pairs = {}
    names, asked = self._names(pairs)
    if names:
      table = classes.by_class(pairs, names)
      found["classes"] = [list(row) for row in table]
      # What is no target's class is not averaged over.
      averaged = [row for row in table if row.name in asked]
      found["averages"] = classes.averages(averaged, self._is_multi)
      if not self._is_multi and len(names) <= MOST_CLASSES:
        counts = classes.confusion(pairs, names)
        found["confusion"] = {"classes": names, "counts": counts}
    if table := self._entities.table():
      found["entities"] = {
        "classes": [list(row) for row in table],
        "averages": classes.averages(table, micro=True),
      }
    if self._sure.count:
      found["calibration"] = self._sure.describe()
    if self._labels:
      found["threshold"] = self._thresholds()
    if self._errors:
      surest = sorted(self._errors, reverse=True, key=lambda error: error[:2])
      found["errors"] = [error for _, _, error in surest]
    return found

  def _classes_of(self, row) -> Iterator[tuple[str, str]]:
    """Pairs (target, prediction) of what a row decides."""
    head = self._head
    target, prediction = value_of(row["target"]), value_of(row["prediction"])
    if head is None:
      if isinstance(target, (str, int)) and isinstance(prediction, (str, int)):
        if isinstance(target, int):
          text = row["input"].get("targets_pretokenized", target)
          self._words.setdefault(target, str(as_text(text))[:_LABEL])
        # Numbers have their words when all are known. What is longer is no
        # class's name.
        short = lambda x: isinstance(x, int) or len(x) <= _LABEL
        self._has_long_targets |= not short(target)
        yield tuple(x if short(x) else _NONE for x in (target, prediction))
    elif head.kind == "token_classification":
      yield from zip(target["tags"], prediction["tags"])
    elif self._is_multi:
      for name, wanted, given in zip(label_names(head), target, prediction):
        yield name if wanted else _NONE, name if given else _NONE
    elif self._is_single and target >= 0:
      names = label_names(head)
      yield names[target], names[prediction]

  def _names(self, pairs) -> tuple[list[str], set[str]]:
    """(the classes, those of targets); none where answers are texts."""
    head = self._head
    if not pairs:
      return [], set()
    if head is not None and head.kind != "token_classification":
      names = label_names(head)
      return names, set(names)
    targets: collections.Counter = collections.Counter()
    for (target, _), count in pairs.items():
      targets[target] += count
    seen = {name for pair in pairs for name in pair}
    # Texts that hardly come twice are no classes.
    if head is None and (
      len(seen) > MOST_CLASSES or targets.total() < 4 * len(targets)
    ):
      return [], set()
    # A tag that is only predicted is one of the head's names.
    asked = seen if head is not None else set(targets)
    return [*sorted(targets), *sorted(seen - {*targets})], asked

  def _in_words(self) -> collections.Counter:
    """The pairs with the texts of numbers, where each has its own."""
    words = self._words
    if len({*words.values()}) < len(words):
      words = {}
    invalid = "(invalid)" if words else "-1"
    text = lambda x: words.get(x, invalid if x == -1 else str(x))
    found: collections.Counter = collections.Counter()
    for (target, prediction), count in self._pairs.items():
      found[text(target), text(prediction)] += count
    return found

  def _thresholds(self) -> dict[str, Any]:
    """The best threshold of all decisions, and that of each class."""
    targets_NK = np.array(self._labels)
    probabilities_NK = np.array(self._probabilities)
    value, f1 = thresholds.best_f1(targets_NK, probabilities_NK)
    each = [
      thresholds.best_f1(*columns)
      for columns in zip(targets_NK.T, probabilities_NK.T)
    ]
    names = label_names(self._head)
    decided_NK = probabilities_NK > [threshold for threshold, _ in each]
    return {
      "value": value,
      "f1_micro": f1,
      "by_class": dict(zip(names, (threshold for threshold, _ in each))),
      "f1_micro_by_class": _f1(targets_NK, decided_NK),
      "f1_micro_at_half": _f1(targets_NK, probabilities_NK > 0.5),
    }


class _Entities:
  """Counts whole names by their kind; windows of a sentence come together."""

  def __init__(self):
    self._open: tuple[Any, list[str], list[str]] = (None, [], [])
    self._counts = [collections.Counter() for _ in range(3)]
    self._is_marked = False

  def add(self, target, prediction) -> None:
    if target["sentence"] != self._open[0]:
      self._close()
      self._open = (target["sentence"], [], [])
    _, wanted, given = self._open
    wanted += target["tags"]
    given += prediction["tags"]

  def _close(self) -> None:
    _, *both = self._open
    self._is_marked |= any(tag.startswith("B-") for tag in both[0] + both[1])
    wanted, given = (set(metrics.entities(tags)) for tags in both)
    for counter, found in zip(
      self._counts, (wanted & given, wanted, given), strict=True
    ):
      counter.update(entity.kind for entity in found)

  def table(self) -> list[classes.ClassScores]:
    """By kind; none of tags that mark no names."""
    self._close()
    self._open = (None, [], [])
    if not self._is_marked:
      return []
    hits, wanted, given = self._counts
    return [
      classes.scores(kind, hits[kind], wanted[kind], given[kind])
      for kind in sorted({*wanted, *given})
    ]


def _f1(targets_NK, decided_NK) -> float:
  both = int(targets_NK.sum() + decided_NK.sum())
  return 2 * int((targets_NK * decided_NK).sum()) / both if both else 0.0


def label_names(head: HeadConfig) -> list[str]:
  """The names of a head's classes, or their numbers."""
  return list(head.label_names or map(str, range(head.num_labels)))


def value_of(found: Any) -> Any:
  """What a target or prediction says, without its group."""
  return (
    found["value"] if isinstance(found, dict) and "value" in found else found
  )


def probability(row, head: HeadConfig | None) -> float | None:
  """Of the class that is predicted; None where a row is no single class, or its
  numbers are none (NaN)."""
  if head is None or head.kind not in ("sequence_classification", "enct5"):
    return None
  if head.problem_type != "single_label_classification":
    return None
  values = row["output"]
  found = float(values[1 + int(values[0])])
  return round(found, 6) if math.isfinite(found) else None


def sample(row, head: HeadConfig | None) -> dict[str, str]:
  """`input`, `target` and `prediction` of a row, for a person."""
  text = as_text(row["input"].get("inputs_pretokenized", ""))
  if head is None or head.kind == "embedding":
    target = row["input"].get("targets_pretokenized", row["target"])
    said = row.get("output", row.get("prediction", row.get("score")))
    both = {"target": as_text(target), "prediction": said}
  else:
    both = {k: heads.describe(row[k], head) for k in ("target", "prediction")}
  return {k: str(v)[:_TEXT] for k, v in {"input": text, **both}.items()}


# ---- The terminal ------------------------------------------------------------


def tell(title: str, found: Mapping[str, Any]) -> None:
  """The details in short."""
  if entities := found.get("entities"):
    _tell_table(f"{title}: by name", entities)
  elif "classes" in found:
    _tell_table(f"{title}: by class", found)
  if "confusion" in found and "entities" not in found:
    _tell_confusion(title, found["confusion"])
  if calibration := found.get("calibration"):
    console.say(
      f"{title}: expected calibration error {calibration['error']:.4f} (mean"
      f" confidence {calibration['confidence']:.4f}, accuracy"
      f" {calibration['accuracy']:.4f})"
    )
  if best := found.get("threshold"):
    console.say(
      f"{title}: micro F1 {best['f1_micro_at_half']:.4f} at THRESHOLD = 0.5;"
      f" {best['f1_micro']:.4f} at {best['value']:.6g}, the best of one"
      f" ('dev'); {best['f1_micro_by_class']:.4f} with one for each class"
      " ('dev_by_class')"
    )
  if "errors" in found:
    console.plain_table(
      f"{title}: the surest errors",
      ("probability", "input", "target", "prediction"),
      [
        (
          f"{e['probability']:.4f}",
          e["input"][:120],
          e["target"],
          e["prediction"],
        )
        for e in found["errors"][:_SHOWN_ERRORS]
      ],
    )


def _tell_table(title: str, found: Mapping[str, Any]) -> None:
  table = [classes.ClassScores(*row) for row in found["classes"]]
  shown = table
  if len(table) > _SHOWN_CLASSES:
    shown = sorted(table, key=lambda row: (row.f1 or 0.0, -row.targets))
    shown = shown[:_SHOWN_CLASSES]
    title += f", the worst {_SHOWN_CLASSES} of {len(table)}"
  number = lambda x: "-" if x is None else f"{x:.4f}"
  rows = [
    (r.name, *map(number, (r.precision, r.recall, r.f1)), f"{r.targets:,}")
    for r in shown
  ]
  total = sum(row.targets for row in table)
  rows += [
    (f"({kind})", *map(number, values), f"{total:,}")
    for kind, values in found["averages"].items()
  ]
  header = ("", "precision", "recall", "F1", "targets")
  console.plain_table(title, header, rows)


def _tell_confusion(title: str, found: Mapping[str, Any]) -> None:
  names, counts = found["classes"], found["counts"]
  if len(names) <= _SHOWN_CLASSES:
    console.plain_table(
      f"{title}: targets (lines) and what was predicted (columns)",
      ("", *names),
      [(name, *map(str, row)) for name, row in zip(names, counts)],
    )
    return
  pairs = [
    (count, names[i], names[j])
    for i, row in enumerate(counts)
    for j, count in enumerate(row)
    if i != j and count
  ]
  pairs = heapq.nsmallest(_SHOWN_PAIRS, pairs, key=lambda p: (-p[0], *p[1:]))
  console.plain_table(
    f"{title}: most often confused",
    ("target", "predicted as", "rows"),
    [(target, found, str(count)) for count, target, found in pairs],
  )
