"""What a person sees while a command runs: progress, tables, samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
import contextlib
import math
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Standard output is for results (infer writes there), this is for people.
console = Console(stderr=True, highlight=False, soft_wrap=True)


def only_errors() -> None:
  """Silences this process: one of many hosts speaks for all."""
  console.quiet = True


@contextlib.contextmanager
def without_native_lines() -> Iterator[None]:
  """Drops what native code writes while TensorFlow loads (no flag does)."""
  saved = os.dup(2)
  sink = os.open(os.devnull, os.O_WRONLY)
  os.dup2(sink, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(sink)


def say(text: str) -> None:
  """A line for a person."""
  console.print(escape(text))


def duration(seconds: float) -> str:
  """ "1h02m", "3m07s" or "12s"."""
  seconds = max(0, round(seconds))
  if seconds >= 3600:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  if seconds >= 60:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds}s"


# Between two lines of a training's progress in a log.
LOG_SECONDS = 10.0


class Progress:
  """A line that is rewritten on a terminal, and printed now and then in a log.

  Rates count the time since the previous report of sums, evaluations and saves
  left out.
  """

  def __init__(self, first_step: int, last_step: int):
    self._step, self._last = first_step, last_step
    self._begin_step, self._busy = first_step, 0.0
    self._mark = time.monotonic()
    self._text = ""
    self._live = console.is_terminal
    self._shown = -math.inf

  def pause(self) -> None:
    """Stops the clock (evaluation, saving)."""
    self._busy += time.monotonic() - self._mark
    if self._live and self._text:
      console.print()
      self._text = ""

  def resume(self) -> None:
    self._mark = time.monotonic()

  def elapsed(self) -> float:
    """Seconds of training so far."""
    return self._busy + time.monotonic() - self._mark

  def update(
    self,
    step: int,
    *,
    loss: float,
    learning_rate: float | None,
    tokens_per_second: float,
    padding: float,
    epochs: Collection[float],
    force: bool,
  ) -> None:
    """Shows a step; in a log now and then, only where `force`, and the last."""
    self._step = step
    now = time.monotonic()
    wait = 0.2 if self._live else LOG_SECONDS
    is_due = now - self._shown >= wait or step == self._last
    if not (is_due and (force or self._live)):
      return
    self._shown = now
    done = max(1, step - self._begin_step)
    left = self.elapsed() / done * (self._last - step)
    rate = "" if learning_rate is None else f"  lr {learning_rate:.2e}"
    # What a narrow terminal cuts off comes last.
    self._text = (
      f"step {step}/{self._last}  loss {loss:.4f}  {duration(left)} left{rate}"
      f"  {tokens_per_second:,.0f} target tokens/s  padding {padding:.0%}"
      f"{_epochs(epochs)}"
    )
    if self._live and not console.quiet:
      _rewrite(self._text)
    else:
      say(self._text)


def _epochs(counts: Collection[float]) -> str:
  """ "  epoch 1.25", of a mixture "  epochs 0.10-3.50", or nothing."""
  if not counts:
    return ""
  least, most = min(counts), max(counts)
  if len(counts) == 1:
    return f"  epoch {most:.2f}"
  return f"  epochs {least:.2f}-{most:.2f}"


class Count:
  """How far a command is: how much of how much, how fast, how long still.

  Rewritten on a terminal; in a log a line each half minute. What is done at
  once is not told; the rest has a last line.
  """

  def __init__(self, what: str, unit: str, total: float | None = None):
    """
    Args:
      what: is done.
      unit: of what is counted, in the plural.
      total: how many there will be, about; None of a stream, which has no time
        left either.
    """
    self._what, self._unit, self._total = what, unit, total
    self._begin = self._shown = time.monotonic()
    self._live = console.is_terminal and not console.quiet
    self._wait = 0.5 if self._live else 30.0
    self._done, self._told = 0.0, False

  def __enter__(self) -> Count:
    return self

  def __exit__(self, kind: Any, *unused: Any) -> None:
    """A last line; of a failure none, but its message begins a line."""
    if self._told and self._live:
      sys.stderr.write("\r\x1b[2K")
    if self._told and kind is None:
      say(self._line(time.monotonic(), is_last=True))

  def add(self, number: float = 1) -> None:
    """So many more are done."""
    self._done += number
    now = time.monotonic()
    if now - self._shown < self._wait:
      return
    self._shown, self._told = now, True
    if self._live:
      _rewrite(self._line(now))
    else:
      say(self._line(now))

  def _line(self, now: float, is_last: bool = False) -> str:
    seconds = max(now - self._begin, 1e-9)
    rate = self._done / seconds
    text, end = f"{self._what}: {_number(self._done)}", duration(seconds)
    # A total that was too little says nothing.
    if self._total and self._done <= self._total and not is_last:
      text += f" of {_number(self._total)}"
      end = f"{duration((self._total - self._done) / rate)} left"
    return f"{text} {self._unit}, {_number(rate)}/s, {end}"


def _number(value: float) -> str:
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def counted(
  items: Iterable[Any], what: str, unit: str, total: float | None = None
) -> Iterator[Any]:
  """The items, while a `Count` tells of them."""
  with Count(what, unit, total) as count:
    for item in items:
      yield item
      count.add()


def _rewrite(text: str) -> None:
  """The last line of a terminal, in the place of what was there."""
  # What is wider is folded, and would stay.
  sys.stderr.write(f"\r\x1b[2K{text[: console.width - 1]}")
  sys.stderr.flush()


def metrics_table(title: str, rows: Iterable[tuple[str, str, float]]) -> None:
  """A table of (data set, metric, value)."""
  table = Table(title=title, title_justify="left")
  table.add_column("data set")
  table.add_column("metric")
  table.add_column("value", justify="right")
  for dataset, metric, value in rows:
    table.add_row(escape(dataset), escape(metric), f"{value:.4g}")
  console.print(table)


def pairs_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
  """A name and a text a row."""
  plain_table(title, ("", ""), rows, show_header=False)


def plain_table(
  title: str,
  header: Iterable[str],
  rows: Iterable[Iterable[str]],
  show_header: bool = True,
) -> None:
  """Texts in columns; many columns are folded on a terminal, never in a log."""
  table = Table(title=title, title_justify="left", show_header=show_header)
  for name in header:
    table.add_column(name, overflow="fold")
  for row in rows:
    table.add_row(*map(escape, row))
  if len(table.columns) <= 2 or console.is_terminal:
    console.print(table)
  else:
    Console(stderr=True, width=160, quiet=console.quiet).print(table)


def samples_table(rows: Iterable[Mapping[str, Any]]) -> None:
  """Predictions beside targets; nothing where there are none."""
  table = Table(title="sample predictions", title_justify="left")
  for name in ("input", "target", "prediction"):
    table.add_column(name, overflow="fold", max_width=60)
  for row in rows:
    same = row["target"] == row["prediction"]
    color = "green" if same else "red"
    table.add_row(
      escape(row["input"]),
      escape(row["target"]),
      f"[{color}]{escape(row['prediction'])}[/{color}]",
    )
  if table.row_count:
    console.print(table)
