"""A loaded model's predictions of what Python holds.

The same functions as those of `python -m fat5_jax.infer`, so the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import numpy as np

from fat5_jax import console
from fat5_jax.api import questions
from fat5_jax.data.seqio_source import ROWS
from fat5_jax.errors import UserError
from fat5_jax.inference import (
  heads,
  language_model,
  loading,
  own_task,
  rows,
  score,
  settings,
)
from fat5_jax.inference.decoding import GREEDY, Decoding
from fat5_jax.inference.predictor import Predictor
from fat5_jax.models import factory
from fat5_jax.models.config import HeadConfig


@dataclasses.dataclass(frozen=True)
class Options:
  """How rows are predicted.

  Attributes:
    batch_size: most rows at a time.
    max_input_tokens: longer texts are cut there; None cuts none.
    max_tokens: of an answer.
    use_template: whether the run's own task words the questions.
  """

  batch_size: int = 32
  max_input_tokens: int | None = None
  max_tokens: int = 256
  use_template: bool = True

  def __post_init__(self):
    settings.check(
      None,
      infer_batch_size=self.batch_size,
      max_input_length=self.max_input_tokens,
      max_output_length=self.max_tokens,
      use_template=self.use_template,
    )


class Answers:
  """Answers of one model with its parameters; compiled once a shape."""

  def __init__(
    self, loaded: loading.Loaded, vocabulary: Any, asks_as_run: bool = True
  ):
    """`asks_as_run`: whether the run folder's task is one for this model."""
    self._loaded, self._vocabulary = loaded, vocabulary
    self._config, self._asks_as_run = loaded.model.config, asks_as_run
    self._made: dict[Any, Any] = {}

  @functools.cached_property
  def _own(self) -> tuple[Any, int | None]:
    """(the task that the run folder tells, the length of its windows)."""
    record = None
    if self._asks_as_run:
      record = own_task.record_of(self._loaded.source)
    return rows.recorded_task(record, self._vocabulary)

  def _once(self, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, made once: it holds compiled programs."""
    if key not in self._made:
      self._made[key] = make()
    return self._made[key]

  def _predictor(
    self, batch_size, max_tokens=None, embeds=False, how=GREEDY
  ) -> Predictor:
    model = self._embedder if embeds else self._loaded.model
    partitioner = self._loaded.partitioner
    make = lambda: Predictor(model, partitioner, batch_size, max_tokens, how)
    return self._once(("predictor", batch_size, max_tokens, embeds, how), make)

  def _asked(self, options: Options) -> tuple[Any, int | None]:
    own, window = self._own if options.use_template else (None, None)
    return own, options.max_input_tokens or window

  def _tell(self, told: rows.Told, limit: int | None) -> None:
    for line in told.describe(limit):
      console.say(line.replace("MAX_INPUT_LENGTH", "max_input_tokens"))

  # ---- Language models ----

  def _texts(self, values: list[Any], name: str, own: Any) -> Iterator[Any]:
    columns = ("inputs",) if own is None else own.source.columns
    return rows.texts(questions.rows(values, name, columns)(), own)

  def generate(
    self,
    values: list[Any],
    options: Options,
    decoding: Decoding,
    with_scores: bool,
  ) -> list[Any]:
    """An answer to each text, or several, or with their scores."""
    told = rows.Told()
    own, limit = self._asked(options)
    how = decoding.bind(self._vocabulary, self._config)
    found = language_model.answers(
      self._predictor(options.batch_size, options.max_tokens, how=how),
      self._loaded.params,
      self._texts(values, "texts", own),
      self._vocabulary,
      limit,
      told,
      with_scores,
    )
    keys = ("prediction", "score")
    answers = [
      {key: record[key] for key in keys} if with_scores else record[keys[0]]
      for record in found
    ]
    self._tell(told, limit)
    return answers

  def _scorer(self, batch_size) -> score.Scorer:
    model, partitioner = self._loaded.model, self._loaded.partitioner
    make = lambda: score.Scorer(model, partitioner, batch_size)
    return self._once(("scorer", batch_size), make)

  def score(
    self, inputs: list[Any], targets: list[Any], options: Options
  ) -> np.ndarray:
    """The log-likelihood of each target, float64 (N,)."""
    told = rows.Told()
    own, limit = self._asked(options)
    eos, size = self._config.eos_token_id, self._config.vocab_size

    def ids_of(where, text, most):
      if not isinstance(text, str):
        raise UserError(f"{where} is {questions.shown(text)}, no text")
      try:
        ids = language_model.encode(self._vocabulary, text, most, told)
        rows.check_tokens([*ids, eos], text, size)
      except UserError as e:
        raise UserError(f"{where}: {e}") from None
      return [*ids, eos]

    examples = [
      {
        "inputs": ids_of(where, row["inputs"], limit),
        "targets": ids_of(f"targets[{i}]", targets[i], None),
      }
      for i, (where, row) in enumerate(self._texts(inputs, "inputs", own))
    ]
    found = self._scorer(options.batch_size)(self._loaded.params, examples)
    self._tell(told, limit)
    return found

  # ---- Heads ----

  def _records(self, task: Any, options: Options, limit) -> list[Any]:
    told = rows.Told()
    found = heads.predict_task(
      self._predictor(options.batch_size),
      self._loaded.params,
      task,
      ROWS,
      limit,
      told,
    )
    records = list(found)
    self._tell(told, limit)
    return records

  def classify(self, values: list[Any], options: Options) -> list[Any]:
    """A record for each text or pair."""
    own, limit = self._asked(options)
    pairs = False
    if own is not None:
      columns = own.source.columns
    else:
      pairs = bool(values) and _is_pair(values[0])
      columns = ("inputs", "second") if pairs else ("inputs",)
    read = questions.rows(values, "texts", columns)
    head = self._config.head
    task = heads.asked(head, own, read, self._vocabulary, pairs)
    records = self._records(task, options, limit)
    return [_without(record, "inputs") for record in records]

  def tag(self, words: list[Any], options: Options) -> list[Any]:
    """A record for each sentence."""
    own, limit = self._asked(options)
    column = "inputs" if own is None else own.source.columns[0]
    made = [{column: sentence} for sentence in questions.sentences(words)]
    read = questions.rows(made, "words", ())
    if own is None:
      task = heads.task_of_rows(self._config.head, read, self._vocabulary)
    else:
      task = heads.asked(self._config.head, own, read, self._vocabulary)
    return self._records(task, options, limit)

  def answer(
    self, asked: list[Any], contexts: list[Any], options: Options
  ) -> list[Any]:
    """A record for each question."""
    own, limit = self._asked(options)
    made = [
      {"question": question, "context": context}
      for question, context in zip(asked, contexts)
    ]
    for i, row in enumerate(made):
      for key, value in row.items():
        if not isinstance(value, str) or not value.strip():
          raise UserError(f"{key}s[{i}] is {questions.shown(value)}, no text")
    read = questions.rows(made, "questions", ())
    task = heads.asked(self._config.head, own, read, self._vocabulary)
    return [_without(r, "id") for r in self._records(task, options, limit)]

  # ---- Vectors ----

  @functools.cached_property
  def _embedder(self) -> Any:
    head = self._config.head
    if head is not None and head.kind == "embedding":
      return self._loaded.model
    return factory.create(
      self._config.with_head(HeadConfig("embedding", pooling="mean"))
    )

  def embed(self, values: list[Any], options: Options) -> np.ndarray:
    """float32 (N, M) of texts."""
    told = rows.Told()
    own, limit = self._asked(options)
    model, params = self._embedder, self._loaded.params
    if model is not self._loaded.model:
      # Its encoder; the task of another head words no text for it.
      own = None
      params = {key: params[key] for key in ("token_embedder", "encoder")}
    columns = ("inputs",) if own is None else own.source.columns
    read = questions.rows(values, "texts", columns)
    task = heads.asked(model.config.head, own, read, self._vocabulary)
    predictor = self._predictor(options.batch_size, embeds=True)
    found = heads.predict_task(predictor, params, task, ROWS, limit, told)
    vectors = [record["embedding"] for record in found]
    self._tell(told, limit)
    return np.array(vectors, np.float32)


def _is_pair(value: Any) -> bool:
  if isinstance(value, dict):
    return "second" in value
  return not isinstance(value, str)


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
  return {name: value for name, value in record.items() if name != key}
