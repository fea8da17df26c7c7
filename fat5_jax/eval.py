"""Evaluates a checkpoint: `python -m fat5_jax.eval --gin_file=... `."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax import cli

  raise SystemExit(cli.main("eval"))

from collections.abc import Callable, Iterator
import json
import os
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow_datasets as tfds

from fat5_jax import (
  checkpoints,
  console,
  hosts,
  metrics,
  predictions,
  row_batches,
  run_folder,
  run_record,
  weights,
)
from fat5_jax.data import features, pipeline, seqio_source, tasks
from fat5_jax.data import metrics as metrics_lib
from fat5_jax.errors import UserError
from fat5_jax.program import Program, abstract_params, prediction
from fat5_jax.sharding import Partitioner


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
    self._partitioner = partitioner
    self._folder = os.path.join(output_dir, "inference_eval")
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
      self._predict = prediction(model, partitioner, max_length)

  @property
  def task_names(self) -> list[str]:
    return [task.name for task in self._evaluator.eval_tasks]

  def _predictions(self, dataset, params) -> list[tuple[int, list[int]]]:
    """(number, prediction) of every row; long rows in smaller batches."""
    found = []
    examples = tfds.as_numpy(dataset)
    tokens = "encoder_input_tokens"
    # SeqIO has padded them all to the longest of the split.
    size = lambda row: int(np.flatnonzero(row[1][tokens]).max(initial=0)) + 1
    for group in row_batches.group(examples, size, self._config.batch_size):
      rows, length = row_batches.shape(
        list(map(size, group)), self._config.batch_size
      )
      rows = self._partitioner.round_up(rows)
      width = len(group[0][1][tokens])
      batch = {
        key: np.stack([row[key] for _, row in group])
        for key in (tokens, "answerable")
        if key in group[0][1]
      }
      batch = {
        # A length that every mesh divides.
        key: np.pad(x, ((0, 0), (0, max(length - width, 0))))[:, :length]
        for key, x in pipeline.fill_rows(batch, rows).items()
      }
      placed = self._partitioner.to_devices(batch, 0, rows)
      values = np.asarray(self._predict(params, placed))
      if self._has_tags:
        # SeqIO makes one array of them all.
        missing = max(width - values.shape[1], 0)
        values = np.pad(values, ((0, 0), (0, missing)))[:, :width]
      found += [(int(i), x.tolist()) for (i, _), x in zip(group, values)]
    return found

  def evaluate(self, params, step: int) -> dict[str, dict[str, float]]:
    """Metrics by task name."""
    if not self._evaluator.eval_tasks:
      return {}
    with seqio_source.reraise():
      results, _ = self._evaluator.evaluate(
        compute_metrics=True,
        step=step,
        predict_fn=lambda dataset: self._predictions(dataset, params),
      )
    if hasattr(results, "result"):
      results = results.result()
    return {
      task: {name: _number(value) for name, value in values.items()}
      for task, values in results.items()
    }

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
              key: predictions.describe(row[key], self._model.config.head)
              for key in ("target", "prediction")
            }


def _number(value: Any) -> float:
  return float(np.asarray(getattr(value, "value", value)))


def loss_metrics(
  program: Program,
  params: Any,
  config: pipeline.DatasetConfig,
  max_batches: int | None,
) -> dict[str, float]:
  """Loss and token accuracy over a split, teacher-forced."""
  total: dict[str, float] = {}
  partitioner = program.partitioner
  rows = partitioner.round_up(config.batch_size)
  vocab_size = program.model.config.vocab_size
  for batch in pipeline.eval_batches(config, vocab_size, max_batches, rows):
    placed = partitioner.to_devices(batch, 0, rows)
    metrics.add(total, jax.device_get(program.eval_step(params, placed)))
  return metrics.scalars(total) if total else {}


def evaluate(
  *,
  dataset_cfg: pipeline.DatasetConfig,
  checkpoint_path: str,
  output_dir: str | None = None,
  model: Any = None,
  partitioner: Partitioner | None = None,
  head_module: str | None = None,
  config_text: Callable[[], str] | None = None,
  dry_run: bool = False,
) -> dict[str, dict[str, float]]:
  """Predicts a split with a checkpoint and writes metrics and predictions.

  Args:
    dataset_cfg: the split; its vocabulary may be None for a checkpoint that
      brings its own.
    checkpoint_path: run folder, one checkpoint, or HF folder.
    output_dir: where results go; `eval` inside the checkpoint's run folder by
      default.
    model: overrides the checkpoint's own T5Config (same architecture).
    partitioner: the mesh; None puts a part of each batch on every device.
    head_module: see load_model.
    config_text: gives the operative configuration for `config.gin`.
    dry_run: stop once everything is built.

  Returns:
    {task: {metric: value}}.

  Raises:
    UserError: for a mistake in the checkpoint, the data or the task.
  """
  partitioner = partitioner or Partitioner()
  if config_text is not None:
    hosts.everyone.agree("the configuration", config_text())
  model, params, vocabulary, source = load_model(
    checkpoint_path, model, partitioner, head_module
  )
  dataset_cfg = run_folder.with_own_task(dataset_cfg, source, vocabulary)
  output_dir = checkpoints.prepare_model_dir(
    output_dir or os.path.join(source.run_dir, "eval")
  )
  if model.config.head and model.config.head.kind == "embedding":
    raise UserError(
      "an embedding has nothing to score by itself: its loss and accuracy in"
      " training are its metrics, fat5_jax.infer writes its vectors"
    )
  evaluator = InferenceEvaluator(model, dataset_cfg, output_dir, partitioner)
  if not evaluator.task_names:
    raise UserError(
      f"task {dataset_cfg.task().name!r} has no metrics for split"
      f" {dataset_cfg.split!r}"
    )
  if config_text is not None:
    checkpoints.write_atomically(
      os.path.join(output_dir, "config.gin"), config_text()
    )
  if dry_run:
    console.say(
      f"dry run: {source.path} and {dataset_cfg.task().name} are fine"
    )
    return {}
  results = evaluator.evaluate(params, source.step)
  console.metrics_table(
    f"{source.path}, split {dataset_cfg.split}",
    [(t, m, v) for t, values in results.items() for m, v in values.items()],
  )
  console.samples_table(evaluator.samples(source.step, 5))
  console.say(f"predictions and metrics: {output_dir}/inference_eval")
  return results


def load_model(
  path: str,
  model: Any = None,
  partitioner: Partitioner | None = None,
  head_module: str | None = None,
):
  """(model, params on the devices, vocabulary or None, source) of a checkpoint.

  `model` may change run-time choices; its architecture must be the
  checkpoint's. `head_module` allows a head module of a person's own, by the
  name that the run folder gives it, to be imported.
  """
  from fat5_jax.data import vocabularies
  from fat5_jax.models import factory

  source = weights.find(path)
  hosts.everyone.agree("the checkpoint to read", source.path)
  if model is None:
    config = weights.read_config(source).replace(
      scan_layers=False, remat_policy="none"
    )
    own_head = run_folder.own_head(source, head_module)
    model = factory.create(config, head_layers=own_head)
  partitioner = partitioner or Partitioner()
  partitioner.check(model.config)
  params, source, _ = weights.initial_params(
    path,
    model.config,
    partitioner.place(abstract_params(model)),
    partitioner,
  )
  console.say(f"weights of {source.path}")
  vocabulary = None
  if source.kind != "fat5":
    if any(
      os.path.exists(os.path.join(source.run_dir, name))
      for name in ("spiece.model", "tokenizer_config.json", "tokenizer.json")
    ):
      vocabulary = vocabularies.from_hf(source.run_dir)
  else:
    found = run_record.read_or_none(source.run_dir) or {}
    if found.get("vocabulary"):
      vocabulary = vocabularies.load(found["vocabulary"], source.run_dir)
  return model, params, vocabulary, source
