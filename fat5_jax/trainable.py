"""Which parameters train: patterns over their names, and trees cut in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re
from typing import Any

from fat5_jax.convert import table
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config


def name_of(path: tuple[str, ...]) -> str:
  return "/".join(path)


def searcher(setting: str, pattern: str) -> Callable[[str], Any]:
  """A function that looks for a pattern in a name.

  Raises:
    UserError: if it is no regular expression, in the words of `setting`.
  """
  try:
    return re.compile(pattern).search
  except (re.error, TypeError) as e:
    raise UserError(
      f"{setting} = {pattern!r} is no regular expression: {e}"
    ) from None


def names_of(path: tuple[str, ...], leaf: Any) -> list[str]:
  """A parameter's names; scanned layers have one for each layer."""
  if "layers" not in path:
    return [name_of(path)]
  i = path.index("layers")
  return [
    name_of((*path[:i], f"layers_{n}", *path[i + 1 :]))
    for n in range(leaf.shape[0])
  ]


class Patterns:
  """Which of a few patterns is the first in a parameter's name."""

  def __init__(self, setting: str, patterns: Iterable[str]):
    self._setting = setting
    self._searchers = {p: searcher(setting, p) for p in patterns}

  def _first(self, name: str) -> str | None:
    found = (p for p, search in self._searchers.items() if search(name))
    return next(found, None)

  def of(self, params: Mapping[str, Any]) -> dict[tuple[str, ...], str | None]:
    """The first pattern, or None, by the paths of parameters.

    Raises:
      UserError: for a pattern that is the first in no name, or if scanned
        layers differ.
    """
    first = {}
    for path, leaf in table.flatten(params).items():
      found = set(map(self._first, names_of(path, leaf)))
      if len(found) > 1:
        raise UserError(
          f"{self._setting}: the layers of {name_of(path)} have different"
          " patterns; with SCAN_LAYERS = True all layers are one parameter. Set"
          " it to False"
        )
      first[path] = found.pop()
    for pattern in self._searchers:
      if pattern not in first.values():
        raise UserError(
          f"{self._setting}: {pattern!r} is the first match of no parameter"
          " that trains"
        )
    return first


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
  flat = table.flatten(params)
  names = {path: names_of(path, leaf) for path, leaf in flat.items()}
  everything = [name for group in names.values() for name in group]
  tests = []
  for macro, pattern in (("TRAINABLE", trainable), ("FROZEN", frozen)):
    tests.append(None if pattern is None else searcher(macro, pattern))
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
        f"the patterns choose some layers of {name_of(path)} and not others;"
        " with SCAN_LAYERS = True all layers are one parameter. Set it to False"
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
    name_of(path[:-1]) for path in table.flatten(params) if path[-1] == "lora_a"
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
  flat = table.flatten(params)
  return (
    table.nest({path: x for path, x in flat.items() if path in chosen}),
    table.nest({path: x for path, x in flat.items() if path not in chosen}),
  )


def merge(some: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `split`."""
  return table.nest({**table.flatten(some), **table.flatten(others)})
