"""The last words of a run: its metrics, samples, and what to try next."""

from __future__ import annotations

import shlex
import shutil
import sys

import jax
import seqio

from fat5_jax import console
from fat5_jax.data import examples, seqio_source, sources
from fat5_jax.errors import UserError
from fat5_jax.evaluation import report
from fat5_jax.evaluation.generation import InferenceEvaluator
from fat5_jax.loggers.metrics import MetricsLog
from fat5_jax.training import describe
from fat5_jax.training.run import Run
from fat5_jax.training.start import Start

_METRICS = (
  "loss_per_nonpadding_target_token",
  "accuracy",
  "non_padding_fraction/overall",
  "timing/target_tokens_per_second",
)


def opening_words(
  run: Run, begin: Start, last_step: int, model_dir: str
) -> None:
  """What trains, and where."""
  program, count = run.program, describe.count
  if begin.step == last_step and begin.own_step is not None:
    console.say(f"nothing is left to train: step {last_step} is the last")
  console.say(
    f"{count(program.abstract_state.params):,} parameters,"
    f" {count(program.trained):,} of them training, on"
    f" {jax.device_count()} {jax.default_backend()} device(s)"
    f" ({run.partitioner.describe()}), {run.model.config.dtype}; results in"
    f" {model_dir}"
  )


def stopped_words(run: Run, name: str, step: int, model_dir: str) -> None:
  """How to go on after a signal."""
  if run.config_text is None:
    # Built in Python.
    console.say(
      f"stopped by {name} at step {step}, which is saved in {model_dir}. The"
      " same call with this run folder goes on"
    )
    return
  command = shlex.join(getattr(sys, "orig_argv", sys.argv))
  console.say(
    f"stopped by {name} at step {step}, which is saved in {model_dir}. Run the"
    f" same command again to go on:\n  {command}"
  )


def closing_words(
  run: Run,
  log: MetricsLog,
  evaluator: InferenceEvaluator | None,
  model_dir: str,
  step: int,
) -> None:
  """The table, samples, plot, and what to try next."""
  console.metrics_table(
    f"metrics at step {step}",
    [
      (dataset, metric, value)
      for dataset, values in log.latest().items()
      for metric, value in values.items()
      if metric in _METRICS or dataset.startswith("inference_eval")
    ],
  )
  if evaluator is not None:
    evaluator.tell_details(step)
    console.samples_table(evaluator.samples(step, 8))
  console.say(f"curves: {log.plot()}")
  console.say(f"report: {report.write(model_dir, run.model.config.head)}")
  if run.config_text is None:
    return
  python = "python"
  if shutil.which("python") != sys.executable:
    python = sys.executable
  task = run.train_dataset_cfg.task()
  if all(map(examples.is_denoised, seqio.get_subtasks(task))):
    console.say(
      f"fine-tune it next, with a recipe:\n  {python} -m fat5_jax.train"
      " --gin_file=recipes/glue.gin"
      f" --gin.INITIAL_CHECKPOINT_PATH={shlex.quote(model_dir)}"
      " --gin.MODEL_DIR=..."
    )
    return
  columns, example = _example(task)
  command = (
    f"{python} -m fat5_jax.infer --gin.MODEL_DIR={shlex.quote(model_dir)}"
  )
  if len(columns) > 1:
    console.say(
      f"try your own rows next (columns {', '.join(columns)}):\n  {command}"
      " --gin.INPUT=rows.jsonl"
    )
  else:
    echo = f"echo {shlex.quote(example)} | " if example else ""
    console.say(f"try your own lines next:\n  {echo}{command}")


def _example(task: seqio.Task | seqio.Mixture) -> tuple[tuple[str, ...], str]:
  """(the columns that a task asks about, a text of its only one or "")."""
  source = getattr(task, "source", None)
  if not isinstance(source, seqio_source.SeqioSource):
    return (), ""
  if len(source.columns) != 1:
    return source.columns, ""
  try:
    split = "validation" if "validation" in source.splits else "train"
    _, row = next(iter(source.rows_source.rows(split)))
    value = sources.column(row, source.columns[0])
  except (UserError, StopIteration):
    return source.columns, ""
  return source.columns, " ".join(value) if isinstance(value, list) else value
