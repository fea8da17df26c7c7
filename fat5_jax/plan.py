"""Rehearses a run: `python -m fat5_jax.plan --gin_file=F --topology=v5e:16x16`.

The training step of the gin file, and its decoding step, are compiled by the
chip's own compiler for the whole topology; no chip is needed. `--fastest` does
the same with other meshes, remat policies and microbatches, and ranks them.
What it does is in planning/.
"""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax.gin_config import cli

  raise SystemExit(cli.main("plan"))

from fat5_jax.data import curriculum, pipeline
from fat5_jax.planning import report
from fat5_jax.planning.report import Request
from fat5_jax.training.run import Run

__all__ = ["Request", "Run", "plan"]


def plan(run: Run, request: Request) -> None:
  """Prints what the run would take, and writes it as JSON; reads no data.

  Raises:
    UserError: for a topology, mesh, batch or length that cannot be.
  """
  last = curriculum.stages(run.train_dataset_cfg)[-1]
  shapes = pipeline.batch_shapes(last.config)
  total_steps = run.total_steps or run.relative_steps

  def earlier(multiple: int):
    found = curriculum.stages(run.train_dataset_cfg, multiple)[:-1]
    return [(int(s.end), pipeline.batch_shapes(s.config)) for s in found]

  report.report(run.program, shapes, total_steps, request, earlier)
