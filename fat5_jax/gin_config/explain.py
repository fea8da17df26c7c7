"""gin's errors, in words for people."""

from __future__ import annotations

from collections.abc import Iterable
import importlib
import inspect
import re

from fat5_jax.errors import nearest
from fat5_jax.gin_config import private

# Where a name without a dot may belong to, if it is a parameter's.
_BOUND = {
  "fat5_jax.training.run": ("Run",),
  "fat5_jax.data.pipeline": ("DatasetConfig",),
  "fat5_jax.data.tasks": ("text_to_text",),
  "fat5_jax.data.head_tasks": ("classification", "tagging", "spans"),
  "fat5_jax.data.sources": ("Files", "HuggingFace", "Tfds"),
  "fat5_jax.optimizers": (
    "adafactor",
    "adamw",
    "create_learning_rate_scheduler",
    "muon",
  ),
  "fat5_jax.models.config": ("T5Config", "HeadConfig", "LoRAConfig"),
}


def suggest(name: str, macros: Iterable[str]) -> str:
  """What a person may have meant by a name that is no macro."""
  scope, _, bare = name.rpartition("/")
  if scope:
    return (
      f" A macro has no scope; what it is used for has: see where {bare} is"
      f" bound, as in --gin.{scope}/pipeline.DatasetConfig.batch_size=8"
    )
  by_folded = {macro.casefold(): macro for macro in macros}
  if name.casefold() in by_folded:
    return f" Did you mean {by_folded[name.casefold()]!r}?"
  owners = [
    f"{module.rpartition('.')[2]}.{function}.{name}"
    for module, functions in _BOUND.items()
    for function in functions
    if name in _parameters(getattr(importlib.import_module(module), function))
  ]
  if owners:
    return f" A parameter is set with its owner: {' or '.join(owners)}"
  return nearest(name, macros) or nearest(name.upper(), macros)


def _parameters(function) -> list[str]:
  return list(inspect.signature(function).parameters)


def explain_import(error: ImportError) -> str:
  reason = " ".join(str(error).split())
  match = re.search(r"No module named '(\w+)", reason)
  package = match[1] if match else ""
  if package in ("t5x", "t5"):
    return (
      f"gin: {reason}. This is a gin file of T5X, whose modules are not here:"
      " fat5_jax's own files have its macros. Begin yours with include"
      " 'runs/finetune.gin' and a model file (include 'models/t5_1_1/base.gin',"
      " or 'models/from_checkpoint.gin') and set the macros after them"
    )
  return f"gin: {reason}"


def explain(message: str) -> str:
  """gin's message with the nearest known name added."""
  match = re.search(
    r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
  )
  if match:
    return message.strip() + _nearest_parameter(*match.groups())
  match = re.search(r"[Nn]o configurable matching '([\w./]+)'", message)
  if match:
    return message.strip() + nearest(match[1], _configurables())
  return message.strip()


def _configurables() -> list[str]:
  names = []
  for name in private.selectors():
    parts = name.split(".")
    names += [".".join(parts[-n:]) for n in (1, 2)]
  return names


def _nearest_parameter(configurable: str, parameter: str) -> str:
  try:
    function = private.function_of(configurable)
    names = _parameters(function)
  except (KeyError, AttributeError, ValueError, TypeError):
    return ""
  return nearest(parameter, names) + f" It has: {', '.join(names)}"


def explain_call(error: Exception, function: str) -> str | None:
  """A short text for an error that gin raised while building arguments."""
  text = str(error)
  match = re.search(
    r"Required bindings for `([\w.]+)` not provided in config: (\[.*?\])", text
  )
  if match:
    return (
      f"the gin files leave {match[1]} without {match[2]}: include a run file"
      " (runs/finetune.gin, runs/pretrain.gin) and a model file"
    )
  match = re.search(
    rf"{function}(?:\.__init__)?\(\) missing \d+ required keyword-only"
    r" arguments?: (.*)",
    text,
  )
  if match:
    return (
      f"the gin files leave {function} without {match[1].splitlines()[0]}:"
      " include a run file (runs/finetune.gin, runs/pretrain.gin)"
    )
  return None
