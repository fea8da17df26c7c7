"""A profile of some steps, for XProf and TensorBoard's profile plug-in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import os
from typing import Any

import jax

from fat5_jax import console, staging
from fat5_jax.errors import UserError
from fat5_jax.training.meter import Meter

FOLDER = "profile"


class Profile:
  """Captures the steps from `first` to `last`, and nothing else of training.

  Every host writes what its devices did. What is computed stays the same; the
  clock stands still while a capture is begun and written.
  """

  def __init__(
    self,
    steps: Sequence[int] | None,
    model_dir: str,
    meter: Meter,
    step: int,
    last_step: int,
  ):
    """
    Args:
      steps: (first, last), counted as the metrics count them; or None.
      model_dir: the run folder.
      meter: of the run.
      step: that the run goes on from.
      last_step: of the run.

    Raises:
      UserError: for steps after the last one.
    """
    self._first, self._last = steps or (0, 0)
    self._meter, self._mirror = meter, None
    self._folder = os.path.join(model_dir, FOLDER)
    if self._first > last_step:
      raise UserError(
        f"PROFILE_STEPS = {(self._first, self._last)}: the run ends at step"
        f" {last_step}"
      )
    if steps is not None and self._last <= step:
      console.say(
        f"PROFILE_STEPS = {(self._first, self._last)} are done already, at step"
        f" {step}: nothing is captured"
      )

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *unused: Any) -> None:
    if self._mirror is not None:
      # Training failed within the steps; another run may follow.
      jax.profiler.stop_trace()

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Where the step that leads to `number` is begun."""
    if not self._first <= number <= self._last:
      yield
      return
    if self._mirror is None:
      self._start()
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after(self, number: int) -> None:
    """Once that step is with the meter."""
    if number == self._last:
      self.close()

  def _start(self) -> None:
    with self._meter.off_the_clock():
      self._mirror = staging.Mirror(self._folder)
      options = jax.profiler.ProfileOptions()
      # Each call of Python would be traced, and slow down what is measured.
      options.python_tracer_level = 0
      jax.profiler.start_trace(self._mirror.path, profiler_options=options)

  def close(self) -> None:
    """Writes what was captured, of a run that ends within the steps too."""
    if self._mirror is None:
      return
    with self._meter.off_the_clock():
      mirror, self._mirror = self._mirror, None
      jax.profiler.stop_trace()
      mirror.push()
      mirror.close()
    self._first = self._last = 0
    console.say(
      f"profile: {self._folder} (xprof --logdir {self._folder}, or"
      " TensorBoard's plug-in)"
    )
