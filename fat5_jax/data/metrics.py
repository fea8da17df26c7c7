"""Metrics of the T5 tasks: functions (targets, predictions) -> {name: value}.

Values are percentages, named and defined as in the T5 paper's own code.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import re
import string

import numpy as np


def _match(same) -> float:
  return 100.0 * float(np.mean([bool(s) for s in same]))


def accuracy(targets, predictions) -> dict[str, float]:
  """Share of equal values."""
  return {"accuracy": _match(t == p for t, p in zip(targets, predictions))}


def exact_match(targets, predictions) -> dict[str, float]:
  """Share of predictions equal to the target text."""
  return {"exact_match": _match(t == p for t, p in zip(targets, predictions))}


def f1_with_invalid(targets, predictions) -> dict[str, float]:
  """F1 of class 1; an invalid prediction counts as the wrong class."""
  from sklearn.metrics import f1_score

  targets, predictions = np.asarray(targets), np.asarray(predictions)
  invalid = ~np.isin(predictions, (0, 1))
  predictions = np.where(invalid, 1 - targets, predictions)
  return {"f1": 100.0 * float(f1_score(targets, predictions))}


def matthews_corrcoef(targets, predictions) -> dict[str, float]:
  """Matthews correlation, times 100."""
  from sklearn.metrics import matthews_corrcoef as matthews

  return {"matthews_corrcoef": 100.0 * float(matthews(targets, predictions))}


def pearson_corrcoef(targets, predictions) -> dict[str, float]:
  """Pearson correlation, times 100; 0 where the predictions are constant."""
  from scipy import stats

  if len(set(predictions)) < 2 or len(set(targets)) < 2:
    return {"pearson_corrcoef": 0.0}
  value = stats.pearsonr(targets, predictions)[0]
  return {"pearson_corrcoef": 100.0 * float(value)}


def spearman_corrcoef(targets, predictions) -> dict[str, float]:
  """Spearman rank correlation, times 100; 0 where they are constant."""
  from scipy import stats

  if len(set(predictions)) < 2 or len(set(targets)) < 2:
    return {"spearman_corrcoef": 0.0}
  value = stats.spearmanr(targets, predictions)[0]
  return {"spearman_corrcoef": 100.0 * float(value)}


def bleu(targets, predictions) -> dict[str, float]:
  """Corpus BLEU, sacrebleu's "intl" tokenizer."""
  import sacrebleu

  score = sacrebleu.corpus_bleu(
    list(predictions), [list(targets)], tokenize="intl"
  )
  return {"bleu": float(score.score)}


def rouge(targets, predictions) -> dict[str, float]:
  """Mean ROUGE-1, -2 and -Lsum F1, without stemming."""
  from rouge_score import rouge_scorer

  keys = ["rouge1", "rouge2", "rougeLsum"]
  scorer = rouge_scorer.RougeScorer(keys, use_stemmer=False)
  scores = [
    scorer.score(_sentence_lines(t), _sentence_lines(p))
    for t, p in zip(targets, predictions)
  ]
  return {
    key: 100.0 * float(np.mean([s[key].fmeasure for s in scores]))
    for key in keys
  }


def _sentence_lines(summary: str) -> str:
  """Sentences on lines of their own, as ROUGE-Lsum wants them."""
  return summary.replace(" . ", " .\n")


def _normalise_answer(text: str) -> str:
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _token_f1(target: str, prediction: str) -> float:
  target_tokens, prediction_tokens = target.split(), prediction.split()
  common = collections.Counter(target_tokens) & collections.Counter(
    prediction_tokens
  )
  same = sum(common.values())
  if not same:
    return 0.0
  precision, recall = same / len(prediction_tokens), same / len(target_tokens)
  return 2 * precision * recall / (precision + recall)


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """SQuAD's exact match and token F1, the best over a question's answers."""
  exact, f1 = [], []
  for answers, prediction in zip(targets, predictions):
    prediction = _normalise_answer(prediction)
    answers = [_normalise_answer(answer) for answer in answers]
    exact.append(prediction in answers)
    f1.append(max(_token_f1(answer, prediction) for answer in answers))
  return {"em": 100.0 * float(np.mean(exact)), "f1": 100.0 * float(np.mean(f1))}


BY_NAME = {
  f.__name__: f
  for f in (
    accuracy,
    exact_match,
    f1_with_invalid,
    matthews_corrcoef,
    pearson_corrcoef,
    spearman_corrcoef,
    bleu,
    rouge,
    squad,
  )
}
