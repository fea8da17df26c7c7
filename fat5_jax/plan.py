"""Rehearses a run: `python -m fat5_jax.plan --gin_file=F --topology=v5e:16x16`.

The training step of the gin file, and its decoding step, are compiled by the
chip's own compiler for the whole topology; no chip is needed. `--fastest` does
the same with other meshes, remat policies and microbatches, and ranks them.
What it does is in planning/.
"""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax import cli

  raise SystemExit(cli.main("plan"))

from collections.abc import Sequence
import dataclasses
import json
import os

from fat5_jax import checkpoints, console
from fat5_jax.data import pipeline
from fat5_jax.errors import UserError
from fat5_jax.planning import chips, search, tell
from fat5_jax.planning.rehearse import (
  Memory,
  Report,
  rehearse,
  useful_and_all_flops,
)
from fat5_jax.program import Program


def report(
  program: Program,
  dataset_cfg: pipeline.DatasetConfig,
  total_steps: int | None,
  topologies: Sequence[str],
  output: str | None = None,
  decode: bool = True,
  seek: bool = True,
  fastest: int | None = None,
) -> None:
  """Compiles for each topology, prints, and writes JSON.

  Args:
    program: what a run of the gin file would compile.
    dataset_cfg: of its training data; none of it is read.
    total_steps: TRAIN_STEPS, for the hours.
    topologies: names such as v5e:16x16, h100:8, cpu:4; "all" is a host of each
      chip.
    output: JSON file; None is plan.json, here.
    decode: whether to compile decoding too.
    seek: whether to look for a change that fits where the run does not.
    fastest: how many other settings to compile and rank; None is none.

  Raises:
    UserError: for a topology, mesh, batch or length that cannot be.
  """
  output = output or "plan.json"
  folder = os.path.dirname(os.path.abspath(output))
  if not os.access(folder, os.W_OK):
    raise UserError(f"--json={output}: {folder} cannot be written")
  every = "all" in topologies
  if every:
    topologies = [
      c.example for c in chips.CHIPS.values() if c.platform != "cpu"
    ]
  shapes = pipeline.batch_shapes(dataset_cfg)
  flops = useful_and_all_flops(program, shapes)
  found = []
  for topology in topologies:
    console.say(f"compiling for {topology} ...")
    try:
      result = rehearse(program, shapes, topology, flops, decode)
      if seek and not every and not fastest and not result.fits:
        change = search.find_change(program, shapes, topology, flops)
        result = dataclasses.replace(result, sought=True, change=change)
    except UserError as e:
      if not every:
        raise
      result = Report(topology, 0, "", False, 0, Memory(), 0, problem=str(e))
    if not every:
      tell.one(result, total_steps)
    found.append(result)
    if fastest:
      _write(output, found)

      def keep(ranked):
        rows = [c.as_dict() for c in search.by_rank(ranked)]
        found[-1] = dataclasses.replace(found[-1], fastest=rows)
        _write(output, found)

      tell.ranked(search.fastest(program, shapes, result, fastest, keep))
  if every:
    tell.several(found)
  _write(output, found)
  console.say(f"all figures: {output}")


def _write(output: str, found: Sequence[Report]) -> None:
  """The JSON; a search writes it whenever there is more to tell."""
  values = [
    dataclasses.asdict(r)
    | {"seconds_by_roofline": r.seconds, "of_compute": r.of_compute}
    for r in found
  ]
  checkpoints.write_atomically(output, json.dumps(values, indent=2) + "\n")
