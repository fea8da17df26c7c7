"""What a run measures as it trains, and the moment at which it must stop."""

from __future__ import annotations

import collections
from collections.abc import Iterator
import contextlib
import time
from typing import Any

import jax
import numpy as np

from fat5_jax import console, trees
from fat5_jax.checkpoints.checkpointer import Checkpointer
from fat5_jax.errors import UserError
from fat5_jax.loggers.metrics import MetricsLog
from fat5_jax.objectives import totals
from fat5_jax.training.run import Run
from fat5_jax.training.start import Start

# Steps that may be in flight; bounds how late a NaN or a signal is seen.
_IN_FLIGHT = 2


class Meter:
  """Sums of steps to progress and rows of metrics, two steps behind.

  Attributes:
    sums: of a row of metrics that is not complete yet.
  """

  def __init__(
    self,
    run: Run,
    begin: Start,
    last_step: int,
    log: MetricsLog,
    checkpoints: Checkpointer,
  ):
    self._run, self._last_step, self._log = run, last_step, log
    self._checkpoints = checkpoints
    self.sums = dict(begin.sums)
    self._pending: collections.deque = collections.deque()
    self._progress = console.Progress(begin.step, last_step)
    self._mark, self._waited = time.monotonic(), 0.0

  def push(
    self, step: int, sums: dict[str, Any], epochs: dict[str, float]
  ) -> None:
    """Takes the sums of a step that was just begun.

    `epochs`: passes over the data of each task, its batch counted.
    """
    self._pending.append((step, sums, epochs))
    self._take(_IN_FLIGHT)

  def drain(self) -> None:
    """Takes in all steps that were begun.

    Raises:
      UserError: for a loss or a gradient that is not finite.
    """
    self._take(0)

  def close(self) -> None:
    self.drain()
    self._progress.pause()

  @contextlib.contextmanager
  def off_the_clock(self) -> Iterator[None]:
    """Work that is no training, once all steps that were begun are in."""
    self.drain()
    begin = time.monotonic()
    self._progress.pause()
    yield
    self._progress.resume()
    self._waited += time.monotonic() - begin

  def _take(self, limit: int) -> None:
    while len(self._pending) > limit:
      step, sums, epochs = self._pending.popleft()
      sums = jax.device_get(sums)
      rate = sums.pop("learning_rate", None)
      self._check_finite(step, sums)
      totals.add(self.sums, sums)
      self._tell(step, rate, epochs)

  def _check_finite(self, step: int, sums: dict[str, Any]) -> None:
    bad_leaf = sums.pop("bad_leaf")
    if bad_leaf < 0 and np.isfinite(sums["loss"]):
      return
    where = "the loss"
    if bad_leaf >= 0:
      name = trees.leaf_name(self._run.program.trained, bad_leaf)
      where = f"the gradient of {name}"
    text = (
      f"step {step}: loss {float(sums['loss']):.6g}; first not finite: {where}."
    )
    if getattr(self._run.optimizer, "skip_nan_updates", False):
      console.say(f"{text} skip_nan_updates: the run goes on")
      return
    self._checkpoints.wait()
    raise UserError(
      f"{text} {self._checkpoints.last_good()}. Usual mends: a lower learning"
      " rate or more warm-up, global_norm_clip_threshold = 1.0, dtype ="
      " 'float32'"
    )

  def _tell(self, step: int, rate: Any, epochs: dict[str, float]) -> None:
    seconds = max(time.monotonic() - self._mark - self._waited, 1e-9)
    values = totals.scalars(self.sums)
    due = step % self._run.stats_period == 0 or step == self._last_step
    self._progress.update(
      step,
      loss=values["loss_per_nonpadding_target_token"],
      learning_rate=rate,
      tokens_per_second=self.sums["target_tokens"] / seconds,
      padding=1 - values["non_padding_fraction/overall"],
      epochs=epochs.values(),
      force=due,
    )
    if not due:
      return
    if rate is not None:
      values["learning_rate"] = rate
    for task, count in epochs.items():
      values["epoch" if len(epochs) == 1 else f"epoch/{task}"] = count
    for name, key in (
      ("steps", "steps"),
      ("target_tokens", "target_tokens"),
      ("input_tokens", "encoder_tokens"),
    ):
      values[f"timing/{name}_per_second"] = self.sums[key] / seconds
    self._log.write(step, "train", values, events="train")
    self.sums = {}
    self._mark, self._waited = time.monotonic(), 0.0
