"""metrics.csv: a line a value. The run's own memory of what it measured."""

from __future__ import annotations

from collections.abc import Mapping
import csv
import os

import jax

from fat5_jax import storage
from fat5_jax.checkpoints import run_folder
from fat5_jax.loggers.logger import Logger

Row = tuple[int, str, str, float]
_COLUMNS = ("step", "dataset", "metric", "value")


class CsvFile(Logger):
  """All of a run's values, cut back to the step that it goes on from.

  Attributes:
    rows: (step, data set, metric, value), in the order of the file.
  """

  def __init__(self, folder: str, first_step: int):
    super().__init__()
    self._path = os.path.join(folder, "metrics.csv")
    self.rows = [row for row in read_csv(self._path) if row[0] <= first_step]
    self._rewrite()

  def _rewrite(self) -> None:
    lines = [",".join(_COLUMNS)]
    lines += [f"{s},{d},{m},{v!r}" for s, d, m, v in self.rows]
    run_folder.write_atomically(self._path, "\n".join(lines) + "\n")

  def add(self, step: int, dataset: str, values: Mapping[str, float]) -> None:
    rows = [(step, dataset, key, value) for key, value in values.items()]
    # An evaluation that a kill cut short is run, and written, again.
    again = {row[:3] for row in rows} & {row[:3] for row in self.rows}
    self.rows = [row for row in self.rows if row[:3] not in again] + rows
    if again:
      self._rewrite()
    elif jax.process_index() == 0:
      with open(self._path, "a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def read_csv(path: str) -> list[Row]:
  """Rows (step, data set, metric, value) of a metrics.csv; none if absent."""
  if not storage.exists(path):
    return []
  rows = []
  lines = storage.read(path).decode().splitlines(keepends=True)
  for record in csv.DictReader(lines):
    try:
      rows.append(
        (
          int(record["step"]),
          record["dataset"],
          record["metric"],
          float(record["value"]),
        )
      )
    except (TypeError, ValueError):
      # The last line of a killed run may be cut short.
      continue
  return rows
