"""What a task keeps of a row, whole, and what a length takes of it.

A row is prepared once (tokens, no length) and cut as often as it is read. The
same functions serve the store (reading/store.py), the commands and SeqIO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import itertools
from typing import Any

import numpy as np
import seqio

from fat5_jax.data.denoising import Denoiser, Objective
from fat5_jax.data.features import IGNORED
from fat5_jax.errors import UserError

Example = dict[str, Any]
Features = Mapping[str, seqio.Feature]
Limits = Mapping[str, int] | None
# What T5 pre-trains with.
EXAMPLE_LENGTHS = {"inputs": 512, "targets": 114}


def encode_all(
  vocabulary: seqio.Vocabulary, texts: Sequence[str]
) -> list[list[int]]:
  """The token ids of texts, as `vocabulary.encode` gives them one by one."""
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return [list(vocabulary.encode(text)) for text in texts]
  found = vocabulary.tokenizer.encode(list(texts))
  # SeqIO has no id beyond the vocabulary.
  size, unknown = vocabulary.vocab_size, vocabulary.unk_id
  return [
    ids
    if max(ids, default=0) < size
    else [i if i < size else unknown for i in ids]
    for ids in found
  ]


def _ids(*parts: Sequence[int]) -> np.ndarray:
  return np.concatenate([np.asarray(part, np.int32) for part in parts])


class Text:
  """Inputs and targets: what is too long loses its end, never its `</s>`."""

  is_windowed = False
  removed = ()

  def prepare(
    self, rows: Sequence[Example], features: Features, limits: Limits
  ) -> Iterator[Example]:
    del limits
    sides = [name for name in ("inputs", "targets") if name in rows[0]]
    ids = {}
    for name in sides:
      vocabulary = features[name].vocabulary
      end = [vocabulary.eos_id] if features[name].add_eos else []
      texts = [row[name] for row in rows]
      ids[name] = [_ids(x, end) for x in encode_all(vocabulary, texts)]
    for number, row in enumerate(rows):
      text = {f"{name}_pretokenized": row[name] for name in sides}
      yield row | text | {name: ids[name][number] for name in sides}

  def cut(self, example: Example, limits: Limits) -> Example:
    found = {}
    for name in ("inputs", "targets"):
      limit = (limits or {}).get(name)
      tokens = example.get(name)
      if limit is not None and tokens is not None and len(tokens) > limit:
        found[name] = _ids(tokens[: limit - 1], tokens[-1:])
    return example | found


class Corpus:
  """Texts without an answer, whole as `inputs`; very long ones in pieces.

  What is asked about them is drawn as they are read.

  Attributes:
    denoisers: of data.denoising.
    piece_length: tokens of the longest piece.
    join: whether rows that come after each other are one text.
    text_length: see denoising.Objective.
  """

  is_windowed = False
  removed = ()

  def __init__(
    self,
    denoisers: Sequence[Denoiser],
    piece_length: int,
    join: bool,
    text_length: int | None,
  ):
    self.denoisers, self.piece_length = tuple(denoisers), piece_length
    self.join, self.text_length = join, text_length

  def prepare(
    self, rows: Sequence[Example], features: Features, limits: Limits
  ) -> Iterator[Example]:
    del limits
    vocabulary = features["inputs"].vocabulary
    texts = encode_all(vocabulary, [row["inputs"] for row in rows])
    if self.join:
      texts = [list(itertools.chain.from_iterable(texts))]
    for ids in texts:
      for begin in range(0, len(ids), self.piece_length):
        yield {"inputs": _ids(ids[begin : begin + self.piece_length])}

  def cut(self, example: Example, limits: Limits) -> Example:
    del limits
    return example

  def objective(self, features: Features, limits: Limits) -> Objective:
    """What is asked about the texts, where both sides have these lengths.

    Raises:
      UserError: for lengths that no denoiser takes, and pieces that are
        shorter than it wants.
    """
    missing = {"inputs", "targets"} - set(limits or ())
    if missing:
      raise UserError(
        "pre-training needs TASK_FEATURE_LENGTHS of inputs and targets, for"
        f" example {EXAMPLE_LENGTHS}"
      )
    found = Objective(
      self.denoisers, features["inputs"].vocabulary, limits, self.text_length
    )
    if found.longest.max() > self.piece_length:
      raise UserError(
        f"texts of {found.longest.max():,} tokens fit TASK_FEATURE_LENGTHS, and"
        f" long ones are prepared in pieces of {self.piece_length:,}: set"
        " piece_length of the task"
      )
    return found


class Pair:
  """`inputs` from `first` and `second`, as `A </s>` or `A </s> B </s>`.

  What is too long loses the end of its longer text, never its `</s>`.
  """

  is_windowed = False
  removed = ("first", "second")

  def prepare(
    self, rows: Sequence[Example], features: Features, limits: Limits
  ) -> Iterator[Example]:
    del limits
    end = [features["inputs"].vocabulary.eos_id]
    dtype = features["targets"].dtype.as_numpy_dtype
    for row in rows:
      rest = {k: v for k, v in row.items() if k not in self.removed}
      first, second = row["first"], row["second"]
      inputs = _ids(first, end)
      if len(second):
        inputs = _ids(inputs, second, end)
      targets = np.asarray(row["targets"], dtype)
      yield rest | {
        "inputs": inputs,
        "targets": targets,
        "first_size": len(first),
      }

  def cut(self, example: Example, limits: Limits) -> Example:
    inputs, size = example["inputs"], int(example["first_size"])
    limit = (limits or {}).get("inputs")
    if limit is None or len(inputs) <= limit:
      return example
    end = inputs[-1:]
    first, second = inputs[:size], inputs[size + 1 : -1]
    if len(inputs) == size + 1:
      return example | {"inputs": _ids(first[: max(limit - 1, 0)], end)}
    room = max(limit - 2, 0)
    keep = max((room + 1) // 2, room - len(second))
    first = first[:keep]
    second = second[: room - min(len(first), room)]
    return example | {"inputs": _ids(first, end, second, end)[:limit]}


class Tags:
  """A tag a token; a sentence that is too long comes in several rows."""

  is_windowed = True
  removed = ()

  def prepare(
    self, rows: Sequence[Example], features: Features, limits: Limits
  ) -> Iterator[Example]:
    end = [features["inputs"].vocabulary.eos_id]
    limit = (limits or {}).get("inputs")
    for row in rows:
      pieces, tags = row["inputs"], row["targets"]
      room = max(len(pieces) if limit is None else limit - 1, 1)
      for start in range(0, len(pieces), room):
        part = slice(start, start + room)
        yield row | {
          "inputs": _ids(pieces[part], end),
          "targets": _ids(tags[part], [IGNORED]),
        }

  def cut(self, example: Example, limits: Limits) -> Example:
    del limits
    return example


class Spans:
  """`question </s> context </s>` in windows that overlap by `stride` tokens.

  Each window carries `begin` and `end`, the characters of the context that a
  token stands for, and `answerable`. `targets` are the first and last token of
  the answer; both 0 (a token that cannot be an answer) where it is not, or not
  wholly, in the window. A question may take half the length.
  """

  is_windowed = True
  removed = ("question_ids", "context_ids", "answer")

  def __init__(self, stride: int):
    self.stride = stride

  def prepare(
    self, rows: Sequence[Example], features: Features, limits: Limits
  ) -> Iterator[Example]:
    end = [features["inputs"].vocabulary.eos_id]
    limit = (limits or {}).get("inputs")
    for row in rows:
      question, context = row["question_ids"], row["context_ids"]
      first, last = row["answer"]
      if limit is None:
        room = max(len(context), 1)
      else:
        question = question[: max(limit // 2 - 1, 0)]
        room = max(limit - 2 - len(question), 1)
      step = max(room - self.stride, 1)
      # The last window is the first that reaches the end.
      windows = 1 + max(0, -(-(len(context) - room) // step))
      rest = {k: v for k, v in row.items() if k not in self.removed}
      before, zeros = len(question) + 1, [0] * (len(question) + 1)
      for start in range(0, windows * step, step):
        ids = context[start : start + room]
        inside = first >= start and last < start + len(ids)
        around = lambda values: _ids(zeros, values, [0])  # noqa: B023
        yield rest | {
          "inputs": _ids(question, end, ids, end),
          "targets": _ids(
            [first - start + before, last - start + before]
            if inside
            else [0, 0]
          ),
          "answerable": around([1] * len(ids)),
          "begin": around(row["begin"][start : start + room]),
          "end": around(row["end"][start : start + room]),
        }

  def cut(self, example: Example, limits: Limits) -> Example:
    del limits
    return example
