"""Rows made into examples by several processes, in the order of the rows.

Each process reads all rows, which is cheap, and tokenises some of their blocks.
Grain starts them and puts the blocks in order.
"""

from __future__ import annotations

from collections.abc import Iterator
import copy
import dataclasses
import multiprocessing
import pickle
from typing import Any

from absl import flags
import cloudpickle
import grain
import seqio

from fat5_jax.data import examples
from fat5_jax.data.layouts import Example, Limits
from fat5_jax.errors import UserError

# Blocks of a process that wait to be written.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class _Block:
  """What became of a block of rows, or why there is none."""

  examples: list[Example]
  counts: examples.Counts
  error: UserError | None = None


class _Iterator(grain.DatasetIterator):
  def __init__(self, make):
    super().__init__()
    self._blocks = make()

  def __next__(self):
    return next(self._blocks)

  def get_state(self):
    return {}

  def set_state(self, state):
    del state


class _Blocks(grain.IterDataset):
  """The blocks of a split; those of its part, once it is sliced."""

  def __init__(self, task: seqio.Task, split: str, limits: Limits):
    super().__init__()
    self._task, self._split, self._limits = task, split, limits
    self._part = (0, 1)

  def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
    del sequential_slice
    self._part = (sl.start or 0, sl.step or 1)

  def __iter__(self) -> grain.DatasetIterator:
    return _Iterator(self._make)

  def _make(self) -> Iterator[_Block]:
    counts = examples.Counts()
    made = examples.blocks(
      self._task, self._split, self._limits, counts, self._part
    )
    while True:
      try:
        block = next(made, None)
      except UserError as e:
        yield _Block([], counts, e)
        return
      if block is None:
        return
      # It is sent while the next one is made.
      yield _Block(block, copy.deepcopy(counts))
      counts.reset()


def check_process() -> None:
  """Raises UserError in a worker that runs its parent's script again.

  As multiprocessing does, but before it waits for what the parent prepares.
  """
  if getattr(multiprocessing.current_process(), "_inheriting", False):
    raise UserError(
      "NUM_WORKERS: a process that reads data runs this script again; put what"
      ' the script does under `if __name__ == "__main__":`'
    )


def prefetched(dataset: grain.IterDataset, num_workers: int, ahead: int) -> Any:
  """The elements of a data set, made in processes of their own."""
  try:
    cloudpickle.dumps(dataset)
  except (TypeError, pickle.PicklingError) as e:
    raise UserError(
      f"NUM_WORKERS = {num_workers}: the task holds what no other process can"
      f" have ({e}); set it to 0"
    ) from None
  if not flags.FLAGS.is_parsed():
    # Grain asks absl for settings that nobody gives here.
    flags.FLAGS.mark_as_parsed()
  return dataset.mp_prefetch(
    grain.MultiprocessingOptions(
      num_workers=num_workers, per_worker_buffer_size=ahead
    )
  )


def whole(
  task: seqio.Task,
  split: str,
  limits: Limits,
  counts: examples.Counts,
  num_workers: int,
) -> Iterator[Example]:
  """What examples.whole gives, made by `num_workers` processes."""
  blocks = prefetched(_Blocks(task, split, limits), num_workers, _AHEAD)
  for block in blocks:
    counts.merge(block.counts)
    if block.error is not None:
      raise block.error
    yield from block.examples
  task.source.tell(split, counts.rows, counts.left_out)
