"""The examples of a task: whole, as a store keeps them, or cut to lengths.

A task of ours is read in Python (layouts.py). One of SeqIO's own goes through
its preprocessors up to where SeqIO itself would cache it.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
from types import ModuleType

import numpy as np
import seqio

from fat5_jax.data import (
  denoising,
  features,
  layouts,
  preprocessors,
  seqio_source,
)
from fat5_jax.data.layouts import Example, Limits
from fat5_jax.data.skipped import Skipped

# Texts that are drawn from at once, where they are read in order.
_TEXTS = 1024


class Counts:
  """What was seen of a split as it was read.

  Attributes:
    rows: that gave an example.
    left_out: bad ones.
    unknown: tokens of the inputs that the vocabulary has not.
    tokens: of the inputs.
  """

  def __init__(self):
    self.reset()

  def reset(self) -> None:
    self.rows = self.unknown = self.tokens = 0
    self.left_out = Skipped()

  def merge(self, other: Counts) -> None:
    """Adds what was seen of another part of the split."""
    self.rows += other.rows
    self.unknown += other.unknown
    self.tokens += other.tokens
    self.left_out.merge(other.left_out)

  def facts(self) -> dict[str, int]:
    return {
      "rows": self.rows,
      "skipped": self.left_out.rows,
      "unknown": self.unknown,
      "tokens": self.tokens,
    }


def code_modules() -> tuple[ModuleType, ...]:
  """Those whose code decides what an example is."""
  from fat5_jax.data import (
    formats,
    glue,
    head_tasks,
    nli,
    pretraining,
    pronouns,
    renamed,
    super_glue,
    super_glue_tasks,
    tasks,
  )

  ours = (preprocessors, layouts, formats, renamed, tasks, head_tasks)
  return *ours, glue, super_glue, super_glue_tasks, pronouns, nli, pretraining


def small_features(task: seqio.Task) -> set[str]:
  """Features whose ids fit in two bytes."""
  return {
    name
    for name, feature in task.output_features.items()
    if not isinstance(feature, features.LabelFeature)
    and not isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
    and feature.dtype.as_numpy_dtype == np.int32
    and feature.rank == 1
    and feature.vocabulary.vocab_size <= 1 << 16
  }


def whole(
  task: seqio.Task,
  split: str,
  limits: Limits = None,
  counts: Counts | None = None,
  use_cached: bool = False,
) -> Iterator[Example]:
  """Every example of a split in order, uncut, with all its features.

  Args:
    task: no mixture.
    split: of it.
    limits: lengths that windows have.
    counts: counts on the way.
    use_cached: from SeqIO's own offline cache.

  Raises:
    UserError: naming the place, for a bad row.
  """
  counts = counts or Counts()
  if not isinstance(task.source, seqio_source.SeqioSource):
    from fat5_jax.data import seqio_tasks

    yield from seqio_tasks.whole(task, split, counts, use_cached)
    return
  for block in blocks(task, split, limits, counts):
    yield from block
  task.source.tell(split, counts.rows, counts.left_out)


def blocks(
  task: seqio.Task,
  split: str,
  limits: Limits,
  counts: Counts,
  part: tuple[int, int] = (0, 1),
) -> Iterator[list[Example]]:
  """The examples of each block of rows of a task of ours, in order.

  Args:
    task: of ours.
    split: of it.
    limits: lengths that windows have.
    counts: counts on the way.
    part: (i, n) makes the i-th of every n blocks alone.
  """
  unknown = task.output_features["inputs"].vocabulary.unk_id
  layout, output = task.source.layout, task.output_features
  for rows in task.source.blocks(split, counts.left_out, part):
    counts.rows += len(rows)
    found = list(layout.prepare(rows, output, limits)) if rows else []
    for example in found:
      tokens = example["inputs"]
      counts.tokens += len(tokens)
      if unknown is not None:
        counts.unknown += int(np.count_nonzero(tokens == unknown))
    yield found


def is_denoised(task: seqio.Task | seqio.Mixture) -> bool:
  """Whether a task is of texts, whose examples are drawn as they are read."""
  layout = getattr(getattr(task, "source", None), "layout", None)
  return isinstance(layout, layouts.Corpus)


def objective(task: seqio.Task, limits: Limits) -> denoising.Objective:
  """What such a task asks about its texts, at these lengths.

  Raises:
    UserError: see layouts.Corpus.objective.
  """
  return task.source.layout.objective(task.output_features, limits)


def denoised(
  task: seqio.Task, texts: Iterator[Example], limits: Limits
) -> Iterator[Example]:
  """The examples of such a task's texts, once and in order, always the same."""
  asked = objective(task, limits)
  for number in itertools.count():
    block = [text["inputs"] for text in itertools.islice(texts, _TEXTS)]
    if not block:
      return
    yield from asked.examples(block, [0, number], shuffle=False)


def cut_to(
  task: seqio.Task,
  split: str,
  limits: Limits = None,
  cuts: features.Cuts | None = None,
  seed: int | None = None,
  use_cached: bool = False,
) -> Iterator[Example]:
  """Every example of a split in order, cut to lengths; None cuts nothing.

  `seed` and `use_cached` are for tasks of SeqIO's own.
  """
  source = task.source
  if not isinstance(source, seqio_source.SeqioSource):
    from fat5_jax.data import seqio_tasks

    yield from seqio_tasks.cut_to(task, split, limits, seed, use_cached)
    return
  if is_denoised(task):
    yield from denoised(task, whole(task, split), limits)
    return
  names = [n for n in ("inputs", "targets") if (limits or {}).get(n)]
  for example in whole(task, split, limits):
    if cuts is not None:
      cuts.count(
        names, [len(example[n]) for n in names], [limits[n] for n in names]
      )
    yield source.layout.cut(example, limits)
