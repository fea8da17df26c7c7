"""MODEL_DIR/report.html: one page that tells what a run did, by itself.

All of it comes from files of the run folder: metrics.csv, best.json, the rows
of the latest evaluation of each task, config.gin, model.json.
"""

from __future__ import annotations

from collections.abc import Iterator
import importlib.metadata
import json
import os
import platform
import re
import time
from typing import Any

import jax
import numpy as np

from fat5_jax import storage
from fat5_jax.checkpoints import history, run_folder
from fat5_jax.evaluation import details
from fat5_jax.loggers import curves, metrics
from fat5_jax.models.config import HeadConfig

NAME = "report.html"
# Rows that are shown: of the wrong ones the surest, of the others the first.
_WRONG, _RIGHT = 400, 100
_ROWS_FILE = re.compile(r"(.+)-(\d{6,})\.jsonl$")
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "seqio", "numpy")


def write(model_dir: str, head: HeadConfig | None = None) -> str:
  """Writes the page; its path. Host 0 alone does.

  Args:
    model_dir: the run folder, or that of an evaluation.
    head: of the model; None is a language model.
  """
  path = os.path.join(model_dir, NAME)
  if jax.process_index() == 0:
    template = os.path.join(os.path.dirname(__file__), NAME)
    with open(template, encoding="utf-8") as file:
      page = file.read()
    # No text of a row may end the script that holds it.
    data = json.dumps(
      collect(model_dir, head), ensure_ascii=False, allow_nan=False
    )
    text = page.replace("/*DATA*/", data.replace("<", "\\u003c"))
    run_folder.write_atomically(path, text)
  return path


def collect(model_dir: str, head: HeadConfig | None) -> dict[str, Any]:
  """What the page shows, as JSON holds it."""
  rows = metrics.read_csv(os.path.join(model_dir, "metrics.csv"))
  best = history.best(model_dir)
  last = max((row[0] for row in rows), default=None)
  about = f"written {time.strftime('%Y-%m-%d %H:%M')}"
  if last is not None:
    about += f", measured up to step {last:,}"
  if best is not None:
    about += f"; best {best[0]}: {best[2]:.4g} at step {best[1]:,}"
  config = os.path.join(model_dir, "config.gin")
  return {
    "name": os.path.basename(os.path.normpath(model_dir)),
    "about": about,
    "panels": [
      {
        "title": panel.title,
        "log": panel.is_log,
        "series": panel.series,
        "best": panel.best,
      }
      for panel in curves.panels(rows, best)
    ],
    "metrics": _metrics(rows),
    "tasks": [
      _task(name, step, path, head)
      for name, step, path in _rows_files(model_dir)
    ],
    "config": storage.read(config).decode() if storage.exists(config) else "",
    "environment": _environment(),
  }


def _environment() -> dict[str, str]:
  found = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
  device = jax.devices()[0]
  found["devices"] = (
    f"{jax.device_count()} x {device.device_kind} on {jax.process_count()}"
    " host(s)"
  )
  found["Python"] = platform.python_version()
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _metrics(rows: list[curves.Row]) -> list[list[Any]]:
  """[data set, metric, latest, its step, highest, its step, lowest, ...]."""
  found: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for step, dataset, metric, value in rows:
    if np.isfinite(value):
      found.setdefault((dataset, metric), []).append((step, value))
  table = []
  for (dataset, metric), points in found.items():
    step, value = points[-1]
    high = max(points, key=lambda point: point[1])
    low = min(points, key=lambda point: point[1])
    table.append([dataset, metric, value, step, *high[::-1], *low[::-1]])
  # What people look for first stands first.
  order = ("inference_eval", "training_eval", "train")
  return sorted(table, key=lambda r: (order.index(r[0].split("/")[0]), r[:2]))


def _rows_files(model_dir: str) -> Iterator[tuple[str, int, str]]:
  """(task, step, path) of the latest rows of each task."""
  folder = os.path.join(model_dir, "inference_eval")
  latest: dict[str, tuple[int, str]] = {}
  names = storage.names(folder) if storage.exists(folder) else []
  for name in sorted(names):
    if match := _ROWS_FILE.match(name):
      step = int(match[2])
      if step >= latest.get(match[1], (-1, ""))[0]:
        latest[match[1]] = step, os.path.join(folder, name)
  for task, (step, path) in sorted(latest.items()):
    yield task, step, path


def _read_rows(path: str) -> Iterator[dict[str, Any]]:
  left = b""
  for piece in storage.pieces(path):
    *lines, left = (left + piece).split(b"\n")
    yield from map(json.loads, lines)
  if left.strip():
    yield json.loads(left)


def _task(
  name: str, step: int, path: str, head: HeadConfig | None
) -> dict[str, Any]:
  """What a task's rows tell, read once and not held."""
  told = details.Details(head)
  wrong: list[list[Any]] = []
  right: list[list[Any]] = []
  count = 0
  for row in _read_rows(path):
    count += 1
    sample = _sample(row, head)
    if "prediction" in row:
      told.add(row)
    if sample[3]:
      if len(right) < _RIGHT:
        right.append(sample)
    else:
      wrong.append(sample)
      if len(wrong) > 2 * _WRONG:
        wrong = _surest(wrong)
  found = told.found()
  found.pop("errors", None)  # Among the samples.
  samples = _surest(wrong) + right
  return {"name": name, "step": step, "rows": count, "samples": samples} | found


def _surest(samples: list[list[Any]]) -> list[list[Any]]:
  """Those whose probability is highest, which are the worst of the errors."""
  key = lambda sample: -1.0 if sample[4] is None else sample[4]
  return sorted(samples, key=key, reverse=True)[:_WRONG]


def _sample(row, head) -> list[Any]:
  """[input, target, prediction, whether it is right, probability]."""
  texts = details.sample(row, head)
  is_right = row["target"] == row.get("prediction")
  return [*texts.values(), is_right, details.probability(row, head)]
