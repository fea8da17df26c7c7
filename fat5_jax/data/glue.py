"""The nine GLUE tasks: where their rows are, what their columns mean.

Official layout (`SST-2/train.tsv`, `dev.tsv`, `test.tsv`) or HF's `glue`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Any

from fat5_jax import fetched
from fat5_jax.data import sources
from fat5_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Glue:
  """One GLUE task: TFDS/HF config, official folder and columns, labels."""

  folder: str
  # Official column of each feature; the feature's name where it is the same.
  features: Mapping[str, str]
  label_column: str
  label_names: Sequence[str]
  metrics: Sequence[str]
  # Given where the files have no header.
  columns: Sequence[str] | None = None
  validation: str = "dev"
  config: str = ""


def _pair(first: str, second: str) -> dict[str, str]:
  return {first: first, second: second}


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = Glue(
  "MNLI",
  {"premise": "sentence1", "hypothesis": "sentence2"},
  "gold_label",
  ("entailment", "neutral", "contradiction"),
  ("accuracy",),
)
GLUE = {
  "cola": Glue(
    "CoLA",
    {"sentence": "sentence"},
    "label",
    ("unacceptable", "acceptable"),
    ("matthews_corrcoef",),
    columns=("source", "label", "star", "sentence"),
  ),
  "sst2": Glue(
    "SST-2",
    {"sentence": "sentence"},
    "label",
    ("negative", "positive"),
    ("accuracy",),
  ),
  "mrpc": Glue(
    "MRPC",
    {"sentence1": "#1 String", "sentence2": "#2 String"},
    "Quality",
    ("not_equivalent", "equivalent"),
    ("f1_with_invalid", "accuracy"),
  ),
  "stsb": Glue(
    "STS-B",
    _pair("sentence1", "sentence2"),
    "score",
    (),
    ("pearson_corrcoef", "spearman_corrcoef"),
  ),
  "qqp": Glue(
    "QQP",
    _pair("question1", "question2"),
    "is_duplicate",
    ("not_duplicate", "duplicate"),
    ("f1_with_invalid", "accuracy"),
  ),
  "mnli": dataclasses.replace(_MNLI, validation="dev_matched"),
  "mnli_matched": dataclasses.replace(
    _MNLI, validation="dev_matched", config="mnli"
  ),
  "mnli_mismatched": dataclasses.replace(
    _MNLI, validation="dev_mismatched", config="mnli"
  ),
  "qnli": Glue(
    "QNLI", _pair("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)
  ),
  "rte": Glue(
    "RTE",
    _pair("sentence1", "sentence2"),
    "label",
    _ENTAILMENT,
    ("accuracy",),
  ),
  "wnli": Glue(
    "WNLI",
    _pair("sentence1", "sentence2"),
    "label",
    _ENTAILMENT[::-1],
    ("accuracy",),
  ),
}


def find(name: str) -> Glue:
  """The description of a task.

  Raises:
    UserError: for an unknown name.
  """
  if name not in GLUE:
    raise UserError(
      f"unknown GLUE task {name!r}.{nearest(name, GLUE)} Known:"
      f" {', '.join(GLUE)}"
    )
  return GLUE[name]


def source(
  name: str, data_dir: str | None, given: Any = None
) -> tuple[Any, Callable[[sources.RowFn], sources.RowFn]]:
  """(source, what makes a row function read its columns).

  The label of a row without one is -1, as in HF's test sets.

  Args:
    name: of the task.
    data_dir: folder with the official layout; None reads HF.
    given: a source that takes the place of both.

  Raises:
    UserError: if no file is there.
  """
  task = find(name)
  names = {**task.features, "label": task.label_column}

  def rename(row_fn):
    def value(row, ours, theirs):
      # A question's blank label stands under our name, beside the official.
      if ours == "label" and ours in row:
        return row[ours]
      if theirs in row:
        return row[theirs]
      if ours == "label" and "index" in row:
        return -1
      # HF's, TFDS's, and what a person asks about may have our names.
      return sources.column(row, ours if ours in row else theirs)

    return lambda row: row_fn(
      {ours: value(row, ours, theirs) for ours, theirs in names.items()}
    )

  suffix = task.validation.removeprefix("dev")
  if given is not None:
    return given, rename
  if data_dir is None:
    splits = {"train": "train"} | {
      split: f"{split}{suffix}" for split in ("validation", "test")
    }
    hf = sources.HuggingFace("nyu-mll/glue", task.config or name, splits)
    return hf, rename
  folder = fetched.local(os.path.join(data_dir, task.folder))
  files = {
    "train": "train.tsv",
    "validation": f"{task.validation}.tsv",
    "test": f"test{suffix}.tsv",
  }
  found = {
    split: os.path.join(folder, file)
    for split, file in files.items()
    if os.path.exists(os.path.join(folder, file))
  }
  if not found:
    raise UserError(
      f"{folder}: none of the data files {', '.join(files.values())} is there"
    )
  # The test sets have headers even where train and dev have none.
  columns = {split: task.columns for split in ("train", "validation")}
  return sources.Files(found, columns), rename


def submission_file(name: str) -> str:
  """The name under which GLUE's server takes a task's predictions."""
  special = {"mnli": "MNLI-m", "mnli_matched": "MNLI-m"}
  special["mnli_mismatched"] = "MNLI-mm"
  return f"{special.get(name, GLUE[name].folder)}.tsv"
