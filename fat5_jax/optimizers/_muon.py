"""Muon for the matrices of layers, AdamW for all others."""

from __future__ import annotations

from collections.abc import Mapping
import math
import re
from typing import Any, NamedTuple

import jax
import optax

from fat5_jax import trees
from fat5_jax.optimizers._adamw import (
  NOT_DECAYED,
  StateDtype,
  adamw_directions,
  as_state_dtype,
  decayed_weights,
)
from fat5_jax.optimizers._base import (
  BELOW_1,
  Optimizer,
  Schedule,
  as_schedule,
  at_rate,
  chain,
  check_ranges,
)

# Kernels of attention, (M, H D), heads-major, and of the MLP, (M, F), or turned
# round; scanned ones have their layers in front.
_MATRIX = re.compile(
  r"/(?:\w*attention/(?:query|key|value|out)|mlp/(?:wi|wi_\d|wo))/kernel$"
)


class MuonState(NamedTuple):
  """Of two optimizers, each of its own parameters."""

  matrices: Any
  others: Any


def muon(
  learning_rate: Schedule | float,
  beta: float = 0.95,
  weight_decay: float = 0.0,
  not_decayed: str | None = NOT_DECAYED,
  consistent_rms: float | None = 0.2,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  state_dtype: StateDtype = "float32",
  global_norm_clip_threshold: float | None = None,
  learning_rate_multipliers: Mapping[str, float] | None = None,
) -> Optimizer:
  """Muon (optax.contrib) for attention's and the MLP's kernels.

  A step of theirs is the momentum with all its singular values made about 1.
  Embeddings, the projection to logits, norms, position tables, LoRA and heads
  are trained by AdamW.

  Args:
    learning_rate: schedule or number, for both.
    beta: decay of Muon's momentum, Nesterov's.
    weight_decay: see `adamw`.
    not_decayed: see `adamw`.
    consistent_rms: the RMS of Muon's steps before the learning rate, 0.2 as of
      AdamW's, so that one learning rate is right for both (arXiv:2502.16982);
      None multiplies them by sqrt(max(1, outputs / inputs)) instead.
    b1: see `adamw`.
    b2: see `adamw`.
    eps: see `adamw`.
    state_dtype: of the momentum; see `adamw`.
    global_norm_clip_threshold: limit to the norm of all gradients together.
    learning_rate_multipliers: see `scale_by_pattern`.
  """
  check_ranges(
    learning_rate=(learning_rate, 0.0, math.inf),
    beta=(beta, 0.0, BELOW_1),
    consistent_rms=(consistent_rms, 0.0, math.inf),
    global_norm_clip_threshold=(global_norm_clip_threshold, 0.0, math.inf),
  )
  rate_at = as_schedule(learning_rate)
  matrices = optax.chain(
    optax.contrib.scale_by_muon(
      beta=beta,
      eps=eps,
      mu_dtype=as_state_dtype(state_dtype),
      weight_dimension_numbers=_dimension_numbers,
    ),
    _scale_by_shape(consistent_rms),
    decayed_weights(weight_decay, not_decayed),
  )
  others = adamw_directions(
    b1, b2, eps, weight_decay, not_decayed, False, state_dtype
  )
  chained = chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    at_rate(
      _apart(matrices, others), rate_at, lambda state: state.others[0].count
    ),
  )
  return Optimizer(chained, rate_at)


def _dimension_numbers(params: Any) -> Any:
  """The last two axes are a matrix, those before them many of them."""
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  return jax.tree.map(lambda _: numbers, params)


def _scale_by_shape(
  consistent_rms: float | None,
) -> optax.GradientTransformation:
  """The RMS of an orthogonal matrix is 1 / sqrt(its larger side)."""

  def scale(x):
    inputs, outputs = x.shape[-2:]
    if consistent_rms is None:
      return x * math.sqrt(max(1, outputs / inputs))
    return x * (consistent_rms * math.sqrt(max(inputs, outputs)))

  return optax.stateless_with_tree_map(lambda x, _: scale(x))


def _apart(
  matrices: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Two transformations, each of a tree of its own."""

  def split(tree):
    flat = trees.flatten(tree)
    is_matrix = {k: bool(_MATRIX.search(trees.name_of(k))) for k in flat}
    return tuple(
      trees.nest({k: x for k, x in flat.items() if is_matrix[k] == side})
      for side in (True, False)
    )

  def init(params):
    of_matrices, of_others = split(params)
    return MuonState(matrices.init(of_matrices), others.init(of_others))

  def update(updates, state, params=None):
    wanted, given = split(updates), split(params)
    first, of_matrices = matrices.update(wanted[0], state.matrices, given[0])
    second, of_others = others.update(wanted[1], state.others, given[1])
    merged = {**trees.flatten(first), **trees.flatten(second)}
    return trees.nest(merged), MuonState(of_matrices, of_others)

  return optax.GradientTransformation(init, update)
