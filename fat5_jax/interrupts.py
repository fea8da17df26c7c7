"""Ctrl-C and SIGTERM, at every moment of a command.

Python acts on a signal between two of its own instructions, and a compile or a
read inside a library can take minutes. So a thread sees to it that a signal is
answered: a command that has not ended by itself soon after, or that gets a
second Ctrl-C, ends there and then. What it was writing has another name until
it is whole, so nothing is half there.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time

# For a command to end by itself, tidily.
PATIENCE_SECONDS = 5.0
NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
  """Raised where a command is, by a signal."""


class _Signals:
  """Those of this process.

  Attributes:
    program: the name of the command.
    number: the first that came, or None.
    loading: whether libraries are being imported, in the midst of which an
      exception is printed, or crashes; there is nothing to tidy up yet.
    finishes: whether the command has taken it upon itself to end in good order,
      however long that takes: it saves.
  """

  def __init__(self, program: str):
    self.program = program
    # Standard error is elsewhere for a while, where libraries load.
    self._terminal = os.dup(2)
    self.number: int | None = None
    self.loading = True
    self.finishes = False
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)

  def raise_stopped(self, number, frame) -> None:
    del frame
    self.number = self.number or number
    if self.loading:
      return  # The thread ends it.
    raise Stopped(signal.Signals(number).name)

  def unraisable(self, unraisable) -> None:
    """A hook: a callback of the garbage collector's, say, swallows whatever is
    raised in it. So the signal comes again.
    """
    if isinstance(unraisable.exc_value, Stopped):
      # Once this call is over, which would swallow it too.
      again = lambda: _thread.interrupt_main(self.number)
      threading.Timer(0.05, again).start()
    elif self.number is None:
      sys.__unraisablehook__(unraisable)

  def watch(self) -> None:
    """The thread: reads what the system wrote, a byte a signal."""
    came = 0
    while byte := os.read(self._reader, 1):
      number = byte[0]
      if number not in NUMBERS:
        continue
      came += 1
      if self.loading:
        self._leave(number, "")
      if came > 1 and number == signal.SIGINT:
        self._leave(number)
      if not self.finishes:
        threading.Thread(
          target=self._insist, args=[number], daemon=True
        ).start()

  def _insist(self, number: int) -> None:
    time.sleep(PATIENCE_SECONDS)
    if not self.finishes and _signals is self:
      self._leave(number)

  def _leave(self, number: int, how: str = " at once") -> None:
    text = f"\n{self.program}: stopped{how} by {words(number)}\n"
    os.write(self._terminal, text.encode())
    os._exit(status(number))

  def close(self) -> None:
    os.close(self._writer)
    os.close(self._terminal)


_signals: _Signals | None = None


def words(number: int) -> str:
  return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def status(number: int) -> int:
  """Of a process that a signal ended, as shells count."""
  return 128 + number


@contextlib.contextmanager
def watched(program: str):
  """While a command of that name runs, in the main thread of its process."""
  global _signals
  if threading.current_thread() is not threading.main_thread() or _signals:
    yield
    return
  _signals = signals = _Signals(program)
  before = {n: signal.signal(n, signals.raise_stopped) for n in NUMBERS}
  hook, sys.unraisablehook = sys.unraisablehook, signals.unraisable
  descriptor = signal.set_wakeup_fd(signals._writer, warn_on_full_buffer=False)
  threading.Thread(target=signals.watch, daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(descriptor)
    sys.unraisablehook = hook
    for number, handler in before.items():
      signal.signal(number, handler)
    _signals = None
    signals.close()


def received() -> int | None:
  """The signal that this command got, if any."""
  return _signals.number if _signals else None


@contextlib.contextmanager
def finishing(handler, numbers=NUMBERS):
  """`handler(number, frame)` ends the command in good order; no one insists."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {n: signal.signal(n, handler) for n in numbers}
  if _signals:
    _signals.finishes = True
  try:
    yield
  finally:
    for number, old in before.items():
      signal.signal(number, old)
    if _signals:
      _signals.finishes = False


def note(number: int) -> None:
  """A handler of `finishing` was called: the status will say so."""
  if _signals:
    _signals.number = _signals.number or number


def loaded() -> None:
  """From here on a signal is an exception where the command is."""
  if _signals:
    _signals.loading = False


def ending(more: str = "") -> int | None:
  """The exit status, told in a line, if a signal is why the command ends.

  Whatever exception comes of a signal, also from the midst of an import, it is
  no fault of the program's.
  """
  number = received()
  if number is None and isinstance(sys.exception(), KeyboardInterrupt):
    number = signal.SIGINT  # Of who runs the command in a program of theirs.
  if number is None:
    return None
  program = f"{_signals.program}: " if _signals else ""
  text = f"\n{program}stopped by {words(number)}{more}"
  print(text, file=sys.stderr, flush=True)
  return status(number)
