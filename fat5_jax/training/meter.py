"""What a run measures as it trains, and the moment at which it must stop."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
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
from fat5_jax.training import machine
from fat5_jax.training.run import Run
from fat5_jax.training.start import Start

# Steps that may be in flight; bounds how late a NaN or a signal is seen.
_IN_FLIGHT = 2
_RATES = (
  ("steps", "steps"),
  ("target_tokens", "target_tokens"),
  ("input_tokens", "encoder_tokens"),
)


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
    self._machine = machine.Machine(run.program)
    # Of the row, what was done since the mark: not what another process did.
    self._timed: collections.Counter[str] = collections.Counter()
    self._compile_seconds, self._flops = 0.0, 0.0
    self._mark, self._waited = time.monotonic(), 0.0

  @contextlib.contextmanager
  def begun(self, batch: Mapping[str, Any]) -> Iterator[None]:
    """Where a step of a batch is begun; the first of its shapes compiles."""
    if self._machine.is_new(batch):
      with self.off_the_clock():
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self._flops = self._machine.flops(batch)
      self._compile_seconds += seconds
      console.say(f"compiled the training step in {seconds:.1f} s")
      return
    yield
    self._flops = self._machine.flops(batch)

  def push(
    self, step: int, sums: dict[str, Any], epochs: dict[str, float]
  ) -> None:
    """Takes the sums of the step that was just begun.

    `epochs`: passes over the data of each task, its batch counted.
    """
    self._pending.append((step, sums, epochs, self._flops))
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
      step, sums, epochs, flops = self._pending.popleft()
      sums = jax.device_get(sums)
      rate = sums.pop("learning_rate", None)
      self._check_finite(step, sums)
      totals.add(self.sums, sums)
      self._timed.update({key: float(sums[key]) for _, key in _RATES})
      self._timed["flops"] += flops
      self._tell(step, rate, epochs)

  def _check_finite(self, step: int, sums: dict[str, Any]) -> None:
    bad_leaf = sums.pop("bad_leaf")
    is_finite = np.isfinite([sums["loss"], sums["weight_norm"]])
    if bad_leaf < 0 and is_finite.all():
      return
    where = "the norm of the weights that it leads to"
    if not is_finite[0]:
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
      tokens_per_second=self._timed["target_tokens"] / seconds,
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
    for name, value in self._of_the_clock(seconds).items():
      values[f"timing/{name}"] = value
    self._log.write(step, "train", values)
    self.sums = {}
    self._timed.clear()
    self._mark, self._waited = time.monotonic(), 0.0

  def _of_the_clock(self, seconds: float) -> dict[str, float]:
    """What another day, or another machine, would have otherwise."""
    found = {
      f"{name}_per_second": self._timed[key] / seconds for name, key in _RATES
    }
    found |= self._machine.use(self._timed["flops"], seconds)
    found |= machine.peak_memory()
    if self._compile_seconds:
      found["compile_seconds"], self._compile_seconds = (
        self._compile_seconds,
        0.0,
      )
    return found
