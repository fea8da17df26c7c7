"""Which logical axes each parameter has, and where they go on the mesh.

One table, in T5X's names; the rules of a run say over which mesh axes a logical
axis is split.
"""

from __future__ import annotations

from collections.abc import Sequence
import re
from typing import Any

from fat5_jax.errors import UserError

# Name of a parameter (a scanned layer's has no number) -> its logical axes;
# exactly one row must match. None is replicated, whatever the shape.
_LAYER = r"(?:encoder|decoder)/layers(?:_\d+)?"
_ATTENTION = rf"{_LAYER}/\w*attention"
_BIAS = rf"(?:encoder|decoder|{_LAYER})/relpos_bias"
PARAMETER_AXES: tuple[tuple[str, tuple[str, ...] | None], ...] = (
  (r"token_embedder/embedding", ("vocab", "embed")),
  (rf"{_BIAS}/rel_embedding", ("heads", "relpos_buckets")),
  # FIRE's network: its output layer has a row a head.
  (rf"{_BIAS}/out_kernel", ("heads", "relpos_mlp")),
  (rf"{_BIAS}/out_bias", ("heads",)),
  (rf"{_BIAS}/(?:hidden_kernel|hidden_bias|c|threshold_multiplier)", None),
  (rf"{_ATTENTION}/(?:query|key|value)/kernel", ("embed", "joined_kv")),
  (rf"{_ATTENTION}/out/kernel", ("joined_kv", "embed")),
  (rf"{_LAYER}/mlp/wi(?:_\d)?/kernel", ("embed", "mlp")),
  (rf"{_LAYER}/mlp/wo/kernel", ("mlp", "embed")),
  (rf"{_LAYER}/\w+_layer_norm/scale", ("embed",)),
  (r"(?:encoder|decoder)/\w+_norm/scale", ("embed",)),
  (r"decoder/logits_dense/kernel", ("embed", "vocab")),
  # LoRA: a (inputs, rank) and b (rank, outputs) of each kernel above.
  (
    r".+/(?:query|key|value|wi|wi_\d|logits_dense)/lora_a",
    ("embed", "lora_rank"),
  ),
  (r".+/out/lora_a", ("joined_kv", "lora_rank")),
  (r".+/wo/lora_a", ("mlp", "lora_rank")),
  (r".+/(?:query|key|value)/lora_b", ("lora_rank", "joined_kv")),
  (r".+/(?:wi|wi_\d)/lora_b", ("lora_rank", "mlp")),
  (r".+/(?:out|wo)/lora_b", ("lora_rank", "embed")),
  (r".+/logits_dense/lora_b", ("lora_rank", "vocab")),
  # Heads are small, and may be modules of one's own.
  (r"(?:head|classifier|prompt_embedder)/.+", None),
)


def standard_logical_axis_rules(
  additional_rules: Sequence[tuple[str, Any]] = (),
) -> tuple[tuple[str, Any], ...]:
  """T5X's logical axes over this mesh.

  Args:
    additional_rules: pairs (logical axis, mesh axis, axes or None) that come
      before the standard ones; an axis that they name loses its standard rule.
  """
  standard = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
    ("kv", None),
    ("relpos_buckets", None),
    ("relpos_mlp", None),
    ("lora_rank", None),
    ("layers", None),
  )
  first = tuple((name, _axes_of_rule(axes)) for name, axes in additional_rules)
  named = {name for name, _ in first}
  return first + tuple(rule for rule in standard if rule[0] not in named)


def _axes_of_rule(axes: Any) -> str | tuple[str, ...] | None:
  return tuple(axes) if isinstance(axes, list) else axes


def logical_axes(name: str) -> tuple[str, ...] | None:
  """The logical axes of a parameter, without its layer axis if scanned.

  Raises:
    UserError: unless exactly one row of the table matches.
  """
  rows = [row for row in PARAMETER_AXES if re.fullmatch(row[0], name)]
  if len(rows) != 1:
    raise UserError(
      f"parameter {name!r} matches {len(rows)} rows of"
      " rules.PARAMETER_AXES; it must match exactly one"
    )
  return rows[0][1]
