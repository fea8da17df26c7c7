"""TensorBoard's event files: `train/`, and `training_eval/<task>/` a task.

SeqIO's own logger writes those of `inference_eval/` (evaluation/).
"""

from __future__ import annotations

from collections.abc import Mapping
import errno
import os

from clu import metric_writers
import tensorflow as tf

from fat5_jax.convert import plain_files
from fat5_jax.loggers.logger import Logger

_SEQIO = "inference_eval/"


class TensorBoard(Logger):
  """Event files of a run folder, cut back to the step that it goes on from."""

  def __init__(self, folder: str, first_step: int):
    super().__init__()
    self._folder = folder
    self._writers: dict[str, metric_writers.SummaryWriter] = {}
    for dataset, path in _event_files(folder):
      self.there |= {
        (step, self.named(dataset, tag))
        for step, tag in _cut_back(path, first_step)
      }

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    """TensorFlow's own errors become OSError."""
    if dataset.startswith(_SEQIO):
      return
    folder = os.path.join(self._folder, dataset)
    try:
      if dataset not in self._writers:
        self._writers[dataset] = metric_writers.SummaryWriter(folder)
      self._writers[dataset].write_scalars(step, values)
      self._writers[dataset].flush()
    except tf.errors.OpError as e:
      is_full = isinstance(e, tf.errors.ResourceExhaustedError)
      number = errno.ENOSPC if is_full else errno.EIO
      raise OSError(number, os.strerror(number), folder) from e

  def close(self, failed: bool = False) -> None:
    for writer in self._writers.values():
      writer.close()


def is_event_file(name: str) -> bool:
  """Whether a file of a run folder is one of these."""
  return "tfevents" in name and not name.startswith(_SEQIO)


def _event_files(folder: str) -> list[tuple[str, str]]:
  """(data set, path) of those that are there."""
  found = []
  for dataset in ("train", "training_eval"):
    for here, _, names in os.walk(os.path.join(folder, dataset)):
      of = os.path.relpath(here, folder).replace(os.sep, "/")
      for name in filter(is_event_file, sorted(names)):
        path = os.path.join(here, name)
        if name.startswith(plain_files.SCRATCH):
          os.unlink(path)  # Of a process that was killed at it.
        else:
          found.append((of, path))
  return found


def _cut_back(path: str, last_step: int) -> list[tuple[int, str]]:
  """Drops later steps from a file, and what a kill has cut short.

  Returns:
    (step, tag) of what stays.
  """
  kept: list[tuple[int, str]] = []
  records: list[bytes] = []
  is_whole = True
  reader = tf.compat.v1.io.tf_record_iterator(path)
  while True:
    try:
      record = next(reader)
    except StopIteration:
      break
    except tf.errors.OpError:
      is_whole = False
      break
    event = tf.compat.v1.Event.FromString(record)
    if event.step > last_step:
      is_whole = False
      continue
    records.append(record)
    kept += [(event.step, value.tag) for value in event.summary.value]
  if not is_whole:
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, plain_files.SCRATCH + name)
    with tf.io.TFRecordWriter(scratch) as writer:
      for record in records:
        writer.write(record)
    os.replace(scratch, path)
  return kept
