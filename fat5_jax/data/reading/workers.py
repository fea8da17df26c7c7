"""Rows made into examples by several processes, in the order of the rows.

Each process reads all rows, which is cheap, and tokenises some of their blocks.
Grain starts them and puts the blocks in order.
"""

from __future__ import annotations

from collections.abc import Iterator
import copy
import dataclasses
import multiprocessing
import os
import pickle
import re
import threading
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


def _end_with_parent(number: int, count: int) -> None:
  """Ends this process once its parent is gone, which kill -9 cannot say."""
  del number, count

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


class Reader:
  """The elements of a data set, made in processes of their own.

  Raises:
    UserError: if one of them is gone, killed for its memory say.
  """

  def __init__(self, dataset: grain.IterDataset, num_workers: int):
    self._iterator, self._count = iter(dataset), num_workers

  def __iter__(self) -> Reader:
    return self

  def __next__(self) -> Any:
    try:
      return next(self._iterator)
    except RuntimeError as e:
      if "Worker process was terminated" not in str(e):
        raise
      code = re.search(r"exit code (-?\d+)", str(e))
      raise UserError(
        f"NUM_WORKERS = {self._count}: a process that reads data has ended"
        f" ({f'exit code {code[1]}' if code else 'killed'}; -9 is mostly a lack"
        " of memory): set fewer, or 0"
      ) from None

  def close(self) -> None:
    close = getattr(self._iterator, "close", None)
    if close is not None:
      close()


def prefetched(
  dataset: grain.IterDataset, num_workers: int, ahead: int
) -> Reader:
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
  options = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=ahead
  )
  found = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
  return Reader(found, num_workers)


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
