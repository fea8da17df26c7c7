"""From a task to batches of numpy arrays, at a position that can be resumed.

A split is prepared once (reading/prepare.py) and read by number; which example
comes next, and which go together, is known from the seed and their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib
import itertools
import json
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax import console, storage
from fat5_jax.data import (
  checks,
  examples,
  features,
  mixtures,
  opening,
  records,
  seqio_source,
  tasks,
)
from fat5_jax.data.layouts import Example
from fat5_jax.data.reading import buckets, reader, streams
from fat5_jax.data.reading.assemble import Batch
from fat5_jax.data.reading.reader import BatchStream
from fat5_jax.errors import UserError, nearest
from fat5_jax.models.config import HeadConfig

# TensorFlow reads data; the accelerator is JAX's.
tf.config.set_visible_devices([], "GPU")

# Raise it when a position of before means another place now.
_ORDER = 2
# Examples that one pass over a split reads at a time.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """One split of a task, cut to lengths and batched. Names are T5X's.

  Attributes:
    mixture_or_task_name: a registered name, one of ready.TASKS, or a
      task.
    task_feature_lengths: {"inputs": ..., "targets": ...} in tokens, the end of
      sequence included; None (evaluation only) takes the longest of the split.
    split: of the task; None leaves an evaluation out.
    batch_size: rows, over all hosts.
    shuffle: whether to shuffle, from `seed`.
    seed: fixes the order; None is the run's.
    use_cached: read SeqIO's offline cache.
    pack: put several examples in a row.
    buckets: instead, rows of about one length together: how many lengths, or
      which; None is TASK_FEATURE_LENGTHS for all.
    curriculum: shorter lengths that a training begins with, by the step that
      they end at; see curriculum.py.
    stream: read rows as they come, prepare nothing; for what is too large, or
      has no end.
    cache_dir: of prepared examples; None is FAT5_JAX_CACHE of the environment,
      or ~/.cache/fat5_jax.
    num_workers: processes that read training data; 0 is a thread.
    module: imported first, for the tasks it registers.
    vocabulary: for the tasks that are built by name.
    data_dir: local files of those tasks.
  """

  mixture_or_task_name: Any
  task_feature_lengths: Mapping[str, int] | None
  split: str | None
  batch_size: int
  shuffle: bool = False
  seed: int | None = 42
  use_cached: bool = False
  pack: bool = False
  buckets: int | Sequence[Any] | None = None
  curriculum: Mapping[int, Mapping[str, int]] | None = None
  stream: bool = False
  cache_dir: str | None = None
  num_workers: int = 0
  module: str | None = None
  vocabulary: seqio.Vocabulary | None = None
  data_dir: str | None = None

  def __post_init__(self):
    wanted = (str, seqio.Task, seqio.Mixture, type(None))
    for name, value, kinds in (
      ("MIXTURE_OR_TASK_NAME", self.mixture_or_task_name, wanted),
      ("VOCABULARY", self.vocabulary, (seqio.Vocabulary, type(None))),
    ):
      if not isinstance(value, kinds):
        raise UserError(
          f"{name} is a {type(value).__name__}, and must be a"
          f" {kinds[-2].__name__}"
        )
    if self.batch_size < 1:
      raise UserError(f"batch_size={self.batch_size} must be at least 1")
    for key, length in (self.task_feature_lengths or {}).items():
      if not isinstance(length, int) or length < 1:
        raise UserError(
          f"TASK_FEATURE_LENGTHS[{key!r}] = {length!r} must be a positive"
          " number of tokens"
        )

  def task(self) -> seqio.Task | seqio.Mixture:
    """The task, with `split` checked; built once.

    Raises:
      UserError: for an unknown task, split or module.
    """
    return self._task

  @functools.cached_property
  def _task(self) -> seqio.Task | seqio.Mixture:
    if self.mixture_or_task_name is None:
      raise UserError("MIXTURE_OR_TASK_NAME must be set")
    if self.module:
      try:
        importlib.import_module(self.module)
      except ImportError as e:
        raise UserError(f"MIXTURE_OR_TASK_MODULE {self.module}: {e}") from None
    task = tasks.resolve(
      self.mixture_or_task_name, self.vocabulary, self.data_dir
    )
    splits = {s for t in seqio.get_subtasks(task) for s in t.splits}
    if self.split not in splits:
      raise UserError(
        f"task {task.name!r} has no split {self.split!r}."
        f"{nearest(str(self.split), splits)} It has:"
        f" {', '.join(sorted(splits))}. EVAL_SPLIT names the one to evaluate"
        " on; --gin.EVAL_SPLIT=None trains without one"
      )
    lengths = features.complete_lengths(self.task_feature_lengths, task)
    if lengths is not None and set(lengths) != set(task.output_features):
      raise UserError(
        f"TASK_FEATURE_LENGTHS names {', '.join(sorted(lengths))}; task"
        f" {task.name!r} has {', '.join(sorted(task.output_features))}"
      )
    if self.pack and self.buckets is not None:
      raise UserError("BUCKETS takes the place of PACK: set PACK = False")
    if self.buckets is not None and lengths is not None:
      is_text = features.label_feature(task) is None
      names = ("inputs", "targets") if is_text else ("inputs",)
      buckets.check(self.buckets, [lengths[name] for name in names])
    if self.pack and features.label_feature(task) is not None:
      raise UserError(
        f"task {task.name!r} has labels, one row an example: set PACK = False"
      )
    return task

  def lengths(self) -> dict[str, int] | None:
    """task_feature_lengths, with those that follow from the inputs'."""
    return features.complete_lengths(self.task_feature_lengths, self.task())

  def record(self) -> dict[str, Any]:
    """The task as plain data, to be written beside a run; see records.py."""
    return records.describe(self.task()) | {
      "module": self.module,
      "data_dir": self.data_dir and storage.absolute(self.data_dir),
      "use_cached": self.use_cached,
      "lengths": dict(self.task_feature_lengths or {}),
    }

  def fingerprint(self) -> dict[str, Any]:
    """What a position in the stream depends on, as JSON."""
    found = {
      "task": self.task().name,
      "content": records.fingerprint(self.record()),
      "split": self.split,
      "task_feature_lengths": dict(self.task_feature_lengths or {}),
      "batch_size": self.batch_size,
      "shuffle": self.shuffle,
      "seed": self.seed,
      "pack": self.pack,
      "buckets": json.loads(json.dumps(self.buckets)),
      "stream": self.stream,
      "identity": opening.identity(self.task(), self.split),
      "order": _ORDER,
    }
    if self.curriculum is not None:
      table = sorted((k, dict(v)) for k, v in self.curriculum.items())
      found["curriculum"] = json.loads(json.dumps(table))
    return found


def of_tasks(config: DatasetConfig) -> list[DatasetConfig]:
  """A mixture's tasks apart, those that have the split."""
  return [
    dataclasses.replace(config, mixture_or_task_name=part)
    for part in seqio.get_subtasks(config.task())
    if config.split in part.splits
  ]


def check_rows(config: DatasetConfig, evaluation: bool = False) -> None:
  """Raises UserError unless the split has rows for a batch, and they are fine.

  Reads no more of it than that. An evaluation needs one.
  """
  task = config.task()
  if isinstance(task, seqio.Mixture) or not isinstance(
    task.source, seqio_source.SeqioSource
  ):
    return
  rows: Iterator[Any] = task.source.examples(config.split)
  if examples.is_denoised(task) and not evaluation:
    # A text may be many examples.
    rows = examples.cut_to(task, config.split, config.lengths())
  count = sum(1 for _ in itertools.islice(rows, config.batch_size))
  if evaluation:
    if not count:
      raise UserError(
        f"split {config.split!r} of task {task.name!r} has no rows; EVAL_SPLIT"
        " names another, --gin.EVAL_SPLIT=None trains without an evaluation"
      )
    return
  if count < config.batch_size:
    raise UserError(
      f"split {config.split!r} of task {task.name!r} has {count:,} rows, fewer"
      f" than BATCH_SIZE = {config.batch_size}, so a batch would hold rows"
      f" twice: set BATCH_SIZE to {count:,} or less"
    )


def batch_shapes(config: DatasetConfig) -> dict[str, tuple[tuple, np.dtype]]:
  """(shape, type) of every array of a training batch; no data is read."""
  convert = features.feature_converter(config.task(), config.pack)
  lengths = dict(convert.get_model_feature_lengths(config.lengths()))
  found = {}
  for key, length in lengths.items():
    # Packing adds segment ids and positions, which are no features.
    spec = convert.MODEL_FEATURES.get(key)
    dtype = np.int32 if spec is None else spec.dtype.as_numpy_dtype
    found[key] = ((config.batch_size, length), np.dtype(dtype))
  return found


def _check_ids(batch: Batch, vocab_size: int, config: DatasetConfig) -> None:
  for feature in ("encoder_input_tokens", "decoder_target_tokens"):
    if feature not in batch:
      continue
    largest = int(batch[feature].max(initial=0))
    if largest >= vocab_size:
      raise UserError(
        f"{feature} of task {config.task().name!r} holds token id {largest},"
        f" beyond the model's embedding (vocab_size = {vocab_size}); task and"
        " model need the same vocabulary"
      )


def prepare_all(config: DatasetConfig) -> Iterator[tuple[str, str]]:
  """(place, what is in it) of every store, prepared where it is not there."""
  for store in opening.stores(config):
    yield store.path, streams.describe(store, config.lengths() or {})


def train_batches(
  config: DatasetConfig,
  vocab_size: int,
  position: dict[str, Any] | None = None,
  own: Callable[[int], tuple[int, int]] | None = None,
  multiple: int = 1,
) -> BatchStream:
  """Batches without end, from a position on.

  The order is a function of the data and the seed: not of the hosts, of the
  processes that read, or of where a run was stopped.

  Args:
    config: must name task_feature_lengths.
    vocab_size: rows of the model's embedding.
    position: of an earlier stream over the same data; None is the beginning.
    own: of a batch of so many rows, the [first, end) that are wanted, a
      reader.Share for example; None is all.
    multiple: that the rows of a batch must be one of, where BUCKETS decides
      how many there are.

  Raises:
    UserError: for bad data (place and row named), or a token id beyond the
      embedding.
  """
  if config.curriculum is not None:
    raise ValueError("a curriculum has stages: see curriculum.stages")
  if config.task_feature_lengths is None:
    raise UserError(
      "training needs TASK_FEATURE_LENGTHS, for example"
      " {'inputs': 512, 'targets': 114}"
    )
  found = opening.open_streams(config)
  shapes = None
  if config.buckets is not None:
    shapes = opening.bucket_shapes(config, found, multiple)
  source = reader.Source(
    found,
    opening.rates(config),
    opening.make_planner(config, shapes, opening.count(found)),
    opening.make_assembler(config),
    lambda batch: _check_ids(batch, vocab_size, config),
    own or reader.Share(),
  )
  position = _checked(position, found)
  stream = BatchStream(source, position, config.num_workers)
  stream.about = opening.tell(config, found, shapes)
  return stream


def _checked(
  position: dict[str, Any] | None, found: Sequence[Any]
) -> dict[str, Any] | None:
  """A position, unless it is one in other data: what a function makes, say."""
  lengths = [stream.length for stream in found]
  if position is not None and position["lengths"] != lengths:
    console.say(
      f"the training data had {_counted(position['lengths'])} examples when the"
      f" checkpoint was saved, and has {_counted(lengths)}: it is read from its"
      " beginning"
    )
    return None
  return position


def _counted(lengths: Sequence[int | None]) -> str:
  return " + ".join("?" if n is None else f"{n:,}" for n in lengths)


def first_batch(config: DatasetConfig, vocab_size: int) -> Batch:
  """A batch of the first rows, in their order; nothing is prepared."""
  config = dataclasses.replace(config, buckets=None)
  sized, found = opening.sized_features(config), []
  for part, _ in mixtures.drawn(config.task(), config.split):
    rows = examples.cut_to(part, config.split, config.lengths())
    found += itertools.islice(rows, 8 * config.batch_size)
  sizes = ([len(example[name]) for name in sized] for example in found)
  with seqio_source.reraise():
    plan = next(opening.plans_once(config, sizes))
  rows = [[found[place[2]] for place in row] for row in plan.rows]
  batch = opening.make_assembler(config)(rows, plan.lengths)
  _check_ids(batch, vocab_size, config)
  return fill_rows(batch, config.batch_size)


def longest_target(config: DatasetConfig) -> int:
  """Tokens of the longest target of a split, as cut."""
  lengths = config.lengths()
  if lengths is not None:
    return lengths["targets"]
  task = config.task()
  if not isinstance(task, seqio.Mixture) and not opening.goes_through_seqio(
    config, task
  ):
    (store,) = opening.stores(config)
    return int(store.lengths["targets"].max())
  return max(len(example["targets"]) for example in one_pass(config))


def one_pass(config: DatasetConfig) -> Iterator[Example]:
  """Every example of a split once, in order, cut, with all its features."""
  lengths = config.lengths()
  for part, _ in mixtures.drawn(config.task(), config.split):
    if opening.goes_through_seqio(config, part):
      yield from examples.cut_to(
        part,
        config.split,
        lengths,
        seed=config.seed,
        use_cached=config.use_cached,
      )
      continue
    stored = _in_order(opening.store_of(config, part))
    if examples.is_denoised(part):
      yield from examples.denoised(part, stored, lengths)
    else:
      yield from (streams.cut(part, x, lengths) for x in stored)


def _in_order(store: Any) -> Iterator[Example]:
  """All that a store holds."""
  for start in range(0, len(store), _BLOCK):
    yield from store.read(np.arange(start, min(start + _BLOCK, len(store))))


def count_examples(config: DatasetConfig) -> int | None:
  """Of one_pass, where that is known without reading them."""
  total = 0
  for part, _ in mixtures.drawn(config.task(), config.split):
    if opening.goes_through_seqio(config, part) or examples.is_denoised(part):
      return None
    total += len(opening.store_of(config, part))
  return total


def eval_batches(
  config: DatasetConfig,
  vocab_size: int,
  max_batches: int | None,
  multiple: int = 1,
) -> Iterator[Batch]:
  """One pass over a split, the same on every host.

  A batch is filled with empty rows to the size of the others of its lengths, a
  number that `multiple` divides.
  """
  if config.task_feature_lengths is None:
    config = _as_long_as_the_longest(config)
  build, sized = opening.make_assembler(config), opening.sized_features(config)
  rows = {(): -(-config.batch_size // multiple) * multiple}
  shapes = None
  if config.buckets is not None:
    shapes = opening.bucket_shapes(
      config, opening.open_streams(config), multiple
    )
    rows = dict(shapes)
  waiting: dict[int, Example] = {}

  def sizes():
    for number, example in enumerate(one_pass(config)):
      waiting[number] = example
      yield [len(example[name]) for name in sized]

  with seqio_source.reraise():
    plans = opening.plans_once(config, sizes(), shapes)
    for plan in itertools.islice(plans, max_batches):
      examples_of = [[waiting.pop(p[2]) for p in row] for row in plan.rows]
      batch = build(examples_of, plan.lengths)
      _check_ids(batch, vocab_size, config)
      yield fill_rows(batch, rows[plan.lengths if shapes else ()])


def _as_long_as_the_longest(config: DatasetConfig) -> DatasetConfig:
  """The data set with the lengths of its longest texts."""
  is_labelled = features.label_feature(config.task()) is not None
  names = ("inputs",) if is_labelled else ("inputs", "targets")
  longest = dict.fromkeys(names, 1)
  for example in one_pass(config):
    for name in names:
      longest[name] = max(longest[name], len(example[name]))
  return dataclasses.replace(config, task_feature_lengths=longest)


def count_batches(config: DatasetConfig) -> float:
  """Batches of one pass over a split, the last one in part."""
  (store,) = opening.stores(config)
  shapes, rows = None, {(): config.batch_size}
  if config.buckets is not None:
    shapes = opening.bucket_shapes(config, opening.open_streams(config), 1)
    rows = dict(shapes)
  sizes = opening.sizes_of(config, store)
  return sum(
    len(plan.rows) / rows[plan.lengths if shapes else ()]
    for plan in opening.plans_once(config, iter(sizes.tolist()), shapes)
  )


def fill_rows(batch: Batch, rows: int) -> Batch:
  """The batch with rows of zeros appended, up to `rows`."""
  return {
    key: np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))
    for key, x in batch.items()
  }


def head_config(
  dataset: DatasetConfig,
  kind: str,
  pooling: str | None = None,
  body: str = "encoder",
  widths: Sequence[int] | None = None,
  activation: str = "tanh",
  dropout_rate: float = 0.0,
  decoder_layers: int = 1,
  max_answer_tokens: int = 30,
) -> HeadConfig:
  """The head of a kind for a task's labels; the rest as in HeadConfig.

  Raises:
    UserError: if the task has no labels.
  """
  task = dataset.task()
  label = features.label_feature(task)
  if label is None:
    raise UserError(
      f"task {task.name!r} has text as targets, and a head of kind {kind} needs"
      f" labels: {checks.text_recipe(task.name)}"
    )
  return HeadConfig(
    kind,
    num_labels=label.size,
    problem_type=label.problem_type,
    label_names=label.names,
    pooling=pooling,
    body=body,
    widths=widths,
    activation=activation,
    dropout_rate=dropout_rate,
    decoder_layers=decoder_layers,
    max_answer_tokens=max_answer_tokens,
  )


def show(feature: seqio.Feature, tokens: np.ndarray) -> str:
  """Text of a row of ids for a person: all of its sentences, `A </s> B`."""
  vocabulary = feature.vocabulary
  ids = [int(t) for t in tokens]
  while ids and ids[-1] in (vocabulary.pad_id, vocabulary.eos_id):
    ids.pop()
  parts: list[list[int]] = [[]]
  for i in ids:
    if i == vocabulary.eos_id:
      parts.append([])
    else:
      parts[-1].append(i)
  return " </s> ".join(map(vocabulary.decode, parts))


def decode(feature: seqio.Feature, tokens: np.ndarray) -> str:
  """Text of a row of ids, up to its end-of-sequence."""
  return feature.vocabulary.decode([int(t) for t in tokens])
