"""Whether a task is one for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import seqio

from fat5_jax.data import features, ready
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

if TYPE_CHECKING:
  from fat5_jax.data.pipeline import DatasetConfig


def check_task(config: DatasetConfig, model_config: T5Config) -> None:
  """Raises UserError unless the task is one for the model.

  Its labels must be the head's. It may have no more token ids than the
  embedding, and SeqIO pads rows and starts decoder inputs with 0.
  """
  task = config.task()
  _check_labels(task, model_config)
  rows = model_config.vocab_size
  for name in ("inputs", "targets"):
    feature = task.output_features[name]
    if isinstance(feature, features.LabelFeature):
      continue
    if feature.vocabulary.vocab_size > rows:
      raise UserError(
        f"task {task.name!r}: the vocabulary of {name!r} has"
        f" {feature.vocabulary.vocab_size} ids, the model's embedding"
        f" {rows} rows; token ids beyond it would have no embedding."
        " Set T5Config.vocab_size or use the model's own vocabulary"
      )
    _check_ends(task, name, feature.vocabulary, model_config)
  for key in ("pad_token_id", "decoder_start_token_id"):
    if getattr(model_config, key) != 0:
      raise UserError(
        f"the model has {key} = {getattr(model_config, key)}; SeqIO's batches"
        " have 0 there, so it cannot be trained or scored on a task"
      )


def _check_ends(task, name: str, vocabulary, model_config: T5Config) -> None:
  """Raises UserError for a vocabulary of other ends and padding than T5's."""
  if isinstance(vocabulary, seqio.PassThroughVocabulary):
    return
  eos = model_config.eos_token_id
  if vocabulary.eos_id not in (None, eos):
    raise UserError(
      f"task {task.name!r}: texts of {name!r} end in id {vocabulary.eos_id},"
      f" and the model takes id {eos} for the end. A SentencePiece model is"
      " T5's with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1, as"
      " tools/train_vocabulary.py has them"
    )
  if vocabulary.unk_id == vocabulary.pad_id == 0:
    raise UserError(
      f"task {task.name!r}: what is unknown to the vocabulary of {name!r} has"
      " id 0, which is padding: train one by tools/train_vocabulary.py"
    )


# Which recipe learns which labels.
_RECIPES = {
  "sequence_classification": "recipes/classify.gin",
  "token_classification": "recipes/tag.gin",
  "question_answering": "recipes/answer.gin",
}


def text_recipe(name: str) -> str:
  """What to do with a text task where labels are wanted."""
  labelled = name.replace("_v002", "_classes")
  found = "train it with --gin_file=recipes/glue.gin"
  if labelled != name and labelled in ready.TASKS:
    found += f", or take --gin.MIXTURE_OR_TASK_NAME={labelled}"
  return f"{found}, or bind a task with labels (@head_tasks.classification())"


def _check_labels(task, model_config: T5Config) -> None:
  label, head = features.label_feature(task), model_config.head
  kind = "language_model" if head is None else head.kind
  if label is None:
    if kind not in ("language_model", "embedding"):
      raise UserError(
        f"task {task.name!r} has text as targets, and the model's head is"
        f" {kind}: {text_recipe(task.name)}"
      )
    return
  fits = kind == label.kind or (
    kind == "enct5" and label.kind == "sequence_classification"
  )
  if not fits:
    recipe = _RECIPES[label.kind]
    raise UserError(
      f"task {task.name!r} is one for a head of kind {label.kind}, the model's"
      f" is {kind}: train it with --gin_file={recipe}, or include"
      f" 'heads/{label.kind}.gin' after the model's file"
    )
  if kind == "question_answering":
    return
  if (head.problem_type, head.num_labels) != (label.problem_type, label.size):
    raise UserError(
      f"task {task.name!r} has {label.size} labels, {label.problem_type}; the"
      f" head has {head.num_labels}, {head.problem_type}"
    )
  if head.label_names and label.names and head.label_names != label.names:
    raise UserError(
      f"task {task.name!r} names its labels {', '.join(label.names)}, the head"
      f" {', '.join(head.label_names)}"
    )
