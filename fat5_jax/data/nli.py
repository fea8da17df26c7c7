"""Pairs of sentences as MNLI, SNLI, ANLI and XNLI have them.

Whatever its columns are called, a pair is premise, hypothesis and label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import logging
from typing import Any

import seqio

from fat5_jax.data import (
  folders,
  head_tasks,
  preprocessors,
  records,
  renamed,
  sources,
  tasks,
)
from fat5_jax.data.files import Unread
from fat5_jax.data.sources import column

logger = logging.getLogger("fat5_jax")

LABELS = ("entailment", "neutral", "contradiction")
# Official files and HF's; what a person asks about has the first.
_COLUMNS = {
  "premise": ("premise", "sentence1", "context"),
  "hypothesis": ("hypothesis", "sentence2"),
  "label": ("label", "gold_label"),
}
# ANLI's.
_LETTERS = {"e": "entailment", "n": "neutral", "c": "contradiction"}


class Pairs(renamed.Renamed):
  """The pairs of a source, without those that nobody agreed about.

  SNLI and MNLI mark them by `-` as label, HF by -1; a test set has -1, or no
  label at all.
  """

  def __init__(self, source: Any):
    super().__init__(source, _COLUMNS)

  def rows(self, split: str) -> Iterator[sources.LocatedRow]:
    is_blind = split not in ("train", "validation")
    no_labels = ("-",) if is_blind else ("-", "-1")
    left_out = 0
    for where, row in super().rows(split):
      is_row = not isinstance(row, Unread)
      if is_row and str(column(row, "label")) in no_labels:
        left_out += 1
      else:
        yield where, row
    if left_out:
      logger.warning(
        "%s: left out %d pairs without an agreed label",
        self.describe(split),
        left_out,
      )

  def rename(self, row: sources.Row, whole: bool = True) -> sources.Row:
    found = super().rename({"gold_label": -1, **row}, whole)
    label = found["label"]
    return found | {"label": _LETTERS.get(label, label)}

  def num_rows(self, split: str) -> int:
    return sum(1 for _ in self.rows(split))


def rows(data_dir: str | None, given: Any = None) -> Pairs:
  """Files of a folder named after their split, or (None) HF's `multi_nli`.

  `given`: a source that takes the place of both.

  Raises:
    UserError: if there is no such file.
  """
  if given is None and data_dir is None:
    given = sources.HuggingFace(
      "nyu-mll/multi_nli",
      splits={"train": "train", "validation": "validation_matched"},
    )
  return Pairs(given or folders.named_splits(data_dir, "", None))


@records.recorded
def text(
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  name: str = "nli",
  label_names: Sequence[str] = LABELS,
  source: Any = None,
) -> seqio.Task:
  """Pairs of sentences as T5's MNLI: whether one follows from the other.

  Args:
    vocabulary: SeqIO vocabulary.
    data_dir: folder with files named after their split, as MNLI, SNLI, ANLI and
      XNLI have them; None reads HF's `nyu-mll/multi_nli`.
    name: of the task.
    label_names: of class numbers, and T5's words.
    source: of rows, instead of both.
  """
  return tasks.add_text_task(
    name,
    rows(data_dir, source),
    preprocessors.glue("mnli", ("premise", "hypothesis"), label_names),
    vocabulary,
    columns=("premise", "hypothesis"),
    unanswered=lambda row: row | {"label": -1},
    postprocess=preprocessors.label_to_class(tuple(label_names)),
    metrics=("accuracy",),
  )


@records.recorded
def classes(
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  name: str = "nli_classes",
  label_names: Sequence[str] = LABELS,
  source: Any = None,
) -> seqio.Task:
  """Pairs of sentences, one of which may follow from the other, as classes.

  Arguments are those of `text`.
  """
  return head_tasks.classification(
    rows(data_dir, source),
    ("{premise}", "{hypothesis}"),
    "label",
    vocabulary,
    label_names,
    name=name,
  )
