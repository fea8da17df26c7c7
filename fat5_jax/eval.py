"""Evaluates a checkpoint: `python -m fat5_jax.eval --gin_file=... `."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax.gin_config import cli

  raise SystemExit(cli.main("eval"))

from collections.abc import Callable
import dataclasses
import os
from typing import Any

from fat5_jax import console
from fat5_jax.checkpoints import run_folder
from fat5_jax.data import pipeline
from fat5_jax.distributed import hosts
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.evaluation.generation import InferenceEvaluator
from fat5_jax.inference import loading, own_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """A checkpoint, and the split that it predicts and is scored on.

  Attributes:
    dataset_cfg: the split; its task and vocabulary may be None for a checkpoint
      that brings its own.
    checkpoint_path: run folder, one checkpoint, or HF folder.
    output_dir: where results go; `eval` inside the checkpoint's run folder by
      default.
    model: overrides the checkpoint's own T5Config (same architecture).
    partitioner: the mesh; None puts a part of each batch on every device.
    head_module: see loading.load_model.
    config_text: gives the operative configuration for `config.gin`.
  """

  dataset_cfg: pipeline.DatasetConfig
  checkpoint_path: str
  output_dir: str | None = None
  model: Any = None
  partitioner: Partitioner | None = None
  head_module: str | None = None
  config_text: Callable[[], str] | None = None


@dataclasses.dataclass(frozen=True)
class _Built:
  """All that an evaluation needs, built."""

  loaded: loading.Loaded
  dataset_cfg: pipeline.DatasetConfig
  output_dir: str
  evaluator: InferenceEvaluator


def _build(run: Evaluation) -> _Built:
  if run.config_text is not None:
    hosts.everyone.agree("the configuration", run.config_text())
  loaded = loading.load_model(
    run.checkpoint_path, run.model, run.partitioner, run.head_module
  )
  source, head = loaded.source, loaded.model.config.head
  dataset_cfg = own_task.with_task_of_run(
    run.dataset_cfg, source, loaded.vocabulary
  )
  output_dir = run_folder.prepare_model_dir(
    run.output_dir or os.path.join(source.run_dir, "eval")
  )
  if head is not None and head.kind == "embedding":
    raise UserError(
      "an embedding has nothing to score by itself: its loss and accuracy in"
      " training are its metrics, fat5_jax.infer writes its vectors"
    )
  evaluator = InferenceEvaluator(
    loaded.model, dataset_cfg, output_dir, loaded.partitioner
  )
  if not evaluator.task_names:
    raise UserError(
      f"task {dataset_cfg.task().name!r} has no metrics for split"
      f" {dataset_cfg.split!r}"
    )
  if run.config_text is not None:
    run_folder.write_atomically(
      os.path.join(output_dir, "config.gin"), run.config_text()
    )
  return _Built(loaded, dataset_cfg, output_dir, evaluator)


def dry_run(run: Evaluation) -> None:
  """Builds everything, and stops.

  Raises:
    UserError: for a mistake in the checkpoint, the data or the task.
  """
  built = _build(run)
  console.say(
    f"dry run: {built.loaded.source.path} and {built.dataset_cfg.task().name}"
    " are fine"
  )


def evaluate(run: Evaluation) -> dict[str, dict[str, float]]:
  """Predicts a split with a checkpoint and writes metrics and predictions.

  Returns:
    {task: {metric: value}}.

  Raises:
    UserError: for a mistake in the checkpoint, the data or the task.
  """
  built = _build(run)
  source, evaluator = built.loaded.source, built.evaluator
  results = evaluator.evaluate(built.loaded.params, source.step)
  console.metrics_table(
    f"{source.path}, split {built.dataset_cfg.split}",
    [(t, m, v) for t, values in results.items() for m, v in values.items()],
  )
  console.samples_table(evaluator.samples(source.step, 5))
  console.say(f"predictions and metrics: {built.output_dir}/inference_eval")
  return results
