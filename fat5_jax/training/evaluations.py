"""The evaluations of a run: its loss on a split, its predictions of it."""

from __future__ import annotations

from typing import Any

import jax

from fat5_jax import console
from fat5_jax.data import pipeline
from fat5_jax.evaluation.generation import InferenceEvaluator
from fat5_jax.loggers.metrics import MetricsLog
from fat5_jax.objectives import totals
from fat5_jax.training.program import Program
from fat5_jax.training.run import Run
from fat5_jax.training.start import Start


class Evaluations:
  """What a run is evaluated on, each time to the log and the terminal."""

  def __init__(self, run: Run, model_dir: str):
    self._run, self._log = run, None
    self.generation = None
    if run.infer_eval_dataset_cfg is not None:
      self.generation = InferenceEvaluator(
        run.model,
        run.infer_eval_dataset_cfg,
        model_dir,
        run.partitioner,
        run.decoding,
        tensorboard="tensorboard" in run.loggers,
      )
    # Of a mixture, every task apart.
    self._loss_parts = []
    if run.train_eval_dataset_cfg is not None:
      self._loss_parts = pipeline.of_tasks(run.train_eval_dataset_cfg)
    self._last: int | None = None

  def log_to(self, log: MetricsLog, begin: Start) -> None:
    """Where results go; what it holds of the first step is not done again."""
    self._log = log
    parts = ("training_eval/", "inference_eval/")
    if log.has(begin.step, parts[self.generation is not None]):
      self._last = begin.step

  def is_due(self, begin: Start) -> bool:
    """Whether a run was killed between saving a step and evaluating it."""
    return (
      (begin.own_step is not None or begin.step == begin.begin_step)
      and self._evaluates(begin)
      and not self.has(begin.step)
    )

  def _evaluates(self, begin: Start) -> bool:
    if begin.step > begin.begin_step:
      return self._run.evaluates_at(begin.step)
    return self._run.eval_before_training

  def has(self, step: int) -> bool:
    return self._last == step

  def at(self, step: int, params: Any) -> None:
    """Evaluates the parameters of a step."""
    run, log = self._run, self._log
    for cfg in self._loss_parts:
      values = _loss_metrics(run.program, params, cfg, run.eval_steps)
      name = f"training_eval/{cfg.task().name}"
      log.write(step, name, values)
      shown = ("loss_per_nonpadding_target_token", "accuracy")
      _say(step, name, {k: values[k] for k in shown if k in values}, ".4f")
    if self.generation is not None:
      results = self.generation.evaluate(params, step)
      for task, values in results.items():
        name = f"inference_eval/{task}"
        log.write(step, name, values)
        _say(step, name, values, ".4g")
    log.plot()
    self._last = step


def _say(step: int, name: str, values: dict[str, float], form: str) -> None:
  text = "  ".join(f"{key} {value:{form}}" for key, value in values.items())
  console.say(f"step {step}  {name}  {text}")


def _loss_metrics(
  program: Program,
  params: Any,
  config: pipeline.DatasetConfig,
  max_batches: int | None,
) -> dict[str, float]:
  """Loss and token accuracy over a split, teacher-forced."""
  total: dict[str, float] = {}
  partitioner = program.partitioner
  ways = partitioner.ways("batch")
  vocab_size = program.model.config.vocab_size
  found = pipeline.eval_batches(config, vocab_size, max_batches, ways)
  what = f"loss of {config.task().name}"
  # At most: a packed batch holds more examples than rows.
  count = pipeline.count_examples(config)
  most = [max_batches, count and -(-count // config.batch_size)]
  most = min((n for n in most if n is not None), default=None)
  for batch in console.counted(found, what, "batches", most):
    rows = len(next(iter(batch.values())))
    placed = partitioner.to_devices(batch, 0, rows)
    totals.add(total, jax.device_get(program.eval_step(params, placed)))
  return totals.scalars(total) if total else {}
