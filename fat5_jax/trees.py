"""Trees of parameters: flat and nested; names of leaves, patterns of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any

from fat5_jax.errors import UserError


def nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  """{("a", "b"): x} as {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


def flatten(tree: Mapping[str, Any], prefix=()) -> dict[tuple[str, ...], Any]:
  """{"a": {"b": x}} as {("a", "b"): x}."""
  flat: dict[tuple[str, ...], Any] = {}
  for key, value in tree.items():
    path = (*prefix, str(key))
    if isinstance(value, Mapping):
      flat.update(flatten(value, path))
    else:
      flat[path] = value
  return flat


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
    for path, leaf in flatten(params).items():
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


def path_keys(path: Any) -> tuple[str, ...]:
  """A leaf's path, as jax has it, as ("encoder", "layers_0", ...)."""
  return tuple(path_name((key,)) for key in path)


def path_name(path: Any) -> str:
  """A leaf's path, as jax has it, as "encoder/layers_0/..."."""
  import jax  # Converters, who read this module too, do without.

  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_name(tree: Any, index: int) -> str:
  """The name of a tree's leaf, "encoder/layers_0/..."."""
  import jax

  return path_name(jax.tree_util.tree_leaves_with_path(tree)[index][0])
