"""Weights & Biases, MLflow and Trackio, each where it is installed.

Where they log to, and under which names, their own environment variables say
(WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME,
TRACKIO_SPACE_ID, ...). Else a project is called as the folder that MODEL_DIR is
in, and a run as MODEL_DIR. `MODEL_DIR/trackers/` keeps which run it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import csv
import glob
import json
import os
import re
import secrets
import sys
import time
from typing import Any

from fat5_jax.checkpoints import run_folder
from fat5_jax.loggers.logger import Logger

FOLDER = "trackers"


class Tracker(Logger):
  """A run of a tool, which is gone on with where the folder knows one.

  Attributes:
    goes_on: whether an earlier process of this run used it.
  """

  name: str

  def __init__(self, folder: str, model_dir: str):
    """Opens it.

    Args:
      folder: where files of the run folder are written.
      model_dir: the run folder, for names.
    """
    super().__init__()
    self._folder = folder
    self._record_path = os.path.join(folder, FOLDER, f"{self.name}.json")
    self._sent_path = os.path.join(folder, FOLDER, f"{self.name}-sent.csv")
    model_dir = model_dir.rstrip("/")
    self.run_name = _plain(os.path.basename(model_dir)) or "run"
    self.project = _plain(os.path.basename(os.path.dirname(model_dir)))
    self.project = self.project or "fat5_jax"
    self.record = record_of(folder, self.name)
    self.goes_on = self.record is not None

  def keep(self, **record: str) -> None:
    """Writes down which run of the tool this is."""
    os.makedirs(os.path.dirname(self._record_path), exist_ok=True)
    run_folder.write_atomically(self._record_path, json.dumps(record) + "\n")

  def sent(self) -> set[tuple[int, str]]:
    """What earlier processes handed in, of a tool that does not tell."""
    if not os.path.exists(self._sent_path):
      return set()
    with open(self._sent_path, encoding="utf-8", newline="") as file:
      rows = [row for row in csv.reader(file) if len(row) == 2]
    return {(int(step), name) for step, name in rows if step.isdecimal()}

  def note_sent(self, step: int, names) -> None:
    with open(self._sent_path, "a", encoding="utf-8", newline="") as file:
      csv.writer(file).writerows((step, name) for name in names)

  def values_of(self, dataset: str, values: Mapping[str, float]):
    return {self.named(dataset, name): v for name, v in values.items()}


class Wandb(Tracker):
  """Weights & Biases, https://docs.wandb.ai.

  Offline, a run that goes on begins a file of its own with all of its rows:
  what a killed process had is not on the disk yet, or not all. The file before
  is put aside as `wandb/replaced-...`.
  """

  name = "wandb"

  def __init__(self, folder: str, model_dir: str):
    super().__init__(folder, model_dir)
    import wandb

    unless = lambda variable, name: None if variable in os.environ else name
    run_id = (self.record or {}).get("id") or os.environ.get("WANDB_RUN_ID")
    run_id = run_id or secrets.token_hex(4)
    options = {} if "WANDB_CONSOLE" in os.environ else {"console": "off"}
    self._run = wandb.init(
      id=run_id,
      resume="allow",
      name=unless("WANDB_NAME", self.run_name),
      project=unless("WANDB_PROJECT", self.project),
      dir=unless("WANDB_DIR", folder),
      settings=wandb.Settings(**options),
    )
    self.keep(id=run_id)
    # The x-axis, of rows that come late too.
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")
    # Where W&B's own count of rows is; it takes nothing below it.
    self._next = 0
    if self._run.offline:
      self._put_aside(run_id)
    elif self._run.resumed:
      # Rows in order, of which the server has the first ones.
      self._next = self._run.starting_step
      self.there = {row for row in self.sent() if row[0] < self._next}

  def _put_aside(self, run_id: str) -> None:
    here = os.path.dirname(os.path.realpath(self._run.dir))
    above = os.path.dirname(here)
    for path in glob.glob(
      os.path.join(glob.escape(above), f"offline-run-*-{run_id}")
    ):
      if os.path.realpath(path) != here:
        name = f"replaced-{os.path.basename(path)}"
        os.rename(path, os.path.join(above, name))
    with contextlib.suppress(FileNotFoundError):
      os.unlink(self._sent_path)

  def settings(self, values: Mapping[str, Any], text: str | None) -> None:
    if text is not None:
      values = {**values, "config.gin": text}
    self._run.config.update(values, allow_val_change=True)

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    row = self.values_of(dataset, values) | {"step": step}
    if step >= self._next:
      self._next = step
      self._run.log(row, step=step)
    else:
      # An evaluation of the step that an earlier process ended with: W&B takes
      # no step again, so that it counts one on.
      self._next += 1
      self._run.log(row)
    self.note_sent(step, self.values_of(dataset, values))

  def close(self, failed: bool = False) -> None:
    self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
  """MLflow, https://mlflow.org/docs: an experiment's run."""

  name = "mlflow"

  def __init__(self, folder: str, model_dir: str):
    super().__init__(folder, model_dir)
    import mlflow

    uri = (self.record or {}).get("tracking_uri")
    if uri is None or os.environ.get("MLFLOW_TRACKING_URI"):
      uri = mlflow.get_tracking_uri()
    self._mlflow = mlflow
    self._client = mlflow.MlflowClient(uri)
    if self.record is None:
      run = self._client.create_run(self._experiment(), run_name=self.run_name)
      self._id = run.info.run_id
      self.keep(id=self._id, tracking_uri=uri)
      return
    self._id = self.record["id"]
    run = self._client.get_run(self._id)
    self._client.update_run(self._id, status="RUNNING")
    for key in run.data.metrics:
      history = self._client.get_metric_history(self._id, key)
      self.there |= {(metric.step, key) for metric in history}

  def _experiment(self) -> str:
    if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
      return found
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.project
    experiment = self._client.get_experiment_by_name(name)
    if experiment is not None:
      return experiment.experiment_id
    return self._client.create_experiment(name)

  def named(self, dataset: str, name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", f"{dataset}/{name}", flags=re.ASCII)

  def settings(self, values: Mapping[str, Any], text: str | None) -> None:
    """Parameters are never changed there: what a resumed run has otherwise is
    in config.gin."""
    known = self._client.get_run(self._id).data.params
    entities = self._mlflow.entities
    self._client.log_batch(
      self._id,
      params=[
        entities.Param(key, str(value)[:6000])
        for key, value in values.items()
        if key not in known
      ],
    )
    if text is not None:
      self._client.log_text(self._id, text, "config.gin")

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    self._client.log_batch(
      self._id,
      metrics=[
        self._mlflow.entities.Metric(key, value, now, step)
        for key, value in self.values_of(dataset, values).items()
      ],
    )

  def close(self, failed: bool = False) -> None:
    status = "FAILED" if failed else "FINISHED"
    self._client.set_terminated(self._id, status)


class Trackio(Tracker):
  """Trackio, huggingface.co/docs/trackio: on this machine, or a Space."""

  name = "trackio"

  def __init__(self, folder: str, model_dir: str):
    super().__init__(folder, model_dir)
    import trackio

    # Trackio goes on with a run by its name.
    known = self.record or {
      "project": self.project,
      "name": f"{self.run_name}-{secrets.token_hex(3)}",
    }
    if self.goes_on:
      is_away = {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & {*os.environ}
      self.there = self.sent() if is_away else set(_logged(**known))
    # It speaks on standard output.
    with contextlib.redirect_stdout(sys.stderr):
      self._run = trackio.init(**known, resume="allow", embed=False)
    self.keep(**known)

  def settings(self, values: Mapping[str, Any], text: str | None) -> None:
    if text is not None:
      values = {**values, "config.gin": text}
    self._run.config.update(values)

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    row = self.values_of(dataset, values)
    self._run.log(row, step=step)
    self.note_sent(step, row)

  def close(self, failed: bool = False) -> None:
    with contextlib.redirect_stdout(sys.stderr):
      self._run.finish()


def _logged(project: str, name: str) -> Iterator[tuple[int, str]]:
  """(step, metric) of what Trackio has of a run on this machine."""
  from trackio.sqlite_storage import SQLiteStorage

  for row in SQLiteStorage.get_logs(project, name):
    yield from ((row["step"], key) for key in row)


def record_of(folder: str, name: str) -> dict[str, str] | None:
  """Which run of a tool a run folder's is; None of none."""
  try:
    with open(
      os.path.join(folder, FOLDER, f"{name}.json"), encoding="utf-8"
    ) as file:
      return json.load(file)
  except (FileNotFoundError, ValueError):
    return None


def _plain(name: str) -> str:
  """A name that every tool takes."""
  return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")
