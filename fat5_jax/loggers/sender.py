"""A tracker behind a thread: it may be slow, or away, and training goes on."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import queue
import threading
from typing import Any

from fat5_jax import console
from fat5_jax.loggers.logger import Logger

# In which what is left is handed in at the end.
PATIENCE_SECONDS = 60.0


class Sender(Logger):
  """Hands rows to a tracker, in order, from a thread of its own.

  A row that the tracker does not take is told once, and tried again with the
  next one and at the end.
  """

  def __init__(self, name: str, tracker: Logger):
    super().__init__()
    self._name, self._tracker = name, tracker
    # What is to be done; None is the end.
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    self._waiting: collections.deque = collections.deque()
    self._warned, self._failed = False, False
    self._thread = threading.Thread(
      target=self._work, name=f"to {name}", daemon=True
    )
    self._thread.start()

  def settings(self, values: Mapping[str, Any], text: str | None) -> None:
    self._jobs.put(lambda: self._tracker.settings(values, text))

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    values = dict(values)
    self._jobs.put(lambda: self._tracker.metrics(step, dataset, values))

  def close(self, failed: bool = False) -> None:
    self._failed = failed
    self._jobs.put(None)
    self._thread.join(PATIENCE_SECONDS)
    if self._thread.is_alive() or self._waiting:
      console.say(
        f"warning: {self._name} has not taken all of this run; metrics.csv has"
        " it"
      )

  def _work(self) -> None:
    while (job := self._jobs.get()) is not None:
      self._waiting.append(job)
      while self._waiting and self._done(self._waiting[0]):
        self._waiting.popleft()
    # Each once more: one that is never taken may be in the others' way.
    left = [job for job in self._waiting if not self._done(job)]
    self._waiting = collections.deque(left)
    self._done(lambda: self._tracker.close(self._failed))

  def _done(self, job: Callable[[], None]) -> bool:
    """Whether the tracker has taken it; the first failure is told."""
    try:
      job()
    except Exception as e:  # Whatever a tool of others raises.
      if not self._warned:
        self._warned = True
        console.say(
          f"warning: {self._name}: {brief(e)}. Training goes on, and what this"
          " did not take is tried again"
        )
      return False
    return True


def brief(error: Exception) -> str:
  """An error of a tool of others, in a line."""
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:300]
