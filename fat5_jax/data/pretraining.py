"""Tasks of text alone: what is asked about it is an objective's (denoising).

`@pretraining.text()` in gin reads any source; the names of T5's tasks read
`train*.jsonl`, `validation*.txt`, ... of DATA_DIR, or C4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from fat5_jax.data import (
  denoising,
  features,
  folders,
  layouts,
  mixtures,
  preprocessors,
  records,
  seqio_source,
  sources,
  t5_preprocessors,
)
from fat5_jax.errors import UserError

# Texts of more tokens are kept in pieces: what is read of one is a small part.
_PIECE = 1 << 14


@mixtures.weighted
@records.recorded
def text(
  source,
  vocabulary: seqio.Vocabulary,
  objective: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] = "ul2",
  column: str = "text",
  name: str = "text",
  join: bool = False,
  text_length: int | None = None,
  piece_length: int = _PIECE,
  skip_bad_rows: bool = False,
) -> seqio.Task:
  """A task of texts, each epoch in other pieces with other noise.

  Args:
    source: of rows; a file of lines has one a line.
    vocabulary: with sentinels (extra_ids).
    objective: 'span_corruption', 'prefix_lm', 'causal_lm', 'ul2' (FAT5's
      seven), or denoisers of your own, see denoising.find.
    column: of the text.
    name: under which it is registered.
    join: rows that come after each other are one text, as the lines of a book
      are; else every row is one.
    text_length: tokens of text of the longest example; None is what just fits
      TASK_FEATURE_LENGTHS. Shorter ones fill packed rows better where denoisers
      have sides of unlike length, as UL2's.
    piece_length: most tokens of a text that are kept together; at least those
      of the longest example.
    skip_bad_rows: leave out rows that would be an error. Blank ones always are.

  Raises:
    UserError: for an unknown objective, or no vocabulary.
  """
  features.check_given(vocabulary, name)
  denoisers = denoising.find(objective)
  for setting, value in (("piece", piece_length), ("text", text_length)):
    unset = value is None and setting == "text"
    if not unset and (not isinstance(value, int) or value < 2):
      raise UserError(f"{setting}_length = {value!r} must be at least 2")
  layout = layouts.Corpus(denoisers, piece_length, join, text_length)

  def format_row(row: sources.Row) -> sources.Row | None:
    found = preprocessors.text_of(row, column)
    return {"inputs": found} if found.strip() else None

  seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=seqio_source.SeqioSource(
      source,
      format_row,
      {"inputs": tf.TensorSpec([], tf.string)},
      layout,
      skip_bad_rows,
      (column,),
    ),
    preprocessors=[
      seqio_source.preprocessor(
        layout, {"inputs": tf.TensorSpec([None], tf.int32)}
      ),
      t5_preprocessors.as_preprocessor(layout),
    ],
    output_features={
      side: seqio.Feature(vocabulary, add_eos=True)
      for side in ("inputs", "targets")
    },
    metric_fns=[],
  )


@records.recorded
def c4(
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  objective: str = "span_corruption",
  name: str = "c4_v220_span_corruption",
  source: Any = None,
) -> seqio.Task:
  """A task of T5's by its name, over texts of your own.

  Args:
    vocabulary: with sentinels.
    data_dir: folder with files named after their split (`train*.jsonl`, `.txt`,
      ...), with a column `text`; None reads HF's `allenai/c4`, with STREAM.
    objective: see `text`.
    name: of the task.
    source: of rows, instead of both.
  """
  if source is None:
    source = folders.named_splits(data_dir, "allenai/c4", "en", ("txt",))
  return text(source, vocabulary, objective, name=name)
