"""What a run would take on chips that are not here: compiled, told, written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json
import os

import numpy as np

from fat5_jax import console
from fat5_jax.convert import plain_files
from fat5_jax.errors import UserError
from fat5_jax.planning import chips, search, tell
from fat5_jax.planning.rehearse import (
  Memory,
  Report,
  on_topology,
  rehearse,
  rehearse_stage,
  useful_and_all_flops,
)
from fat5_jax.training.program import Program

Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclasses.dataclass(frozen=True)
class Request:
  """What to plan.

  Attributes:
    topologies: names such as v5e:16x16, h100:8, cpu:4; "all" is a host of each
      chip.
    output: JSON file.
    decode: whether to compile decoding too.
    seek: whether to look for a change that fits where the run does not.
    fastest: how many other settings to compile and rank; None is none.
  """

  topologies: Sequence[str]
  output: str = "plan.json"
  decode: bool = True
  seek: bool = True
  fastest: int | None = None


def report(
  program: Program,
  shapes: Shapes,
  total_steps: int | None,
  request: Request,
  stages: Callable[[int], Sequence[tuple[int, Shapes]]],
) -> None:
  """Compiles for each topology, prints, and writes JSON.

  Args:
    program: what a run would compile.
    shapes: of the arrays of a training batch, with their types.
    total_steps: TRAIN_STEPS, for the hours.
    request: where, and what else.
    stages: of a curriculum, those before the last: the steps at which they end
      and their shapes, by what the rows must be a multiple of.

  Raises:
    UserError: for a topology, mesh, batch or length that cannot be.
  """
  topologies, output = request.topologies, request.output
  folder = os.path.dirname(os.path.abspath(output))
  if not os.access(folder, os.W_OK):
    raise UserError(f"--json={output}: {folder} cannot be written")
  every = "all" in topologies
  if every:
    topologies = [
      c.example for c in chips.CHIPS.values() if c.platform != "cpu"
    ]
  flops = useful_and_all_flops(program, shapes)
  found = []
  for topology in topologies:
    console.say(f"compiling for {topology} ...")
    try:
      result = rehearse(program, shapes, topology, flops, request.decode)
      if request.seek and not every and not request.fastest and not result.fits:
        change = search.find_change(program, shapes, topology, flops)
        result = dataclasses.replace(result, sought=True, change=change)
      earlier = [
        rehearse_stage(program, stage_shapes, topology, end)
        for end, stage_shapes in stages(
          on_topology(program, topology).row_multiple
        )
      ]
      result = dataclasses.replace(result, stages=earlier)
    except UserError as e:
      if not every:
        raise
      result = Report(topology, 0, "", False, 0, Memory(), 0, problem=str(e))
    if not every:
      tell.one(result, total_steps)
    found.append(result)
    if request.fastest:
      _write(output, found)

      def keep(ranked):
        rows = [c.as_dict() for c in search.by_rank(ranked)]
        found[-1] = dataclasses.replace(found[-1], fastest=rows)
        _write(output, found)

      tell.ranked(
        search.fastest(program, shapes, result, request.fastest, keep)
      )
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
  plain_files.replace_with(
    output, (json.dumps(values, indent=2) + "\n").encode()
  )
