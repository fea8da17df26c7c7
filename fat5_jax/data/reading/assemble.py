"""Examples in rows, as the arrays that the model reads. Names are T5X's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fat5_jax.data.layouts import Example

Batch = dict[str, np.ndarray]


def text(
  rows: Sequence[Sequence[Example]], lengths: Mapping[str, int], packed: bool
) -> Batch:
  """Encoder inputs, decoder inputs and targets; of packed rows with segments.

  Args:
    rows: the examples of each, with `inputs` and `targets`.
    lengths: of both.
    packed: whether a row may hold several.

  Returns:
    int32 (rows, length) each: 0 is padding, and what a decoder starts with;
    segments count from 1, positions from 0 in each.
  """
  tokens, segments, positions = {}, {}, {}
  for name in ("inputs", "targets"):
    tokens[name], segments[name], positions[name] = _laid_out(
      [[example[name] for example in row] for row in rows], lengths[name]
    )
  target, part = tokens["targets"], segments["targets"]
  before = np.zeros_like(target)
  before[:, 1:] = target[:, :-1]
  if packed:
    before[:, 1:] *= part[:, 1:] == part[:, :-1]
  batch = {
    "encoder_input_tokens": tokens["inputs"],
    "decoder_target_tokens": target,
    "decoder_input_tokens": before,
    "decoder_loss_weights": (target != 0).astype(np.int32),
  }
  if packed:
    batch |= {
      "encoder_segment_ids": segments["inputs"],
      "decoder_segment_ids": part,
      "encoder_positions": positions["inputs"],
      "decoder_positions": positions["targets"],
    }
  return batch


def _laid_out(
  rows: Sequence[Sequence[np.ndarray]], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(tokens, segments, positions), int32 (rows, length), all at once."""
  shape = (len(rows), length)
  sequences = [sequence for row in rows for sequence in row]
  if not sequences:
    return tuple(np.zeros(shape, np.int32) for _ in range(3))
  sizes = np.array([len(sequence) for sequence in sequences])
  counts = [len(row) for row in rows]
  before = np.cumsum(sizes) - sizes
  # Of each sequence: its number in its row, and where in the batch it begins.
  first = np.cumsum(counts) - counts
  number = np.arange(len(sequences)) - np.repeat(first, counts)
  in_row = before - np.repeat(np.append(before, 0)[first], counts)
  if (in_row + sizes > length).any():
    raise ValueError(f"a row of more than {length} tokens")
  start = np.repeat(np.arange(len(rows)) * length, counts) + in_row
  # Of each token.
  position = np.arange(sizes.sum()) - np.repeat(before, sizes)
  place = np.repeat(start, sizes) + position
  found = []
  for values in (
    np.concatenate(sequences),
    np.repeat(number + 1, sizes),
    position,
  ):
    laid = np.zeros(shape, np.int32)
    laid.reshape(-1)[place] = values
    found.append(laid)
  return tuple(found)


def labels(
  rows: Sequence[Sequence[Example]],
  lengths: Mapping[str, int],
  dtype: np.dtype,
) -> Batch:
  """What a head learns: `labels` and where they count, and `answerable`."""
  count = len(rows)
  shapes = {"encoder_input_tokens": "inputs", "labels": "targets"}
  if "answerable" in lengths:
    shapes["answerable"] = "answerable"
  batch = {
    key: np.zeros(
      (count, lengths[name]), dtype if key == "labels" else np.int32
    )
    for key, name in shapes.items()
  }
  batch["label_weights"] = np.zeros_like(batch["labels"], np.int32)
  for number, row in enumerate(rows):
    for example in row:
      for key, name in shapes.items():
        values = example[name][: lengths[name]]
        batch[key][number, : len(values)] = values
      batch["label_weights"][number, : len(example["targets"])] = 1
  return batch
