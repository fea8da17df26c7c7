"""A split of a task as streams, plans and arrays, for pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import seqio

from fat5_jax.data import (
  examples,
  features,
  mixtures,
  seqio_source,
  seqio_tasks,
)
from fat5_jax.data import (
  identity as identity_lib,
)
from fat5_jax.data.reading import (
  assemble,
  buckets,
  packing,
  prepare,
  streams,
  workers,
)
from fat5_jax.data.reading.assemble import Batch
from fat5_jax.data.reading.store import Store
from fat5_jax.errors import UserError

if TYPE_CHECKING:
  from fat5_jax.data.pipeline import DatasetConfig

# Examples that a packed row waits for at most.
_PATIENCE = 1 << 13


def store_of(config: DatasetConfig, task: seqio.Task) -> Store:
  """A task's store, prepared now where it is not there."""
  if config.num_workers:
    workers.check_process()
  return prepare.prepared(
    task,
    config.split,
    config.cache_dir,
    config.lengths(),
    config.use_cached,
    config.num_workers,
  )


def stores(config: DatasetConfig) -> list[Store]:
  return [store_of(config, part) for part, _ in drawn(config)]


def sizes_of(config: DatasetConfig, store: Store) -> np.ndarray:
  """int64 (N, features): tokens of every example of a store, as cut."""
  sized = sized_features(config)
  if examples.is_denoised(config.task()):
    objective = examples.objective(config.task(), sized)
    return objective.cut(store.lengths["inputs"], [0]).sizes_N2
  found = [np.minimum(store.lengths[n], most) for n, most in sized.items()]
  return np.stack(found, axis=1)


def drawn(config: DatasetConfig) -> list[tuple[seqio.Task, float]]:
  """The tasks that a split draws from, and their rates.

  Raises:
    UserError: if there are none.
  """
  found = mixtures.drawn(config.task(), config.split)
  if not found:
    raise UserError(
      f"{config.task().name!r}, split {config.split!r}: none of its tasks has a"
      " rate above 0"
    )
  return found


def identity(task: seqio.Task | seqio.Mixture, split: str) -> str:
  """A hash of the code that makes the examples, where it is not ours."""
  found = []
  for part, _ in mixtures.drawn(task, split):
    try:
      found.append(prepare.identity_of(part))
    except identity_lib.Unknown:
      found.append(None)
  text = json.dumps(found, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def sized_features(config: DatasetConfig) -> dict[str, int]:
  """The features that decide what goes together, and their lengths."""
  lengths = config.lengths()
  if features.label_feature(config.task()) is not None:
    return {"inputs": lengths["inputs"]}  # The others follow from it.
  missing = {"inputs", "targets"} - lengths.keys()
  if missing:
    raise UserError(
      f"task {config.task().name!r} has no {missing.pop()}: an encoder-decoder"
      " has both"
    )
  return {name: lengths[name] for name in ("inputs", "targets")}


def open_streams(config: DatasetConfig) -> list[Any]:
  sized, found = sized_features(config), []
  for number, (part, _) in enumerate(drawn(config)):
    # Tasks of one length are not to ask about the same rows side by side.
    seed = [(config.seed or 0) % (1 << 64), number] if config.shuffle else None
    if config.stream or is_stream(part):
      found.append(streams.Endless(part, config.split, sized, seed))
      continue
    store = store_of(config, part)
    is_ours = isinstance(part.source, seqio_source.SeqioSource)
    kind: Any = streams.Stored
    if examples.is_denoised(part):
      kind = streams.Denoised
    elif not is_ours and not seqio_tasks.is_plain(part):
      kind = streams.Remade
    found.append(kind(part, store, sized, seed))
  return found


def is_stream(task: seqio.Task) -> bool:
  """Whether a task's rows can only be read one after the other."""
  source = getattr(task.source, "rows_source", None)
  return bool(getattr(source, "is_stream", False))


def rates(config: DatasetConfig) -> list[float]:
  return [rate for _, rate in drawn(config)]


def bucket_shapes(
  config: DatasetConfig, found: Sequence[Any], multiple: int
) -> list[buckets.Shape]:
  """(lengths, rows) of the batches that BUCKETS makes.

  As many tokens as BATCH_SIZE rows of TASK_FEATURE_LENGTHS hold.

  Args:
    config: with `buckets`.
    found: streams, whose first and longest examples decide where only a number
      is given.
    multiple: that the rows of every batch must be one of.
  """
  limits = tuple(sized_features(config).values())
  shapes = buckets.check(config.buckets, limits)
  if isinstance(shapes, int):
    sizes = [
      stream.sizes(chunk)
      for stream in found
      for chunk in range(1 if stream.length is None else 16)
    ]
    longest = np.max([stream.longest() for stream in found], axis=0)
    shapes = buckets.choose(
      np.concatenate(sizes), buckets.rounded(longest, limits), shapes
    )
  return buckets.with_rows(shapes, config.batch_size * sum(limits), multiple)


def make_planner(
  config: DatasetConfig,
  shapes: Sequence[buckets.Shape] | None,
  count: int | None = None,
) -> Callable[[], Any]:
  """`count`: examples of an epoch, None where nobody knows."""
  if shapes is not None:
    return lambda: packing.Buckets(shapes)
  lengths, rows = tuple(sized_features(config).values()), config.batch_size
  if not config.pack:
    return lambda: packing.Padding(lengths, rows)
  # None of a small data set waits for epochs.
  patience = _PATIENCE if count is None else min(_PATIENCE, 1 + count // 8)
  return lambda: packing.Packing(lengths, rows, patience)


def count(found: Sequence[Any]) -> int | None:
  """Examples of an epoch of all streams."""
  lengths = [stream.length for stream in found]
  return None if None in lengths else sum(lengths)


def make_assembler(config: DatasetConfig) -> Callable[..., Batch]:
  """(rows of examples, lengths of a plan) to the model's arrays."""
  task = config.task()
  label = features.label_feature(task)
  names = list(sized_features(config))
  if label is None:
    return lambda rows, lengths: assemble.text(
      rows, dict(zip(names, lengths)), config.pack
    )
  dtype = label.dtype.as_numpy_dtype

  def labels(rows, lengths):
    sized = dict(zip(names, lengths))
    return assemble.labels(rows, features.complete_lengths(sized, task), dtype)

  return labels


def tell(
  config: DatasetConfig,
  found: Sequence[Any],
  shapes: Sequence[buckets.Shape] | None,
) -> list[str]:
  """What a person should know of the data, a line each."""
  lines = [f"{stream.name}: {stream.describe()}" for stream in found]
  folders = {os.path.dirname(s.path) for s in map(_store, found) if s}
  lines += [f"tokens are read from {folder}" for folder in sorted(folders)]
  if shapes is not None:
    sizes = ", ".join(
      f"{rows} x {'/'.join(map(str, lengths))}" for lengths, rows in shapes
    )
    lines.append(
      f"batches of {len(shapes)} shapes, each compiled once: {sizes}"
    )
  return lines


def _store(stream: Any) -> Store | None:
  return getattr(stream, "store", None)


def plans_once(
  config: DatasetConfig,
  sizes: Iterator[Sequence[int]],
  shapes: Sequence[buckets.Shape] | None = None,
) -> Iterator[packing.Plan]:
  """Plans of numbered examples, each once; the last ones as they are left."""
  planner = make_planner(config, shapes)()
  for number, size in enumerate(sizes):
    planner.add((0, 0, number), size)
    while (plan := planner.take()) is not None:
      yield plan
  yield from planner.rest()


def goes_through_seqio(config: DatasetConfig, task: seqio.Task) -> bool:
  """Whether a pass over a split is no pass over a store."""
  is_ours = isinstance(task.source, seqio_source.SeqioSource)
  return config.stream or is_stream(task) or not is_ours
