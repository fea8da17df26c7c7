"""Sentences of tagged words: CoNLL, CoNLL-U, IOB2; in, and predictions out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import os
from typing import Any

from fat5_jax.data import sources
from fat5_jax.errors import UserError


def read(
  path: str, word_column: int | None = None, tag_column: int | None = None
) -> Iterator[sources.LocatedRow]:
  """(place, {"words": [...], "tags": [...]}) of every sentence of a file.

  A word a line, columns apart by tabs or, where there are none, spaces; an
  empty line ends a sentence; `# ` begins a comment, `-DOCSTART-` a document.
  Multi-word ranges (`1-2`) and empty nodes (`1.1`) of CoNLL-U are left out.

  Args:
    path: a file, also .gz .xz .bz2.
    word_column: counted from 0; None is 1 where the first column counts the
      words, else 0.
    tag_column: None is 3 (UPOS) in CoNLL-U, 2 where the first column counts the
      words, else the last.

  Raises:
    UserError: naming file and row, for a line with too few columns, or other
      ones than the line before.
  """
  _, opener = sources.split_suffix(path)
  words: list[str] = []
  tags: list[str] = []
  begin = width = 1
  # Whether tabs part the columns; None until the first word.
  tabs: bool | None = None
  for number, line in sources.read_lines(path, opener):
    if not line.strip():
      if words:
        yield f"{path}, row {begin}", {"words": words, "tags": tags}
        words, tags = [], []
      continue
    if line.startswith("-DOCSTART-") or _is_comment(line, tabs):
      continue
    before, tabs = tabs, "\t" in line
    columns = line.split("\t") if tabs else line.split()
    counted = columns[0].replace("-", "").replace(".", "").isdigit()
    counted = counted and len(columns) > 2
    if counted and not columns[0].isdigit():
      continue
    word_at = int(counted) if word_column is None else word_column
    tag_at = tag_column
    if tag_at is None:
      tag_at = len(columns) - 1
      if counted:
        tag_at = 3 if len(columns) == 10 else 2
    if max(word_at, tag_at) >= len(columns) or len(columns) < 2:
      raise UserError(
        f"{path}, row {number}: {len(columns)} columns; words are in column"
        f" {word_at}, tags in column {tag_at} (counted from 0)"
      )
    if before not in (None, tabs):
      raise UserError(
        f"{path}, row {number}: columns are apart by"
        f" {'tabs' if tabs else 'spaces'}, before by"
        f" {'tabs' if before else 'spaces'}"
      )
    if not words:
      begin, width = number, len(columns)
    if len(columns) != width:
      raise UserError(
        f"{path}, row {number}: {len(columns)} columns, and {width} in the line"
        " before"
      )
    for what, at in (("word", word_at), ("tag", tag_at)):
      if not columns[at].strip():
        raise UserError(f"{path}, row {number}: the {what} is empty")
    words.append(columns[word_at])
    tags.append(columns[tag_at])
  if words:
    yield f"{path}, row {begin}", {"words": words, "tags": tags}


def _is_comment(line: str, tabs: bool | None) -> bool:
  """`# sent_id = 1`; not the word `#` and its tag."""
  if not line.startswith("# "):
    return False
  return " = " in line or ("\t" not in line and tabs is not False)


class Conll:
  """Local files of tagged sentences, one or more glob patterns a split.

  Attributes:
    splits: split name to files.
  """

  def __init__(
    self,
    splits: Mapping[str, str | Sequence[str]],
    word_column: int | None = None,
    tag_column: int | None = None,
  ):
    self.splits = sources.split_files(splits)
    self._columns = (word_column, tag_column)
    for name, column in zip(("word_column", "tag_column"), self._columns):
      if column is not None and not isinstance(column, int):
        raise UserError(f"Conll: {name} = {column!r} must be a number or None")

  def rows(self, split: str) -> Iterator[sources.LocatedRow]:
    for path in self.splits[split]:
      yield from read(path, *self._columns)

  def num_rows(self, split: str) -> int:
    count = lambda path: sum(1 for _ in read(path, *self._columns))
    return sources.count_files(self.splits[split], self._columns, count)

  def record(self) -> dict[str, Any]:
    word_column, tag_column = self._columns
    return sources.files_record(
      self, self.splits, word_column=word_column, tag_column=tag_column
    )

  def describe(self, split: str) -> str:
    return ", ".join(self.splits[split])

  def size_bytes(self, split: str) -> int:
    return sum(os.path.getsize(path) for path in self.splits[split])


def write(
  sentences: Iterable[tuple[Sequence[str], Sequence[str]]],
) -> Iterator[str]:
  """Lines `word<tab>tag` of (words, tags), an empty one after each sentence."""
  for words, tags in sentences:
    for word, tag in zip(words, tags, strict=True):
      yield f"{word}\t{tag}\n"
    yield "\n"
