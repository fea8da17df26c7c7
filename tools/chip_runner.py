"""Runs units of work in child processes; each leaves a line of JSON.

A unit is a function's name and arguments. A worker, a process of its own, takes
one after the other; one that hangs or crashes ends with its unit, and the next
unit gets a new worker. What a unit found is appended to a file and synced
before the next begins: whatever ends a run, finished units are kept, and a
second run does the others. Only the standard library: it runs before anything
is known of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

# What a row's status can be. "wrong" is a measurement that found a fault.
DONE = ("ok", "wrong", "skipped")
AGAIN = ("failed", "timeout")
# Seconds for a worker to import and to find its device.
START = 180


class Refusal(Exception):
  """What the user must change, in one line."""


@dataclasses.dataclass(frozen=True)
class Unit:
  """One row.

  Attributes:
    key: its name in the file, unique.
    do: a function of the worker.
    arguments: of it.
    limit: seconds, once its worker has started; then it is killed.
    needs: with fewer seconds left it is not begun.
    pool: units of different pools share no worker.
  """

  key: str
  do: str
  arguments: dict[str, Any]
  limit: float = 120
  needs: float = 20
  pool: str = ""


@dataclasses.dataclass(frozen=True)
class Phase:
  """Units that run alike.

  Attributes:
    name: stands in each row.
    units: in the order of their worth.
    workers: processes at a time.
    fresh: whether each unit has a process of its own.
    environment: of its processes; "{dumps}" is a folder of the unit's own.
  """

  name: str
  units: Sequence[Unit]
  workers: int = 1
  fresh: bool = False
  environment: dict[str, str] = dataclasses.field(default_factory=dict)


# --- rows --------------------------------------------------------------------


def read_rows(path: str) -> list[dict]:
  """All rows of a file; a torn last line is none."""
  if not os.path.exists(path):
    return []
  with open(path, encoding="utf-8") as file:
    lines = file.read().split("\n")
  rows = []
  for number, line in enumerate(lines[:-1], 1):
    try:
      rows.append(json.loads(line))
    except ValueError:
      raise Refusal(
        f"{path}, line {number} is no JSON: remove that line"
      ) from None
  return rows


class Rows:
  """The file, open for this process alone.

  Raises:
    Refusal: if another process writes there, or its rows are of another chip,
      commit, jax or kind of run.
  """

  def __init__(self, path: str, identity: dict[str, Any]):
    self._identity = identity
    self._file = open(path, "ab")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise Refusal(
        f"another process writes to {path}: wait for it, or name another --out"
      ) from None
    with open(path, "rb") as file:
      whole = file.read().rfind(b"\n") + 1
    os.truncate(path, whole)  # A line that a kill has torn.
    self.all = read_rows(path)
    for row in self.all:
      for name, value in identity.items():
        if row.get(name) != value:
          raise Refusal(
            f"{path} holds rows of {name} {row.get(name)!r}, this is {value!r}:"
            " name another --out, or print its table with --table"
          )

  def add(self, row: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    row = row | self._identity | {"date": now.isoformat(timespec="seconds")}
    self.all.append(row)
    self._file.write(json.dumps(row).encode() + b"\n")
    self._file.flush()
    os.fsync(self._file.fileno())

  def of(self, key: str) -> list[dict]:
    return [row for row in self.all if row["key"] == key]


def to_do(
  units: Sequence[Unit], rows: Rows, *, retries: bool, again: bool
) -> list[Unit]:
  """Units without a row; or those that failed, once (`again`: ever)."""
  found = []
  for unit in units:
    earlier = rows.of(unit.key)
    failed = earlier and earlier[-1]["status"] in AGAIN
    if retries and failed and (again or len(earlier) == 1):
      found.append(unit)
    if not retries and not earlier:
      found.append(unit)
  return found


# --- the worker's side -------------------------------------------------------


def die_with_parent() -> None:
  """A parent that is killed, however, takes this process along (Linux)."""
  with contextlib.suppress(AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Skip(Exception):
  """Raised by a unit that this machine cannot do, with the reason."""


def serve(functions: dict[str, Callable], start: Callable = lambda: None):
  """Answers units on standard input until it ends: a worker's main."""
  parent = os.getppid()
  die_with_parent()
  if os.getppid() != parent:
    sys.exit(1)
  # What libraries print must not stand among the answers.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def answer(message):
    print(json.dumps(message), file=answers, flush=True)

  # A unit that is stopped says where it was.
  faulthandler.register(signal.SIGUSR1)
  start()
  answer({"started": True})
  for line in sys.stdin:
    unit = json.loads(line)
    try:
      found = functions[unit["do"]](**unit["arguments"])
      answer({"status": "ok"} | (found or {}))
    except (Skip, ImportError, NotImplementedError) as error:
      reason = str(error)
      answer({"status": "skipped", "reason": reason.splitlines()[:3]})
    except Exception as error:
      # An error on a device can spoil what comes after it.
      traceback.print_exc()
      lines = f"{type(error).__name__}: {error}".splitlines()
      answer({"status": "failed", "reason": [x[:300] for x in lines[:5]]})
      return


class Worker:
  """The parent's end of a worker: one unit at a time."""

  def __init__(self, command: Sequence[str], environment: dict[str, str]):
    self.errors = tempfile.TemporaryFile()
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.errors,
      env=environment,
      start_new_session=True,
    )
    os.set_blocking(self.process.stdout.fileno(), False)
    self._unread, self._started = b"", False
    self.unit: Unit | None = None
    self.begun = self.deadline = 0.0

  def send(self, unit: Unit) -> None:
    self.unit, self.begun = unit, time.monotonic()
    self.deadline = self.begun + (unit.limit if self._started else START)
    message = {"do": unit.do, "arguments": unit.arguments}
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.write(json.dumps(message).encode() + b"\n")
      self.process.stdin.flush()

  def answer(self) -> dict | None:
    """The unit's, if there is one now; {} when the worker is gone."""
    chunk = self.process.stdout.read()
    if chunk == b"":
      return {}
    self._unread += chunk or b""
    *lines, self._unread = self._unread.split(b"\n")
    for line in map(json.loads, lines):
      if "started" not in line:
        return line
      self._started, self.begun = True, time.monotonic()
      self.deadline = self.begun + self.unit.limit
    return None

  def last_words(self, count: int = 15) -> list[str]:
    self.errors.seek(0, os.SEEK_END)
    self.errors.seek(max(0, self.errors.tell() - 2**16))
    text = self.errors.read().decode(errors="replace")
    return [line[:300] for line in text.splitlines()[-count:]]

  def stack(self) -> list[str]:
    """Its last words, then where its unit is now, the innermost call first."""
    with contextlib.suppress(ProcessLookupError):
      self.process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    words = self.last_words(80)
    begins = [n for n, line in enumerate(words) if "most recent call" in line]
    return words[max(0, begins[-1] - 8) :] if begins else words[-15:]

  def end(self) -> int:
    """Kills it and all it started; its exit status."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    for pipe in (self.process.stdin, self.process.stdout):
      with contextlib.suppress(BrokenPipeError):
        pipe.close()
    return self.process.wait()


# --- the parent's side -------------------------------------------------------


class Runner:
  """Runs phases until a moment.

  Attributes:
    rows: where units leave theirs.
    command: starts a worker.
    ends: of time.monotonic().
    say: prints a line for a person.
    keep: is told a unit's key and the folder of its dumps.
  """

  def __init__(
    self,
    rows: Rows,
    command: Sequence[str],
    ends: float,
    say: Callable[[str], None],
    keep: Callable[[str, str], None],
  ):
    self.rows, self._command, self._ends = rows, command, ends
    self._say, self._keep = say, keep

  def run(self, phase: Phase, units: Sequence[Unit]) -> None:
    """These units of a phase, as far as time goes."""
    waiting = list(units)
    with contextlib.ExitStack() as stack:
      slots = [_Slot(stack, self._command, phase) for _ in range(phase.workers)]
      selector = stack.enter_context(selectors.DefaultSelector())
      while True:
        for slot in slots:
          if slot.unit is None and waiting:
            if self._ends - time.monotonic() < waiting[0].needs:
              waiting.clear()
              break
            slot.begin(waiting.pop(0), selector)
        busy = [slot for slot in slots if slot.unit is not None]
        if not busy:
          return
        until = min(self._ends, *(slot.worker.deadline for slot in busy))
        selector.select(max(0.0, until - time.monotonic()))
        for slot in busy:
          self._look_at(slot, phase, selector)

  def _look_at(self, slot: _Slot, phase: Phase, selector) -> None:
    """Writes the row of a slot's unit if it has ended, one way or another."""
    worker, unit = slot.worker, slot.unit
    row, now = worker.answer(), time.monotonic()
    seconds = now - worker.begun
    if row is None and now < min(worker.deadline, self._ends):
      return
    died = row == {}
    if row and row["status"] == "failed":
      row["stderr"] = worker.last_words()
    if died or row is None:
      words = worker.last_words() if died else worker.stack()
      status = slot.end(selector)
      if died:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        row = {"status": "failed", "reason": [how], "stderr": words}
      elif now < worker.deadline:
        self._say(f"{unit.key}: time is over, not measured; it was in")
        for word in words[:12]:
          self._say(word)
        slot.unit = None
        return
      else:
        row = {"status": "timeout", "limit": unit.limit, "stderr": words}
    elif phase.fresh or row["status"] == "failed":
      slot.end(selector)
    attempt = 1 + len(self.rows.of(unit.key))
    head = {"key": unit.key, "phase": phase.name, "seconds": round(seconds, 2)}
    self.rows.add(head | {"attempt": attempt} | row)
    reason = (row.get("reason") or row.get("stderr") or [""])[-1]
    fine = row["status"] == "ok"
    self._say(
      f"{unit.key}: {row['status']}, {seconds:.1f} s"
      + ("" if fine or not reason else f": {reason}")
    )
    if slot.dumps:
      self._keep(unit.key, slot.dumps)
    slot.unit = None


class _Slot:
  """Where workers of a phase follow each other."""

  def __init__(self, stack, command: Sequence[str], phase: Phase):
    self._command, self._phase, self._stack = command, phase, stack
    self.worker: Worker | None = None
    self.unit: Unit | None = None
    self.dumps = ""
    stack.callback(lambda: self.worker and self.worker.end())

  def begin(self, unit: Unit, selector) -> None:
    if self.worker is not None and self.worker.unit.pool != unit.pool:
      self.end(selector)
    if self.worker is None:
      values = self._phase.environment
      if any("{dumps}" in value for value in values.values()):
        folder = tempfile.TemporaryDirectory(prefix="dumps_")
        self.dumps = self._stack.enter_context(folder)
      values = {k: v.replace("{dumps}", self.dumps) for k, v in values.items()}
      self.worker = Worker(self._command, os.environ | values)
      selector.register(self.worker.process.stdout, selectors.EVENT_READ)
    self.unit = unit
    self.worker.send(unit)

  def end(self, selector) -> int:
    selector.unregister(self.worker.process.stdout)
    status = self.worker.end()
    self.worker = None
    return status


def ask(
  command: Sequence[str], unit: Unit, environment: dict[str, str]
) -> dict[str, Any]:
  """What a unit answers, in a worker of its own, without a row.

  Raises:
    Refusal: if it hangs or fails, with its last words.
  """
  worker = Worker(command, os.environ | environment)
  try:
    worker.send(unit)
    while (answer := worker.answer()) is None:
      if time.monotonic() > worker.deadline:
        answer = {}
        break
      time.sleep(0.05)
    words = worker.last_words(3)
  finally:
    worker.end()
  if answer.get("status") != "ok":
    reason = " / ".join(answer.get("reason") or words) or "it hangs"
    raise Refusal(f"no device can be reached: {reason}")
  return answer
