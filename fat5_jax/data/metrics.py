"""Metrics of the T5 tasks: functions (targets, predictions) -> {name: value}.

Values are percentages, named and defined as in the T5 paper's own code.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import inspect
import itertools
import re
import string
from typing import Any, NamedTuple

import numpy as np

from fat5_jax.data import thresholds
from fat5_jax.errors import UserError, nearest


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


class Entity(NamedTuple):
  """Words first ... last (both in) of one name."""

  kind: str
  first: int
  last: int


def entities(tags: Sequence[str]) -> list[Entity]:
  """The names that IOB, IOBES or IO tags mark, as seqeval reads them.

  A name begins at B- or S-, where the kind changes, after E- or S-, and at an
  I- after O.
  """
  found: list[Entity] = []
  open_kind, open_at, closed = None, 0, True
  for i, tag in enumerate([*tags, "O"]):
    prefix, _, kind = tag.partition("-")
    kind = kind or "_"
    begins = prefix in ("B", "S") or closed or kind != open_kind
    if open_kind is not None and (prefix == "O" or begins):
      found.append(Entity(open_kind, open_at, i - 1))
      open_kind = None
    if prefix != "O" and open_kind is None:
      open_kind, open_at = kind, i
    closed = prefix in ("E", "S")
  return found


def _sentences(rows) -> list[list[str]]:
  """The tags of each sentence; a long one comes in several rows, in order.

  Rows that are apart are no windows of one: processes that prepare data each
  number their own (NUM_WORKERS).
  """
  windows = itertools.groupby(rows, key=lambda row: row["sentence"])
  return [[t for row in found for t in row["tags"]] for _, found in windows]


def entity_f1(targets, predictions) -> dict[str, float]:
  """Precision, recall and F1 of whole names (conlleval's, seqeval's micro)."""
  targets, predictions = _sentences(targets), _sentences(predictions)
  correct = wanted = given = 0
  for tags, given_tags in zip(targets, predictions, strict=True):
    target = set(entities(tags))
    prediction = set(entities(given_tags))
    correct += len(target & prediction)
    wanted, given = wanted + len(target), given + len(prediction)
  precision, recall = correct / max(given, 1), correct / max(wanted, 1)
  f1 = 2 * precision * recall / max(precision + recall, 1e-12)
  return {
    "entity_precision": 100.0 * precision,
    "entity_recall": 100.0 * recall,
    "entity_f1": 100.0 * f1,
  }


def tag_accuracy(targets, predictions) -> dict[str, float]:
  """Share of words with the right tag."""
  pairs = zip(targets, predictions)
  same = [
    t == p for a, b in pairs for t, p in zip(a["tags"], b["tags"], strict=True)
  ]
  return {"tag_accuracy": _match(same)}


def best_span(one: Mapping[str, Any], other: Mapping[str, Any]):
  """Of two windows' answers to a question the one with the highest score.

  No answer scores as in the window where it scores least, as in BERT's
  run_squad.py.
  """
  best = max(one, other, key=lambda row: row["score"])
  if "no_answer" not in best:
    return best
  return {**best, "no_answer": min(one["no_answer"], other["no_answer"])}


def best_spans(
  rows: Iterable[Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
  """The answer of each question, of all its windows."""
  best: dict[str, Mapping[str, Any]] = {}
  for row in rows:
    known = best.get(row["id"])
    best[row["id"]] = row if known is None else best_span(known, row)
  return best


def decide_answer(row: Mapping[str, Any], threshold: float | None):
  """An answer, empty where no answer is better by more than the threshold."""
  if threshold is None or row["no_answer"] - row["score"] <= threshold:
    return row
  return {**row, "text": ""}


def span_squad(targets, predictions, no_answer_threshold=None):
  """SQuAD's exact match and F1 of questions whose contexts came in windows.

  Where some have no answer, also SQuAD 2.0's `best_exact` and `best_f1`, the
  thresholds of NO_ANSWER_THRESHOLD that give them, and both kinds of questions
  apart.
  """
  # What is nothing but articles and marks is no answer (evaluate-v2.0.py).
  answers = {
    row["id"]: [a for a in row["answers"] if _normalise_answer(a)] or [""]
    for row in targets
  }
  spans = best_spans(predictions)
  given = {
    q: decide_answer(spans[q], no_answer_threshold)["text"] for q in answers
  }
  exact, f1 = _answer_scores(answers, given)
  mean = lambda values: 100.0 * float(np.mean(values))
  found = {"em": mean([*exact.values()]), "f1": mean([*f1.values()])}
  has_answer = {row["id"]: bool(row["answers"]) for row in targets}
  if all(has_answer.values()) or "no_answer" not in next(iter(spans.values())):
    return found
  for name, wanted in (("HasAns", True), ("NoAns", False)):
    of_kind = [q for q in answers if has_answer[q] == wanted]
    if of_kind:
      found[f"{name}_f1"] = mean([f1[q] for q in of_kind])
  # The best is looked for among the answers as if none were left out.
  texts = {q: spans[q]["text"] for q in answers}
  exact, f1 = _answer_scores(answers, texts)
  without = {q: spans[q]["no_answer"] - spans[q]["score"] for q in answers}
  is_empty = {q: not _normalise_answer(text) for q, text in texts.items()}
  for name, values in (("exact", exact), ("f1", f1)):
    threshold, best = thresholds.best_no_answer(
      without, values, has_answer, is_empty
    )
    found[f"best_{name}"] = 100.0 * best
    found[f"best_{name}_thresh"] = threshold
  return found


def _answer_scores(
  answers: Mapping[str, Sequence[str]], texts: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
  """(exact match, F1) by question; nothing for nothing is right."""
  exact, f1 = {}, {}
  for question, accepted in answers.items():
    text = _normalise_answer(texts[question])
    wanted = [_normalise_answer(answer) for answer in accepted]
    exact[question] = float(text in wanted)
    f1[question] = max(
      _token_f1(answer, text) if answer and text else float(answer == text)
      for answer in wanted
    )
  return exact, f1


def multilabel_f1(targets, predictions) -> dict[str, float]:
  """Micro and macro F1 of rows of 0 and 1, and the share of rows all right."""
  from sklearn.metrics import f1_score

  targets, predictions = np.asarray(targets), np.asarray(predictions)
  return {
    "f1_micro": 100.0
    * float(f1_score(targets, predictions, average="micro", zero_division=0)),
    "f1_macro": 100.0
    * float(f1_score(targets, predictions, average="macro", zero_division=0)),
    "subset_accuracy": _match((targets == predictions).all(axis=1)),
  }


def mean_3class_f1(targets, predictions) -> dict[str, float]:
  """Unweighted mean of the F1 of three classes (CB)."""
  from sklearn.metrics import f1_score

  value = f1_score(
    targets, predictions, labels=range(3), average="macro", zero_division=0
  )
  return {"mean_3class_f1": 100.0 * float(value)}


def multirc(targets, predictions) -> dict[str, float]:
  """F1 over all answers (F1a), and the share of questions all right (EM).

  Values are {"value": class}, those of targets with the "group" of an answer:
  its question. An invalid prediction is wrong.
  """
  right: dict[str, bool] = {}
  for target, prediction in zip(targets, predictions):
    same = target["value"] == prediction["value"]
    right[target["group"]] = right.get(target["group"], True) and same
  values = lambda rows: [row["value"] for row in rows]
  return f1_with_invalid(values(targets), values(predictions)) | {
    "exact_match": _match(right.values())
  }


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
    entity_f1,
    tag_accuracy,
    span_squad,
    multilabel_f1,
    mean_3class_f1,
    multirc,
  )
}


def find(
  metrics: Sequence[str | Callable[..., Any]], task: str
) -> list[Callable[..., Any]]:
  """Metric functions by name; functions stay.

  Raises:
    UserError: for an unknown name, in the words of `task`.
  """
  for metric in metrics:
    if isinstance(metric, str) and metric not in BY_NAME:
      raise UserError(
        f"task {task!r}: unknown metric {metric!r}."
        f"{nearest(metric, BY_NAME)} Known: {', '.join(BY_NAME)}"
      )
  found = [BY_NAME[m] if isinstance(m, str) else m for m in metrics]
  check(found, task)
  return found


def arguments(metric: Callable[..., Any]) -> list[str]:
  """The names that a metric must be given, as SeqIO looks for them."""
  return [
    name
    for name, parameter in inspect.signature(metric).parameters.items()
    if parameter.default is inspect.Parameter.empty
    and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
  ]


# What a metric may ask for, as seqio.Task's metric_fns do.
_ARGUMENTS = (
  ["targets", "predictions"],
  ["targets", "scores"],
  ["targets", "predictions", "aux_values"],
)


def check(metrics: Sequence[Callable[..., Any]], task: str) -> None:
  """Raises UserError for a metric of what an evaluation does not compute."""
  for metric in metrics:
    required = arguments(metric)
    if required not in _ARGUMENTS:
      name = getattr(metric, "__name__", repr(metric))
      known = ", ".join(f"({', '.join(names)})" for names in _ARGUMENTS)
      raise UserError(
        f"task {task!r}: metric {name} asks for {', '.join(required)}; an"
        f" evaluation gives one of {known}"
      )
