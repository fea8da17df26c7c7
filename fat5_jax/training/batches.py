"""The batches of a run, on the devices, from a place in its data on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fat5_jax import console
from fat5_jax.data import curriculum, pipeline
from fat5_jax.data.reading import reader
from fat5_jax.training.run import Run
from fat5_jax.training.start import Start


class RunBatches:
  """Batches without end, on the devices; the first is read now.

  Attributes:
    position: in the data, after the batch that was given last.
    epochs: passes over each task's data up to there; of those that end.
  """

  def __init__(self, run: Run, begin: Start):
    """Opens the training data of a run.

    Args:
      run: of its training data, the rows that this host's devices hold.
      begin: where in it.

    Raises:
      UserError: for bad data, with its place.
    """
    self._partitioner, self._multiple = run.partitioner, run.row_multiple
    self._vocab_size = run.model.config.vocab_size
    self._stages = curriculum.stages(run.train_dataset_cfg, self._multiple)
    self._read_steps = begin.step - begin.begin_step
    self.position = begin.data["position"]
    self._stage = 0 if self.position is None else self.position.get("stage", 0)
    self._open(self.position)
    self.epochs = self._stream.epochs
    steps = run.last_step(begin.begin_step, begin.step) - begin.begin_step
    lengths = curriculum.describe(self._stages, steps)
    for line in [*self._stream.about, *lengths]:
      console.say(line)
    self._first: tuple[Any, ...] | None = self._read()

  def _open(self, position: dict[str, Any] | None) -> None:
    """Reads on in the stage of the next step."""
    number = curriculum.number_at(self._stages, self._read_steps)
    config = self._stages[number].config
    if position is not None and number != self._stage:
      position = curriculum.moved(
        position, self._stages[self._stage].config, config
      )
    self._stage = number
    self._stream = pipeline.train_batches(
      config,
      self._vocab_size,
      position,
      # Worker processes have no devices.
      own=reader.Share(*self._partitioner.rows(self._multiple), self._multiple),
      multiple=self._multiple,
    )

  def _read(self) -> tuple[Any, ...]:
    if self._read_steps >= self._stages[self._stage].end:
      self._stream.close()
      self._open(self._stream.position)
    stream = self._stream
    batch = next(stream)
    self._read_steps += 1
    position = stream.position
    if len(self._stages) > 1:
      position = position | {"stage": self._stage}
    return batch, stream.rows, position, stream.epochs

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
