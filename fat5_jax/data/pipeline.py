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

from fat5_jax import storage
from fat5_jax.data import (
  examples,
  features,
  mixtures,
  ready,
  records,
  seqio_source,
  seqio_tasks,
  tasks,
)
from fat5_jax.data.layouts import Example
from fat5_jax.data.reading import (
  assemble,
  buckets,
  packing,
  prepare,
  reader,
  streams,
)
from fat5_jax.data.reading.assemble import Batch
from fat5_jax.data.reading.reader import BatchStream
from fat5_jax.data.reading.store import Store
from fat5_jax.errors import UserError, nearest
from fat5_jax.models.config import HeadConfig, T5Config

# TensorFlow reads data; the accelerator is JAX's.
tf.config.set_visible_devices([], "GPU")

# Raise it when a position of before means another place now.
_ORDER = 2
# Examples that a packed row waits for at most.
_PATIENCE = 1 << 13
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
    return {
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
      "order": _ORDER,
    }


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
  rows = task.source.examples(config.split)
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


def _store(config: DatasetConfig, task: seqio.Task) -> Store:
  """A task's store, prepared now where it is not there."""
  return prepare.prepared(
    task,
    config.split,
    config.cache_dir,
    config.lengths(),
    config.use_cached,
    config.num_workers,
  )


def _stores(config: DatasetConfig) -> list[Store]:
  return [
    _store(config, part)
    for part, _ in mixtures.drawn(config.task(), config.split)
  ]


def prepare_all(config: DatasetConfig) -> Iterator[tuple[str, str]]:
  """(place, what is in it) of every store, prepared where it is not there."""
  for store in _stores(config):
    yield store.path, streams.describe(store, config.lengths() or {})


def _sized(config: DatasetConfig) -> dict[str, int]:
  """The features that decide what goes together, and their lengths."""
  lengths = config.lengths()
  if features.label_feature(config.task()) is not None:
    return {"inputs": lengths["inputs"]}  # The others follow from it.
  return {name: lengths[name] for name in ("inputs", "targets")}


def _streams(config: DatasetConfig) -> list[Any]:
  seed = config.seed if config.shuffle else None
  sized, found = _sized(config), []
  for part, _ in mixtures.drawn(config.task(), config.split):
    if config.stream or is_stream(part):
      found.append(streams.Endless(part, config.split, sized, seed))
      continue
    store = _store(config, part)
    is_ours = isinstance(part.source, seqio_source.SeqioSource)
    kind = streams.Stored
    if not is_ours and not seqio_tasks.is_plain(part):
      kind = streams.Remade
    found.append(kind(part, store, sized, seed))
  return found


def is_stream(task: seqio.Task) -> bool:
  """Whether a task's rows can only be read one after the other."""
  source = getattr(task.source, "rows_source", None)
  return bool(getattr(source, "is_stream", False))


def _rates(config: DatasetConfig) -> list[float]:
  return [rate for _, rate in mixtures.drawn(config.task(), config.split)]


def bucket_shapes(
  config: DatasetConfig, found: Sequence[Any], multiple: int
) -> list[buckets.Shape]:
  """(lengths, rows) of the batches that BUCKETS makes.

  As many tokens as BATCH_SIZE rows of TASK_FEATURE_LENGTHS hold.

  Args:
    config: with `buckets`.
    found: streams, whose first examples decide where only a number is given.
    multiple: that the rows of every batch must be one of.
  """
  limits = tuple(_sized(config).values())
  if isinstance(config.buckets, int):
    sizes = [
      stream.sizes(chunk)
      for stream in found
      for chunk in range(1 if stream.length is None else 16)
    ]
    shapes = buckets.choose(np.concatenate(sizes), limits, config.buckets)
  else:
    given = [
      tuple(shape) if isinstance(shape, (tuple, list)) else (shape, *limits[1:])
      for shape in config.buckets
    ]
    shapes = [*sorted(s for s in given if s != limits), limits]
  return buckets.with_rows(shapes, config.batch_size * sum(limits), multiple)


def _planner(
  config: DatasetConfig,
  shapes: Sequence[buckets.Shape] | None,
  count: int | None = None,
) -> Callable[[], Any]:
  """`count`: examples of an epoch, None where nobody knows."""
  if shapes is not None:
    return lambda: packing.Buckets(shapes)
  lengths, rows = tuple(_sized(config).values()), config.batch_size
  if not config.pack:
    return lambda: packing.Padding(lengths, rows)
  # None of a small data set waits for epochs.
  patience = _PATIENCE if count is None else min(_PATIENCE, 1 + count // 8)
  return lambda: packing.Packing(lengths, rows, patience)


def _count(found: Sequence[Any]) -> int | None:
  """Examples of an epoch of all streams."""
  lengths = [stream.length for stream in found]
  return None if None in lengths else sum(lengths)


def _assembler(config: DatasetConfig) -> Callable[..., Batch]:
  """(rows of examples, lengths of a plan) to the model's arrays."""
  task = config.task()
  label = features.label_feature(task)
  names = list(_sized(config))
  if label is None:
    return lambda rows, lengths: assemble.text(
      rows, dict(zip(names, lengths)), config.pack
    )
  dtype = label.dtype.as_numpy_dtype

  def labels(rows, lengths):
    sized = dict(zip(names, lengths))
    return assemble.labels(rows, features.complete_lengths(sized, task), dtype)

  return labels


def _tell(
  config: DatasetConfig,
  found: Sequence[Any],
  shapes: Sequence[buckets.Shape] | None,
) -> list[str]:
  """What a person should know of the data, a line each."""
  lines = [f"{stream.name}: {stream.describe()}" for stream in found]
  if shapes is not None:
    sizes = ", ".join(
      f"{rows} x {'/'.join(map(str, lengths))}" for lengths, rows in shapes
    )
    lines.append(
      f"batches of {len(shapes)} shapes, each compiled once: {sizes}"
    )
  return lines


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
    own: of a batch of so many rows, the [first, end) that are wanted; None is
      all.
    multiple: that the rows of a batch must be one of, where BUCKETS decides
      how many there are.

  Raises:
    UserError: for bad data (place and row named), or a token id beyond the
      embedding.
  """
  if config.task_feature_lengths is None:
    raise UserError(
      "training needs TASK_FEATURE_LENGTHS, for example"
      " {'inputs': 512, 'targets': 114}"
    )
  found = _streams(config)
  shapes = None
  if config.buckets is not None:
    shapes = bucket_shapes(config, found, multiple)
  source = reader.Source(
    found,
    _rates(config),
    _planner(config, shapes, _count(found)),
    _assembler(config),
    lambda batch: _check_ids(batch, vocab_size, config),
    own or (lambda rows: (0, rows)),
  )
  stream = BatchStream(source, position, config.num_workers)
  stream.about = _tell(config, found, shapes)
  return stream


def first_batch(config: DatasetConfig, vocab_size: int) -> Batch:
  """A batch of the first rows, in their order; nothing is prepared."""
  config = dataclasses.replace(config, buckets=None)
  sized, found = _sized(config), []
  for part, _ in mixtures.drawn(config.task(), config.split):
    rows = examples.cut_to(part, config.split, config.lengths())
    found += itertools.islice(rows, 8 * config.batch_size)
  sizes = ([len(example[name]) for name in sized] for example in found)
  with seqio_source.reraise():
    plan = next(_plans_once(config, sizes))
  rows = [[found[place[2]] for place in row] for row in plan.rows]
  batch = _assembler(config)(rows, plan.lengths)
  _check_ids(batch, vocab_size, config)
  return fill_rows(batch, config.batch_size)


def longest_target(config: DatasetConfig) -> int:
  """Tokens of the longest target of a split, as cut."""
  lengths = config.lengths()
  if lengths is not None:
    return lengths["targets"]
  task = config.task()
  if not isinstance(task, seqio.Mixture) and not _through_seqio(config, task):
    (store,) = _stores(config)
    return int(store.lengths["targets"].max())
  return max(len(example["targets"]) for example in one_pass(config))


def _through_seqio(config: DatasetConfig, task: seqio.Task) -> bool:
  """Whether a pass over a split is no pass over a store."""
  is_ours = isinstance(task.source, seqio_source.SeqioSource)
  return config.stream or is_stream(task) or not is_ours


def one_pass(config: DatasetConfig) -> Iterator[Example]:
  """Every example of a split once, in order, cut, with all its features."""
  lengths = config.lengths()
  for part, _ in mixtures.drawn(config.task(), config.split):
    if _through_seqio(config, part):
      yield from examples.cut_to(
        part,
        config.split,
        lengths,
        seed=config.seed,
        use_cached=config.use_cached,
      )
    else:
      store = _store(config, part)
      for start in range(0, len(store), _BLOCK):
        numbers = np.arange(start, min(start + _BLOCK, len(store)))
        for example in store.read(numbers):
          yield streams.cut(part, example, lengths)


def _plans_once(
  config: DatasetConfig,
  sizes: Iterator[Sequence[int]],
  shapes: Sequence[buckets.Shape] | None = None,
) -> Iterator[packing.Plan]:
  """Plans of numbered examples, each once; the last ones as they are left."""
  planner = _planner(config, shapes)()
  for number, size in enumerate(sizes):
    planner.add((0, 0, number), size)
    while (plan := planner.take()) is not None:
      yield plan
  yield from planner.rest()


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
  build, sized = _assembler(config), _sized(config)
  rows = {(): -(-config.batch_size // multiple) * multiple}
  shapes = None
  if config.buckets is not None:
    shapes = bucket_shapes(config, _streams(config), multiple)
    rows = dict(shapes)
  waiting: dict[int, Example] = {}

  def sizes():
    for number, example in enumerate(one_pass(config)):
      waiting[number] = example
      yield [len(example[name]) for name in sized]

  with seqio_source.reraise():
    plans = _plans_once(config, sizes(), shapes)
    for plan in itertools.islice(plans, max_batches):
      examples_of = [[waiting.pop(p[2]) for p in row] for row in plan.rows]
      batch = build(examples_of, plan.lengths)
      _check_ids(batch, vocab_size, config)
      yield fill_rows(batch, rows[plan.lengths if shapes else ()])


def count_batches(config: DatasetConfig) -> float:
  """Batches of one pass over a split, the last one in part."""
  (store,) = _stores(config)
  if not config.pack and config.buckets is None:
    return len(store) / config.batch_size
  shapes, rows = None, {(): config.batch_size}
  if config.buckets is not None:
    shapes = bucket_shapes(config, _streams(config), 1)
    rows = dict(shapes)
  sizes = np.stack(
    [np.minimum(store.lengths[n], most) for n, most in _sized(config).items()],
    axis=1,
  )
  return sum(
    len(plan.rows) / rows[plan.lengths if shapes else ()]
    for plan in _plans_once(config, iter(sizes), shapes)
  )


def fill_rows(batch: Batch, rows: int) -> Batch:
  """The batch with rows of zeros appended, up to `rows`."""
  return {
    key: np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))
    for key, x in batch.items()
  }


def check_task(config: DatasetConfig, model_config: T5Config) -> None:
  """Raises UserError unless the task is one for the model.

  Its labels must be the head's. It may have no more token ids than the
  embedding, and SeqIO pads rows and starts decoder inputs with 0.
  """
  task = config.task()
  _check_labels(task, model_config)
  rows = model_config.vocab_size
  for name in ("inputs", "targets"):
    feature = task.output_features[name]
    if isinstance(feature, features.LabelFeature):
      continue
    if feature.vocabulary.vocab_size > rows:
      raise UserError(
        f"task {task.name!r}: the vocabulary of {name!r} has"
        f" {feature.vocabulary.vocab_size} ids, the model's embedding"
        f" {rows} rows; token ids beyond it would have no embedding."
        " Set T5Config.vocab_size or use the model's own vocabulary"
      )
  for key in ("pad_token_id", "decoder_start_token_id"):
    if getattr(model_config, key) != 0:
      raise UserError(
        f"the model has {key} = {getattr(model_config, key)}; SeqIO's batches"
        " have 0 there, so it cannot be trained or scored on a task"
      )


# Which recipe learns which labels.
_RECIPES = {
  "sequence_classification": "recipes/classify.gin",
  "token_classification": "recipes/tag.gin",
  "question_answering": "recipes/answer.gin",
}


def _text_recipe(name: str) -> str:
  """What to do with a text task where labels are wanted."""
  labelled = name.replace("_v002", "_classes")
  found = "train it with --gin_file=recipes/glue.gin"
  if labelled != name and labelled in ready.TASKS:
    found += f", or take --gin.MIXTURE_OR_TASK_NAME={labelled}"
  return f"{found}, or bind a task with labels (@head_tasks.classification())"


def _check_labels(task, model_config: T5Config) -> None:
  label, head = features.label_feature(task), model_config.head
  kind = "language_model" if head is None else head.kind
  if label is None:
    if kind not in ("language_model", "embedding"):
      raise UserError(
        f"task {task.name!r} has text as targets, and the model's head is"
        f" {kind}: {_text_recipe(task.name)}"
      )
    return
  fits = kind == label.kind or (
    kind == "enct5" and label.kind == "sequence_classification"
  )
  if not fits:
    recipe = _RECIPES[label.kind]
    raise UserError(
      f"task {task.name!r} is one for a head of kind {label.kind}, the model's"
      f" is {kind}: train it with --gin_file={recipe}, or include"
      f" 'heads/{label.kind}.gin' after the model's file"
    )
  if kind == "question_answering":
    return
  if (head.problem_type, head.num_labels) != (label.problem_type, label.size):
    raise UserError(
      f"task {task.name!r} has {label.size} labels, {label.problem_type}; the"
      f" head has {head.num_labels}, {head.problem_type}"
    )
  if head.label_names and label.names and head.label_names != label.names:
    raise UserError(
      f"task {task.name!r} names its labels {', '.join(label.names)}, the head"
      f" {', '.join(head.label_names)}"
    )


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
      f" labels: {_text_recipe(task.name)}"
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
