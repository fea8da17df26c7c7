"""The best of a run's evaluations: which step, and whether to go on."""

from __future__ import annotations

import json
import math
import os
import re

import jax

from fat5_jax import console
from fat5_jax.checkpoints import history, run_folder
from fat5_jax.errors import UserError, nearest
from fat5_jax.loggers.metrics import MetricsLog

# Of a metric with one of these words in its own name the least is the best.
_LOWER = {
  *("loss", "losses", "error", "errors", "perplexity", "ppl", "entropy"),
  *("nll", "bits", "mse", "rmse", "mae", "ece", "wer", "cer", "ter"),
}


class Best:
  """Follows a metric through a run's evaluations.

  It is found in metrics.csv alone, which a resumed run has as an uncut one has
  it.

  Attributes:
    step: of the best value so far; None before the first.
    value: that.
  """

  def __init__(
    self, metric: str | None, patience: int | None, mode: str | None, path: str
  ):
    """
    Args:
      metric: TASK/METRIC, or METRIC of the only task that has it; None follows
        nothing.
      patience: evaluations in a row without a better value, after which a run
        is done; None never.
      mode: "max" or "min"; None by the metric's name.
      path: the run folder.
    """
    self.metric, self._patience, self._path = metric, patience, path
    name = (metric or "").rpartition("/")[2].lower()
    lower = not _LOWER.isdisjoint(re.split(r"[^a-z]+", name))
    self._sign = -1 if mode == "min" or (mode is None and lower) else 1
    self._gone: set[int] | None = None
    self.step: int | None = None
    self.value = float("nan")
    self._since = 0

  def look(self, log: MetricsLog) -> None:
    """Takes in what the log holds.

    Raises:
      UserError: if there are evaluations, and none of them has the metric.
    """
    if self.metric is None:
      return
    values = self._values(log)
    if self._gone is None:
      # Before a run was told to keep its best it removed what is old.
      there = history.steps(self._path)
      old = range(max(there, default=0))
      self._gone = {step for step, _ in values if step in old} - {*there}
    before = self.step
    self.step, self._since = None, 0
    for step, value in values:
      if math.isnan(value) or step in self._gone:
        self._since += 1
      elif self.step is None or self._sign * value > self._sign * self.value:
        self.step, self.value, self._since = step, value, 0
      else:
        self._since += 1
    if self.step is not None and self.step != before:
      self._write()

  def _values(self, log: MetricsLog) -> list[tuple[int, float]]:
    found: dict[str, list[tuple[int, float]]] = {}
    known: set[str] = set()
    for step, dataset, metric, value in log.rows():
      kind, _, of = dataset.partition("/")
      if kind not in ("inference_eval", "training_eval"):
        continue
      known.add(f"{of}/{metric}")
      if self.metric in (metric, f"{of}/{metric}", f"{dataset}/{metric}"):
        found.setdefault(dataset, []).append((step, value))
    if not known:
      return []
    # Predictions go before a loss of the same name.
    kinds = sorted(found)
    kinds = [d for d in kinds if d.startswith("inference_eval/")] or kinds
    if len(kinds) != 1:
      told = "no evaluation has it" if not kinds else f"it is in {kinds}"
      raise UserError(
        f"KEEP_BEST = {self.metric!r}: {told};"
        f"{nearest(self.metric, known)} there are {', '.join(sorted(known))}"
      )
    return found[kinds[0]]

  def _write(self) -> None:
    record = {"step": self.step, "metric": self.metric, "value": self.value}
    if jax.process_index() == 0:
      run_folder.write_atomically(
        os.path.join(self._path, history.BEST), json.dumps(record) + "\n"
      )

  @property
  def exhausted(self) -> bool:
    """Whether the run shall stop: no better value for long enough."""
    return self._patience is not None and self._since >= self._patience

  def tell(self, step: int, last_step: int) -> None:
    """What a person should know at the end."""
    if self.step is None:
      return
    if self.exhausted and step < last_step:
      console.say(
        f"stopped at step {step} of {last_step}: {self._since} evaluations in a"
        f" row without a better {self.metric} (PATIENCE = {self._patience})"
      )
    console.say(
      f"best {self.metric}: {self.value:.4g} at step {self.step}, kept:"
      f" CHECKPOINT_PATH={self._path}/best"
    )
