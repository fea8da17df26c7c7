"""A model's predictions of a split, scored by the task's metrics."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import json
import os
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from fat5_jax import staging
from fat5_jax.data import checks, pipeline, seqio_source, tasks
from fat5_jax.data import metrics as metrics_lib
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.inference import heads
from fat5_jax.inference.predictor import Predictor

# What of an example is for the pipeline alone.
_INNER = "first_size"


class InferenceEvaluator:
  """Every task of a split, predicted and scored, compiled once a shape.

  Rows are read, predicted and written one after the other: of a row, only what
  the metrics compare stays in memory. Writes
  `inference_eval/<task>-metrics.jsonl`, `<task>-<step>.jsonl` and TensorBoard
  events, as SeqIO's evaluator does.
  """

  def __init__(
    self,
    model,
    config: pipeline.DatasetConfig,
    output_dir: str,
    partitioner: Partitioner,
  ):
    self._model = model
    head = model.config.head
    self._has_tags = head is not None and head.kind == "token_classification"
    # Its writers know a disk alone.
    self._mirror = staging.Mirror(os.path.join(output_dir, "inference_eval"))
    self._folder = self._mirror.path
    tasks.register(config.task())
    for part in seqio.get_subtasks(config.task()):
      metrics_lib.check(part.metric_fns, part.name)
      if len(part.metric_objs) > len(part.metric_fns):
        raise UserError(
          f"task {part.name!r} has metrics that are classes; an evaluation"
          " scores by functions of (targets, predictions)"
        )
    self._parts = [
      part for part in pipeline.of_tasks(config) if part.task().metric_fns
    ]
    os.makedirs(self._folder, exist_ok=True)
    self._loggers = []
    if not jax.process_index():
      # Every host predicts and scores, one writes.
      self._loggers = [
        seqio.JSONLogger(self._folder, write_n_results=0),
        seqio.TensorBoardLogger(self._folder),
      ]
    if self._parts:
      checks.check_task(config, model.config)
      max_length = None
      if model.config.is_language_model:
        max_length = max(map(pipeline.longest_target, self._parts))
      self._predict = Predictor(
        model, partitioner, config.batch_size, max_length
      )

  @property
  def task_names(self) -> list[str]:
    return [part.task().name for part in self._parts]

  def evaluate(self, params, step: int) -> dict[str, dict[str, float]]:
    """Metrics by task name."""
    results: dict[str, dict[str, float]] = {}
    if not self._parts:
      return results
    self._mirror.pull(lambda name: name.endswith("-metrics.jsonl"))
    for part in self._parts:
      with seqio_source.reraise(), self._disk_errors():
        name = part.task().name
        results[name] = self._score(part, params, step)
    if self._loggers:
      self._mirror.push()
    return results

  def _score(
    self, config: pipeline.DatasetConfig, params, step: int
  ) -> dict[str, float]:
    """Predicts and scores a task."""
    task = config.task()
    targets, predictions = [], []
    with self._rows_file(f"{task.name}-{step:06d}.jsonl") as write:
      for row in self._rows(config, params):
        targets.append(row["target"])
        predictions.append(row["prediction"])
        write(row)
    found: dict[str, Any] = {}
    for metric in task.metric_fns:
      found |= metric(targets, predictions)
    values = {
      name: value
      if isinstance(value, seqio.metrics.MetricValue)
      else seqio.metrics.Scalar(value)
      for name, value in found.items()
    }
    for logger in self._loggers:
      logger(task.name, step, values, None, None, None)
    return {name: _number(value) for name, value in values.items()}

  def _rows(
    self, config: pipeline.DatasetConfig, params
  ) -> Iterator[dict[str, Any]]:
    """Each row with its target and what was predicted, as metrics see them."""
    task = config.task()
    vocabulary = task.output_features["targets"].vocabulary
    postprocess = task.postprocess_fn or (lambda value, **unused: value)
    for example, values in self._predict(params, pipeline.one_pass(config)):
      if self._has_tags:
        # Metrics ask for classes alone.
        values = values[: len(example["inputs"]), 0]
      target = example.get("targets_pretokenized")
      if target is None:
        target = vocabulary.decode(example["targets"].tolist())
      elif isinstance(target, bytes):
        target = target.decode("utf-8")
      output = vocabulary.decode(values.tolist())
      yield {
        "input": {k: v for k, v in example.items() if k != _INNER},
        "target": postprocess(target, example=example, is_target=True),
        "output": output,
        "prediction": postprocess(output, example=example, is_target=False),
      }

  @contextlib.contextmanager
  def _rows_file(self, name: str):
    """Writes rows to a file that is there when it is whole."""
    if not self._loggers:
      yield lambda row: None
      return
    path = os.path.join(self._folder, name)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
      yield lambda row: file.write(
        json.dumps(row, cls=seqio.TensorAndNumpyEncoder) + "\n"
      )
    os.replace(f"{path}.tmp", path)

  @contextlib.contextmanager
  def _disk_errors(self) -> Iterator[None]:
    """What SeqIO says of a disk that is full or gone, as Python says it."""
    try:
      yield
    except ValueError as e:
      if not isinstance(e.__cause__, tf.errors.OpError):
        raise
      is_full = isinstance(e.__cause__, tf.errors.ResourceExhaustedError)
      number = errno.ENOSPC if is_full else errno.EIO
      if not os.path.isdir(self._folder):
        number = errno.ENOENT
      raise OSError(number, os.strerror(number), self._folder) from e

  def samples(self, step: int, count: int) -> Iterator[dict[str, str]]:
    """The first predictions of a step, from the file that was written."""
    for task in self.task_names:
      path = os.path.join(self._folder, f"{task}-{step:06d}.jsonl")
      if not os.path.exists(path):
        continue
      with open(path, encoding="utf-8") as file:
        for _, line in zip(range(count), file):
          row = json.loads(line)
          text = {"input": str(row["input"].get("inputs_pretokenized", ""))}
          if self._model.config.is_language_model:
            target = row["input"].get("targets_pretokenized", row["target"])
            found = row["output" if "output" in row else "prediction"]
            yield text | {"target": str(target), "prediction": str(found)}
          else:
            yield text | {
              key: heads.describe(row[key], self._model.config.head)
              for key in ("target", "prediction")
            }


def _number(value: Any) -> float:
  return float(np.asarray(getattr(value, "value", value)))
