"""A curriculum of lengths: short rows first, with as many tokens a batch.

What comes early is cheap, and need not be long (Shortformer, arXiv:2012.15832).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fat5_jax.data import opening
from fat5_jax.data.files import shown
from fat5_jax.errors import UserError

if TYPE_CHECKING:
  from fat5_jax.data.pipeline import DatasetConfig


@dataclasses.dataclass(frozen=True)
class Stage:
  """Batches of one shape.

  Attributes:
    end: steps of the run after which it is over; inf for the last one.
    config: with its lengths and rows, without a curriculum.
  """

  end: float
  config: DatasetConfig


def stages(config: DatasetConfig, multiple: int = 1) -> list[Stage]:
  """The stages of a training, the last of them with the config's own lengths.

  The others hold as many tokens a batch, or a little less.

  Args:
    config: with a `curriculum`, or none.
    multiple: that the rows of a batch must be one of.

  Raises:
    UserError: for lengths that are longer than those, or of no feature, and
      with buckets.
  """
  last = dataclasses.replace(config, curriculum=None)
  if not config.curriculum:
    return [Stage(math.inf, last)]
  if config.buckets is not None:
    raise UserError(
      "CURRICULUM has batches of one length at a time, BUCKETS of many: set one"
      " of them"
    )
  whole = dict(config.task_feature_lengths or {})
  tokens = config.batch_size * sum(opening.sized_features(last).values())
  found = []
  for end, lengths in sorted(config.curriculum.items()):
    _check(end, lengths, whole)
    stage = dataclasses.replace(
      last, task_feature_lengths=whole | dict(lengths)
    )
    rows = tokens // sum(opening.sized_features(stage).values())
    rows = max(1, rows // multiple) * multiple
    found.append(Stage(end, dataclasses.replace(stage, batch_size=rows)))
  return [*found, Stage(math.inf, last)]


def _check(end: Any, lengths: Any, whole: Mapping[str, int]) -> None:
  where = f"CURRICULUM, until step {shown(end)}"
  if type(end) is not int or end < 1:
    raise UserError(f"{where}: a whole number of steps, at least 1")
  if not isinstance(lengths, Mapping) or not lengths:
    raise UserError(
      f"{where}: {shown(lengths)} must be a table of tokens, {{'inputs': 128}}"
    )
  for name, length in lengths.items():
    if name not in whole:
      raise UserError(
        f"{where}: {shown(name)} is none of TASK_FEATURE_LENGTHS'"
        f" {', '.join(whole)}"
      )
    if type(length) is not int or not 1 <= length <= whole[name]:
      raise UserError(
        f"{where}: {shown(length)} tokens of {name} must be from 1 to those of"
        f" TASK_FEATURE_LENGTHS, {whole[name]:,}"
      )


def describe(found: Sequence[Stage], last_step: int | None) -> list[str]:
  """Lines for a person, of more than one stage, for a run of so many steps."""
  if len(found) == 1:
    return []
  parts = []
  for stage in found:
    config = stage.config
    sizes = "/".join(map(str, opening.sized_features(config).values()))
    end = f" until step {stage.end}" if stage.end < math.inf else ""
    parts.append(f"{config.batch_size} x {sizes}{end}")
  lines = [f"a curriculum of lengths: {', '.join(parts)}"]
  if last_step is not None and last_step <= found[-2].end:
    lines.append(
      f"WARNING: the run ends at step {last_step}, before this curriculum does:"
      " it never trains on rows as long as TASK_FEATURE_LENGTHS"
    )
  return lines


def number_at(found: Sequence[Stage], steps: int) -> int:
  """Of the stage that the batch after so many steps of the run belongs to."""
  return next(i for i, stage in enumerate(found) if steps < stage.end)


def moved(
  position: dict[str, Any], before: DatasetConfig, after: DatasetConfig
) -> dict[str, Any]:
  """The place in another stage's batches where one's data goes on.

  Rows that were not full are left out.
  """
  cursors = []
  pairs = zip(opening.open_streams(before), opening.open_streams(after))
  for (chunk, number), (old, new) in zip(position["cursors"], pairs):
    # A text in other pieces has another number of examples.
    counts = [len(stream.sizes(chunk)) for stream in (old, new)]
    cursors.append([chunk, number * counts[1] // max(counts[0], 1)])
  return position | {"cursors": cursors, "planner": None}
