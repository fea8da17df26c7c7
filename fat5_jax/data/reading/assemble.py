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
  count = len(rows)
  tokens, segments, positions = {}, {}, {}
  for name in ("inputs", "targets"):
    shape = (count, lengths[name])
    ids = tokens[name] = np.zeros(shape, np.int32)
    parts = segments[name] = np.zeros(shape, np.int32)
    places = positions[name] = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
      start = 0
      for segment, example in enumerate(row, 1):
        values = example[name]
        end = start + len(values)
        ids[number, start:end] = values
        parts[number, start:end] = segment
        places[number, start:end] = np.arange(len(values))
        start = end
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
