"""Strict renaming: every tensor is accounted for, in both directions.

Tensors are read one at a time: a checkpoint is a flat table of `Leaf`, by path
in our tree, and only what writes or computes with one reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from fat5_jax import trees
from fat5_jax.errors import UserError

# Prints this many names of a list, then a count.
_LISTED = 8
# What a parameter may be.
FLOATS = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A tensor that is read when it is wanted; `dtype` by its numpy name.

  `read_part` reads what an index (as of numpy) picks, where the format can.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]
  read_part: Callable[[Any], np.ndarray] | None = None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * _itemsize(self.dtype)


def _itemsize(dtype: str) -> int:
  """Bytes of an element, bfloat16 included."""
  return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


Leaves = dict[tuple[str, ...], Leaf]


def leaf_of(array: Any) -> Leaf:
  """An array that is there already."""
  return Leaf(
    tuple(np.shape(array)), str(array.dtype), lambda: np.asarray(array)
  )


def as_leaves(tree: Mapping[Any, Any]) -> Leaves:
  """A tree of arrays as a table; a table stays one."""
  if all(isinstance(key, tuple) for key in tree):
    return dict(tree)
  return {path: leaf_of(x) for path, x in trees.flatten(tree).items()}


def read_all(leaves: Leaves) -> dict[str, Any]:
  """The tree of all arrays."""
  return trees.nest({path: leaf.read() for path, leaf in leaves.items()})


class LazyTree(dict):
  """A table as a tree whose arrays are read at each access and not kept.

  flax applies a model to one as to any other dictionary, a layer in memory at
  a time.
  """

  def __init__(self, leaves: Leaves):
    super().__init__(trees.nest(leaves))

  def __getitem__(self, key):
    node = super().__getitem__(key)
    if isinstance(node, Leaf):
      return node.read()
    tree = LazyTree({})
    tree.update(node)
    return tree

  def items(self):
    return ((key, self[key]) for key in self)

  def values(self):
    return (self[key] for key in self)


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
  lines = [f"  - {shown(name)}" for name in sorted(expected - found)]
  lines += [f"  + {shown(name)}" for name in sorted(found - expected)]
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
    f"  - {shown(name)} {tuple(shape)}\n  + {shown(name)} {tuple(found[name])}"
    for name, shape in sorted(expected.items())
    if tuple(found[name]) != tuple(shape)
  ]
  if lines:
    most = _LISTED // 2
    more = len(lines) - most
    if more > 0:
      lines = lines[:most] + [f"  ... and {more} more"]
    raise UserError(
      f"{where}: tensor shapes differ from the config's (- expected, +"
      " found):\n" + "\n".join(lines)
    )


def shown(name: str) -> str:
  """A name of a file's for a message: one line, not too long."""
  text = name if name.isprintable() else ascii(name)
  return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} letters)"


def check_floats(found: Mapping[str, Leaf], where: str) -> None:
  """Raises UserError naming a tensor that does not hold floats."""
  for name, leaf in found.items():
    if leaf.dtype not in FLOATS:
      raise UserError(
        f"{where}: tensor {shown(name)} holds {leaf.dtype}; parameters are one"
        f" of {', '.join(FLOATS)}"
      )


def check_finite(array: np.ndarray, name: str, where: str) -> None:
  """Raises UserError if a tensor holds what is no number."""
  wrong = array.size - np.count_nonzero(np.isfinite(array))
  if wrong:
    raise UserError(
      f"{where}: {wrong} of the {array.size} numbers of tensor {name} are NaN"
      " or infinite; take an earlier or a fresh copy of the checkpoint"
    )


def finite(leaves: Leaves, where: str) -> Leaves:
  """The tensors, each checked whenever it is read."""

  def read(path, leaf):
    array = leaf.read()
    check_finite(array, "/".join(path), where)
    return array

  return {
    path: Leaf(
      leaf.shape, leaf.dtype, lambda path=path, leaf=leaf: read(path, leaf)
    )
    for path, leaf in leaves.items()
  }


def check_layers(config, tensors: int, where: str) -> None:
  """Raises UserError if a model has more layers than there are tensors.

  Before the tensors of the model are listed, which a config alone could make
  endless.
  """
  for field in ("num_encoder_layers", "num_decoder_layers"):
    if getattr(config, field) > tensors:
      raise UserError(
        f"{where}: {field} = {getattr(config, field)}, and there are"
        f" {tensors} tensors"
      )


def to_leaves(
  rows: Iterable[Row], tensors: Mapping[str, Leaf], where: str
) -> Leaves:
  """Foreign tensors under our names.

  Raises:
    UserError: with a `-`/`+` list unless they are those of the rows.
  """
  rows = list(rows)
  check_names((r.foreign for r in rows), tensors, where)
  check_shapes(
    {r.foreign: r.foreign_shape for r in rows},
    {name: leaf.shape for name, leaf in tensors.items()},
    where,
  )
  check_floats(tensors, where)
  return {r.path: _turned(r, tensors[r.foreign], r.shape) for r in rows}


def to_foreign(
  rows: Iterable[Row], leaves: Leaves, where: str
) -> dict[str, Leaf]:
  """The inverse of `to_leaves`, as strict."""
  rows = list(rows)
  name = "/".join
  check_names((name(r.path) for r in rows), map(name, leaves), where)
  check_shapes(
    {name(r.path): r.shape for r in rows},
    {name(path): leaf.shape for path, leaf in leaves.items()},
    where,
  )
  return {r.foreign: _turned(r, leaves[r.path], r.foreign_shape) for r in rows}


def _turned(row: Row, leaf: Leaf, shape: tuple[int, ...]) -> Leaf:
  if not row.transposed:
    return leaf
  return Leaf(shape, leaf.dtype, lambda: np.ascontiguousarray(leaf.read().T))
