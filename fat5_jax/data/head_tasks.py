"""Tasks of heads: classes, numbers, tags and spans instead of target text.

Like tasks.py: bind a factory from gin, or use a name of BUILTIN_TASKS. Text is
tokenised here, in Python, because labels must be aligned with its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax.data import (
  features,
  labels,
  layouts,
  mixtures,
  preprocessors,
  records,
  seqio_source,
  sources,
)
from fat5_jax.data import glue as glue_lib
from fat5_jax.data import metrics as metrics_lib
from fat5_jax.data import squad as squad_lib
from fat5_jax.errors import UserError

_INTS = tf.TensorSpec([None], tf.int32)
_TEXT = tf.TensorSpec([], tf.string)
_TEXTS = tf.TensorSpec([None], tf.string)


def _register(
  name: str,
  source,
  row_fn: sources.RowFn,
  vocabulary: seqio.Vocabulary,
  signature: dict[str, tf.TensorSpec],
  added: dict[str, tf.TensorSpec],
  label: dict[str, Any],
  layout: Any,
  postprocess: Callable[..., Any],
  metrics: Sequence[str | Callable[..., Any]],
  skip_bad_rows: bool,
  columns: Sequence[str],
  unanswered: Callable[[sources.Row], sources.Row],
) -> seqio.Task:
  """Registers a head's task, in place of an earlier one of that name.

  `signature` is what the row function gives, `added` what the layout adds.
  `columns` and `unanswered`: see SeqioSource.
  """
  features.check_given(vocabulary, name)
  seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=seqio_source.SeqioSource(
      source, row_fn, signature, layout, skip_bad_rows, columns, unanswered
    ),
    preprocessors=[seqio_source.preprocessor(layout, added)],
    output_features=features.head_features(vocabulary, label),
    postprocess_fn=postprocess,
    metric_fns=metrics_lib.find(metrics, name),
  )


# ---- Sequences ---------------------------------------------------------------


@mixtures.weighted
@records.recorded
def classification(
  source,
  inputs: str | Sequence[str],
  label: str | Sequence[str],
  vocabulary: seqio.Vocabulary,
  label_names: Sequence[str] = (),
  problem_type: str = "single_label_classification",
  name: str = "classification",
  metrics: Sequence[str | Callable[..., Any]] | None = None,
  separator: str = ",",
  num_labels: int | None = None,
  skip_bad_rows: bool = False,
  rename: Callable[[sources.RowFn], sources.RowFn] | None = None,
  group: str | None = None,
) -> seqio.Task:
  """Labels, or numbers, of texts or pairs of texts.

  Args:
    source: see tasks.text_to_text.
    inputs: template with `{column}` fields, or two for a pair, which becomes
      `A </s> B </s>`.
    label: column of the label: a name, or its number; for multi-label names
      separated by `separator`, a list, or a column of 0 and 1 for each label;
      for regression a number, or a list. -1 (no label) and -100 count for
      nothing.
    vocabulary: SeqIO vocabulary.
    label_names: in the order of the outputs; () takes the data set's own names
      (HF's ClassLabel), else those found in the training split, sorted.
    problem_type: as in HeadConfig.
    name: under which it is registered.
    metrics: names of data.metrics; None is what suits the problem.
    separator: see `label`.
    num_labels: numbers a row, in regression; 1 by default.
    skip_bad_rows: leave out rows that would be an error.
    rename: wraps the row function, to give it other columns than the source's.
    group: column of what belongs together (MultiRC's answers of a question);
      metrics then compare {"value": ..., "group": ...}.

  Raises:
    UserError: for a setting that fits no problem.
  """
  templates = (inputs,) if isinstance(inputs, str) else tuple(inputs)
  if not 1 <= len(templates) <= 2:
    raise UserError(f"task {name!r}: inputs is one template, or a pair")
  asked = [field for t in templates for field in preprocessors.fields(t)]
  label_columns = () if isinstance(label, str) else tuple(label)
  if label_columns and problem_type == "single_label_classification":
    raise UserError(
      f"task {name!r}: a column a label is for multi-label (or regression)"
    )
  size = num_labels or len(label_columns) or 1
  if problem_type != "regression":
    label_names = label_names or label_columns
    if not label_names:
      label_names = labels.found_labels(
        source, label, problem_type, separator, name
      )
    size = len(label_names)
  read_label = preprocessors.label_reader(
    tuple(label_names), problem_type, size, separator
  )
  fill = [preprocessors.fill(template) for template in templates]

  def value_of(row):
    if not label_columns:
      return sources.column(row, label)
    values = [sources.column(row, column) for column in label_columns]
    if problem_type == "regression":
      return values
    return [i for i, on in enumerate(values) if _is_on(on, label_columns[i])]

  def unanswered(row):
    blank: Any = -1
    if problem_type == "multi_label_classification":
      blank = []
    elif problem_type == "regression":
      blank = [0] * size if size > 1 else 0
    if label_columns:
      return row | dict.fromkeys(label_columns, 0)
    return row | {label: blank}

  def format_row(row):
    texts = [f(row) for f in fill]
    ids = [vocabulary.encode(text) for text in texts]
    # A row that somebody asks about is in no group.
    more = {} if group is None else {"group": str(row.get(group, ""))}
    return more | {
      "inputs_pretokenized": " </s> ".join(texts),
      "first": ids[0],
      "second": ids[1] if len(ids) > 1 else [],
      "targets": read_label(value_of(row)),
    }

  dtype = tf.int32 if problem_type.startswith("single") else tf.float32
  return _register(
    name,
    source,
    format_row if rename is None else rename(format_row),
    vocabulary,
    {
      "inputs_pretokenized": _TEXT,
      "first": _INTS,
      "second": _INTS,
      "targets": tf.TensorSpec([None], dtype),
      **({} if group is None else {"group": _TEXT}),
    },
    {"inputs": _INTS},
    {
      "kind": "sequence_classification",
      "problem_type": problem_type,
      "size": size,
      "names": tuple(label_names),
    },
    layouts.Pair(),
    functools.partial(_sequence_value, problem_type, group is not None),
    _SEQUENCE_METRICS[problem_type] if metrics is None else metrics,
    skip_bad_rows,
    asked,
    unanswered,
  )


def _is_on(value: Any, column: str) -> bool:
  text = str(value).strip().lower()
  if text in ("1", "1.0", "true"):
    return True
  if text in ("0", "0.0", "false", ""):
    return False
  raise UserError(
    f"column {column!r}: {sources.shown(value)} is neither 0 nor 1"
  )


_SEQUENCE_METRICS = {
  "single_label_classification": ("accuracy",),
  "multi_label_classification": ("multilabel_f1",),
  "regression": ("pearson_corrcoef", "spearman_corrcoef"),
}


def _sequence_value(problem_type, grouped, values, example=None, **unused):
  """What metrics compare: a class, a number, or a list of 0 and 1."""
  if grouped:
    value = _sequence_value(problem_type, False, values)
    return {"value": value, "group": preprocessors.as_text(example["group"])}
  if problem_type == "multi_label_classification":
    return [int(value > 0.5) for value in values]
  if problem_type == "regression":
    numbers = [float(value) for value in values]
    return numbers[0] if len(numbers) == 1 else numbers
  return int(values[0])


@records.recorded
def glue(
  name: str,
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  source: Any = None,
) -> seqio.Task:
  """A GLUE task as classes (STS-B: numbers), `glue_sst2_classes`.

  Pairs are `A </s> B </s>`, as Hugging Face's classifiers read them.

  Args:
    name: see tasks.glue.
    vocabulary: SeqIO vocabulary.
    data_dir: folder with the official layout; None reads HF's `glue`.
    source: of rows, instead of both.
  """
  task = glue_lib.find(name)
  source, rename = glue_lib.source(name, data_dir, source)
  problem = "regression" if name == "stsb" else "single_label_classification"
  return classification(
    source,
    [f"{{{column}}}" for column in task.features],
    "label",
    vocabulary,
    task.label_names,
    problem,
    f"glue_{name}_classes",
    task.metrics,
    rename=rename,
  )


# What comes in windows, each of which carries the whole text.
_MOST_CHARACTERS = 1 << 21
_MOST_WORDS = 1 << 15


def _check_length(length: int, most: int, what: str) -> None:
  if length > most:
    raise UserError(
      f"{length:,} {what}, and at most {most:,} may be in a row: make several"
      " rows of it"
    )


# ---- Tags --------------------------------------------------------------------


@mixtures.weighted
@records.recorded
def tagging(
  source,
  vocabulary: seqio.Vocabulary,
  words: str = "words",
  tags: str = "tags",
  tag_names: Sequence[str] | None = None,
  name: str = "tagging",
  metrics: Sequence[str | Callable[..., Any]] | None = None,
  skip_bad_rows: bool = False,
) -> seqio.Task:
  """A tag a word; the first piece of a word has it, the others count not.

  Args:
    source: `conll.Conll`, or any source with two list columns.
    vocabulary: SeqIO vocabulary.
    words: column of the words.
    tags: column of their tags: names, or numbers of `tag_names`.
    tag_names: in the order of the outputs; None takes those of the training
      split, sorted, the outside tag first.
    name: under which it is registered.
    metrics: names of data.metrics; None is entity_f1 for B- and I- tags,
      tag_accuracy else.
    skip_bad_rows: leave out rows that would be an error.

  Raises:
    UserError: if the training split has no tags.
  """
  if tag_names is None:
    found = labels.found_tags(source, tags, name)
    tag_names = sorted(found, key=lambda tag: (tag != "O", tag))
  tag_names = tuple(tag_names)
  if not tag_names:
    raise UserError(f"task {name!r}: no tags in {source.describe('train')}")
  numbers = {tag: i for i, tag in enumerate(tag_names)}
  if metrics is None:
    is_entity = any(tag.startswith("B-") for tag in tag_names)
    metrics = ("entity_f1", "tag_accuracy") if is_entity else ("tag_accuracy",)
  counter = itertools.count()

  def words_of(row):
    found = labels.items(row, words)
    return [preprocessors.text_of({words: word}, words) for word in found]

  def number_of(tag, word):
    if isinstance(tag, str) and tag in numbers:
      return numbers[tag]
    if (
      isinstance(tag, (int, np.integer))
      and not isinstance(tag, bool)
      and (0 <= tag < len(tag_names) or tag == features.IGNORED)
    ):
      return int(tag)
    raise UserError(
      f"tag {sources.shown(tag)} of word {sources.shown(word)} is none of"
      f" {sources.listed(tag_names)}."
      " tagging.tag_names = (...) names all that may occur"
    )

  def format_row(row):
    row_words = words_of(row)
    row_tags = labels.items(row, tags)
    _check_length(len(row_words), _MOST_WORDS, f"words in column {words!r}")
    characters = f"characters in column {words!r}"
    _check_length(sum(map(len, row_words)), _MOST_CHARACTERS, characters)
    if len(row_words) != len(row_tags) or not row_words:
      raise UserError(f"{len(row_words)} words and {len(row_tags)} tags")
    pieces, targets = [], []
    for word, tag in zip(row_words, row_tags):
      number = number_of(tag, word)
      # A word that the vocabulary drops still has a tag to predict.
      ids = vocabulary.encode(word) or [vocabulary.unk_id]
      pieces += ids
      targets += [number] + [features.IGNORED] * (len(ids) - 1)
    return {
      "inputs": pieces,
      "targets": targets,
      "inputs_pretokenized": " ".join(row_words),
      "sentence": next(counter),
      "words": row_words,
    }

  return _register(
    name,
    source,
    format_row,
    vocabulary,
    {
      "inputs": _INTS,
      "targets": _INTS,
      "inputs_pretokenized": _TEXT,
      "sentence": tf.TensorSpec([], tf.int64),
      "words": _TEXTS,
    },
    {},
    {
      "kind": "token_classification",
      "size": len(tag_names),
      "names": tag_names,
    },
    layouts.Tags(),
    functools.partial(_tags, tag_names),
    metrics,
    skip_bad_rows,
    (words,),
    lambda row: row | {tags: [0] * len(words_of(row))},
  )


def _tags(tag_names, values, example=None, is_target=False, **unused):
  """The tags of a row's words."""
  targets = [int(label) for label in example["targets"]]
  return {
    "sentence": int(example["sentence"]),
    "tags": [
      tag_names[int(value)]
      for value, label in zip(values, targets)
      if label != features.IGNORED
    ],
  }


# ---- Spans -------------------------------------------------------------------


@mixtures.weighted
@records.recorded
def spans(
  source,
  vocabulary: seqio.Vocabulary,
  name: str = "spans",
  stride: int = 128,
  skip_bad_rows: bool = False,
) -> seqio.Task:
  """Questions whose answer is a span of their context.

  Args:
    source: rows with id, question, context, and `answers`: HF's and TFDS's
      {"text": [...], "answer_start": [...]}, or a list of texts, the first of
      which is looked for in the context.
    vocabulary: SeqIO vocabulary.
    name: under which it is registered.
    stride: tokens by which the windows of a long context overlap.
    skip_bad_rows: leave out rows that would be an error.
  """

  def format_row(row):
    context = preprocessors.text_of(row, "context")
    if not context.strip():
      raise UserError("column 'context' is empty")
    _check_length(len(context), _MOST_CHARACTERS, "characters of context")
    answer = preprocessors.first_answer(row, context)
    question = vocabulary.encode(preprocessors.text_of(row, "question").strip())
    ids, begin, end = features.encode_with_offsets(vocabulary, context)
    first = last = -1
    if answer is not None:
      inside = [
        i
        for i in range(len(ids))
        if end[i] > answer[0] and begin[i] < answer[1]
      ]
      if not inside:
        raise UserError("the answer covers no token of its context")
      first, last = inside[0], inside[-1]
    return {
      "id": preprocessors.text_of(row, "id"),
      "inputs_pretokenized": f"{row['question']} </s> {context}",
      "context": context,
      "answers": preprocessors.answer_texts(row),
      "question_ids": question,
      "context_ids": ids,
      "begin": begin,
      "end": end,
      "answer": [first, last],
    }

  numbers = itertools.count()
  signature = {"id": _TEXT, "inputs_pretokenized": _TEXT, "context": _TEXT}
  signature |= {"answers": _TEXTS, "answer": tf.TensorSpec([2], tf.int32)}
  for key in ("question_ids", "context_ids", "begin", "end"):
    signature[key] = _INTS
  return _register(
    name,
    source,
    format_row,
    vocabulary,
    signature,
    dict.fromkeys(("inputs", "targets", "answerable", "begin", "end"), _INTS),
    {"kind": "question_answering"},
    layouts.Spans(stride),
    _answer,
    ("span_squad",),
    skip_bad_rows,
    ("question", "context"),
    lambda row: {"id": f"{next(numbers)}", **row, "answers": []},
  )


def _answer(values, example=None, is_target=False, **unused):
  """A target's accepted answers, or a prediction's text and scores."""
  question = preprocessors.as_text(example["id"])
  if is_target:
    answers = [preprocessors.as_text(answer) for answer in example["answers"]]
    return {"id": question, "answers": answers}
  first, last, score = int(values[0]), int(values[1]), float(values[2])
  context = preprocessors.as_text(example["context"])
  text = context[int(example["begin"][first]) : int(example["end"][last])]
  found = {"id": question, "text": text.strip(), "score": score}
  # SQuAD 2.0's null score; a position and a score alone are a target's.
  return found | ({"no_answer": float(values[4])} if len(values) > 4 else {})


@records.recorded
def squad(
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  name: str = "squad_spans",
  stride: int = 128,
  source: Any = None,
) -> seqio.Task:
  """SQuAD 1.1 as spans; `data_dir` and `source` as in tasks.squad."""
  return spans(source or squad_lib.source(data_dir), vocabulary, name, stride)


BUILTIN_TASKS: dict[str, Callable[..., seqio.Task]] = {
  **{f"glue_{n}_classes": functools.partial(glue, n) for n in glue_lib.GLUE},
  "squad_spans": squad,
}
