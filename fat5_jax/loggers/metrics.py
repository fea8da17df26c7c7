"""Scalars of a run: to metrics.csv, and to the loggers that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import importlib.util
import itertools
import json
import math
import os
from typing import Any

import jax
import numpy as np

from fat5_jax import console, staging
from fat5_jax.checkpoints import history, run_folder
from fat5_jax.errors import UserError, nearest
from fat5_jax.loggers import curves, sender, tensorboard, trackers
from fat5_jax.loggers.csv_file import CsvFile, Row, read_csv
from fat5_jax.loggers.logger import Logger

__all__ = ["LOGGERS", "MetricsLog", "check_loggers", "read_csv"]

_TRACKERS = {
  "wandb": trackers.Wandb,
  "mlflow": trackers.MLflow,
  "trackio": trackers.Trackio,
}
LOGGERS = ("tensorboard", *_TRACKERS)


def check_loggers(names: Sequence[str]) -> None:
  """Raises UserError for what is no logger, or is not installed."""
  for name in names:
    if name not in LOGGERS:
      raise UserError(
        f"LOGGERS: no logger {name!r}.{nearest(str(name), LOGGERS)} There are"
        f" {', '.join(LOGGERS)}"
      )
    if name not in _TRACKERS:
      continue
    found = importlib.util.find_spec(name)
    # A folder that a tool writes here has its name, and is no package.
    if found is None or found.origin is None:
      raise UserError(
        f"LOGGERS: {name} is not installed here: pip install {name}"
      )


class MetricsLog:
  """metrics.csv of a run folder and what else takes it, written by host 0.

  A resumed run first drops what a killed one wrote after its last checkpoint,
  and hands to the loggers what they have not of what came before. In a bucket
  files are written now and then, at the latest with `flush`.
  """

  def __init__(
    self, model_dir: str, first_step: int, loggers: Sequence[str] = ()
  ):
    """
    Args:
      model_dir: the run folder.
      first_step: that is gone on from.
      loggers: of LOGGERS.

    Raises:
      UserError: if a tracker that this run has not used before cannot be
        opened.
    """
    self._folder = model_dir
    self._mirror = staging.Mirror(model_dir)
    self._model_dir = model_dir = self._mirror.path
    self._mirror.pull(_goes_on)
    self._csv = CsvFile(model_dir, first_step)
    evaluated = self.has(first_step, "inference_eval/")
    _drop_later_lines(model_dir, first_step if evaluated else first_step - 1)
    self._loggers: list[Logger] = []
    if jax.process_index() == 0:
      self._open(loggers, first_step)
    place = lambda row: row[:2]
    for (step, dataset), rows in itertools.groupby(self._csv.rows, place):
      values = {name: value for _, _, name, value in rows}
      for logger in self._loggers:
        logger.metrics(step, dataset, values)
    self.flush()

  def _open(self, names: Sequence[str], first_step: int) -> None:
    try:
      for name in names:
        logger = self._opened(name, first_step)
        self._loggers += [logger] if logger is not None else []
    except UserError:
      for logger in self._loggers:
        logger.close(failed=True)
      raise

  def _opened(self, name: str, first_step: int) -> Logger | None:
    if name == "tensorboard":
      return tensorboard.TensorBoard(self._model_dir, first_step)
    is_known = trackers.record_of(self._model_dir, name) is not None
    try:
      tracker = _TRACKERS[name](self._model_dir, self._folder)
    except Exception as e:  # Whatever a tool of others raises.
      said = f"{name} cannot be opened: {sender.brief(e)}"
      if not is_known:
        raise UserError(f"LOGGERS: {said}") from e
      # Nobody may be there to see it, and training can go on.
      console.say(
        f"warning: {said}. Training goes on without it; the next start of this"
        " run hands in what it has missed"
      )
      return None
    return sender.Sender(name, tracker)

  def settings(self, values: Mapping[str, Any], text: str | None) -> None:
    """What the run is, for loggers that keep it; see Logger.settings."""
    for logger in self._loggers:
      logger.settings(values, text)

  def flush(self) -> None:
    """Until all of it is where the run folder is.

    Raises:
      StorageError: if that takes no more.
    """
    if jax.process_index() == 0:
      self._mirror.push()

  def write(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    """Adds scalars of a data set at a step."""
    values = {key: float(np.asarray(v)) for key, v in values.items()}
    self._csv.metrics(step, dataset, values)
    for logger in self._loggers:
      logger.metrics(step, dataset, values)
    if jax.process_index() == 0:
      self._mirror.push_if_due()

  def has(self, step: int, prefix: str) -> bool:
    """Whether a data set whose name starts so has values at a step."""
    return any(s == step and d.startswith(prefix) for s, d, _, _ in self.rows())

  def rows(self) -> list[Row]:
    """(step, data set, metric, value) of all there is."""
    return list(self._csv.rows)

  def latest(self) -> dict[str, dict[str, float]]:
    """The last value of every metric, by data set."""
    found: dict[str, dict[str, float]] = {}
    for _, dataset, metric, value in self._csv.rows:
      found.setdefault(dataset, {})[metric] = value
    return found

  def plot(self) -> str:
    """Draws curves.png; its path."""
    path = os.path.join(self._model_dir, "curves.png")
    if jax.process_index() == 0:
      best = history.best(self._folder)
      name = os.path.basename(self._folder)
      curves.plot(self._csv.rows, path, name, best)
    self.flush()
    return os.path.join(self._folder, "curves.png")

  def close(self, failed: bool = False) -> None:
    """No more will come; `failed` of a run that ended by an error."""
    for logger in self._loggers:
      logger.close(failed)
    if not failed:
      self.flush()
    self._mirror.close()


def _goes_on(name: str) -> bool:
  """Whether a file of a run folder is added to by a resumed run."""
  return (
    name == "metrics.csv"
    or (name.startswith("inference_eval/") and name.endswith("-metrics.jsonl"))
    or name.startswith(f"{trackers.FOLDER}/")
    or tensorboard.is_event_file(name)
  )


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
