"""From a task to batches of numpy arrays, at a position that can be resumed.

The order of the data is a function of the task and the seed alone, so a
position is a number of batches: a resumed run builds the same stream and skips
what it has already seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib
import itertools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from fat5_jax import storage
from fat5_jax.data import features, records, seqio_source, tasks
from fat5_jax.errors import UserError, nearest
from fat5_jax.models.config import HeadConfig, T5Config

# TensorFlow reads data; the accelerator is JAX's.
tf.config.set_visible_devices([], "GPU")

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """One split of a task, cut to lengths and batched. Names are T5X's.

  Attributes:
    mixture_or_task_name: a registered name, one of tasks.BUILTIN_TASKS, or a
      task.
    task_feature_lengths: {"inputs": ..., "targets": ...} in tokens, the end of
      sequence included; None (evaluation only) takes the longest of the split.
    split: of the task; None leaves an evaluation out.
    batch_size: rows, over all hosts.
    shuffle: whether to shuffle, from `seed`.
    seed: fixes the order; None is the run's.
    use_cached: read SeqIO's offline cache.
    pack: put several examples in a row.
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
    }


def _dataset(
  config: DatasetConfig,
  num_epochs: int | None,
  shard: int = 0,
  num_shards: int = 1,
) -> tf.data.Dataset:
  task = config.task()
  dataset = task.get_dataset(
    sequence_length=config.lengths(),
    split=config.split,
    use_cached=config.use_cached,
    shuffle=config.shuffle,
    seed=config.seed,
    shard_info=seqio.ShardInfo(shard, num_shards),
    num_epochs=num_epochs,
  )
  convert = features.feature_converter(task, config.pack)
  return convert(dataset, config.lengths())


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


def train_batches(
  config: DatasetConfig,
  vocab_size: int,
  skip: int = 0,
  rows: tuple[int, int] | None = None,
  num_shards: int = 1,
) -> Iterator[Batch]:
  """Batches without end, from the one numbered `skip` on.

  The data is split into `num_shards` streams, each of which gives its part of
  every batch. A host opens those that hold its rows, so what a batch is does
  not depend on the number of hosts.

  Args:
    config: must name task_feature_lengths.
    vocab_size: rows of the model's embedding.
    skip: batches already seen.
    rows: [first, end) of each batch that are wanted; None is all.
    num_shards: streams; must divide the batch.

  Raises:
    UserError: for bad data (place and row named), or a token id beyond the
      embedding.
  """
  if config.task_feature_lengths is None:
    raise UserError(
      "training needs TASK_FEATURE_LENGTHS, for example"
      " {'inputs': 512, 'targets': 114}"
    )
  if config.batch_size % num_shards:
    raise UserError(
      f"BATCH_SIZE = {config.batch_size} does not divide into DATA_SHARDS ="
      f" {num_shards}"
    )
  share = config.batch_size // num_shards
  first, end = rows or (0, config.batch_size)
  shards = range(first // share, -(-end // share))

  def stream(shard):
    dataset = _dataset(config, None, shard, num_shards)
    dataset = dataset.batch(share, drop_remainder=True).skip(skip)
    return tfds.as_numpy(dataset.prefetch(tf.data.AUTOTUNE))

  wanted = slice(first - shards[0] * share, end - shards[0] * share)
  with seqio_source.reraise():
    for parts in zip(*map(stream, shards)):
      batch = {
        key: np.concatenate([part[key] for part in parts])[wanted]
        for key in parts[0]
      }
      _check_ids(batch, vocab_size, config)
      yield batch


def eval_batches(
  config: DatasetConfig,
  vocab_size: int,
  max_batches: int | None,
  rows: int | None = None,
) -> Iterator[Batch]:
  """One pass over a split, the same on every host.

  The last batch is filled with empty rows, and all up to `rows` where given.
  """
  with seqio_source.reraise():
    dataset = _dataset(config, num_epochs=1).batch(config.batch_size)
    if max_batches is not None:
      dataset = dataset.take(max_batches)
    for batch in tfds.as_numpy(dataset):
      _check_ids(batch, vocab_size, config)
      yield fill_rows(batch, rows or config.batch_size)


def count_rows(config: DatasetConfig) -> int:
  """Rows of one pass over a split, as they are packed; reads all of it."""
  with seqio_source.reraise():
    dataset = _dataset(config, num_epochs=1)
    return sum(1 for _ in dataset)


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
  if labelled != name and labelled in tasks.BUILTIN_TASKS:
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
