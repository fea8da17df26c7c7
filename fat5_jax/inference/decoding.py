"""How a language model answers: what a person asks for, and the step that does.

`Decoding` is in words, with Hugging Face's names; with a vocabulary it becomes
a `Search`, in token ids, which generates over a key/value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fat5_jax import fetched, macros, objectives
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.inference import search
from fat5_jax.inference.search import constraints
from fat5_jax.models import cache as cache_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """How answers are chosen; greedy as it is.

  Attributes:
    num_beams: 2 or more is beam search (search/beam.py).
    num_return_sequences: answers to a row, the best first.
    length_penalty, early_stopping: of beam search.
    beam_rule: "hf" or "t5x": whose length penalty and end.
    do_sample: draw at random (search/sample.py); so does any of `temperature`,
      `top_k` and `top_p`, which are those of sampling.
    seed: of what is drawn. A row's answer depends on it and on the row's number
      alone.
    min_new_tokens: no end before as many.
    no_repeat_ngram_size: so many tokens do not come a second time.
    repetition_penalty: above 1, tokens that are there become less likely.
    forced_first_token: a piece of the vocabulary, or its id, that every answer
      begins with (a language's, as mBART has them).
    prompt: a text that every answer begins with.
    allowed_outputs: the only texts that may be answers, or a file with one a
      line; None for all.
  """

  num_beams: int = 1
  num_return_sequences: int = 1
  length_penalty: float = 1.0
  early_stopping: search.EarlyStopping = False
  beam_rule: search.Rule = "hf"
  do_sample: bool = False
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  seed: int = 0
  min_new_tokens: int = 0
  no_repeat_ngram_size: int = 0
  repetition_penalty: float = 1.0
  forced_first_token: str | int | None = None
  prompt: str | None = None
  allowed_outputs: str | Sequence[str] | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name = _MACROS.get(field.name, field.name.upper())
      macros.check(name, getattr(self, field.name), field.name)
    if self.allowed_outputs is not None:
      texts = _lines(self.allowed_outputs)
      object.__setattr__(self, "allowed_outputs", texts)
    if self.draws and self.num_beams > 1:
      raise UserError(
        f"num_beams = {self.num_beams} searches for the likeliest answer, and"
        f" {self._drawn_by()} draws one: choose"
      )
    for name in ("min_new_tokens", "no_repeat_ngram_size"):
      value = getattr(self, name)
      if self.allowed_outputs is not None and value:
        raise UserError(
          f"{name} = {value}: allowed_outputs are the answers as they are, long"
          " or short; leave one of the two out"
        )
    if self.num_return_sequences > max(1, self.num_beams) and not self.draws:
      raise UserError(
        f"num_return_sequences = {self.num_return_sequences}: there are as many"
        f" answers as beams, num_beams = {self.num_beams}; or do_sample = True"
        " draws them"
      )

  def changes(self) -> str:
    """What is not as it is by itself."""
    return ", ".join(
      f"{field.name} = {value!r}"
      for field in dataclasses.fields(self)
      if (value := getattr(self, field.name)) != field.default
    )

  def check_unused(self, kind: str) -> None:
    """Raises UserError if anything is set, for a head of a kind."""
    if changes := self.changes():
      raise UserError(
        f"{changes}: a head of kind {kind} does not search; leave it out"
      )

  @property
  def draws(self) -> bool:
    return bool(self._drawn_by())

  def _drawn_by(self) -> str:
    given = [
      f"{name} = {value}"
      for name in ("temperature", "top_k", "top_p")
      if (value := getattr(self, name)) is not None
    ]
    return ", ".join([*given, *["do_sample = True"] * self.do_sample])

  def bind(self, vocabulary: Any, config: Any) -> Search:
    """In the ids of a vocabulary, for a model's config.

    Raises:
      UserError: for a text that has no ids, or none that the model knows.
    """
    known = min(config.vocab_size, vocabulary.vocab_size)

    def ids_of(name: str, text: str) -> tuple[int, ...]:
      ids = tuple(vocabulary.encode(text))
      if not ids or max(ids) >= known or vocabulary.unk_id in ids:
        raise UserError(
          f"{name}: {text!r} is nothing in the model's vocabulary"
        )
      return ids

    first = self.forced_first_token
    if isinstance(first, str):
      first = _piece(vocabulary, first, known)
    elif first is not None and first >= known:
      raise UserError(
        f"forced_first_token = {first}: the vocabulary has {known} tokens"
      )
    allowed = None
    if self.allowed_outputs is not None:
      allowed = tuple(
        (*ids_of("allowed_outputs", text), config.eos_token_id)
        for text in self.allowed_outputs
      )
    prompt = () if self.prompt is None else ids_of("prompt", self.prompt)
    return Search(
      self,
      vocab_size=None if known == config.vocab_size else known,
      first=first,
      prompt=prompt,
      allowed=allowed,
    )


def _lines(allowed: str | Sequence[str]) -> tuple[str, ...]:
  """Texts, or those of a file with one a line; each once."""
  if isinstance(allowed, str):
    from fat5_jax.data import files

    path = fetched.local(allowed)
    files.check_file(path)
    opener = files.split_suffix(path)[1]
    lines = [line.strip() for _, line in files.read_lines(path, opener)]
    allowed = [line for line in lines if line]
    if not allowed:
      raise UserError(f"allowed_outputs: {path} has no line")
  return tuple(dict.fromkeys(allowed))


# What a setting's macro is called, where it is not its own name.
_MACROS = {
  "seed": "SEARCH_SEED",
  "min_new_tokens": "MIN_OUTPUT_LENGTH",
  "prompt": "OUTPUT_PROMPT",
}


def _piece(vocabulary: Any, text: str, known: int) -> int:
  """The id of one token, by its piece or by what it is the whole text of."""
  from fat5_jax.data import vocabularies

  found = vocabularies.piece_id(vocabulary, text)
  if found is None:
    ids = vocabulary.encode(text)
    found = ids[0] if len(ids) == 1 and ids[0] != vocabulary.unk_id else None
  if found is None or found >= known:
    raise UserError(
      f"forced_first_token = {text!r} is no single token of the model's"
      " vocabulary"
    )
  return found


@dataclasses.dataclass(frozen=True)
class Search:
  """A `Decoding` in token ids.

  Attributes:
    decoding: what was asked for.
    vocab_size: real entries of a padded embedding; None if all are.
    first, prompt, allowed: ids of the texts of `decoding`.
  """

  decoding: Decoding = Decoding()
  vocab_size: int | None = None
  first: int | None = None
  prompt: tuple[int, ...] = ()
  allowed: tuple[tuple[int, ...], ...] | None = None

  @property
  def ways(self) -> int:
    """Rows of the decoder for each of the encoder's."""
    asked = self.decoding
    return asked.num_return_sequences if asked.draws else asked.num_beams

  def check_room(self, max_length: int) -> None:
    """Raises UserError unless an answer of so many tokens holds its beginning
    and each of those that are allowed."""
    begun = len(self.prompt) + (self.first is not None)
    if begun >= max_length:
      raise UserError(
        f"an answer's beginning has {begun} tokens, and at most {max_length}"
        " are asked for (MAX_OUTPUT_LENGTH, max_tokens)"
      )
    for text, ids in zip(
      self.decoding.allowed_outputs or (), self.allowed or ()
    ):
      if begun + len(ids) > max_length:
        raise UserError(
          f"allowed_outputs: {text!r} and its end are {len(ids)} tokens"
          + (f" after the {begun} that are given" if begun else "")
          + f", and at most {max_length} are asked for (MAX_OUTPUT_LENGTH,"
          " max_tokens)"
        )

  def constraint(self, eos_id: int) -> search.Constraint | None:
    asked, prompt = self.decoding, len(self.prompt)
    found = []
    if asked.repetition_penalty != 1:
      found.append(constraints.repetition_penalty(asked.repetition_penalty))
    if asked.no_repeat_ngram_size:
      found.append(constraints.no_repeated_ngrams(asked.no_repeat_ngram_size))
    if asked.min_new_tokens:
      least = prompt + asked.min_new_tokens
      found.append(constraints.min_length(least, eos_id))
    if self.allowed is not None:
      found.append(
        constraints.only_paths(
          constraints.Trie(self.allowed), prompt + (self.first is not None)
        )
      )
    if self.first is not None:
      found.append(constraints.forced_first(self.first, prompt))
    if self.vocab_size is not None:
      found.append(constraints.only_known(self.vocab_size))
    return constraints.all_of(found)

  def __call__(self, ask: search.Ask, seeds_B: jax.Array) -> search.Found:
    asked = self.decoding
    # T5X's beam of 1 goes on after an end, for a better one.
    if asked.num_beams > 1 or asked.beam_rule == "t5x":
      return search.beam_search(
        ask,
        num_beams=asked.num_beams,
        returned=asked.num_return_sequences,
        length_penalty=asked.length_penalty,
        early_stopping=asked.early_stopping,
        rule=asked.beam_rule,
      )
    if asked.draws:
      temperature = asked.temperature
      return search.sample(
        ask,
        seeds_B,
        samples=asked.num_return_sequences,
        temperature=1.0 if temperature is None else temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=asked.seed,
      )
    return search.greedy_search(ask)


GREEDY = Search()


def generate(
  model: Any,
  params: Any,
  encoder_input_tokens: jax.Array,
  max_length: int,
  how: Search = GREEDY,
  seeds_B: jax.Array | None = None,
) -> search.Found:
  """Answers of an encoder-decoder.

  The encoder and the cross-attention keys and values run once a row; beams and
  samples of a row share them.

  Args:
    model: has `config`, and methods `encode`, `decode` and `segments` (see
      models.t5.Transformer).
    params: its parameters.
    encoder_input_tokens: (B, K), padded with `config.pad_token_id`.
    max_length: most tokens of an answer, its end included.
    how: the search.
    seeds_B: uint32, each row's own, for one that draws.
  """
  config = model.config
  variables = {"params": params}
  rows = encoder_input_tokens.shape[0]
  segment_ids = model.segments(encoder_input_tokens)
  encoded_BKM = model.apply(variables, encoder_input_tokens, method="encode")

  def step(tokens_N1, cache, index):
    return model.apply(
      variables,
      encoded_BKM if cache is None else None,
      segment_ids,
      tokens_N1,
      cache=cache,
      cache_length=max_length,
      index=index,
      method="decode",
    )

  def reorder(cache, ways_BW):
    rows_N = (jnp.arange(rows)[:, None] * how.ways + ways_BW).reshape(-1)
    return cache_lib.reorder(cache, rows_N)

  prompt_BP = None
  if how.prompt:
    prompt_BP = jnp.broadcast_to(
      jnp.array(how.prompt, jnp.int32), (rows, len(how.prompt))
    )
  if seeds_B is None:
    seeds_B = jnp.arange(rows, dtype=jnp.uint32)
  ask = search.Ask(
    step,
    reorder,
    rows,
    max_length,
    start_id=config.decoder_start_token_id,
    eos_id=config.eos_token_id,
    pad_id=config.pad_token_id,
    prompt_BP=prompt_BP,
    constraint=how.constraint(config.eos_token_id),
  )
  return how(ask, seeds_B)


def make_predict_step(
  model: Any,
  partitioner: Partitioner,
  max_length: int | None,
  how: Search = GREEDY,
):
  """(params, batch) -> predictions of every row, on every host.

  `search.Found` of a language model, its tokens (B, S, max_length); of a head
  what its objective says of a row, which needs no length.
  """
  if model.config.is_language_model:

    def predict(params, batch):
      tokens = batch["encoder_input_tokens"]
      return generate(
        model, params, tokens, max_length, how, batch.get("row_numbers")
      )

  else:
    objective = objectives.of(model.config)

    def predict(params, batch):
      return objective.predict(model, params, batch)

  return partitioner.jit(predict, out_shardings=partitioner.replicated)
