"""Definite pronoun resolution (DPR), which T5 mixes into SuperGLUE.

It trains what SuperGLUE's WSC asks (T5 paper, section 2.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import os
import re
from typing import Any

from fat5_jax import fetched
from fat5_jax.data import preprocessors, sources
from fat5_jax.data.sources import Row, column, listed, shown
from fat5_jax.errors import UserError


class PronounFiles:
  """DPR's files: sentence, pronoun, two candidates and the right one, a line
  each, and an empty line (Rahman and Ng, 2012).

  Attributes:
    splits: split name to files.
  """

  def __init__(self, splits: Mapping[str, str | Sequence[str]]):
    self.splits = sources.split_files(splits)

  def rows(self, split: str) -> Iterator[sources.LocatedRow]:
    for path in self.splits[split]:
      yield from self._read(path)

  def _read(self, path: str) -> Iterator[sources.LocatedRow]:
    block: list[str] = []
    lines = sources.read_lines(path, sources.split_suffix(path)[1])
    number = 0
    for number, line in lines:
      if line.strip():
        block.append(line.strip())
      elif block:
        yield _row(path, number - len(block), block)
        block = []
    if block:
      yield _row(path, number - len(block) + 1, block)

  def num_rows(self, split: str) -> int:
    count = lambda path: sum(1 for _ in self._read(path))
    return sources.count_files(self.splits[split], "pronouns", count)

  def record(self) -> dict[str, Any]:
    return sources.files_record(self, self.splits)

  def describe(self, split: str) -> str:
    return ", ".join(self.splits[split])

  def size_bytes(self, split: str) -> int:
    return sum(os.path.getsize(path) for path in self.splits[split])


def _row(path: str, number: int, block: list[str]) -> tuple[str, Row]:
  where = sources.located(path, number)
  if len(block) != 4:
    raise UserError(
      f"{where}: {len(block)} lines, expected 4: sentence, pronoun, candidates,"
      " the right one"
    )
  sentence, pronoun, candidates, right = block
  names = [name.strip() for name in candidates.split(",")]
  if right not in names:
    raise UserError(f"{where}: {shown(right)} is none of {listed(names)}")
  return where, {
    "sentence": sentence,
    "pronoun": pronoun,
    "candidates": names,
    "label": names.index(right),
  }


def source(data_dir: str | None) -> Any:
  """DPR's `DPR/train.c.txt` and `test.c.txt`, or (None) HF's data set.

  Raises:
    UserError: if no file is there.
  """
  splits = ("train", "test")
  if data_dir is None:
    return sources.HuggingFace(
      "community-datasets/definite_pronoun_resolution",
      splits={split: split for split in splits},
    )
  folder = fetched.local(os.path.join(data_dir, "DPR"))
  paths = {s: os.path.join(folder, f"{s}.c.txt") for s in splits}
  found = {s: path for s, path in paths.items() if os.path.exists(path)}
  if not found:
    raise UserError(
      f"{folder}: none of the data files train.c.txt, test.c.txt is there"
    )
  return PronounFiles(found)


def text(row: Row) -> Row:
  """`wsc: ... *he* ...` to the candidate that the pronoun stands for."""
  names = column(row, "candidates")
  if not isinstance(names, (list, tuple)):
    raise UserError(f"column 'candidates' holds {shown(names)}, not a list")
  label = column(row, "label")
  if str(label) not in ("0", "1", "-1") or len(names) != 2:
    raise UserError(
      f"label {shown(label)} of candidates {listed(names)} is not 0 or 1"
    )
  word = re.escape(preprocessors.text_of(row, "pronoun"))
  sentence = preprocessors.text_of(row, "sentence")
  marked = re.sub(rf" ({word})( |\.|,)", r" *\1*\2", sentence, count=1)
  right = names[int(label)] if int(label) >= 0 else "<unk>"
  return {"inputs": f"wsc: {marked}", "targets": right}
