"""Adafactor's choices by parameter: by patterns of names, by logical axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fat5_jax import trees
from fat5_jax.errors import UserError, nearest


class HParamMap:
  """A hyper-parameter by parameter: the value of the first pattern in its name.

  Args:
    rules: pairs (regular expression, value), searched in this order in names
      such as `encoder/layers_0/attention/query/kernel`, scanned or not.
  """

  def __init__(self, rules: Sequence[tuple[str, Any]]):
    self._values = dict(rules)
    if len(self._values) < len(rules):
      raise UserError("HParamMap: a pattern stands there twice")
    self._patterns = trees.Patterns("HParamMap", list(self._values))

  def values(self, name: str, params: Any) -> dict[tuple[str, ...], Any]:
    """The values of hyper-parameter `name`, by the paths of parameters.

    Raises:
      UserError: for a parameter in which no pattern is found, a pattern that is
        the first in no parameter, or layers of a scan that differ.
    """
    found = self._patterns.of(params)
    for path, pattern in found.items():
      if pattern is None:
        raise UserError(
          f"HParamMap: no pattern of {name} is in {trees.name_of(path)};"
          " put ('.*', value) last for all others"
        )
    return {path: self._values[pattern] for path, pattern in found.items()}


def standard_logical_factor_rules() -> dict[str, str]:
  """T5X's: what a logical axis (rules.PARAMETER_AXES) is to Adafactor."""
  return {
    "vocab": "column",
    "embed": "row",
    "mlp": "column",
    "heads": "column",
    "kv": "column",
    "joined_kv": "column",
    "relpos_buckets": "none",
    "relpos_mlp": "none",
    "lora_rank": "none",
    "layers": "batch",
  }


# T5X's words for what an axis is, and ours.
_FACTOR_KINDS = {
  "row": "row",
  "column": "column",
  "col": "column",
  "batch": "batch",
  "none": "none",
  "unfactorized": "none",
}


def factor_rules(rules: Mapping[str, str | None]) -> dict[str, str]:
  """Rules in our words.

  Raises:
    UserError: for an unknown axis or kind, or layers that are not a batch.
  """
  found = {}
  for axis, kind in rules.items():
    known = standard_logical_factor_rules()
    if axis not in known:
      raise UserError(
        f"logicalfactor_rules: no parameter has an axis {axis!r}."
        f"{nearest(axis, known)} Axes: {', '.join(known)}"
      )
    found[axis] = _FACTOR_KINDS.get(str(kind).lower())
    if found[axis] is None:
      raise UserError(
        f"logicalfactor_rules: {axis!r} is {kind!r}; it may be"
        f" {', '.join(_FACTOR_KINDS)}"
      )
    if (axis == "layers") != (found[axis] == "batch"):
      raise UserError(
        f"logicalfactor_rules: {axis!r} is {kind!r}; 'layers' is a batch, and"
        " no other axis is"
      )
  return found
