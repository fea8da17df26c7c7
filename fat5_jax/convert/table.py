"""Strict renaming: every tensor is accounted for, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

import numpy as np

from fat5_jax.errors import UserError

# Prints this many names of a list, then a count.
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor: its foreign name, its path in our tree, and its axes.

  `shape` is ours; a transposed tensor has it reversed in the foreign file.
  """

  foreign: str
  path: tuple[str, ...]
  shape: tuple[int, ...]
  transposed: bool = False

  @property
  def foreign_shape(self) -> tuple[int, ...]:
    return self.shape[::-1] if self.transposed else self.shape


def check_names(
  expected: Iterable[str], found: Iterable[str], where: str
) -> None:
  """Raises UserError with a `-`/`+` list unless both hold the same names."""
  expected, found = set(expected), set(found)
  lines = [f"  - {name}" for name in sorted(expected - found)]
  lines += [f"  + {name}" for name in sorted(found - expected)]
  if not lines:
    return
  more = len(lines) - _LISTED
  if more > 0:
    lines = lines[:_LISTED] + [f"  ... and {more} more"]
  raise UserError(
    f"{where}: the tensors are not those of the model its config describes"
    " (- missing, + unexpected):\n" + "\n".join(lines)
  )


def check_shapes(
  expected: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  """Raises UserError naming every tensor whose shape differs."""
  lines = [
    f"  - {name} {tuple(shape)}\n  + {name} {tuple(found[name])}"
    for name, shape in sorted(expected.items())
    if tuple(found[name]) != tuple(shape)
  ]
  if lines:
    more = len(lines) - _LISTED
    if more > 0:
      lines = lines[:_LISTED] + [f"  ... and {more} more"]
    raise UserError(
      f"{where}: tensor shapes differ from the config's (- expected, +"
      " found):\n" + "\n".join(lines)
    )


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


def to_tree(rows: Iterable[Row], read) -> dict[str, Any]:
  """Our tree, each leaf read by its foreign name."""
  flat = {}
  for row in rows:
    array = read(row.foreign)
    flat[row.path] = np.ascontiguousarray(array.T) if row.transposed else array
  return nest(flat)


def from_tree(rows: Iterable[Row], tree: Mapping[str, Any], where: str):
  """Yields (foreign name, array) of every leaf, strictly.

  Raises:
    UserError: where the tree misses a leaf, has another, or one has another
      shape.
  """
  rows = list(rows)
  flat = flatten(tree)
  name = "/".join
  check_names((name(r.path) for r in rows), map(name, flat), where)
  check_shapes(
    {name(r.path): r.shape for r in rows},
    {name(path): np.shape(leaf) for path, leaf in flat.items()},
    where,
  )
  for row in rows:
    array = np.asarray(flat[row.path])
    yield (
      row.foreign,
      np.ascontiguousarray(array.T if row.transposed else array),
    )
