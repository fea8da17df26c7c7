"""The model that a T5Config describes."""

from __future__ import annotations

import flax.linen as nn

from fat5_jax.models import heads
from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config
from fat5_jax.models.enct5 import EncT5
from fat5_jax.models.t5 import Transformer

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
      models/heads.py. It is not written down with a checkpoint, so `eval` and
      `infer` need it given again.

  Raises:
    ValueError: for a config that no model has.
  """
  config = config.with_head(head or config.head)
  if lora is not None:
    config = config.replace(lora=lora)
  if config.is_language_model:
    return Transformer(config, head_layers)
  return _CLASSES[config.head.kind](config, head_layers)
