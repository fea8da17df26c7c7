"""The one way of predicting: rows of tokens to what a model says of each.

`infer`, evaluations and Python take it, for language models and heads.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
from typing import Any, TypeVar

import jax
import numpy as np

from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.inference import batches, search
from fat5_jax.inference.decoding import GREEDY, Search, make_predict_step

Example = TypeVar("Example", bound=Mapping[str, Any])

# What of an example the model reads, by its name in a batch.
_FEATURES = {"encoder_input_tokens": "inputs", "answerable": "answerable"}
# Batches whose rows are put in the order of their lengths.
WINDOW = 32
# Batches that a device has before the first of them is waited for.
_IN_FLIGHT = 2


class Predictor:
  """A model's predictions of rows, in order, of bounded memory.

  Rows are taken a window at a time, and those of about one length go together;
  there are fewer in a batch where they are long. Compiled once a shape.

  Attributes:
    model: a language model, or a head.
    batch_size: most rows a batch.
    shapes: of the batches so far.
    tokens, room: of all inputs so far, and of the arrays that held them.
    tick: is told of so many rows more that are predicted.
  """

  def __init__(
    self,
    model: Any,
    partitioner: Partitioner,
    batch_size: int,
    max_output_length: int | None = None,
    how: Search = GREEDY,
    window: int = WINDOW,
  ):
    """
    Args:
      max_output_length: tokens of a language model's answers.
      how: a language model's search.
      window: batches whose rows are read before the first is predicted.

    Raises:
      UserError: if what the search asks for has no room in an answer.
    """
    if max_output_length is not None:
      how.check_room(max_output_length)
    self.model, self.batch_size = model, batch_size
    self.shapes = batches.Shapes(batch_size)
    self.tokens = self.room = 0
    self.tick: Callable[[int], None] = lambda rows: None
    self._partitioner, self._window = partitioner, window
    self._predict = make_predict_step(
      model, partitioner, max_output_length, how
    )
    head = model.config.head
    has_spans = head is not None and head.kind == "question_answering"
    self._features = {
      key: name
      for key, name in _FEATURES.items()
      if key != "answerable" or has_spans
    }
    self._draws = model.config.is_language_model and how.decoding.draws

  def describe(self) -> str:
    """In a line, of what there was."""
    padding = 1 - self.tokens / self.room if self.room else 0.0
    shapes = ", ".join(
      f"{rows} x {length}" for rows, length in sorted(self.shapes.seen)
    )
    return (
      f"compiled for {len(self.shapes.seen)}"
      f" shape{'s' * (len(self.shapes.seen) != 1)} of inputs ({shapes});"
      f" {padding:.0%} of them was padding"
    )

  def __call__(
    self, params: Any, examples: Iterable[Example], first: int = 0
  ) -> Iterator[tuple[Example, Any]]:
    """(example, what the model says of it), in order.

    Args:
      params: of the model.
      examples: with `inputs`, token ids without padding, and for spans
        `answerable`, as many numbers, 1 where an answer may be.
      first: number of the first example, which seeds what is drawn.

    Returns:
      `search.Found` of a language model, tokens (S, max_output_length) and
      scores (S,); for the others what their objective says
      (objectives/heads.py), of tags as many as the batch is long.
    """
    size = self._window * self.batch_size
    numbered = enumerate(examples, first)
    while window := list(itertools.islice(numbered, size)):
      found: dict[int, Any] = {}
      for batch, values in self._in_flight(params, window):
        found |= {number: one for (number, _), one in zip(batch, values)}
      for number, example in window:
        yield example, found.pop(number)

  def _in_flight(self, params, window) -> Iterator[tuple[list[Any], Any]]:
    """(rows, what is said of each) of the batches of a window."""
    length_of = lambda row: len(row[1]["inputs"])
    ordered = sorted(window, key=length_of)
    pending: collections.deque = collections.deque()
    for batch in batches.group(ordered, length_of, self.batch_size):
      pending.append((batch, self._begun(params, batch)))
      if len(pending) >= _IN_FLIGHT:
        yield self._taken(*pending.popleft())
    while pending:
      yield self._taken(*pending.popleft())

  def _begun(self, params, batch: list[tuple[int, Example]]) -> Any:
    """What the devices will say of a batch."""
    pad_id = self.model.config.pad_token_id
    lengths = [len(example["inputs"]) for _, example in batch]
    rows, length = self.shapes.of(lengths)
    rows = self._partitioner.round_up(rows)
    self.tokens += sum(lengths)
    self.room += rows * length
    arrays = {
      key: batches.padded(
        [example[name] for _, example in batch],
        (rows, length),
        pad_id if name == "inputs" else 0,
      )
      for key, name in self._features.items()
    }
    if self._draws:
      numbers = np.zeros((rows,), np.uint32)
      numbers[: len(batch)] = [number % 2**32 for number, _ in batch]
      arrays["row_numbers"] = numbers
    placed = self._partitioner.to_devices(arrays, 0, rows)
    return self._predict(params, placed)

  def _taken(self, batch: list[Any], values: Any) -> tuple[list[Any], Any]:
    values = jax.tree.map(np.asarray, values)
    self.tick(len(batch))
    if isinstance(values, search.Found):
      return batch, [search.Found(*one) for one in zip(*values)]
    return batch, values
