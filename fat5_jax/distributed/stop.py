"""A run that a person, or a preemption, ends after a step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from fat5_jax import interrupts
from fat5_jax.distributed import hosts


class StopSignal:
  """Turns SIGTERM, and a first Ctrl-C, into a request to stop after a step.

  Among several hosts one signal is enough: jax's preemption service chooses a
  step that none has passed, and all stop there.
  """

  def __init__(self):
    self.received = False
    self.name = ""
    self._in_evaluation = False
    self._finishing = contextlib.ExitStack()

  def __enter__(self):
    # Of several hosts jax's own handler takes SIGTERM.
    numbers = (
      (signal.SIGINT,) if hosts.everyone.count > 1 else interrupts.NUMBERS
    )
    self._finishing.enter_context(interrupts.finishing(self._handle, numbers))
    return self

  def _handle(self, number, frame):
    del frame
    if self.name:
      if number == signal.SIGINT:
        raise interrupts.Stopped
      return
    self.name = interrupts.words(number)
    interrupts.note(number)
    when = "now" if self._in_evaluation else "after this step"
    print(f"\n{self.name}: saving {when} ...", file=sys.stderr)
    if hosts.everyone.count > 1:
      os.kill(os.getpid(), signal.SIGTERM)
      return
    self.received = True
    if self._in_evaluation:
      raise interrupts.Stopped

  @contextlib.contextmanager
  def evaluating(self):
    """What a signal breaks off: it changes no state. Hosts end it together."""
    self._in_evaluation = hosts.everyone.count == 1
    try:
      yield
    except interrupts.Stopped:
      if not self.received:
        raise
    finally:
      self._in_evaluation = False

  def at(self, step: int) -> bool:
    """Whether to stop after this step; the same on all hosts."""
    if hosts.everyone.count > 1 and not self.received:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.received, self.name = True, self.name or "SIGTERM to a host"
    return self.received

  def __exit__(self, *exception):
    self._finishing.close()
