"""The model that a T5Config describes."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import importlib
import json
from typing import Any

import flax.linen as nn

from fat5_jax.models import heads, layers
from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config
from fat5_jax.models.enct5 import EncT5
from fat5_jax.models.t5 import Transformer


def own_head(model: nn.Module) -> dict[str, Any] | None:
  """What a head module of a person's own is, as JSON; None for ours.

  `module` is its importable name, `fields` what it was made with.

  Raises:
    ValueError: for a module that cannot be made again from such a record.
  """
  head = model.head
  if head is None or type(head) is layers.HeadLayers:
    return None
  kind = type(head)
  name = f"{kind.__module__}:{kind.__qualname__}"
  if "<" in name:
    raise ValueError(
      f"{name}: a head module must be a class at the top of a module, or no"
      " command can make it again"
    )
  fields = {
    field.name: getattr(head, field.name)
    for field in dataclasses.fields(head)
    if field.init and field.name not in ("parent", "name")
  }
  try:
    return {"module": name, "fields": json.loads(json.dumps(fields))}
  except TypeError as e:
    raise ValueError(
      f"{name}: its fields must be plain data, to be written down: {e}"
    ) from None


def import_head(record: Mapping[str, Any]) -> nn.Module:
  """The module that `own_head` described; runs the code of its module.

  Raises:
    ValueError: if it is not there.
  """
  module, _, name = record["module"].partition(":")
  try:
    kind = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as e:
    raise ValueError(f"head module {record['module']}: {e}") from None
  return make_head(kind, record["fields"])


def make_head(kind: type[nn.Module], fields: Mapping[str, Any]) -> nn.Module:
  """A head module from its class and the fields that `own_head` wrote."""
  lists = lambda x: tuple(x) if isinstance(x, list) else x
  return kind(**{key: lists(x) for key, x in fields.items()})


_CLASSES = {
  cls.kind: cls
  for cls in (
    heads.SequenceClassifier,
    heads.TokenClassifier,
    heads.QuestionAnswerer,
    heads.SentenceEmbedder,
    EncT5,
  )
}


def create(
  config: T5Config,
  head: HeadConfig | None = None,
  lora: LoRAConfig | None = None,
  head_layers: nn.Module | None = None,
) -> nn.Module:
  """The model: a Transformer, or what its head says.

  Args:
    config: of the T5; its decoder layers beyond what the head keeps are left
      out.
    head: takes the place of the config's own.
    lora: likewise.
    head_layers: a module in place of the head's own hidden layers; see
      models/heads.py. A run folder holds its name (`own_head`), and `eval` and
      `infer` import it when they are told to.

  Raises:
    ValueError: for a config that no model has.
  """
  config = config.with_head(head or config.head)
  if lora is not None:
    config = config.replace(lora=lora)
  if config.is_language_model:
    return Transformer(config, head_layers)
  return _CLASSES[config.head.kind](config, head_layers)
