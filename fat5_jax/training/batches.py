"""The batches of a run, on the devices, from a place in its data on."""

from __future__ import annotations

from collections.abc import Iterator
import itertools
from typing import Any

from fat5_jax.data import pipeline
from fat5_jax.training.run import Run


def of_run(run: Run, position: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Batches without end; the first is read now.

  Args:
    run: of its training data, the rows that this host's devices hold.
    position: see start.Start.

  Raises:
    UserError: for bad data, with its place.
  """
  rows = run.partitioner.rows(run.batch_size)
  read = pipeline.train_batches(
    run.train_dataset_cfg,
    run.model.config.vocab_size,
    skip=position["batches"],
    rows=rows,
    num_shards=position["data_shards"],
  )
  read = itertools.chain([next(read)], read)
  place = lambda batch: run.partitioner.to_devices(
    batch, rows[0], run.batch_size
  )
  return map(place, read)
