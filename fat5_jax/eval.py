"""Evaluates a checkpoint: `python -m fat5_jax.eval --gin_file=... `."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax.gin_config import cli

  raise SystemExit(cli.main("eval"))

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import os
from typing import Any

from fat5_jax import console, storage
from fat5_jax.checkpoints import history, run_folder
from fat5_jax.checkpoints.reference import CheckpointRef
from fat5_jax.data import pipeline
from fat5_jax.distributed import hosts
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.evaluation import report
from fat5_jax.evaluation.generation import InferenceEvaluator
from fat5_jax.inference import loading, own_task, thresholds
from fat5_jax.inference.decoding import Decoding
from fat5_jax.loggers.metrics import MetricsLog

# A log drops what comes after its step; here nothing does.
_ANY_STEP = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """A checkpoint, and the split that it predicts and is scored on.

  Attributes:
    dataset_cfg: the split; its task and vocabulary may be None for a checkpoint
      that brings its own.
    checkpoint_path: run folder, one checkpoint, or HF folder.
    checkpoints: "all" those of the run folder, or a list of steps, one after
      the other and compiled once; None is what `checkpoint_path` names.
    output_dir: where results go; `eval` inside the checkpoint's run folder by
      default.
    model: overrides the checkpoint's own T5Config (same architecture).
    dtype: of the products, "bfloat16" or "float32"; None is the checkpoint's.
    partitioner: the mesh; None puts a part of each batch on every device.
    head_module: see loading.load_model.
    decoding: how a language model's answers are searched for.
    threshold, no_answer_threshold: where a head decides; see infer.Inference.
    config_text: gives the operative configuration for `config.gin`.
  """

  dataset_cfg: pipeline.DatasetConfig
  checkpoint_path: str
  checkpoints: str | Sequence[int] | None = None
  output_dir: str | None = None
  model: Any = None
  dtype: str | None = None
  partitioner: Partitioner | None = None
  head_module: str | None = None
  decoding: Decoding = Decoding()
  threshold: float | str | None = None
  no_answer_threshold: float | None = None
  config_text: Callable[[], str] | None = None


@dataclasses.dataclass(frozen=True)
class _Built:
  """All that an evaluation needs, built."""

  loaded: loading.Loaded
  dataset_cfg: pipeline.DatasetConfig
  output_dir: str
  evaluator: InferenceEvaluator
  # Where the head decides, of a checkpoint.
  decide: Callable[[CheckpointRef], thresholds.Decisions]
  # Paths of the checkpoints that come after the one that is loaded.
  others: list[str]


def _paths(run: Evaluation) -> list[str]:
  """The checkpoints to evaluate, in their order."""
  if run.checkpoints is None:
    return [run.checkpoint_path]
  folder = storage.absolute(run.checkpoint_path)
  there = history.steps(folder)
  asked = there if run.checkpoints == "all" else sorted({*run.checkpoints})
  missing = sorted({*asked} - {*there})
  if missing or not there:
    raise UserError(
      f"CHECKPOINTS = {run.checkpoints!r}: {folder} has"
      f" {f'no step {missing[0]}, only ' if missing else 'no step'}"
      + ", ".join(map(str, there))
    )
  return [os.path.join(folder, f"checkpoint_{step}") for step in asked]


def _build(run: Evaluation) -> _Built:
  if run.config_text is not None:
    hosts.everyone.agree("the configuration", run.config_text())
  path, *others = _paths(run)
  loaded = loading.load_model(
    path,
    run.model,
    run.partitioner,
    run.head_module,
    dtype=run.dtype,
    is_trained=False,
  )
  source, head = loaded.source, loaded.model.config.head
  decide = functools.partial(
    thresholds.decisions, run.threshold, run.no_answer_threshold, head=head
  )
  decide(source)  # A mistake shows now.
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
    loaded.model,
    dataset_cfg,
    output_dir,
    loaded.partitioner,
    run.decoding,
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
  return _Built(loaded, dataset_cfg, output_dir, evaluator, decide, others)


def _each(built: _Built) -> Iterator[tuple[CheckpointRef, dict[str, Any]]]:
  """(checkpoint, {task: {metric: value}}), one after the other."""
  loaded = built.loaded
  for path in [None, *built.others]:
    if path is not None:
      loaded = loading.another(loaded, path)
    yield (
      loaded.source,
      built.evaluator.evaluate(
        loaded.params, loaded.source.step, built.decide(loaded.source)
      ),
    )


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
    {task: {metric: value}}, of the last of several checkpoints.

  Raises:
    UserError: for a mistake in the checkpoint, the data or the task.
  """
  built = _build(run)
  evaluator = built.evaluator
  # Of all evaluations that this folder has seen, whatever their order.
  log = MetricsLog(built.output_dir, _ANY_STEP)
  for source, results in _each(built):
    for task, values in results.items():
      log.write(source.step, f"inference_eval/{task}", values)
    console.metrics_table(
      f"{source.path}, split {built.dataset_cfg.split}",
      [(t, m, v) for t, values in results.items() for m, v in values.items()],
    )
    evaluator.tell_details(source.step)
  console.samples_table(evaluator.samples(source.step, 5))
  console.say(f"predictions and metrics: {built.output_dir}/inference_eval")
  console.say(f"curves: {log.plot()}")
  log.close()
  console.say(
    f"report: {report.write(built.output_dir, built.loaded.model.config.head)}"
  )
  return results
