"""From a task's features to a model's: text to text, or a head's labels.

A head's task has a `LabelFeature` as `targets`, and its labels decide which
head and which feature converter go with it.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax.errors import UserError

# Labels that count for nothing; Hugging Face's number.
IGNORED = -100
# Kinds of labels whose long texts come in several rows, none of them cut.
WINDOWED = ("token_classification", "question_answering")


class Cuts:
  """Rows of a task that lost their end to TASK_FEATURE_LENGTHS, by feature.

  Counted as rows are read, epoch after epoch, a little ahead of their use.
  """

  def __init__(self):
    self.rows = 0
    self.by_feature: dict[str, int] = collections.Counter()
    self.longest: dict[str, int] = collections.Counter()

  def count(self, names: Sequence[str], lengths, limits) -> None:
    self.rows += 1
    for name, length, limit in zip(names, lengths, limits):
      if length > limit:
        self.by_feature[name] += 1
        self.longest[name] = max(self.longest[name], int(length))

  def describe(self) -> str:
    """For a person; "" if nothing was cut."""
    parts = [
      f"{count:,} of {name} (longest {self.longest[name]:,} tokens)"
      for name, count in sorted(self.by_feature.items())
    ]
    if not parts:
      return ""
    return f"{', '.join(parts)}, of {self.rows:,} rows read"


# By task and length; see count_cut.
_cuts: dict[tuple[str, int | None, int | None], Cuts] = {}


def _counter(name: str, lengths: Mapping[str, int] | None) -> Cuts:
  lengths = lengths or {}
  key = (name, lengths.get("inputs"), lengths.get("targets"))
  return _cuts.setdefault(key, Cuts())


def cuts_of(
  task: seqio.Task | seqio.Mixture, lengths: Mapping[str, int] | None
) -> dict[str, Cuts]:
  """The rows that were cut to these lengths, by task."""
  return {
    part.name: _counter(step.keywords["name"], lengths)
    for part in seqio.get_subtasks(task)
    for step in part.preprocessors
    if "name" in getattr(step, "keywords", ())
  }


def count_cut(
  dataset: tf.data.Dataset, sequence_length=None, *, name: str
) -> tf.data.Dataset:
  """Counts the rows of tokens that are about to lose their end."""
  limits = sequence_length or {}
  keys = [key for key in ("inputs", "targets") if limits.get(key) is not None]
  if not keys:
    return dataset
  found = _counter(name, sequence_length)
  # append_eos needs a place too.
  room = [limits[key] - 1 for key in keys]

  def note(*lengths):
    found.count(keys, lengths, room)
    return np.int32(0)

  def look(row):
    lengths = [tf.size(row[key]) for key in keys]
    done = tf.numpy_function(note, lengths, tf.int32)
    with tf.control_dependencies([done]):
      return row | {key: tf.identity(row[key]) for key in keys}

  # One after the other: the counter is Python's.
  return dataset.map(look)


# Characters of a text that a row whose tokens are cut keeps for a person.
_KEPT_TEXT = 1 << 16


def shorten_text(
  dataset: tf.data.Dataset, sequence_length=None
) -> tf.data.Dataset:
  """Cuts the text that stands beside tokens which are cut themselves.

  SeqIO shuffles a thousand rows with it: a few of 20 MB would fill the memory.
  """
  if sequence_length is None:
    return dataset

  def shorten(row):
    return row | {
      key: tf.strings.substr(row[key], 0, _KEPT_TEXT, unit="UTF8_CHAR")
      for key in row
      if key.endswith("_pretokenized")
    }

  return dataset.map(shorten)


def check_given(vocabulary: seqio.Vocabulary | None, task: str) -> None:
  """Raises UserError unless a task was given a vocabulary."""
  if vocabulary is None:
    raise UserError(
      f"task {task!r} needs a vocabulary: include a model's gin file, or set"
      " VOCABULARY = @seqio.SentencePieceVocabulary() and VOCAB_FILE"
    )


@dataclasses.dataclass(frozen=True)
class LabelFeature(seqio.Feature):
  """The `targets` of a head's task.

  Attributes:
    kind: the HeadConfig.kind that learns them (EncT5 takes a sequence's too).
    problem_type: as in HeadConfig.
    size: how many labels there are; numbers a row in regression.
    names: of the labels, empty where they have none.
  """

  kind: str = "sequence_classification"
  problem_type: str = "single_label_classification"
  size: int = 2
  names: tuple[str, ...] = ()

  @property
  def per_row(self) -> int | None:
    """Labels a row; None is one a token."""
    if self.kind == "token_classification":
      return None
    if self.kind == "question_answering":
      return 2
    single = self.problem_type == "single_label_classification"
    return 1 if single else self.size


def label_feature(task: seqio.Task | seqio.Mixture) -> LabelFeature | None:
  """The labels of a head's task; None for text to text."""
  feature = task.output_features.get("targets")
  return feature if isinstance(feature, LabelFeature) else None


def head_features(
  vocabulary: seqio.Vocabulary, label: Mapping[str, Any]
) -> dict[str, seqio.Feature]:
  """The output features of a head's task; `label` is LabelFeature's fields."""
  size = label.get("size", 2)
  dtype = tf.int32
  if label.get("problem_type", "").startswith(("multi", "regression")):
    dtype = tf.float32
  found = {
    "inputs": seqio.Feature(vocabulary, add_eos=True),
    "targets": LabelFeature(
      seqio.PassThroughVocabulary(size), add_eos=False, dtype=dtype, **label
    ),
  }
  if label["kind"] == "question_answering":
    found["answerable"] = seqio.Feature(
      seqio.PassThroughVocabulary(2), add_eos=False
    )
  return found


class LabelFeatureConverter(seqio.FeatureConverter):
  """Class labels, spans and tags for heads.

  Gives `encoder_input_tokens` (L), `labels` (K) with their `label_weights` (K),
  0 where a row of tags is padded, and for spans `answerable` (L): 1 where an
  answer may be.
  """

  TASK_FEATURES: Mapping[str, seqio.FeatureConverter.FeatureSpec] = {}
  MODEL_FEATURES: Mapping[str, seqio.FeatureConverter.FeatureSpec] = {}
  PACKING_FEATURE_DTYPES: Mapping[str, Any] = {}

  def __init__(self, label: LabelFeature):
    spec = seqio.FeatureConverter.FeatureSpec
    self._more = ("answerable",) if label.kind == "question_answering" else ()
    ints = {key: spec(dtype=tf.int32) for key in self._more}
    self.TASK_FEATURES = {
      "inputs": spec(dtype=tf.int32),
      "targets": spec(dtype=label.dtype),
      **ints,
    }
    self.MODEL_FEATURES = {
      "encoder_input_tokens": spec(dtype=tf.int32),
      "labels": spec(dtype=label.dtype),
      "label_weights": spec(dtype=tf.int32),
      **ints,
    }
    super().__init__(pack=False)

  def _convert_features(self, ds, task_feature_lengths):
    def convert(features):
      targets = features["targets"]
      return {
        "encoder_input_tokens": features["inputs"],
        "labels": targets,
        "label_weights": tf.ones_like(targets, tf.int32),
        **{key: features[key] for key in self._more},
      }

    ds = ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)
    return self._pack_or_pad(
      ds, self.get_model_feature_lengths(task_feature_lengths)
    )

  def get_model_feature_lengths(self, task_feature_lengths):
    return {
      "encoder_input_tokens": task_feature_lengths["inputs"],
      "labels": task_feature_lengths["targets"],
      "label_weights": task_feature_lengths["targets"],
      **{key: task_feature_lengths[key] for key in self._more},
    }


def feature_converter(
  task: seqio.Task | seqio.Mixture, pack: bool
) -> seqio.FeatureConverter:
  """What makes a task's features the model's."""
  label = label_feature(task)
  if label is None:
    return seqio.EncDecFeatureConverter(pack=pack)
  return LabelFeatureConverter(label)


def complete_lengths(
  lengths: Mapping[str, int] | None, task: seqio.Task | seqio.Mixture
) -> dict[str, int] | None:
  """TASK_FEATURE_LENGTHS with those that follow from the inputs' added."""
  label = label_feature(task)
  if lengths is None or label is None or "inputs" not in lengths:
    return None if lengths is None else dict(lengths)
  found = {
    "inputs": lengths["inputs"],
    "targets": label.per_row or lengths["inputs"],
  }
  if "answerable" in task.output_features:
    found["answerable"] = lengths["inputs"]
  return found | dict(lengths)


# ---- Preprocessors that need to know the length ------------------------------


def _length(sequence_length: Mapping[str, int] | None) -> int | None:
  return None if sequence_length is None else sequence_length.get("inputs")


def join_pair(
  dataset: tf.data.Dataset, output_features, sequence_length=None, *, name: str
) -> tf.data.Dataset:
  """`inputs` from `first` and `second`, as `A </s>` or `A </s> B </s>`.

  What is too long loses the end of its longer text, never its `</s>`; how many
  rows did is counted under the task's `name`.
  """
  eos = tf.constant([output_features["inputs"].vocabulary.eos_id], tf.int32)
  limit = _length(sequence_length)

  counted = _counter(name, sequence_length)

  def note(length):
    counted.count(["inputs"], [length], [limit])
    return np.int32(0)

  def join(row):
    first, second = row["first"], row["second"]
    pair = tf.size(second) > 0
    if limit is not None:
      whole = tf.size(first) + tf.size(second) + tf.where(pair, 2, 1)
      with tf.control_dependencies(
        [tf.numpy_function(note, [whole], tf.int32)]
      ):
        first = tf.identity(first)
      room = tf.maximum(limit - tf.where(pair, 2, 1), 0)
      half = (room + 1) // 2
      keep = tf.maximum(half, room - tf.size(second))
      first = first[: tf.where(pair, keep, room)]
      second = second[: room - tf.minimum(tf.size(first), room)]
    joined = tf.cond(
      pair,
      lambda: tf.concat([first, eos, second, eos], 0),
      lambda: tf.concat([first, eos], 0),
    )
    rest = {k: v for k, v in row.items() if k not in ("first", "second")}
    return rest | {"inputs": joined}

  # One after the other: the counter is Python's.
  return shorten_text(dataset.map(join), sequence_length)


def split_tagged(
  dataset: tf.data.Dataset, output_features, sequence_length=None
) -> tf.data.Dataset:
  """Cuts a sentence that is too long into rows, so that no tag is lost."""
  eos = tf.constant([output_features["inputs"].vocabulary.eos_id], tf.int32)
  ignored = tf.constant([IGNORED], tf.int32)
  limit = _length(sequence_length)

  def split(row):
    pieces, tags = row["inputs"], row["targets"]
    room = tf.size(pieces) if limit is None else limit - 1
    starts = tf.range(0, tf.size(pieces), tf.maximum(room, 1))

    def part(start):
      return row | {
        "inputs": tf.concat([pieces[start : start + room], eos], 0),
        "targets": tf.concat([tags[start : start + room], ignored], 0),
      }

    return tf.data.Dataset.from_tensor_slices(starts).map(part)

  return dataset.flat_map(split)


def split_context(
  dataset: tf.data.Dataset, output_features, sequence_length=None, *, stride
) -> tf.data.Dataset:
  """`question </s> context </s>` in windows that overlap by `stride` tokens.

  Each window carries `begin` and `end`, the characters of the context that a
  token stands for, and `answerable`. `targets` are the first and last token of
  the answer; both 0 (a token that cannot be an answer) where it is not, or not
  wholly, in the window. A question may take half the length.
  """
  eos = tf.constant([output_features["inputs"].vocabulary.eos_id], tf.int32)
  limit = _length(sequence_length)

  def split(row):
    question, context = row["question_ids"], row["context_ids"]
    size = tf.size(context)
    if limit is None:
      room = tf.maximum(size, 1)
    else:
      question = question[: max(limit // 2 - 1, 0)]
      room = tf.maximum(limit - 2 - tf.size(question), 1)
    step = tf.maximum(room - stride, 1)
    # The last window is the first that reaches the end.
    windows = 1 + tf.maximum(0, -(-(size - room) // step))
    before = tf.size(question) + 1
    first, last = row["answer"][0], row["answer"][1]

    def part(start):
      ids = context[start : start + room]
      span = tf.stack([first, last]) - start
      inside = (first >= start) & (last < start + tf.size(ids))
      zeros = tf.zeros_like(question)
      around = lambda x: tf.concat([zeros, [0], x, [0]], 0)
      rest = {
        k: v
        for k, v in row.items()
        if k not in ("question_ids", "context_ids", "answer")
      }
      return rest | {
        "inputs": tf.concat([question, eos, ids, eos], 0),
        "targets": tf.where(inside, span + before, 0),
        "answerable": around(tf.ones_like(ids)),
        "begin": around(row["begin"][start : start + room]),
        "end": around(row["end"][start : start + room]),
      }

    return tf.data.Dataset.range(
      0, tf.cast(windows * step, tf.int64), tf.cast(step, tf.int64)
    ).map(lambda start: part(tf.cast(start, tf.int32)))

  return dataset.flat_map(split)


def encode_with_offsets(
  vocabulary: seqio.Vocabulary, text: str
) -> tuple[list[int], list[int], list[int]]:
  """(ids, first character, one past the last) of a text's tokens.

  White space that a piece brings along is not counted.
  """
  if isinstance(vocabulary, seqio.ByteVocabulary):
    ids = vocabulary.encode(text)
    spans = [(i, i + 1) for i, c in enumerate(text) for _ in c.encode("utf-8")]
  else:
    processor = vocabulary.tokenizer
    if hasattr(processor, "encode_as_offset_mapping"):
      found = processor.encode_as_offset_mapping(text)
      ids, spans = found["ids"], found["offsets"]
    else:  # sentencepiece before 0.2.2
      pieces = processor.encode(text, out_type="immutable_proto").pieces
      ids = [piece.id for piece in pieces]
      spans = [(piece.begin, piece.end) for piece in pieces]
  begins, ends = [], []
  for begin, end in spans:
    while begin < end and text[begin].isspace():
      begin += 1
    begins.append(begin)
    ends.append(end)
  return list(ids), begins, ends
