"""The heads of Hugging Face, FAT5 and our own: tensors and config.json.

An exported folder has one of three forms. `stock`: transformers has the class,
in 4.37 and 5. `tokens`: one linear layer on the encoder, which transformers 5
has as ForTokenClassification. `code`: no version has the class, the folder
brings one (shipped/modeling_fat5_jax.py), and its config.json says nothing that
a T5Config takes. FAT5 has names of its own for heads on the encoder, without
`transformer.`; those are read too (`published`). What config.json has no words
for (pooling, hidden widths) is kept under the key `fat5_jax`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
from typing import Any, Literal

import numpy as np

from fat5_jax.convert import table
from fat5_jax.convert.table import Leaf
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

PREFIXES = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
CODE = "modeling_fat5_jax"
CODE_FILE = f"{CODE}.py"
# Of the class that a `code` folder brings, and of the Auto class that finds it.
ENDINGS = {
  "language_model": ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
  "sequence_classification": (
    "ForSequenceClassification",
    "AutoModelForSequenceClassification",
  ),
  "token_classification": (
    "ForTokenClassification",
    "AutoModelForTokenClassification",
  ),
  "question_answering": (
    "ForQuestionAnswering",
    "AutoModelForQuestionAnswering",
  ),
  "embedding": ("EncoderModel", "AutoModel"),
  "enct5": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
}
# An empty tensor under a name that classes with a decoder have: they refuse
# the folder for its shape, where they would make up a decoder and answer.
_GUARD = "decoder.final_layer_norm.weight"

Form = Literal["stock", "tokens", "code"]


def form(config: T5Config) -> Form:
  """Which form an export has; see the module's head."""
  head = config.head
  if head is None or head.kind == "embedding":
    return "stock"
  widths = head.hidden_widths(config.emb_dim)
  if head.kind == "language_model":
    return "code" if widths else "stock"
  if head.kind == "enct5":
    return "code"
  if head.body == "encoder":
    return "code" if widths else "tokens"
  if head.kind == "question_answering":
    return "code" if widths else "stock"
  published = widths == (config.emb_dim,) and head.activation == "tanh"
  return "stock" if published and head.pooled == "eos" else "code"


def prefix(config: T5Config, published: bool = False) -> str:
  """What stands before the names of the body."""
  head = config.head
  if head is None or head.kind == "embedding":
    return ""
  if form(config) == "stock":
    wrapped = head.kind == "sequence_classification"
  else:
    wrapped = head.kind == "token_classification" or not published
  return "transformer." if wrapped else ""


def rows(config: T5Config, published: bool = False) -> list[table.Row]:
  """The tensors of the head.

  Args:
    config: of the model.
    published: under the names of FAT5, where they are others.

  Raises:
    UserError: for layers that the format has no names for.
  """
  head, emb = config.head, config.emb_dim
  if head is None or head.kind == "embedding":
    return []
  widths = head.hidden_widths(emb)
  is_lm = head.kind == "language_model"
  if form(config) == "stock" or published:
    return [] if is_lm and not widths else _published_rows(head, emb)
  if is_lm:
    return _hidden_rows("head", widths, emb)
  if head.kind == "enct5":
    return _prompt_rows(head, emb)
  found = _hidden_rows("head", widths, emb)
  last = (emb, *widths)[-1]
  return found + dense("classifier", ("classifier",), last, head.num_labels)


def _published_rows(head: HeadConfig, emb: int) -> list[table.Row]:
  widths = head.hidden_widths(emb)
  is_sequence = head.kind == "sequence_classification"
  published = widths in ((emb,), ()) if is_sequence else widths == ()
  if (
    not published
    or (widths and head.activation != "tanh")
    or head.kind in ("language_model", "enct5")
  ):
    raise UserError(
      f"a head of kind {head.kind} with widths {widths} and activation"
      f" {head.activation} has no names in FAT5; keep it as fat5, or --to hf"
      + (" or enct5" if head.kind == "enct5" else "")
    )
  name = "qa_outputs" if head.kind == "question_answering" else "classifier"
  found: list[table.Row] = []
  if widths:
    name = "classification_head.out_proj"
    found = dense("classification_head.dense", ("head", "dense_0"), emb, emb)
  return found + dense(name, ("classifier",), emb, head.num_labels)


def _prompt_rows(head: HeadConfig, emb: int) -> list[table.Row]:
  """EncT5's, as hackyon names them; its hidden layers are only ours."""
  widths = head.hidden_widths(emb)
  last = (emb, *widths)[-1]
  name, path = "classification_head", ("classifier",)
  found = [
    table.Row(
      "transformer.decoder.embed_tokens.weight",
      ("prompt_embedder", "embedding"),
      (head.prompts, emb),
    ),
    *_hidden_rows(name, widths, emb),
  ]
  if head.problem_type == "multi_label_classification":
    return found + [
      table.Row(f"{name}.weights", (*path, "kernel"), (head.num_labels, last)),
      table.Row(f"{name}.biases", (*path, "bias"), (head.num_labels,)),
    ]
  return found + dense(f"{name}.out_proj", path, last, head.num_labels)


def _hidden_rows(
  foreign: str, widths: tuple[int, ...], emb: int
) -> list[table.Row]:
  found: list[table.Row] = []
  for i, (inputs, outputs) in enumerate(zip((emb, *widths), widths)):
    name = f"dense_{i}"
    found += dense(f"{foreign}.{name}", ("head", name), inputs, outputs)
  return found


def dense(
  foreign: str, path: tuple[str, ...], inputs: int, outputs: int
) -> list[table.Row]:
  """The kernel and the bias of a torch Linear."""
  return [
    table.Row(f"{foreign}.weight", (*path, "kernel"), (inputs, outputs), True),
    table.Row(f"{foreign}.bias", (*path, "bias"), (outputs,)),
  ]


def guards(config: T5Config, tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
  """The tensors with what keeps classes of another shape away; see _GUARD."""
  if config.num_decoder_layers:
    return dict(tensors)
  name = prefix(config) + _GUARD
  return dict(tensors) | {name: table.leaf_of(np.zeros(0, np.float32))}


# Ours, and FAT5's of flash_t5.py.
_GUARDS = (_GUARD, "encoder.block.0.layer.0.layer_norm.weight")


def without_guards(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
  """The tensors of a folder that hold something."""
  return {
    name: leaf
    for name, leaf in tensors.items()
    if leaf.shape != (0,) or name.removeprefix("transformer.") not in _GUARDS
  }


def code_text() -> str:
  """The modelling file that a folder brings."""
  here = os.path.dirname(os.path.abspath(__file__))
  with open(os.path.join(here, "shipped", CODE_FILE), encoding="utf-8") as file:
    return file.read()


def auto_map(config: T5Config) -> dict[str, str]:
  """Where the Auto classes of transformers find the modelling file's."""
  ending, auto_class = ENDINGS[config.head.kind]
  found = {
    "AutoConfig": f"{CODE}.Fat5JaxConfig",
    auto_class: f"{CODE}.Fat5{ending}",
  }
  return found


def loaded_by(config: T5Config) -> tuple[str, bool]:
  """The class of transformers that answers as the model does, and whether it is
  the folder's own code."""
  head = config.head
  if head is None:
    return "AutoModelForSeq2SeqLM", False
  if head.kind == "embedding":
    return f"{PREFIXES[config.model_type]}EncoderModel", False
  return ENDINGS[head.kind][1], form(config) != "stock"


def config_json(config: T5Config, body: Mapping[str, Any]) -> dict[str, Any]:
  """config.json of the form that the head has.

  Args:
    config: of the model.
    body: what describes its T5.
  """
  head, kind = config.head, form(config)
  family = PREFIXES[config.model_type]
  if head is None:
    return dict(body) | {"architectures": [f"{family}ForConditionalGeneration"]}
  ending, _ = ENDINGS[head.kind]
  labels = labels_json(head)
  if kind == "stock":
    return {**body, **labels, "architectures": [family + ending]}
  labels["auto_map"] = auto_map(config)
  if kind == "tokens":
    name = f"{family}ForTokenClassification"
    return {**body, **labels, "architectures": [name]}
  own = labels["fat5_jax"]
  # Under another name than `model_type`: transformers 5 takes a dictionary with
  # the model_type that it looks for out of any config.json.
  inside = dict(body)
  inside["family"] = inside.pop("model_type")
  if head.kind == "language_model":
    own["logits_via_embedding"] = config.logits_via_embedding
    own["scale_decoder_outputs"] = config.scales_decoder_outputs
  return labels | {
    "architectures": [f"Fat5{ending}"],
    "model_type": "fat5_jax",
    "t5": inside,
    # No T5Config takes this value, so that no stock class loads the folder.
    "feed_forward_proj": "see-README.md",
    "is_encoder_decoder": head.kind == "language_model",
    "hidden_size": config.emb_dim,
    "vocab_size": config.vocab_size,
    **{
      key: body[key]
      for key in ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    },
  }


def labels_json(head: HeadConfig) -> dict[str, Any]:
  """Labels, problem and dropout in HF's words, the rest in ours."""
  found: dict[str, Any] = {"fat5_jax": {"head": dataclasses.asdict(head)}}
  if head.kind in ("embedding", "language_model"):
    return found
  names = label_names_of(head)
  found |= {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
    "classifier_dropout": head.dropout_rate,
  }
  if head.kind in ("sequence_classification", "enct5"):
    found["problem_type"] = head.problem_type
  return found


def label_names_of(head: HeadConfig) -> list[str]:
  """What the outputs are called."""
  if head.label_names:
    return list(head.label_names)
  if head.kind == "question_answering":
    return ["start", "end"]
  return [f"LABEL_{i}" for i in range(head.num_labels)]


def read(
  hf: Mapping[str, Any], tensors: Mapping[str, Leaf], path: str
) -> HeadConfig | None:
  """The head that config.json and the tensors tell of; None for none."""
  own = own_part(hf).get("head")
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
  if len(tensors[name].shape) != 2:
    raise UserError(
      f"{path}: tensor {name} is {tensors[name].shape}, which is no matrix"
    )
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
  try:
    return HeadConfig(
      kind,
      num_labels=num_labels,
      body="encoder_decoder" if both else "encoder",
      dropout_rate=hf.get("classifier_dropout") or 0.0,
      **options,
    )
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None


def own_part(hf: Mapping[str, Any]) -> dict[str, Any]:
  """What config.json keeps under our own key."""
  own = hf.get("fat5_jax", {})
  if not isinstance(own, dict):
    raise UserError("config.json: fat5_jax is no JSON object")
  return own


def problem_type(hf: Mapping[str, Any], num_labels: int) -> str:
  """HF's rule where config.json does not say it."""
  found = hf.get("problem_type")
  if found is None:
    return "regression" if num_labels == 1 else "single_label_classification"
  return found


def label_names(hf: Mapping[str, Any], num_labels: int) -> tuple[str, ...]:
  """The names of the labels; none where they are HF's LABEL_0, LABEL_1."""
  found = hf.get("id2label") or {}
  if not isinstance(found, dict):
    raise UserError(f"config.json: id2label is {str(found)[:80]!r}, no object")
  names = tuple(str(found.get(str(i), "")) for i in range(num_labels))
  if not all(names) or names == tuple(f"LABEL_{i}" for i in range(num_labels)):
    return ()
  return names
