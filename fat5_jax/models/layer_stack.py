"""Two layouts of parameters: a loop's `layers_{i}`, and a scan's `layers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def is_loop(node: Any) -> bool:
  return isinstance(node, dict) and "layers_0" in node


def is_scan(node: Any) -> bool:
  return isinstance(node, dict) and "layers" in node


def apart(node: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
  """(the layers of a loop in their order, what lies beside them)."""
  rest = {k: v for k, v in node.items() if not k.startswith("layers_")}
  return [node[f"layers_{i}"] for i in range(len(node) - len(rest))], rest


def stack(tree: Any) -> Any:
  """`layers_0`, `layers_1`, ... as one `layers` with a leading layer axis."""

  def stacked(node):
    if not is_loop(node):
      return node
    layers, rest = apart(node)
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}

  return jax.tree.map(stacked, tree, is_leaf=is_loop)


def unstack(tree: Any, split: Callable[[Any], Sequence] = list) -> Any:
  """The inverse of `stack`; `split` takes a stacked array apart."""

  def unstacked(node):
    if not is_scan(node):
      return node
    rest = {k: v for k, v in node.items() if k != "layers"}
    leaves, structure = jax.tree.flatten(node["layers"])
    layers = zip(*map(split, leaves))
    return rest | {
      f"layers_{i}": jax.tree.unflatten(structure, layer)
      for i, layer in enumerate(layers)
    }

  return jax.tree.map(unstacked, tree, is_leaf=is_scan)
