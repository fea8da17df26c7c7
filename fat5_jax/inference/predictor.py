"""The one way of predicting: rows of tokens to what a model says of each.

`infer`, evaluations and Python take it, for language models and heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.inference import batches
from fat5_jax.inference.decoding import make_predict_step

Example = TypeVar("Example", bound=Mapping[str, Any])

# What of an example the model reads, by its name in a batch.
_FEATURES = {"encoder_input_tokens": "inputs", "answerable": "answerable"}


class Predictor:
  """A model's predictions of rows, in order, of bounded memory.

  Compiled once a shape: a batch holds rows of about one length, and fewer of
  them where they are long (batches.py).

  Attributes:
    model: a language model, or a head.
    batch_size: most rows a batch.
  """

  def __init__(
    self,
    model: Any,
    partitioner: Partitioner,
    batch_size: int,
    max_output_length: int | None = None,
  ):
    """`max_output_length`: tokens of a language model's answers."""
    self.model, self.batch_size = model, batch_size
    self._partitioner = partitioner
    self._predict = make_predict_step(model, partitioner, max_output_length)
    head = model.config.head
    has_spans = head is not None and head.kind == "question_answering"
    self._features = {
      key: name
      for key, name in _FEATURES.items()
      if key != "answerable" or has_spans
    }

  def __call__(
    self, params: Any, examples: Iterable[Example]
  ) -> Iterator[tuple[Example, np.ndarray]]:
    """(example, what the model says of it), in order.

    Args:
      params: of the model.
      examples: with `inputs`, token ids without padding, and for spans
        `answerable`, as many numbers, 1 where an answer may be.

    Returns:
      Tokens (max_output_length,) of a language model; for the others what
      their objective says (objectives/heads.py), of tags as many as the batch
      is long.
    """
    pad_id = self.model.config.pad_token_id
    length_of = lambda example: len(example["inputs"])
    for batch in batches.group(examples, length_of, self.batch_size):
      rows, length = batches.shape(list(map(length_of, batch)), self.batch_size)
      rows = self._partitioner.round_up(rows)
      arrays = {
        key: batches.padded(
          [example[name] for example in batch],
          (rows, length),
          pad_id if name == "inputs" else 0,
        )
        for key, name in self._features.items()
      }
      placed = self._partitioner.to_devices(arrays, 0, rows)
      yield from zip(batch, np.asarray(self._predict(params, placed)))
