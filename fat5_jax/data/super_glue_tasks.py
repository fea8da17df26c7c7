"""SuperGLUE's tasks, as text and as classes, and T5's DPR beside them."""

from __future__ import annotations

from typing import Any

import seqio

from fat5_jax.data import head_tasks, pronouns, records, super_glue, tasks
from fat5_jax.errors import UserError


@records.recorded
def text(
  name: str,
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  source: Any = None,
) -> seqio.Task:
  """A SuperGLUE task, e.g. "boolq", registered as `super_glue_boolq_v102`.

  Args:
    name: boolq cb copa multirc record rte wic wsc_train wsc_eval; those of WSC
      are `super_glue_wsc_v102_simple_train` and `_eval`: T5 trains on the rows
      whose noun is the pronoun's alone, and asks for the noun.
    vocabulary: SeqIO vocabulary.
    data_dir: folder with the official layout (`BoolQ/train.jsonl`,
      `val.jsonl`); None reads HF's `aps/super_glue`.
    source: of rows, instead of both.

  Raises:
    UserError: for an unknown name or missing files.
  """
  made = super_glue.text_task(name, data_dir, source)
  return tasks.add_text_task(**made, vocabulary=vocabulary)


@records.recorded
def classes(
  name: str,
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  source: Any = None,
) -> seqio.Task:
  """A SuperGLUE task as classes, `super_glue_boolq_classes`.

  Pairs are `A </s> B </s>`; WSC's is the text with its pronoun between
  asterisks, and the noun.

  Args:
    name: boolq cb copa multirc rte wic wsc.
    vocabulary: SeqIO vocabulary.
    data_dir: folder with the official layout; None reads HF's.
    source: of rows, instead of both.
  """
  task = super_glue.find(name)
  if not task.head_inputs:
    raise UserError(f"SuperGLUE's {name} has texts as answers, no classes")
  if source is None:
    source = super_glue.source(name, data_dir)
  mark = super_glue.marked_pronoun
  with_mark = lambda row_fn: lambda row: row_fn(row | {"marked": mark(row)})
  made = head_tasks.classification(
    super_glue.Examples(name, source),
    task.head_inputs,
    "label",
    vocabulary,
    task.label_names,
    name=f"super_glue_{name}_classes",
    metrics=task.metrics,
    rename=with_mark if name == "wsc" else None,
    group=task.group,
  )
  # Not the mark, which no row has.
  made.source.columns = task.features
  return made


@records.recorded
def definite_pronoun_resolution(
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  source: Any = None,
) -> seqio.Task:
  """Which candidate a pronoun stands for, `dpr_v001_simple`.

  Args:
    vocabulary: SeqIO vocabulary.
    data_dir: folder with `DPR/train.c.txt` and `test.c.txt`; None reads HF's
      `community-datasets/definite_pronoun_resolution`.
    source: of rows, instead of both.
  """
  return tasks.add_text_task(
    "dpr_v001_simple",
    source or pronouns.source(data_dir),
    pronouns.text,
    vocabulary,
    columns=("sentence", "pronoun", "candidates"),
    unanswered=lambda row: row | {"label": -1},
    metrics=("accuracy",),
  )
