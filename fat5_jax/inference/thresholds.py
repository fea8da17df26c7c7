"""Where a head decides: THRESHOLD of labels, NO_ANSWER_THRESHOLD of spans."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import os
import re
from typing import Any

import numpy as np

from fat5_jax import macros, storage
from fat5_jax.checkpoints.reference import CheckpointRef
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig

# `<task>-<step>-details-<split>.json`, which an evaluation writes.
DETAILS = "{task}-{step:06d}-details-{split}.json"
_OF_STEP = r".+-{step:06d}-details-(.+)\.json$"
# What train calls it where nobody says otherwise.
_DEV = "validation"


@dataclasses.dataclass(frozen=True)
class Decisions:
  """What the numbers of a head must be above.

  Attributes:
    labels: of each label's probability, (K,) or a number; None is 0.5.
    no_answer: of how much better no answer scores; None always answers.
  """

  labels: Any = None
  no_answer: float | None = None

  def of_labels(self, values_K: np.ndarray) -> np.ndarray:
    """Probabilities as 0 and 1; as they are where 0.5 is the threshold."""
    if self.labels is None:
      return values_K
    return (values_K.astype(np.float64) > self.labels).astype(np.float32)


def decisions(
  threshold: float | str | None,
  no_answer: float | None,
  source: CheckpointRef,
  head: HeadConfig | None,
) -> Decisions:
  """The settings, for a checkpoint and its head.

  Args:
    threshold: a number, 'dev' or 'dev_by_class': what the evaluation of that
      step of the run found best; None is 0.5.
    no_answer: None always answers.

  Raises:
    UserError: for a setting that the head has no use for, and where no
      evaluation found a threshold.
  """
  macros.check("THRESHOLD", threshold, "THRESHOLD")
  macros.check("NO_ANSWER_THRESHOLD", no_answer, "NO_ANSWER_THRESHOLD")
  what = "a language model" if head is None else f"a head of kind {head.kind}"
  is_multi = (
    head is not None and head.problem_type == "multi_label_classification"
  )
  if threshold is not None and not is_multi:
    raise UserError(
      f"THRESHOLD = {threshold!r} is for multi-label classification, and this"
      f" is {what}: leave it out"
    )
  if no_answer is not None and (
    head is None or head.kind != "question_answering"
  ):
    raise UserError(
      f"NO_ANSWER_THRESHOLD = {no_answer!r} is for question answering by spans,"
      f" and this is {what}: leave it out"
    )
  if isinstance(threshold, str):
    return Decisions(_found(threshold, source, head))
  return Decisions(threshold, no_answer)


def _found(threshold: str, source: CheckpointRef, head: HeadConfig) -> Any:
  """The threshold that an evaluation found."""
  found = dict(_evaluated(source))
  where = f"THRESHOLD = {threshold!r}: "
  if not found:
    raise UserError(
      f"{where}no evaluation of step {source.step} in {source.run_dir} found"
      f" one: run fat5_jax.eval on split {_DEV!r} (its results where they go by"
      " themselves), or give a number"
    )
  if len(found) > 1:
    raise UserError(
      f"{where}{', '.join(sorted(found))} tell one each: give a number"
    )
  (best,) = found.values()
  if threshold == "dev":
    return best["value"]
  names = head.label_names or tuple(map(str, range(head.num_labels)))
  missing = [name for name in names if name not in best["by_class"]]
  if missing:
    raise UserError(
      f"{where}{next(iter(found))} tells none for class {missing[0]!r}"
    )
  return np.array([best["by_class"][name] for name in names])


def _evaluated(source: CheckpointRef) -> Iterator[tuple[str, dict[str, Any]]]:
  """(file, its threshold) of the evaluations of a step.

  Those of the training, whose split is the one to choose by; else those of
  `fat5_jax.eval` on validation data. Never of a test split.
  """
  if source.kind != "fat5":
    return
  pattern = re.compile(_OF_STEP.format(step=source.step))
  for parts in (("inference_eval",), ("eval", "inference_eval")):
    folder, is_any = os.path.join(source.run_dir, *parts), False
    for name in storage.names(folder) if storage.exists(folder) else []:
      match = pattern.match(name)
      if match is None or (parts[0] == "eval" and match[1] != _DEV):
        continue
      path = os.path.join(folder, name)
      best = json.loads(storage.read(path)).get("threshold")
      if best is not None:
        is_any = True
        yield path, best
    if is_any:
      return
