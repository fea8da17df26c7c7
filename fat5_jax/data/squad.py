"""SQuAD's files: the official layout in, predictions out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import os
from typing import Any

from fat5_jax import fetched
from fat5_jax.data import folders, formats, sources
from fat5_jax.errors import UserError


class SquadFiles:
  """Local files of questions, one or more glob patterns a split.

  `.json` (also compressed) is the official layout of SQuAD 1.1 and 2.0, every
  other file has a question a row: id, question, context, answers.

  Attributes:
    splits: split name to files.
  """

  def __init__(self, splits: Mapping[str, str | Sequence[str]]):
    self.splits = sources.split_files(splits)

  def rows(self, split: str) -> Iterator[sources.LocatedRow]:
    for path in self.splits[split]:
      yield from self._read(path)

  def _read(self, path: str) -> Iterator[sources.LocatedRow]:
    is_official = sources.split_suffix(path)[0] == ".json"
    return read(path) if is_official else sources.read_file(path)

  def num_rows(self, split: str) -> int:
    count = lambda path: sum(1 for _ in self._read(path))
    return sources.count_files(self.splits[split], "questions", count)

  def record(self) -> dict[str, Any]:
    return sources.files_record(self, self.splits)

  def describe(self, split: str) -> str:
    return ", ".join(self.splits[split])

  def size_bytes(self, split: str) -> int:
    return sum(os.path.getsize(path) for path in self.splits[split])


def read(path: str) -> Iterator[sources.LocatedRow]:
  """(place, row) of every question of an official SQuAD file.

  Raises:
    UserError: if the file is not of that layout.
  """
  found = formats.read_json(path)
  place = path
  try:
    for article in _list(found, "data"):
      for paragraph in _list(article, "paragraphs"):
        for qa in _list(paragraph, "qas"):
          place = f"{path}, question {sources.shown(qa['id'])}"
          answers = _list(qa, "answers")
          row = {
            "id": qa["id"],
            "question": qa["question"],
            "context": paragraph["context"],
            "answers": {
              "text": [answer["text"] for answer in answers],
              "answer_start": [answer["answer_start"] for answer in answers],
            },
          }
          yield f"{path}, question {sources.listed([qa['id']])}", row
  except (KeyError, TypeError, UserError) as e:
    reason = str(e)
    if isinstance(e, KeyError):
      reason = f"no key {e}"
    elif isinstance(e, TypeError):
      reason = "a value where an object with keys belongs"
    raise UserError(f"{place}: not an official SQuAD file: {reason}") from None


def _list(value: Any, key: str) -> list[Any]:
  """The list that an object has under a key."""
  found = value[key]
  if not isinstance(found, list):
    raise UserError(f"{key!r} is {sources.shown(found)}, no list")
  return found


def source(data_dir: str | None) -> Any:
  """SQuAD 1.1: `train-v1.1.json` and `dev-v1.1.json` in a folder, files of a
  question a row named after their split, or (None) HF's `squad`.
  """
  data_dir = data_dir and fetched.local(data_dir)
  official = {
    split: os.path.join(data_dir or "", f"{stem}-v1.1.json")
    for split, stem in (("train", "train"), ("validation", "dev"))
  }
  found = {s: path for s, path in official.items() if os.path.exists(path)}
  if data_dir and found:
    return SquadFiles(found)
  return folders.named_splits(data_dir, "rajpurkar/squad", None)
