"""Language models: an answer for every text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import seqio

from fat5_jax.data import sources
from fat5_jax.errors import UserError
from fat5_jax.inference.predictor import Predictor
from fat5_jax.inference.rows import Told, check_tokens
from fat5_jax.inference.writers import Record


def answers(
  predictor: Predictor,
  params: Any,
  rows: Iterable[sources.LocatedRow],
  vocabulary: seqio.Vocabulary,
  max_input_length: int | None,
  told: Told,
) -> Iterator[Record]:
  """Every row with its `prediction`, the answer to its `inputs`, in order.

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

  for example, found in predictor(params, examples()):
    text = vocabulary.decode(found.tolist())
    yield example["row"] | {"prediction": text}


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
