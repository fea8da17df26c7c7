"""Which parameters train, and trees cut in two."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from fat5_jax import trees
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config


def choose(
  params: Mapping[str, Any], trainable: str | None, frozen: str | None
) -> frozenset[tuple[str, ...]]:
  """The paths of the parameters that train.

  Args:
    params: parameters, or their shapes.
    trainable: regular expression, searched in names such as
      `encoder/layers_0/attention/query/kernel`; None is all of them.
    frozen: likewise, those of them that do not train after all; None is none.

  Raises:
    UserError: for a pattern that is no regular expression or matches nothing,
      if nothing trains, or if scanned layers differ.
  """
  flat = trees.flatten(params)
  names = {path: trees.names_of(path, leaf) for path, leaf in flat.items()}
  everything = [name for group in names.values() for name in group]
  tests = []
  for macro, pattern in (("TRAINABLE", trainable), ("FROZEN", frozen)):
    tests.append(None if pattern is None else trees.searcher(macro, pattern))
    if tests[-1] is not None and not any(map(tests[-1], everything)):
      raise UserError(
        f"{macro} = {pattern!r} matches no parameter; their names are like"
        f" {everything[0]} and {everything[-1]} (--dry_run prints all)"
      )
  take, leave = tests
  chosen = set()
  for path, group in names.items():
    trains = {
      (take is None or bool(take(name)))
      and not (leave is not None and leave(name))
      for name in group
    }
    if len(trains) > 1:
      raise UserError(
        f"the patterns choose some layers of {trees.name_of(path)} and not"
        " others; with SCAN_LAYERS = True all layers are one parameter. Set it"
        " to False"
      )
    if trains == {True}:
      chosen.add(path)
  if not chosen:
    raise UserError(
      f"TRAINABLE = {trainable!r} and FROZEN = {frozen!r} leave nothing to"
      " train"
    )
  return frozenset(chosen)


def check_lora(params: Mapping[str, Any], config: T5Config) -> None:
  """Raises UserError for a LoRA target that no projection has the name of."""
  if config.lora is None:
    return
  names = [
    trees.name_of(path[:-1])
    for path in trees.flatten(params)
    if path[-1] == "lora_a"
  ]
  for target in config.lora.targets:
    alone = dataclasses.replace(config.lora, targets=(target,))
    if not any(map(alone.applies_to, names)):
      raise UserError(
        f"LORA_TARGETS: the model has no projection {target!r}; it has"
        " attention's query, key, value and out, and the MLP's kernels"
        " (--dry_run prints all names)"
      )


def split(
  params: Mapping[str, Any], chosen: frozenset[tuple[str, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(the parameters that train, the others), each a tree without gaps."""
  flat = trees.flatten(params)
  return (
    trees.nest({path: x for path, x in flat.items() if path in chosen}),
    trees.nest({path: x for path, x in flat.items() if path not in chosen}),
  )


def merge(some: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `split`."""
  return trees.nest({**trees.flatten(some), **trees.flatten(others)})
