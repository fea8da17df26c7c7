"""What a model is asked in Python: texts in, answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from fat5_jax.api import questions as ask
from fat5_jax.api.predict import Answers, Options
from fat5_jax.api.words import of_python
from fat5_jax.errors import UserError, nearest
from fat5_jax.inference.decoding import Decoding
from fat5_jax.models.config import T5Config

CLASSIFIERS = ("sequence_classification", "enct5")
_SEARCH = [field.name for field in dataclasses.fields(Decoding)]


class Asks:
  """The predictions of a Model."""

  config: T5Config

  def _ask(self, *kinds: str) -> Answers:
    """What answers, if the model is of one of these kinds (all: of any)."""
    raise NotImplementedError

  def generate(
    self,
    texts: Sequence[str | Mapping[str, Any]],
    max_tokens: int = 256,
    *,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    use_template: bool = True,
    with_scores: bool = False,
    **search: Any,
  ) -> list[Any]:
    """An answer to each text: the most likely token after the other.

    A model from a run folder is asked in the words of its training, as `infer`
    does: a text is the column that the template asks about, a dictionary a row
    of its columns.

    Args:
      texts: texts, or rows.
      max_tokens: of an answer.
      batch_size: texts at a time.
      max_input_tokens: longer texts are cut there (and it is said); None cuts
        none.
      use_template: False takes texts as whole inputs.
      with_scores: whether a `score` is wanted beside each `prediction`, in a
        dictionary: the log-probability of its tokens; of beams as they compare.
      **search: how answers are searched for, by Hugging Face's names:
        `num_beams`, `num_return_sequences`, `length_penalty`, `temperature`,
        `top_k`, `top_p`, `no_repeat_ngram_size`, `allowed_outputs` and others,
        see inference.decoding.Decoding.

    Returns:
      A text for each; a list of them, the best first, where
      `num_return_sequences` is more than 1.

    Raises:
      UserError: for what are no texts, for a setting that is none, and on a
        head.
    """
    _check_search(search)
    with of_python():
      options = Options(batch_size, max_input_tokens, max_tokens, use_template)
      texts = ask.listed(texts, "texts")
      found = self._ask("language_model")
      decoding = Decoding(**search)
      if not texts:
        return []
      return found.generate(texts, options, decoding, with_scores)

  def score(
    self,
    inputs: Sequence[str | Mapping[str, Any]],
    targets: Sequence[str],
    *,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    use_template: bool = True,
  ) -> np.ndarray:
    """The log-likelihood of each target given its input, float64 (N,).

    The natural logarithm, summed over the target's tokens and its end: what
    Hugging Face's loss is, times minus the number of tokens.

    Raises:
      UserError: for lists that differ in length, and on a head.
    """
    with of_python():
      options = Options(batch_size, max_input_tokens, 1, use_template)
      inputs = ask.listed(inputs, "inputs")
      targets = ask.listed(targets, "targets")
      ask.same_length(inputs=inputs, targets=targets)
      found = self._ask("language_model")
      return found.score(inputs, targets, options)

  def rank(
    self,
    texts: Sequence[str | Mapping[str, Any]],
    choices: Sequence[str],
    **options: Any,
  ) -> list[dict[str, Any]]:
    """The likeliest of some answers to each text: rank classification.

    `options` are those of `score`.

    Returns:
      `prediction`, one of the choices, and `scores`, each one's log-likelihood.
    """
    with of_python():
      texts = ask.listed(texts, "texts")
      choices = ask.listed(choices, "choices")
    if not texts or not choices:
      return []
    asked = [text for text in texts for _ in choices]
    found = self.score(asked, list(choices) * len(texts), **options)
    return [
      {
        "prediction": choices[int(row.argmax())],
        "scores": dict(zip(choices, row.tolist())),
      }
      for row in found.reshape(len(texts), len(choices))
    ]

  def embed(
    self,
    texts: Sequence[str | Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    use_template: bool = True,
  ) -> np.ndarray:
    """A vector of length one for each text, float32 (N, emb_dim).

    That of an embedding head; of any other T5 the mean of the encoder's last
    states over the text's tokens (its end among them), scaled to length one.
    """
    with of_python():
      options = Options(batch_size, max_input_tokens, 1, use_template)
      texts = ask.listed(texts, "texts")
      if not texts:
        return np.zeros((0, self.config.emb_dim), np.float32)
      return self._ask().embed(texts, options)

  def classify(
    self,
    texts: Sequence[str | tuple[str, str] | Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    use_template: bool = True,
  ) -> list[dict[str, Any]]:
    """The label of each text, or pair of texts, with probabilities.

    Returns:
      Of a single label `prediction` (its name), `label` (its number),
      `probability` and `probabilities` by name; of several `prediction` (a list
      of names) and `probabilities`; of regression `prediction`.
    """
    with of_python():
      options = Options(batch_size, max_input_tokens, 1, use_template)
      texts = ask.listed(texts, "texts")
      found = self._ask(*CLASSIFIERS)
      return found.classify(texts, options) if texts else []

  def tag(
    self,
    words: Sequence[str | Sequence[str]],
    *,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
    use_template: bool = True,
  ) -> list[dict[str, Any]]:
    """A tag for each word of each sentence, with its probability.

    Args:
      words: sentences, each a list of words, or a text with spaces between.
      batch_size: windows at a time.
      max_input_tokens: of a window; a longer sentence comes in several.
      use_template: False reads the words as they are.

    Returns:
      `words`, `tags` and `probabilities` of each sentence, as many.
    """
    with of_python():
      options = Options(batch_size, max_input_tokens, 1, use_template)
      words = ask.listed(words, "words")
      found = self._ask("token_classification")
      return found.tag(words, options) if words else []

  def answer(
    self,
    questions: Sequence[str],
    contexts: Sequence[str],
    *,
    batch_size: int = 32,
    max_input_tokens: int | None = None,
  ) -> list[dict[str, Any]]:
    """The span of each context that answers its question.

    Returns:
      `text`, `score` (the sum of the logits of its ends) and `probability`
      (among the spans of its window, as Hugging Face's pipeline has it).
    """
    with of_python():
      options = Options(batch_size, max_input_tokens, 1)
      asked = ask.listed(questions, "questions")
      contexts = ask.listed(contexts, "contexts")
      ask.same_length(questions=asked, contexts=contexts)
      found = self._ask("question_answering")
      return found.answer(asked, contexts, options) if asked else []


def _check_search(search: Mapping[str, Any]) -> None:
  """Raises UserError for what is no setting of a search."""
  for name in search:
    if name in ("max_new_tokens", "max_length"):
      raise UserError(f"{name} is max_tokens here")
    if name not in _SEARCH:
      raise UserError(
        f"generate has no argument {name!r}.{nearest(name, _SEARCH)}"
      )
