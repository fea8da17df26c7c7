"""Language models: an answer for every text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import itertools
from typing import Any

import numpy as np
import seqio

from fat5_jax.data import sources
from fat5_jax.errors import UserError
from fat5_jax.inference import search
from fat5_jax.inference.predictor import WINDOW, Predictor
from fat5_jax.inference.rows import Told, check_tokens
from fat5_jax.inference.score import Scorer
from fat5_jax.inference.writers import Record


def answers(
  predictor: Predictor,
  params: Any,
  rows: Iterable[sources.LocatedRow],
  vocabulary: seqio.Vocabulary,
  max_input_length: int | None,
  told: Told,
  with_scores: bool = False,
  part: slice = slice(None),
) -> Iterator[Record]:
  """Every row with its `prediction`, the answer to its `inputs`, in order.

  Of the rows, those of `part` are predicted. The number of a row seeds what is
  drawn.

  Raises:
    UserError: for a text that is too long, or of other tokens than the model's.
  """
  config = predictor.model.config

  def examples():
    for where, row in rows:
      try:
        ids = encode(vocabulary, row["inputs"], max_input_length, told)
        ids = [*ids, config.eos_token_id]
        check_tokens(ids, row["inputs"], config.vocab_size)
      except UserError as e:
        raise UserError(f"{where}: {e}") from None
      yield {"inputs": ids, "row": row}

  asked = itertools.islice(examples(), part.start, part.stop)
  for example, found in predictor(params, asked, part.start or 0):
    yield example["row"] | _record(found, vocabulary, with_scores)


def _record(
  found: search.Found, vocabulary: seqio.Vocabulary, with_scores: bool
) -> Record:
  """`prediction`, a list where several were asked for; likewise `score`."""
  texts = [
    vocabulary.decode(tokens.tolist())
    for tokens, score in zip(*found)
    if score > -np.inf
  ]
  scores = [round(float(x), 6) for x in found.scores if x > -np.inf]
  if len(found.scores) == 1:
    texts, scores = texts[0] if texts else "", scores[0] if scores else None
  return {"prediction": texts} | ({"score": scores} if with_scores else {})


def scores(
  scorer: Scorer,
  params: Any,
  rows: Iterable[sources.LocatedRow],
  vocabulary: seqio.Vocabulary,
  max_input_length: int | None,
  told: Told,
  part: slice = slice(None),
) -> Iterator[Record]:
  """Every row with its `score`: the log-likelihood of its `targets`.

  Natural logarithm, of all tokens and the end, which are counted in `tokens`.
  `told` keeps the sums.

  Raises:
    UserError: as `answers` does.
  """
  config = scorer.model.config

  def ids_of(text, most):
    ids = [*encode(vocabulary, text, most, told), config.eos_token_id]
    check_tokens(ids, text, config.vocab_size)
    return ids

  def examples():
    for where, row in rows:
      try:
        inputs = ids_of(row["inputs"], max_input_length)
        targets = ids_of(row["targets"], None)
      except UserError as e:
        raise UserError(f"{where}: {e}") from None
      yield {"inputs": inputs, "targets": targets, "row": row}

  asked = itertools.islice(examples(), part.start, part.stop)
  while window := list(itertools.islice(asked, WINDOW * scorer.batch_size)):
    for example, score in zip(window, scorer(params, window)):
      told.likelihood += float(score)
      told.targets += len(example["targets"])
      yield example["row"] | {
        "score": round(float(score), 6),
        "tokens": len(example["targets"]),
      }


def ranks(
  scorer: Scorer,
  params: Any,
  rows: Iterable[sources.LocatedRow],
  choices: Sequence[str],
  vocabulary: seqio.Vocabulary,
  max_input_length: int | None,
  told: Told,
  part: slice = slice(None),
) -> Iterator[Record]:
  """Every row with its `prediction`, the likeliest of some answers.

  Rank classification (Brown et al. 2020, "Language Models are Few-Shot
  Learners", 2.4; Sanh et al. 2022, "Multitask Prompted Training", 4):
  `scores` has the log-likelihood of each.

  Raises:
    UserError: as `answers` does.
  """
  asked = (
    (where, row | {"targets": choice, "row": row})
    for where, row in itertools.islice(rows, part.start, part.stop)
    for choice in choices
  )
  found = scores(scorer, params, asked, vocabulary, max_input_length, told)
  told.ranked = True
  while group := list(itertools.islice(found, len(choices))):
    values = {record["targets"]: record["score"] for record in group}
    best = max(values, key=values.get)
    yield group[0]["row"] | {"prediction": best, "scores": values}


def encode(
  vocabulary: seqio.Vocabulary, text: str, max_length: int | None, told: Told
) -> Sequence[int]:
  """Its tokens, room left for the end of the sequence."""
  try:
    ids = vocabulary.encode(text)
  except UnicodeEncodeError:
    raise UserError("half a character (a lone surrogate)") from None
  told.add_tokens(ids, vocabulary.unk_id)
  if max_length is not None and len(ids) >= max_length:
    ids = ids[: max_length - 1]
    told.cut += 1
  return ids
