"""Tasks of SeqIO's own: which of their steps are done once, which every epoch.

SeqIO caches what comes before its CacheDatasetPlaceholder. A task without one
is cached up to the first step that asks for a length or draws a random number.
What is left runs in TensorFlow, a block of examples at a time, with a seed of
its own by block and epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import inspect
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from fat5_jax import console
from fat5_jax.data.layouts import Example, Limits
from fat5_jax.errors import UserError

# Steps that do to every example what Text.cut does.
_ENDS = {
  seqio.preprocessors.append_eos: False,
  seqio.preprocessors.append_eos_after_trim: True,
}


def _steps(
  task: seqio.Task, dataset: tf.data.Dataset, steps, limits: Limits
) -> tf.data.Dataset:
  for step in steps:
    step = seqio.utils.add_kwargs_to_transform(
      step, sequence_length=limits, output_features=task.output_features
    )
    dataset = step(dataset)
  return dataset


def split_steps(task: seqio.Task) -> tuple[list[Any], list[Any]]:
  """(steps that are done once, steps that every epoch does again)."""
  steps = list(task.preprocessors)
  for number, step in enumerate(steps):
    if isinstance(step, seqio.CacheDatasetPlaceholder):
      return steps[:number], steps[number + 1 :]
  for number, step in enumerate(steps):
    if step in _ENDS or _varies(step):
      return steps[:number], steps[number:]
  return steps, []


def _varies(step: Any) -> bool:
  """Whether a step asks for a length or for seeds."""
  try:
    names = set(inspect.signature(step).parameters)
  except (TypeError, ValueError):
    return True
  return bool(names & {"sequence_length", "seed", "seeds"})


def _as_numpy(dataset: tf.data.Dataset) -> Iterator[Example]:
  """Rows whose numbers keep their types; text stays the bytes that it is."""
  for row in tfds.as_numpy(dataset):
    yield {
      key: np.asarray(value) if isinstance(value, np.generic) else value
      for key, value in row.items()
    }


def _check(task: seqio.Task, dataset: tf.data.Dataset, is_last: bool) -> None:
  """Raises UserError for what SeqIO would refuse, or no store can hold."""
  spec = dataset.element_spec
  for name, found in spec.items():
    if isinstance(found, tf.RaggedTensorSpec):
      raise UserError(
        f"task {task.name!r}: {name} is ragged before the steps that every"
        " epoch does, and cannot be kept: put a CacheDatasetPlaceholder before"
        " the step that makes it so"
      )
  for name, feature in task.output_features.items() if is_last else ():
    if name not in spec:
      if not feature.required:
        continue
      raise UserError(
        f"task {task.name!r}: its steps give {', '.join(sorted(spec))}, and no"
        f" {name!r}"
      )
    dtype = getattr(spec[name], "dtype", None)
    if dtype != feature.dtype:
      raise UserError(
        f"task {task.name!r}: {name} is {getattr(dtype, 'name', 'no array')}"
        f" after its steps, and {feature.dtype.name} in its output_features"
      )


# What TensorFlow calls the operations that draw without a seed of SeqIO's.
_DRAWS = {
  *("RandomUniform", "RandomUniformInt", "RandomStandardNormal"),
  *("TruncatedNormal", "ParameterizedTruncatedNormal", "RandomShuffle"),
  *("Multinomial", "RandomGamma", "RandomPoissonV2"),
}


def _draws(dataset: tf.data.Dataset) -> bool:
  """Whether a step draws random numbers that are others in every pass."""
  graph = tf.compat.v1.GraphDef.FromString(
    dataset._as_serialized_graph().numpy()
  )
  nodes = [*graph.node]
  for function in graph.library.function:
    nodes += function.node_def
  return any(node.op in _DRAWS for node in nodes)


def _once(
  task: seqio.Task, split: str, use_cached: bool
) -> tuple[tf.data.Dataset, bool]:
  """(a split after the steps that are done once, whether they draw what is
  another in every pass)."""
  once, again = split_steps(task)
  draws = False
  if use_cached:
    dataset = _seqio_cache(task, split)
  else:
    dataset = task.source.get_dataset(split=split, shuffle=False)
    with seqio.utils.map_seed_manager(0):
      dataset = _steps(task, dataset, once, None)
    draws = _draws(dataset)
  if is_plain(task):
    dataset = _steps(task, dataset, again, None)
  _check(task, dataset, is_plain(task))
  return dataset, draws


def first(
  task: seqio.Task, split: str, use_cached: bool, count: int
) -> Iterator[Example]:
  """The first of what `whole` gives; none where it is another in every pass."""
  dataset, draws = _once(task, split, use_cached)
  if not draws:
    yield from _as_numpy(dataset.take(count))


def whole(
  task: seqio.Task, split: str, counts: Any, use_cached: bool = False
) -> Iterator[Example]:
  """Every example after the steps that are done once.

  Where nothing but an end of sequence comes after them, it is there too.
  """
  dataset, draws = _once(task, split, use_cached)
  if draws:
    console.say(
      f"task {task.name!r} draws random numbers without a seed: what it draws"
      " now is kept, the same in every epoch. @seqio.map_over_dataset("
      "num_seeds=1), or a CacheDatasetPlaceholder before it, draws anew"
    )
  vocabulary = (
    task.output_features["inputs"].vocabulary
    if ("inputs" in task.output_features)
    else None
  )
  unknown = None if vocabulary is None else vocabulary.unk_id
  for example in _as_numpy(dataset):
    counts.rows += 1
    tokens = example.get("inputs")
    if isinstance(tokens, np.ndarray):
      counts.tokens += tokens.size
      if unknown is not None:
        counts.unknown += int(np.count_nonzero(tokens == unknown))
    yield example


def _seqio_cache(task: seqio.Task, split: str) -> tf.data.Dataset:
  try:
    return task._get_cached_source(split).get_dataset(
      split=split, shuffle=False
    )
  except (AssertionError, ValueError, AttributeError) as e:
    raise UserError(f"USE_CACHED_TASKS: task {task.name!r}: {e}") from None


def is_plain(task: seqio.Task) -> bool:
  """Whether its examples need no TensorFlow after the store."""
  return all(step in _ENDS for step in split_steps(task)[1])


def cut(task: seqio.Task, example: Example, limits: Limits) -> Example:
  """A plain task's example, as SeqIO cuts it."""
  keeps_end = any(_ENDS[step] for step in split_steps(task)[1])
  found = {}
  for name, feature in task.output_features.items():
    limit, values = (limits or {}).get(name), example.get(name)
    if limit is None or values is None or len(values) <= limit:
      continue
    found[name] = values[:limit]
    if keeps_end and feature.add_eos:
      found[name] = np.concatenate([values[: limit - 1], values[-1:]])
  return example | found


def again(
  task: seqio.Task,
  examples: Sequence[Example],
  limits: Mapping[str, int],
  seed: int,
) -> list[Example]:
  """A block of stored examples after the steps that every epoch does.

  The number of examples may change.
  """
  spec = _spec(examples[0])
  dataset = tf.data.Dataset.from_generator(
    lambda: iter(examples), output_signature=spec
  )
  with seqio.utils.map_seed_manager(seed):
    dataset = _steps(task, dataset, split_steps(task)[1], limits)
  names = set(task.output_features)
  _check(task, dataset, True)
  found = []
  for row in tfds.as_numpy(dataset):
    found.append(
      {
        key: value[: limits[key]] if key in limits else value
        for key, value in row.items()
        if key in names
      }
    )
  return found


def _spec(example: Example) -> dict[str, tf.TensorSpec]:
  found = {}
  for key, value in example.items():
    if isinstance(value, (str, bytes)):
      found[key] = tf.TensorSpec([], tf.string)
    elif isinstance(value, (list, tuple)):
      found[key] = tf.TensorSpec([None], tf.string)
    else:
      array = np.asarray(value)
      shape = [None] * array.ndim
      dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
      found[key] = tf.TensorSpec(shape, dtype)
  return found


def cut_to(
  task: seqio.Task,
  split: str,
  limits: Limits,
  seed: int | None = None,
  use_cached: bool = False,
) -> Iterator[Example]:
  """Every example as SeqIO itself gives it, in order."""
  dataset = task.get_dataset(
    dict(limits) if limits else None,
    split,
    use_cached=use_cached,
    shuffle=False,
    seed=seed,
  )
  yield from tfds.as_numpy(dataset)
