"""The examples of a task: whole, as a store keeps them, or cut to lengths.

A task of ours is read in Python (layouts.py). One of SeqIO's own goes through
its preprocessors up to where SeqIO itself would cache it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import seqio

from fat5_jax.data import features, layouts, preprocessors, seqio_source
from fat5_jax.data.layouts import Example, Limits

# Rows that are tokenised at once, and characters, if that is less.
_ROWS, _CHARACTERS = 512, 1 << 20


class Counts:
  """What was seen of a split as it was read.

  Attributes:
    rows: that gave an example.
    skipped: bad ones, left out.
    unknown: tokens of the inputs that the vocabulary has not.
    tokens: of the inputs.
  """

  def __init__(self):
    self.rows = self.skipped = self.unknown = self.tokens = 0

  def facts(self) -> dict[str, int]:
    return dict(vars(self))


def code_modules() -> tuple[ModuleType, ...]:
  """Those whose code decides what an example is."""
  from fat5_jax.data import (
    formats,
    glue,
    head_tasks,
    nli,
    pronouns,
    renamed,
    super_glue,
    super_glue_tasks,
    tasks,
  )

  ours = (preprocessors, layouts, formats, renamed, tasks, head_tasks)
  return *ours, glue, super_glue, super_glue_tasks, pronouns, nli


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
  source, counts = task.source, counts or Counts()
  if not isinstance(source, seqio_source.SeqioSource):
    from fat5_jax.data import seqio_tasks

    yield from seqio_tasks.whole(task, split, counts, use_cached)
    return
  vocabulary = task.output_features["inputs"].vocabulary
  unknown = vocabulary.unk_id
  for rows in _blocks(source.examples(split, counts)):
    counts.rows += len(rows)
    for example in source.layout.prepare(rows, task.output_features, limits):
      tokens = example["inputs"]
      counts.tokens += len(tokens)
      if unknown is not None:
        counts.unknown += int(np.count_nonzero(tokens == unknown))
      yield example


def _blocks(rows: Iterator[Example]) -> Iterator[list[Example]]:
  block: list[Example] = []
  characters = 0
  for row in rows:
    block.append(row)
    characters += sum(len(v) for v in row.values() if isinstance(v, str))
    if len(block) == _ROWS or characters > _CHARACTERS:
      yield block
      block, characters = [], 0
  if block:
    yield block


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
  names = [n for n in ("inputs", "targets") if (limits or {}).get(n)]
  for example in whole(task, split, limits):
    if cuts is not None:
      cuts.count(
        names, [len(example[n]) for n in names], [limits[n] for n in names]
      )
    yield source.layout.cut(example, limits)
