"""The batches of a run, on the devices, from a place in its data on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fat5_jax import console
from fat5_jax.data import pipeline
from fat5_jax.data.reading import reader
from fat5_jax.training.run import Run


class RunBatches:
  """Batches without end, on the devices; the first is read now.

  Attributes:
    position: in the data, after the batch that was given last.
    epochs: passes over each task's data up to there; of those that end.
  """

  def __init__(self, run: Run, position: dict[str, Any] | None):
    """Opens the training data of a run.

    Args:
      run: of its training data, the rows that this host's devices hold.
      position: see start.Start.

    Raises:
      UserError: for bad data, with its place.
    """
    self._partitioner, multiple = run.partitioner, run.row_multiple
    self._stream = pipeline.train_batches(
      run.train_dataset_cfg,
      run.model.config.vocab_size,
      position,
      # Worker processes have no devices.
      own=reader.Share(*run.partitioner.rows(multiple), multiple),
      multiple=multiple,
    )
    self.position, self.epochs = position, self._stream.epochs
    for line in self._stream.about:
      console.say(line)
    self._first: tuple[Any, ...] | None = self._read()

  def _read(self) -> tuple[Any, ...]:
    stream = self._stream
    batch = next(stream)
    return batch, stream.rows, stream.position, stream.epochs

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return self

  def __next__(self) -> dict[str, Any]:
    found, self._first = self._first or self._read(), None
    batch, rows, self.position, self.epochs = found
    first_row = self._partitioner.rows(rows)[0]
    return self._partitioner.to_devices(batch, first_row, rows)

  def close(self) -> None:
    """Stops reading ahead."""
    self._stream.close()
