"""The eight SuperGLUE tasks: where their rows are, and T5's texts of them.

Official layout (`BoolQ/train.jsonl`, `val.jsonl`, `test.jsonl`) or HF's
`aps/super_glue`. Texts are those of T5's own code (T5 paper, appendix D; the
data set's version 1.0.2, where a row of WiC has no part of speech).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import os
import re
from typing import Any

import tensorflow as tf

from fat5_jax import fetched
from fat5_jax.data import preprocessors, sources
from fat5_jax.data.files import Unread
from fat5_jax.data.sources import Row, RowFn, column, shown
from fat5_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class SuperGlue:
  """One SuperGLUE task: official folder, HF config, columns, labels.

  Attributes:
    folder: of the official layout.
    features: columns, in the order of T5's text.
    label_names: T5's words for them; empty where an answer is text.
    metrics: of the text, and of the classes.
    head_inputs: templates of a classifier; empty where it is none.
    group: column of the rows that count together.
  """

  folder: str
  features: Sequence[str]
  label_names: Sequence[str] = ()
  metrics: Sequence[str] = ("accuracy",)
  head_inputs: Sequence[str] = ()
  group: str | None = None
  config: str = ""


_TRUTH = ("False", "True")
SUPER_GLUE = {
  "boolq": SuperGlue(
    "BoolQ",
    ("passage", "question"),
    _TRUTH,
    head_inputs=("{question}", "{passage}"),
  ),
  "cb": SuperGlue(
    "CB",
    ("hypothesis", "premise"),
    ("entailment", "contradiction", "neutral"),
    ("mean_3class_f1", "accuracy"),
    ("{premise}", "{hypothesis}"),
  ),
  "copa": SuperGlue(
    "COPA",
    ("choice1", "choice2", "premise", "question"),
    ("choice1", "choice2"),
    head_inputs=(
      "{question}: {premise}",
      "choice1: {choice1} choice2: {choice2}",
    ),
  ),
  "multirc": SuperGlue(
    "MultiRC",
    ("question", "answer", "paragraph"),
    _TRUTH,
    ("multirc",),
    ("{question} {answer}", "{paragraph}"),
    group="group",
  ),
  "record": SuperGlue(
    "ReCoRD", ("query", "entities", "passage"), metrics=("squad",)
  ),
  "rte": SuperGlue(
    "RTE",
    ("hypothesis", "premise"),
    ("entailment", "not_entailment"),
    head_inputs=("{premise}", "{hypothesis}"),
  ),
  "wic": SuperGlue(
    "WiC",
    ("sentence1", "sentence2", "word"),
    _TRUTH,
    head_inputs=("{word}: {sentence1}", "{sentence2}"),
  ),
  "wsc": SuperGlue(
    "WSC",
    ("text", "span1_text", "span2_text", "span2_index"),
    _TRUTH,
    head_inputs=("{marked}", "{span1_text}"),
    config="wsc.fixed",
  ),
}


def find(name: str) -> SuperGlue:
  """The description of a task.

  Raises:
    UserError: for an unknown name.
  """
  if name not in SUPER_GLUE:
    raise UserError(
      f"unknown SuperGLUE task {name!r}.{nearest(name, SUPER_GLUE)} Known:"
      f" {', '.join(SUPER_GLUE)}"
    )
  return SUPER_GLUE[name]


# ---- Rows --------------------------------------------------------------------

_FILES = {
  "train": "train.jsonl",
  "validation": "val.jsonl",
  "test": "test.jsonl",
}


def source(name: str, data_dir: str | None, only: Sequence[str] = ()) -> Any:
  """The rows of a task: official files of a folder, or (None) HF's data set.

  Args:
    name: of the task.
    data_dir: folder with the official layout.
    only: the splits that are wanted; () is all.

  Raises:
    UserError: if no file is there.
  """
  task = find(name)
  wanted = {s: f for s, f in _FILES.items() if not only or s in only}
  if data_dir is None:
    return sources.HuggingFace(
      "aps/super_glue", task.config or name, {s: s for s in wanted}
    )
  folder = fetched.local(os.path.join(data_dir, task.folder))
  paths = {s: os.path.join(folder, file) for s, file in wanted.items()}
  found = {s: path for s, path in paths.items() if os.path.exists(path)}
  if not found:
    raise UserError(
      f"{folder}: none of the data files {', '.join(wanted.values())} is there"
    )
  return sources.Files(found)


class Examples:
  """A source of SuperGLUE's rows as one row an example.

  The official files hold a passage with all its questions and their answers in
  a row. Training has an example for each right answer of ReCoRD, other splits
  one a question.

  Attributes:
    splits: those of the source.
  """

  def __init__(self, name: str, source: Any, right_only: bool = False):
    """`right_only` leaves out WSC's rows whose noun is not the pronoun's."""
    self._name, self._source, self._right_only = name, source, right_only
    self.splits = source.splits

  def rows(self, split: str) -> Iterator[sources.LocatedRow]:
    for where, row in self._source.rows(split):
      if isinstance(row, Unread):
        yield where, row
        continue
      try:
        for example in _examples(self._name, row, split):
          if not self._right_only or _is_right(example):
            yield where, example
      except (KeyError, TypeError, IndexError) as e:
        what = f"no key {e}" if isinstance(e, KeyError) else str(e)
        raise UserError(
          f"{where}: not a row of SuperGLUE's {self._name}: {what}"
        ) from None
      except UserError as e:
        raise UserError(f"{where}: {e}") from None

  def num_rows(self, split: str) -> int:
    if self._name in ("multirc", "record") or self._right_only:
      return sum(1 for _ in self.rows(split))
    return self._source.num_rows(split)

  def record(self) -> dict[str, Any]:
    how = {"task": self._name, "right_only": self._right_only}
    return self._source.record() | {"examples": how}

  def describe(self, split: str) -> str:
    return self._source.describe(split)

  def size_bytes(self, split: str) -> int:
    return self._source.size_bytes(split)


def _examples(name: str, row: Row, split: str) -> Iterator[Row]:
  """The examples of a row of the official files, or of HF's and TFDS's."""
  if name == "multirc":
    yield from _multirc_examples(row)
  elif name == "record":
    for example in _record_questions(row):
      answers = example["answers"] if split == "train" else []
      for answer in answers or [None]:
        yield example | {"answer": answer}
  elif name == "wsc":
    yield _wsc_fixed({"label": -1} | row | row.get("target", {}))
  else:
    yield {"label": -1} | row


def _multirc_examples(row: Row) -> Iterator[Row]:
  if "passage" not in row:
    group = f"{column(row, 'idx.paragraph')}-{column(row, 'idx.question')}"
    yield {"label": -1, "group": group} | row
    return
  for question in row["passage"]["questions"]:
    for answer in question["answers"]:
      yield {
        "paragraph": row["passage"]["text"],
        "question": question["question"],
        "answer": answer["text"],
        "label": answer.get("label", -1),
        "group": f"{row['idx']}-{question['idx']}",
      }


def _record_questions(row: Row) -> Iterator[Row]:
  """Rows with query, entities, passage and answers, both each once, sorted."""
  if "qas" not in row:
    entities = sorted(set(_texts(row, "entities")))
    answers = sorted(set(_texts(row, "answers"))) if "answers" in row else []
    yield row | {"entities": entities, "answers": answers}
    return
  text = row["passage"]["text"]
  spans = row["passage"]["entities"]
  # The end is inside of an entity.
  entities = sorted({text[span["start"] : span["end"] + 1] for span in spans})
  for question in row["qas"]:
    yield {
      "passage": text,
      "query": question["query"],
      "entities": entities,
      "answers": sorted({a["text"] for a in question.get("answers", [])}),
    }


def _texts(row: Row, name: str) -> list[str]:
  found = column(row, name)
  if isinstance(found, (str, bytes)) or not hasattr(found, "__iter__"):
    raise UserError(
      f"column {name!r} holds {shown(found)}, not a list of texts"
    )
  return [str(text) for text in found]


# Their words are apart in the text, so no span is theirs.
_SPLIT_SPANS = ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin")


def _wsc_fixed(row: Row) -> Row:
  """A row of WSC whose spans are parts of its text (TFDS's `wsc.fixed`)."""
  row = {key: value for key, value in row.items() if key != "target"}
  for span in ("span1", "span2"):
    text = preprocessors.text_of(row, f"{span}_text")
    whole = preprocessors.text_of(row, "text")
    if text in whole or text in _SPLIT_SPANS or not text:
      continue
    if "theyscold" in text:
      row["span2_index"] = 10
    first = whole.split()[row[f"{span}_index"]][0]
    head = text[0].lower() if first.islower() else text[0].upper()
    text = (head + text[1:]).rstrip(".").replace("\n", " ")
    if text not in whole:
      raise UserError(f"{span}_text {shown(text)} is not in its text")
    row[f"{span}_text"] = text
  return row


def _is_right(row: Row) -> bool:
  return str(column(row, "label")) in ("True", "1")


# ---- Texts -------------------------------------------------------------------


def row_fn(name: str) -> RowFn:
  """T5's text of a task's example, and what its metric needs besides."""
  task = find(name)
  if name == "record":
    return _record
  if name == "wsc":
    return _wsc
  glue = preprocessors.glue(name, task.features, task.label_names, True)
  if name != "multirc":
    return glue

  def multirc(row: Row) -> Row:
    found = glue(row)
    text = found["inputs"].replace("<br>", " ")
    # A row that somebody asks about is in no group.
    group = str(row.get("group", ""))
    return found | {"inputs": re.sub("</?b>", "", text), "group": group}

  return multirc


def _record(row: Row) -> Row:
  # Bullet points below an article become sentences of it.
  passage = preprocessors.text_of(row, "passage")
  passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", passage)
  passage = passage.replace("\n@highlight\n", ". ")
  answers = _texts(row, "answers")
  target = row.get("answer") or next(iter(answers), "<unk>")
  return {
    "inputs": (
      f"record query: {preprocessors.text_of(row, 'query')} entities:"
      f" {', '.join(_texts(row, 'entities'))} passage: {passage}"
    ),
    "targets": target,
    "answers": answers or [target],
  }


def marked_pronoun(row: Row) -> str:
  """WSC's text with its pronoun between asterisks.

  Raises:
    UserError: if it is not in the text.
  """
  text = preprocessors.text_of(row, "text")
  pronoun = preprocessors.text_of(row, "span2_text")
  at = int(preprocessors.number_of(column(row, "span2_index"), "span2_index"))
  words = text.split(" ")
  if not 0 <= at < len(words):
    raise UserError(f"span2_index {at} is outside of {len(words)} words")
  before, after = " ".join(words[:at]), " ".join(words[at + 1 :])
  if words[at] == pronoun:
    return f"{before} *{pronoun}* {after}"
  # The index of a few rows is beside it, or punctuation follows: the nearest.
  begin = len(before) + 1
  found = re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text)
  place = min(found, key=lambda m: abs(m.start() - begin), default=None)
  if place is None:
    raise UserError(f"span2_text {shown(pronoun)} is not in its text")
  head, tail = text[: place.start()].rstrip(), text[place.end() :].strip()
  return f"{head} *{pronoun}* {tail}"


def _wsc(row: Row) -> Row:
  label = column(row, "label")
  if str(label) not in ("True", "False", "0", "1", "-1"):
    raise UserError(f"label {shown(label)} is neither true nor false")
  number = {"True": 1, "False": 0}.get(str(label))
  return {
    "inputs": f"wsc: {marked_pronoun(row)}",
    "targets": preprocessors.text_of(row, "span1_text"),
    "label": int(label) if number is None else number,
  }


def text_task(name: str, data_dir: str | None, given: Any) -> dict[str, Any]:
  """What tasks.super_glue registers, but for its vocabulary; see there."""
  part = name.removeprefix("wsc_") if name.startswith("wsc_") else ""
  name = "wsc" if part in ("train", "eval") else name
  if name == "wsc" and not part:
    raise UserError("SuperGLUE's wsc is two tasks: wsc_train and wsc_eval")
  task = find(name)
  full, only, metrics = f"super_glue_{name}_v102", (), task.metrics
  if part:
    full += f"_simple_{part}"
    only = ("train",) if part == "train" else ("validation", "test")
    metrics = () if part == "train" else metrics
  given = source(name, data_dir, only) if given is None else given
  text = tf.TensorSpec([], tf.string)
  blank = {"answers": []} if name == "record" else {"label": -1}
  # WSC's noun is what is asked for.
  unknown = {"span1_text": "?"} if name == "wsc" else {}
  compared = {
    "multirc": to_group,
    "record": preprocessors.all_answers,
    "wsc": same_referent,
  }
  return {
    "name": full,
    "source": Examples(name, given, right_only=part == "train"),
    "row_fn": row_fn(name),
    "columns": [key for key in task.features if key not in unknown],
    "unanswered": lambda row: unknown | row | blank,
    "postprocess": compared.get(name)
    or preprocessors.label_to_class(tuple(task.label_names)),
    "metrics": metrics,
    "extra_features": {
      "multirc": {"group": text},
      "record": {"answers": tf.TensorSpec([None], tf.string)},
      "wsc": {"label": tf.TensorSpec([], tf.int32)},
    }.get(name),
  }


# ---- What metrics compare ----------------------------------------------------


def _as_text(value: str | bytes) -> str:
  return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def to_group(text: str, example=None, is_target: bool = False, **unused):
  """MultiRC's answer, True or False, and of a target its question."""
  value = preprocessors.label_to_class(_TRUTH)(text)
  if not is_target:
    return {"value": value}
  return {"value": value, "group": _as_text(example["group"])}


_DETERMINERS = frozenset(
  "a an few her his each every many much my our some that the their these this"
  " those which whose your".split()
)


def _bare(text: str) -> str:
  """Text without determiners, in lower case."""
  words = text.strip().lower().split(" ")
  return " ".join(word for word in words if word not in _DETERMINERS)


def same_referent(text: str, example=None, is_target: bool = False, **unused):
  """Whether a prediction names WSC's noun; of a target, whether it should.

  One may leave out words of the other, but no possessive ("Bob", "Bob's hat").
  No answer is neither: -1, which is right for no label.
  """
  if is_target:
    return int(example["label"])
  noun = _bare(_as_text(example["targets_pretokenized"]))
  answer = _bare(text)
  if not answer:
    return -1
  if ("'" in answer) != ("'" in noun):
    return 0
  answers, nouns = set(answer.split(" ")), set(noun.split(" "))
  return int(answers <= nouns or nouns <= answers)
