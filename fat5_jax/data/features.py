"""From a task's features to a model's: text to text, or a head's labels.

A head's task has a `LabelFeature` as `targets`, and its labels decide which
head and which feature converter go with it.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import seqio
import tensorflow as tf

from fat5_jax.errors import UserError

# Labels that count for nothing; Hugging Face's number.
IGNORED = -100
# Kinds of labels whose long texts come in several rows, none of them cut.
WINDOWED = ("token_classification", "question_answering")


class Cuts:
  """Rows of a task that lose their end to a length, by feature."""

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
