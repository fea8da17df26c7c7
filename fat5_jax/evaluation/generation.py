"""A model's predictions of a split, scored by the task's metrics."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import contextlib
import errno
import functools
import itertools
import json
import os
import re
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from fat5_jax import console, staging
from fat5_jax.data import checks, pipeline, seqio_source, tasks
from fat5_jax.data import metrics as metrics_lib
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.evaluation import details
from fat5_jax.inference import heads, search, thresholds
from fat5_jax.inference.decoding import Decoding
from fat5_jax.inference.predictor import WINDOW, Predictor
from fat5_jax.inference.score import Scorer
from fat5_jax.inference.thresholds import Decisions

# What of an example is for the pipeline alone.
_INNER = "first_size"
# Of a row, the argument of metrics that it is one of.
_ARGUMENTS = {
  "target": "targets",
  "prediction": "predictions",
  "score": "scores",
}
_OF_SEQUENCES = ("sequence_classification", "enct5")


class InferenceEvaluator:
  """Every task of a split, predicted and scored, compiled once a shape.

  Rows are read, predicted and written one after the other: of a row, only what
  the metrics compare stays in memory. Writes
  `inference_eval/<task>-metrics.jsonl`, `<task>-<step>.jsonl` and, with
  `tensorboard`, events for it, as SeqIO's evaluator does, and what details.py
  tells of the rows.
  """

  def __init__(
    self,
    model,
    config: pipeline.DatasetConfig,
    output_dir: str,
    partitioner: Partitioner,
    decoding: Decoding = Decoding(),
    tensorboard: bool = True,
  ):
    """
    Args:
      model: a language model, or a head.
      config: the split; of a mixture each task that has it.
      output_dir: in which `inference_eval` is.
      partitioner: the mesh.
      decoding: how a language model answers.

    Raises:
      UserError: for a metric that cannot be computed.
    """
    self._model, self._split = model, config.split
    self._decisions = Decisions()
    head = model.config.head
    if head is not None:
      decoding.check_unused(head.kind)
    self._has_tags = head is not None and head.kind == "token_classification"
    # Its writers know a disk alone.
    self._mirror = staging.Mirror(os.path.join(output_dir, "inference_eval"))
    self._folder = self._mirror.path
    tasks.register(config.task())
    for part in seqio.get_subtasks(config.task()):
      metrics_lib.check(part.metric_fns, part.name)
      if head is not None and part.score_metric_fns:
        raise UserError(
          f"task {part.name!r} has a metric of (targets, scores), how likely a"
          f" language model finds the targets; a head of kind {head.kind} has"
          " no such scores. A metric of (targets, predictions, aux_values) has"
          " its probabilities"
        )
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
      self._loggers = [seqio.JSONLogger(self._folder, write_n_results=0)]
      if tensorboard:
        self._loggers.append(seqio.TensorBoardLogger(self._folder))
    if self._parts:
      checks.check_task(config, model.config)
      max_length = None
      if model.config.is_language_model:
        max_length = max(map(pipeline.longest_target, self._parts))
        self._score_targets = Scorer(model, partitioner, config.batch_size)
      features = self._parts[0].task().output_features
      self._predict = Predictor(
        model,
        partitioner,
        config.batch_size,
        max_length,
        decoding.bind(features["targets"].vocabulary, model.config),
      )

  @property
  def task_names(self) -> list[str]:
    return [part.task().name for part in self._parts]

  def evaluate(
    self, params, step: int, decisions: Decisions = Decisions()
  ) -> dict[str, dict[str, float]]:
    """Metrics by task name; `decisions` are where a head decides."""
    self._decisions = decisions
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
    task, told = config.task(), details.Details(self._model.config.head)
    given: dict[str, list[Any]] = collections.defaultdict(list)
    aux: dict[str, list[Any]] = collections.defaultdict(list)
    total = pipeline.count_examples(config)
    with (
      self._file(f"{task.name}-{step:06d}.jsonl") as file,
      console.Count(f"predicting {task.name}", "rows", total) as count,
    ):
      self._predict.tick = count.add
      for row, more in self._rows(config, params):
        for name, argument in _ARGUMENTS.items():
          if name in row:
            given[argument].append(row[name])
        for name, value in more.items():
          aux[name].append(value)
        if "prediction" in row:
          told.add(row)
        if file is not None:
          file.write(json.dumps(row, cls=seqio.TensorAndNumpyEncoder) + "\n")
    # Arrays of numbers, as SeqIO's evaluator gives them.
    given["scores"] = np.array(given["scores"])
    given["aux_values"] = {key: np.array(value) for key, value in aux.items()}
    found: dict[str, Any] = {}
    for metric in task.metric_fns:
      wanted = metrics_lib.arguments(metric)
      found |= self._decided(metric)(**{name: given[name] for name in wanted})
    values = {
      name: value
      if isinstance(value, seqio.metrics.MetricValue)
      else seqio.metrics.Scalar(value)
      for name, value in found.items()
    }
    for logger in self._loggers:
      logger(task.name, step, values, None, None, None)
    if more_told := told.found():
      with self._file(self._details_file(task.name, step)) as file:
        if file is not None:
          about = {"task": task.name, "step": step, "split": config.split}
          json.dump(about | more_told, file, ensure_ascii=False)
    return {name: _number(value) for name, value in values.items()}

  def _decided(self, metric: Callable[..., Any]) -> Callable[..., Any]:
    """A metric that leaves questions without an answer as it was asked to."""
    threshold = self._decisions.no_answer
    if metric is not metrics_lib.span_squad or threshold is None:
      return metric
    return functools.partial(metric, no_answer_threshold=threshold)

  def _details_file(self, task: str, step: int) -> str:
    return thresholds.DETAILS.format(
      task=task, step=step, split=re.sub(r"[^\w.-]+", "_", self._split)
    )

  def _rows(
    self, config: pipeline.DatasetConfig, params
  ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row with its target and what was predicted, as metrics see them, and
    what predict_with_aux tells beside it.

    What no metric of the task asks for is not computed.
    """
    task = config.task()
    vocabulary = task.output_features["targets"].vocabulary
    postprocess = task.postprocess_fn or (lambda value, **unused: value)
    scores = None
    if task.score_metric_fns:
      scores = self._scores(pipeline.one_pass(config), params)
    found = ((example, None) for example in pipeline.one_pass(config))
    if task.predict_metric_fns or task.predict_with_aux_metric_fns:
      found = self._predict(params, pipeline.one_pass(config))
    for example, values in found:
      target = example.get("targets_pretokenized")
      if target is None:
        target = vocabulary.decode(example["targets"].tolist())
      elif isinstance(target, bytes):
        target = target.decode("utf-8")
      row = {
        "input": {k: v for k, v in example.items() if k != _INNER},
        "target": postprocess(target, example=example, is_target=True),
      }
      more: dict[str, Any] = {}
      if values is not None:
        said, more = self._said(values, example, vocabulary, postprocess)
        row |= said
      if scores is not None:
        row["score"] = next(scores)
      yield row, more

  def _said(
    self, values, example, vocabulary, postprocess
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """(output and prediction, what is told beside them) of a row."""
    head = self._model.config.head
    more: dict[str, Any] = {}
    if isinstance(values, search.Found):
      more["scores"] = float(values.scores[0])
      values = values.tokens[0]
    elif self._has_tags:
      # Metrics ask for classes alone.
      values = values[: len(example["inputs"]), 0]
    decided = output = vocabulary.decode(values.tolist())
    row = {"output": output}
    if head is not None and head.kind in _OF_SEQUENCES:
      probabilities = heads.probabilities(values, head)
      if probabilities:
        row["probabilities"] = probabilities
        more["probabilities"] = [
          float(v) for v in values[-len(probabilities) :]
        ]
      if self._decisions.labels is not None:
        decided = vocabulary.decode(self._decisions.of_labels(values).tolist())
    said = postprocess(decided, example=example, is_target=False)
    return row | {"prediction": said}, more

  def _scores(self, examples, params) -> Iterator[float]:
    """The log-likelihood of each example's target."""
    size = WINDOW * self._score_targets.batch_size
    while window := list(itertools.islice(examples, size)):
      yield from map(float, self._score_targets(params, window))

  @contextlib.contextmanager
  def _file(self, name: str):
    """A file that is there when it is whole; None where host 0 writes it."""
    if not self._loggers:
      yield None
      return
    path = os.path.join(self._folder, name)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
      yield file
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
          yield details.sample(json.loads(line), self._model.config.head)

  def tell_details(self, step: int) -> None:
    """What details.py finds in the rows of a step, in short."""
    for task in self.task_names:
      path = os.path.join(self._folder, self._details_file(task, step))
      if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
          details.tell(f"{task} at step {step}", json.load(file))


def _number(value: Any) -> float:
  return float(np.asarray(getattr(value, "value", value)))
