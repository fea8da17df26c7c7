"""Rows and a row function as SeqIO sees them, and errors that come through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import itertools
import logging
import re
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax.data.files import Unread
from fat5_jax.data.skipped import Skipped
from fat5_jax.data.sources import LocatedRow, Row, RowFn, column
from fat5_jax.errors import UserError

logger = logging.getLogger("fat5_jax")

# Sources below this many bytes are shuffled as a whole, others by SeqIO's
# buffer alone.
WHOLE_SHUFFLE_BYTES = 1 << 30
# The split of rows that somebody asks about; they are no task's own.
ROWS = "predict"

# tf.data turns a generator's exception into an anonymous one that only quotes
# its text: the number in that text finds the exception again.
_failures: dict[int, UserError] = {}
_numbers = itertools.count()


class _BadRow(Exception):
  """Stands in for a UserError on its way through tf.data."""

  def __init__(self, error: UserError):
    number = next(_numbers)
    _failures[number] = error
    super().__init__(f"fat5_jax row error {number}.")


@contextlib.contextmanager
def reraise():
  """Lets a UserError raised inside a tf.data pipeline through as itself.

  Several pipelines may be open, one within the other; each gets its own.
  """
  try:
    yield
  except tf.errors.OpError as e:
    match = re.search(r"fat5_jax row error (\d+)\.", str(e))
    if match and int(match[1]) in _failures:
      raise _failures.pop(int(match[1])) from None
    raise


# What a text-to-text task's row function gives.
TEXT_TO_TEXT = {
  "inputs": tf.TensorSpec([], tf.string),
  "targets": tf.TensorSpec([], tf.string),
}


# Rows that are made at once, and characters, if that is less.
_BLOCK, _CHARACTERS = 512, 1 << 20
_SKIP = ". (skip_bad_rows = True leaves such rows out)"


def _blocks(
  rows: Iterable[LocatedRow], most: int
) -> Iterator[list[LocatedRow]]:
  block: list[LocatedRow] = []
  characters = 0
  for row in rows:
    block.append(row)
    if not isinstance(row[1], Unread):
      characters += sum(len(v) for v in row[1].values() if isinstance(v, str))
    if len(block) == most or characters > _CHARACTERS:
      yield block
      block, characters = [], 0
  if block:
    yield block


def files_of(task: seqio.Task | seqio.Mixture) -> list[str]:
  """The local files of a task, or of a mixture's tasks."""
  found: list[str] = []
  for part in seqio.get_subtasks(task):
    if isinstance(part.source, SeqioSource):
      for files in part.source.rows_source.splits.values():
        # Sources of other kinds have names or functions there.
        paths = files.values() if isinstance(files, Mapping) else files
        found += [] if isinstance(files, str) or callable(files) else paths
  return found


class Located:
  """Rows that know their place, in split ROWS."""

  def __init__(self, rows: Callable[[], Iterable[LocatedRow]]):
    self.splits = {ROWS: rows}

  def rows(self, split: str) -> Iterable[LocatedRow]:
    return self.splits[split]()

  def describe(self, split: str) -> str:
    return "the input"

  def size_bytes(self, split: str) -> int:
    return 0


class SeqioSource(seqio.DataSource):
  """A source and a row function as SeqIO sees them.

  The row function gives what `signature` names: text, token ids, labels, and
  what a metric needs besides. None drops a row.

  Attributes:
    columns: those that a question needs, without its answer.
    record: the task as plain data (records.py); set by its factory.
    read_like: how its files are read, of sources.read_file, where rows to be
      asked about shall be read so too.
    row_code: a person's own function by which rows are read, or None.
  """

  def __init__(
    self,
    source,
    row_fn: RowFn,
    signature: Mapping[str, tf.TensorSpec],
    layout: Any,
    skip_bad_rows: bool = False,
    columns: Sequence[str] = (),
    unanswered: Callable[[Row], Row] = lambda row: row,
  ):
    """`layout`: of layouts.py, what becomes of what the row function gives.

    `unanswered` puts something in the place of a row's answer.
    """
    if getattr(source, "weights", {}):
      raise UserError(
        "this task takes no weights of files: mix two tasks of them with"
        " tasks.mixture()"
      )
    self._source, self._row_fn, self.layout = source, row_fn, layout
    self._skip_bad_rows = skip_bad_rows
    self._signature = dict(signature)
    self._unanswered = unanswered
    self._counts: dict[str, int] = {}
    self.columns = tuple(columns)
    self.record: dict[str, Any] = {}
    self.read_like: dict[str, Any] = {}
    self.row_code: Any = None
    super().__init__(splits=tuple(source.splits), caching_permitted=False)

  @property
  def rows_source(self) -> Any:
    """Where the rows come from; see sources.py."""
    return self._source

  def _renamed(self, row: Row) -> Row:
    row = dict(row)
    if hasattr(self._source, "rename"):
      # A person's row has the names of the data set, or the task's.
      row = self._source.rename(row, whole=False)
    return row

  def answered(self, row: Row) -> Row:
    """The features of a row with its answer.

    Raises:
      UserError: if it lacks a column.
    """
    return self._row_fn(self._renamed(row))

  def question(self, row: Row) -> Row:
    """The features of a row whose answer is not known.

    Raises:
      UserError: if it has not the columns that a question needs.
    """
    row = self._renamed(row)
    try:
      return self._row_fn(self._unanswered(row))
    except UserError as e:
      if str(e).startswith("no column"):
        # Told with the columns that are there, not with a stand-in's.
        for name in self.columns:
          column(row, name)
      raise

  def asking(self, rows: Callable[[], Iterable[LocatedRow]]) -> SeqioSource:
    """This source with questions in the place of its rows, in split ROWS."""
    return SeqioSource(
      Located(rows), self.question, self._signature, self.layout
    )

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [self._source.describe(split)]

  def examples(self, split: str) -> Iterator[Row]:
    """Every row as what the row function gives, checked.

    Raises:
      UserError: naming the place, for a bad row; or if there is no row.
    """
    count, skipped = 0, Skipped()
    for block in self.blocks(split, skipped):
      count += len(block)
      yield from block
    self.tell(split, count, skipped)

  def blocks(
    self, split: str, skipped: Skipped, part: tuple[int, int] = (0, 1)
  ) -> Iterator[list[Row]]:
    """The examples of each block of rows, in order.

    Args:
      split: of the task.
      skipped: counts bad rows, where they are left out.
      part: (i, n) makes the i-th of every n blocks alone.

    Raises:
      UserError: naming the place, for a bad row.
    """
    rows = _blocks(self._source.rows(split), 1 if split == ROWS else _BLOCK)
    for number, block in enumerate(rows):
      if number % part[1] == part[0]:
        made = (self._example(split, *row, skipped) for row in block)
        yield [example for example in made if example is not None]

  def _example(
    self, split: str, where: str, row: Row, skipped: Skipped
  ) -> Row | None:
    try:
      if isinstance(row, Unread):
        raise UserError(row.reason)
      example = self._row_fn(row)
      if example is None:
        return None
      for key in ("inputs", "targets"):
        text = example.get(key)
        if isinstance(text, str) and not text.strip():
          raise UserError(f"{key} is empty")
        if isinstance(text, str):
          text.encode("utf-8")
    except (UserError, UnicodeEncodeError) as e:
      reason = str(e)
      if isinstance(e, UnicodeEncodeError):
        reason = "half a character (a lone surrogate)"
      if not self._skip_bad_rows:
        hint = "" if split == ROWS else _SKIP
        raise UserError(f"{where}: {reason}{hint}") from None
      skipped.add(where, reason)
      return None
    return {key: example[key] for key in self._signature}

  def tell(self, split: str, count: int, skipped: Skipped) -> None:
    """Says what was left out of a split that gave so many examples.

    Raises:
      UserError: if it gave none.
    """
    if skipped.rows:
      logger.warning(
        "%s: %s", self._source.describe(split), skipped.describe(count)
      )
    if not count:
      raise UserError(
        f"{self._source.describe(split)}: no rows, nothing to read"
      )

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length=None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    del sequence_length, use_cached

    def generate():
      try:
        examples = self.examples(split)
        if shuffle and self._source.size_bytes(split) < WHOLE_SHUFFLE_BYTES:
          rows = list(examples)
          order = np.random.default_rng(seed).permutation(len(rows))
          examples = (rows[i] for i in order)
        for i, example in enumerate(examples):
          if (
            shard_info is None or i % shard_info.num_shards == shard_info.index
          ):
            yield example
      except UserError as e:
        raise _BadRow(e) from None

    dataset = tf.data.Dataset.from_generator(
      generate, output_signature=self._signature
    )
    return dataset if num_epochs == 1 else dataset.repeat(num_epochs)

  def known_rows(self, split: str) -> int | None:
    """Rows of a split, bad ones too, where they are counted quickly: without
    making any. None too where reading them will tell what is wrong."""
    count = getattr(self._source, "num_rows", None)
    if count is None or getattr(self._source, "is_stream", False):
      return None
    try:
      return count(split)
    except UserError:
      return None

  def num_input_examples(self, split: str) -> int | None:
    """Rows of a split, counted once; None of a stream that nobody counted."""
    count = getattr(self._source, "num_rows", None)
    if getattr(self._source, "is_stream", False):
      return None if count is None else count(split)
    if split not in self._counts:
      if self._skip_bad_rows:
        # Which rows are bad shows when they are made.
        found = sum(1 for _ in self.examples(split))
      elif count is None:
        found = sum(1 for _ in self._source.rows(split))
      else:
        found = count(split)
      self._counts[split] = found
    return self._counts[split]


# ---- A layout as a preprocessor of SeqIO's -----------------------------------


def preprocessor(
  layout: Any, added: Mapping[str, tf.TensorSpec]
) -> Callable[..., tf.data.Dataset]:
  """What SeqIO calls to make examples of rows; the same functions as ours.

  Args:
    layout: of layouts.py.
    added: the features that it adds to those that it leaves as they are.
  """

  def preprocess(dataset, output_features, sequence_length=None):
    given = dataset.element_spec
    removed = layout.removed
    spec = {k: v for k, v in given.items() if k not in removed} | dict(added)
    names = sorted(spec)

    def run(*values):
      row = {
        key: _to_python(value, given[key].dtype)
        for key, value in zip(given, values)
      }
      prepared = layout.prepare([row], output_features, sequence_length)
      rows = [layout.cut(example, sequence_length) for example in prepared]
      found = []
      for name in names:
        dtype = spec[name].dtype.as_numpy_dtype
        values = [row[name] for row in rows]
        if spec[name].shape.rank == 0:
          found.append(np.array(values, dtype))
        else:
          flat = [np.asarray(value, dtype) for value in values]
          sizes = np.array([len(value) for value in flat], np.int64)
          found += [np.concatenate([*flat, np.zeros(0, dtype)]), sizes]
      return found

    def types():
      for name in names:
        yield spec[name].dtype
        if spec[name].shape.rank:
          yield tf.int64

    def split(row):
      found = iter(tf.numpy_function(run, list(row.values()), list(types())))
      columns = {}
      for name in names:
        column = next(found)
        column.set_shape([None])
        if spec[name].shape.rank:
          sizes = next(found)
          sizes.set_shape([None])
          column = tf.RaggedTensor.from_row_lengths(column, sizes)
        columns[name] = column
      return tf.data.Dataset.from_tensor_slices(columns)

    return dataset.flat_map(split)

  return preprocess


def _to_python(value: np.ndarray | bytes, dtype: tf.DType) -> Any:
  if dtype != tf.string:
    return value
  if isinstance(value, bytes):
    return value.decode("utf-8")
  return [item.decode("utf-8") for item in value.tolist()]
