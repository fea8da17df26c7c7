"""Predicts lines or a task: `python -m fat5_jax.infer --gin.MODEL_DIR=...`."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax.gin_config import cli

  raise SystemExit(cli.main("infer"))

import sys

from fat5_jax import console
from fat5_jax.inference import job, output_file, settings
from fat5_jax.inference.run import Inference

__all__ = ["Inference", "dry_run", "infer"]


def dry_run(run: Inference) -> None:
  """Builds everything, and stops.

  Raises:
    UserError: for a mistake in the checkpoint, the input or the task.
  """
  built = job.build(run)
  console.say(
    f"dry run: {built.loaded.source.path} and its vocabulary are fine"
  )


def infer(run: Inference) -> None:
  """Writes a prediction for every line, or every example of a task.

  Raises:
    UserError: for a mistake in the checkpoint, the input or the task.
  """
  built = job.build(run)
  built.take_part()
  lines = built.lines()
  if run.path == "-" and run.dataset_cfg is None and sys.stdin.isatty():
    console.say("one input a line, end with Ctrl-D:")
  goes_on = built.done > 0
  writing = output_file.opened(run.file, built.kept, goes_on)
  with writing as file, settings.memory():
    # A terminal that shows the predictions shows how far they are.
    is_seen = run.output == "-" and sys.stdout.isatty()
    with console.Count("predicting", "rows", built.expected()) as count:
      tick = built.ticked_by(count.add) if not is_seen else lambda: None
      for line in lines:
        file.write(line)
        file.flush()
        tick()
  for line in built.told.describe(built.max_input_length):
    console.say(line)
  if run.output != "-":
    console.say(f"{built.done + built.count} predictions in {run.file}")
  if run.mode == "predict":
    console.say(built.predictor.describe())
