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
import tensorflow_datasets as tfds

from fat5_jax import staging
from fat5_jax.data import features, pipeline, seqio_source, tasks
from fat5_jax.data import metrics as metrics_lib
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.inference import heads
from fat5_jax.inference.predictor import Predictor


class InferenceEvaluator:
  """SeqIO's Evaluator over every task of a split, compiled once a shape.

  Writes `inference_eval/<task>-metrics.jsonl`, `<task>-<step>.jsonl` and
  TensorBoard events, as T5X does.
  """

  def __init__(
    self,
    model,
    config: pipeline.DatasetConfig,
    output_dir: str,
    partitioner: Partitioner,
  ):
    self._config, self._model = config, model
    head = model.config.head
    self._has_tags = head is not None and head.kind == "token_classification"
    # SeqIO writes it on a disk.
    self._mirror = staging.Mirror(os.path.join(output_dir, "inference_eval"))
    self._folder = self._mirror.path
    task = config.task()
    # SeqIO's evaluator takes a name.
    tasks.register(task)
    for part in seqio.get_subtasks(task):
      metrics_lib.check(part.metric_fns, part.name)
    with seqio_source.reraise():
      self._evaluator = seqio.Evaluator(
        task.name,
        features.feature_converter(task, pack=False),
        eval_split=config.split,
        sequence_length=config.lengths(),
        seed=config.seed,
        use_cached=config.use_cached,
        # Every host predicts and scores, one writes.
        logger_cls=[]
        if jax.process_index()
        else [seqio.JSONLogger, seqio.TensorBoardLogger],
        log_dir=self._folder,
        async_compute_metrics=False,
      )
    os.makedirs(self._folder, exist_ok=True)
    if self._evaluator.eval_tasks:
      pipeline.check_task(config, model.config)
      max_length = None
      if model.config.is_language_model:
        shapes = self._evaluator.model_feature_shapes
        max_length = shapes["decoder_target_tokens"][0]
      self._predict = Predictor(
        model, partitioner, config.batch_size, max_length
      )

  @property
  def task_names(self) -> list[str]:
    return [task.name for task in self._evaluator.eval_tasks]

  def _predictions(self, dataset, params) -> list[tuple[int, list[int]]]:
    """(number, prediction) of every row."""
    found = []
    for example, values in self._predict(params, _trimmed(dataset)):
      if self._has_tags:
        # SeqIO makes one array of them all; metrics ask for classes alone.
        values = values[:, 0]
        width = example["width"]
        missing = max(width - values.shape[0], 0)
        values = np.pad(values, (0, missing))[:width]
      found.append((example["number"], values.tolist()))
    return found

  def evaluate(self, params, step: int) -> dict[str, dict[str, float]]:
    """Metrics by task name."""
    if not self._evaluator.eval_tasks:
      return {}
    self._mirror.pull(lambda name: name.endswith("-metrics.jsonl"))
    with seqio_source.reraise(), self._disk_errors():
      results, _ = self._evaluator.evaluate(
        compute_metrics=True,
        step=step,
        predict_fn=lambda dataset: self._predictions(dataset, params),
      )
    if hasattr(results, "result"):
      results = results.result()
    if jax.process_index() == 0:
      self._mirror.push()
    return {
      task: {name: _number(value) for name, value in values.items()}
      for task, values in results.items()
    }

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


def _trimmed(dataset) -> Iterator[dict[str, Any]]:
  """The rows of a split without the padding that SeqIO gave them all."""
  for number, row in tfds.as_numpy(dataset):
    tokens = row["encoder_input_tokens"]
    size = int(np.flatnonzero(tokens).max(initial=0)) + 1
    example = {"number": int(number), "inputs": tokens[:size]}
    if "answerable" in row:
      example["answerable"] = row["answerable"][:size]
    yield example | {"width": len(tokens)}


def _number(value: Any) -> float:
  return float(np.asarray(getattr(value, "value", value)))
