"""What a fine-tuning leaves behind: its folder, metrics and curves."""

from __future__ import annotations

import os
from typing import Any

from fat5_jax import fetched
from fat5_jax.loggers import curves
from fat5_jax.loggers import metrics as metrics_lib


class FineTuned:
  """A run that `Model.fine_tune` has trained; a notebook shows its curves.

  Attributes:
    model: the model, with the parameters of the last step.
    folder: the run folder: checkpoints, metrics.csv, TensorBoard, predictions.
      `python -m fat5_jax.infer --gin.MODEL_DIR=...` reads it.
    step: the last step that is saved.
    stopped: whether Ctrl-C or SIGTERM ended it early. The same call with the
      same run_folder goes on.
  """

  def __init__(
    self, model: Any, folder: str, step: int, stopped: bool, owner: Any
  ):
    """`owner` keeps a temporary folder for as long as somebody has this."""
    self.model, self.folder = model, folder
    self.step, self.stopped = step, stopped
    self._owner = owner

  def _rows(self) -> list[tuple[int, str, str, float]]:
    return metrics_lib.read_csv(os.path.join(self.folder, "metrics.csv"))

  @property
  def metrics(self) -> Any:
    """A pandas frame: step, dataset, metric, value, a row each.

    Data sets are `train`, `training_eval/<task>` (the loss on validation) and
    `inference_eval/<task>` (metrics of predictions). A list of dictionaries
    where pandas is not installed.
    """
    columns = ("step", "dataset", "metric", "value")
    rows = [dict(zip(columns, row)) for row in self._rows()]
    try:
      import pandas
    except ImportError:
      return rows
    return pandas.DataFrame(rows, columns=columns)

  @property
  def results(self) -> dict[str, float]:
    """The last metrics of the predictions of validation, {metric: value}."""
    return {
      metric: value
      for _, dataset, metric, value in self._rows()
      if dataset.startswith("inference_eval")
    }

  @property
  def plot(self) -> str:
    """The path of curves.png: loss, rate and metrics over steps."""
    path = fetched.local(os.path.join(self.folder, "curves.png"))
    if not os.path.exists(path):
      curves.plot(self._rows(), path)
    return path

  def _repr_png_(self) -> bytes:
    with open(self.plot, "rb") as file:
      return file.read()

  def __repr__(self) -> str:
    how = "stopped early at" if self.stopped else "at"
    found = "".join(f", {k} {v:.4g}" for k, v in self.results.items())
    return f"FineTuned({how} step {self.step}{found}; {self.folder})"
