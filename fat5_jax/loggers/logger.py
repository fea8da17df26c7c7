"""What every place that a run's numbers go to can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Logger:
  """Takes what a run measures; a class a tool.

  A run that was killed hands in again what it had since its last checkpoint: a
  logger knows what it has, and takes nothing twice.

  Attributes:
    there: (step, metric) of what an earlier process of the run handed in.
  """

  def __init__(self):
    self.there: set[tuple[int, str]] = set()

  def settings(self, values: Mapping[str, Any], text: str | None) -> None:
    """What the run is: plain values by name, and its gin file.

    For tools that keep such; config.gin holds it anyway.
    """

  def metrics(
    self, step: int, dataset: str, values: Mapping[str, float]
  ) -> None:
    """Values of a data set ("train", "training_eval/rte") at a step."""
    new = {
      name: value
      for name, value in values.items()
      if (step, self.named(dataset, name)) not in self.there
    }
    if new:
      self.add(step, dataset, new)

  def named(self, dataset: str, name: str) -> str:
    """What a metric is called here."""
    return f"{dataset}/{name}"

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    """Takes values that are not there."""
    raise NotImplementedError

  def close(self, failed: bool = False) -> None:
    """No more will come; `failed` of a run that ended by an error."""
