"""The heads of Hugging Face and FAT5: their tensors and their config.json.

Hugging Face's classes wrap some bodies in `transformer.`; heads that it has not
(encoder-only sequence classification and question answering) are written under
FAT5's names, which have no prefix. What config.json has no words for (pooling,
hidden widths) is kept under the key `fat5_jax`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from fat5_jax.convert import table
from fat5_jax.convert.table import Leaf
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

_PREFIXES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
_CLASSES = {
  ("language_model", "encoder"): "ForConditionalGeneration",
  ("sequence_classification", "encoder_decoder"): "ForSequenceClassification",
  ("token_classification", "encoder"): "ForTokenClassification",
  ("question_answering", "encoder_decoder"): "ForQuestionAnswering",
  ("embedding", "encoder"): "EncoderModel",
}


def prefix(config: T5Config) -> str:
  """What HF puts before the names of the body."""
  head = config.head
  if head is None:
    return ""
  wrapped = head.kind == "token_classification" or (
    head.kind == "sequence_classification" and head.body == "encoder_decoder"
  )
  return "transformer." if wrapped else ""


def has_class(config: T5Config) -> bool:
  """Whether transformers has a class for the head."""
  return (config.head.kind, config.head.body) in _CLASSES


def rows(config: T5Config) -> list[table.Row]:
  """The tensors of the head.

  Raises:
    UserError: for layers that neither HF nor FAT5 has.
  """
  head, emb = config.head, config.emb_dim
  if head is None or head.kind == "embedding":
    return []
  widths = head.hidden_widths(emb)
  is_sequence = head.kind == "sequence_classification"
  published = widths in ((emb,), ()) if is_sequence else widths == ()
  if widths and head.activation != "tanh":
    published = False
  if not published or head.kind in ("language_model", "enct5"):
    raise UserError(
      f"a head of kind {head.kind} with widths {widths} and activation"
      f" {head.activation} has no Hugging Face names; keep it as fat5"
      + (", or --to enct5" if head.kind == "enct5" else "")
    )
  name = "qa_outputs" if head.kind == "question_answering" else "classifier"
  found: list[table.Row] = []
  if widths:
    name = "classification_head.out_proj"
    found = dense("classification_head.dense", ("head", "dense_0"), emb, emb)
  return found + dense(name, ("classifier",), emb, head.num_labels)


def dense(
  foreign: str, path: tuple[str, ...], inputs: int, outputs: int
) -> list[table.Row]:
  """The kernel and the bias of a torch Linear."""
  return [
    table.Row(f"{foreign}.weight", (*path, "kernel"), (inputs, outputs), True),
    table.Row(f"{foreign}.bias", (*path, "bias"), (outputs,)),
  ]


def config_json(config: T5Config) -> dict[str, Any]:
  """What a head adds to config.json."""
  head = config.head
  if head is None:
    return {"architectures": [f"{_PREFIXES[config.model_type]}{_LM}"]}
  found = labels_json(head)
  name = _CLASSES.get((head.kind, head.body))
  if name is not None:
    found["architectures"] = [_PREFIXES[config.model_type] + name]
  return found


_LM = _CLASSES["language_model", "encoder"]


def labels_json(head: HeadConfig) -> dict[str, Any]:
  """Labels, problem and dropout in HF's words, the rest in ours."""
  found: dict[str, Any] = {"fat5_jax": {"head": dataclasses.asdict(head)}}
  if head.kind == "embedding":
    return found
  names = head.label_names or [f"LABEL_{i}" for i in range(head.num_labels)]
  found |= {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
    "classifier_dropout": head.dropout_rate,
  }
  if head.kind in ("sequence_classification", "enct5"):
    found["problem_type"] = head.problem_type
  return found


def read(
  hf: Mapping[str, Any], tensors: Mapping[str, Leaf], path: str
) -> HeadConfig | None:
  """The head that config.json and the tensors tell of; None for none."""
  own = hf.get("fat5_jax", {}).get("head")
  if own is not None:
    try:
      return HeadConfig(**own)
    except (TypeError, ValueError) as e:
      raise UserError(f"{path}: fat5_jax.head: {e}") from None
  outputs = {
    "classification_head.out_proj.weight": "sequence_classification",
    "qa_outputs.weight": "question_answering",
    "classifier.weight": "token_classification",
  }
  name = next((n for n in outputs if n in tensors), None)
  if name is None:
    return None
  kind, (num_labels, _) = outputs[name], tensors[name].shape
  both = any(".block." in n and "decoder." in n for n in tensors)
  options: dict[str, Any] = {}
  architectures = str(hf.get("architectures"))
  if kind == "token_classification" and "SequenceClassification" in (
    architectures
  ):
    # EncT5 of monologg and TART: a projection of the first token, `<s>`.
    kind = "sequence_classification"
    options = {"widths": (), "pooling": "first"}
  if kind == "sequence_classification":
    options["problem_type"] = problem_type(hf, num_labels)
  if kind != "question_answering":
    options["label_names"] = label_names(hf, num_labels)
  return HeadConfig(
    kind,
    num_labels=num_labels,
    body="encoder_decoder" if both else "encoder",
    dropout_rate=hf.get("classifier_dropout") or 0.0,
    **options,
  )


def problem_type(hf: Mapping[str, Any], num_labels: int) -> str:
  """HF's rule where config.json does not say it."""
  found = hf.get("problem_type")
  if found is None:
    return "regression" if num_labels == 1 else "single_label_classification"
  return found


def label_names(hf: Mapping[str, Any], num_labels: int) -> tuple[str, ...]:
  """The names of the labels; none where they are HF's LABEL_0, LABEL_1."""
  found = hf.get("id2label") or {}
  names = tuple(str(found.get(str(i), "")) for i in range(num_labels))
  if not all(names) or names == tuple(f"LABEL_{i}" for i in range(num_labels)):
    return ()
  return names
