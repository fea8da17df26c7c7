"""Scalars to metrics.csv, TensorBoard and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import csv
import errno
import json
import math
import os

from clu import metric_writers
import jax
import numpy as np
import tensorflow as tf

from fat5_jax import staging, storage
from fat5_jax.checkpoints import run_folder

_COLUMNS = ("step", "dataset", "metric", "value")


class MetricsLog:
  """metrics.csv and TensorBoard events of a run folder, written by host 0.

  A resumed run first drops what a killed one wrote after its last checkpoint.
  In a bucket it is written now and then, at the latest with `flush`.
  """

  def __init__(self, model_dir: str, first_step: int):
    self._folder = model_dir
    self._mirror = staging.Mirror(model_dir)
    self._model_dir = model_dir = self._mirror.path
    self._mirror.pull(_goes_on)
    self._path = os.path.join(model_dir, "metrics.csv")
    self._writers: dict[str, metric_writers.SummaryWriter] = {}
    self._rows = [row for row in read_csv(self._path) if row[0] <= first_step]
    self._rewrite()
    evaluated = self.has(first_step, "inference_eval/")
    _drop_later_lines(model_dir, first_step if evaluated else first_step - 1)
    self.flush()

  def flush(self) -> None:
    """Until all of it is where the run folder is.

    Raises:
      StorageError: if that takes no more.
    """
    if jax.process_index() == 0:
      self._mirror.push()

  def _rewrite(self) -> None:
    lines = [",".join(_COLUMNS)]
    lines += [f"{s},{d},{m},{v!r}" for s, d, m, v in self._rows]
    run_folder.write_atomically(self._path, "\n".join(lines) + "\n")

  def write(
    self,
    step: int,
    dataset: str,
    values: Mapping[str, float],
    events: str | None = None,
  ) -> None:
    """Adds scalars to the CSV and, where `events` names a folder, there too."""
    values = {key: float(np.asarray(v)) for key, v in values.items()}
    rows = [(step, dataset, key, value) for key, value in values.items()]
    # An evaluation that a kill cut short is run, and written, again.
    again = {row[:3] for row in rows} & {row[:3] for row in self._rows}
    self._rows = [row for row in self._rows if row[:3] not in again] + rows
    if again:
      self._rewrite()
    elif jax.process_index() == 0:
      with open(self._path, "a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    if events is not None and jax.process_index() == 0:
      self._write_events(events, step, values)
    if jax.process_index() == 0:
      self._mirror.push_if_due()

  def _write_events(self, events: str, step: int, values) -> None:
    """To TensorBoard; TensorFlow's own errors become OSError."""
    folder = os.path.join(self._model_dir, events)
    try:
      if events not in self._writers:
        self._writers[events] = metric_writers.SummaryWriter(folder)
      self._writers[events].write_scalars(step, values)
      self._writers[events].flush()
    except tf.errors.OpError as e:
      is_full = isinstance(e, tf.errors.ResourceExhaustedError)
      number = errno.ENOSPC if is_full else errno.EIO
      raise OSError(number, os.strerror(number), folder) from e

  def has(self, step: int, prefix: str) -> bool:
    """Whether a data set whose name starts so has values at a step."""
    return any(s == step and d.startswith(prefix) for s, d, _, _ in self._rows)

  def latest(self) -> dict[str, dict[str, float]]:
    """The last value of every metric, by data set."""
    found: dict[str, dict[str, float]] = {}
    for _, dataset, metric, value in self._rows:
      found.setdefault(dataset, {})[metric] = value
    return found

  def plot(self) -> str:
    """Draws curves.png; its path."""
    path = os.path.join(self._model_dir, "curves.png")
    if jax.process_index() == 0:
      plot(self._rows, path)
    self.flush()
    return os.path.join(self._folder, "curves.png")

  def close(self) -> None:
    for writer in self._writers.values():
      writer.close()
    self.flush()
    self._mirror.close()


def _goes_on(name: str) -> bool:
  """Whether a file of a run folder is added to by a resumed run."""
  return name == "metrics.csv" or (
    name.startswith("inference_eval/") and name.endswith("-metrics.jsonl")
  )


def read_csv(path: str) -> list[tuple[int, str, str, float]]:
  """Rows (step, data set, metric, value) of a metrics.csv; none if absent."""
  if not storage.exists(path):
    return []
  rows = []
  lines = storage.read(path).decode().splitlines(keepends=True)
  for record in csv.DictReader(lines):
    try:
      rows.append(
        (
          int(record["step"]),
          record["dataset"],
          record["metric"],
          float(record["value"]),
        )
      )
    except (TypeError, ValueError):
      # The last line of a killed run may be cut short.
      continue
  return rows


def _drop_later_lines(model_dir: str, last_step: int) -> None:
  """Removes later steps from SeqIO's `<task>-metrics.jsonl` files, and what a
  kill has cut short.
  """
  folder = os.path.join(model_dir, "inference_eval")
  if not os.path.isdir(folder):
    return
  for name in os.listdir(folder):
    if not name.endswith("-metrics.jsonl"):
      continue
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as file:
      lines = [line for line in file if _step_of(line) <= last_step]
    run_folder.write_atomically(path, "".join(lines))


def _step_of(line: str) -> float:
  """Of a row of JSON; infinity where it is none."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):
    return math.inf


def plot(rows: Iterable[tuple[int, str, str, float]], path: str) -> None:
  """Loss, learning rate, and evaluation metrics over steps, as a PNG."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  curves: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
  for step, dataset, metric, value in rows:
    xs, ys = curves.setdefault((dataset, metric), ([], []))
    xs.append(step)
    ys.append(value)
  panels = [
    ("loss per target or label (nats)", "loss_per_nonpadding_target_token"),
    ("accuracy of targets or labels", "accuracy"),
    ("learning rate", "learning_rate"),
  ]
  # Fixed margins: a layout that is solved for would draw everything twice.
  figure, axes = plt.subplots(2, 2, figsize=(11, 7))
  figure.subplots_adjust(0.06, 0.07, 0.98, 0.95, wspace=0.15, hspace=0.28)
  for axis, (title, metric) in zip(axes.flat, panels):
    for (dataset, name), (xs, ys) in curves.items():
      if name == metric and not dataset.startswith("inference_eval"):
        axis.plot(xs, ys, label=dataset, marker="." if len(xs) < 30 else None)
    axis.set_title(title)
  # A loss that falls a hundredfold needs a logarithm to be seen.
  axes.flat[0].set_yscale("log")
  axis = axes.flat[3]
  for (dataset, name), (xs, ys) in curves.items():
    if dataset.startswith("inference_eval"):
      axis.plot(xs, ys, label=f"{dataset.split('/')[-1]} {name}", marker="o")
  axis.set_title("predictions")
  for axis in axes.flat:
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize="small")
  temporary = os.path.join(os.path.dirname(path), ".writing-curves.png")
  figure.savefig(temporary, dpi=110)
  os.replace(temporary, path)
  plt.close(figure)
