"""AdamW, at the step of the run; its steps relative to the parameter, too."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from fat5_jax import trees
from fat5_jax.errors import UserError
from fat5_jax.optimizers._base import (
  BELOW_1,
  Optimizer,
  Schedule,
  as_schedule,
  at_rate,
  chain,
  check_ranges,
)

StateDtype = Literal["float32", "bfloat16"]
# Norms, biases and position tables.
NOT_DECAYED = r"(^|/)(scale|bias|rel_embedding)$"


def adamw(
  learning_rate: Schedule | float,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  not_decayed: str | None = NOT_DECAYED,
  multiply_by_parameter_scale: bool = False,
  state_dtype: StateDtype = "float32",
  global_norm_clip_threshold: float | None = None,
  learning_rate_multipliers: Mapping[str, float] | None = None,
) -> Optimizer:
  """AdamW (arXiv:1711.05101), after clipping the norm of all gradients.

  With `multiply_by_parameter_scale` it is FAT5's AdamWScale: Adam's steps are
  relative to the parameter, as Adafactor's are.

  Args:
    learning_rate: schedule or number.
    b1: decay of the mean of gradients.
    b2: decay of that of their squares.
    eps: added to the square root of the latter.
    weight_decay: share of a parameter that a step takes off, times the learning
      rate.
    not_decayed: regular expression, searched in names of parameters, of those
      that keep their weight; None is none of them.
    multiply_by_parameter_scale: a step, but for decay, is times max(RMS of the
      parameter, 1e-3); of scanned layers, of each layer's.
    state_dtype: of the mean of gradients. That of squares is float32: at b2 =
      0.999 a step may take a thousandth off, which bfloat16 does not see.
    global_norm_clip_threshold: limit to the norm of all gradients together.
    learning_rate_multipliers: see `scale_by_pattern`.
  """
  check_ranges(
    learning_rate=(learning_rate, 0.0, math.inf),
    global_norm_clip_threshold=(global_norm_clip_threshold, 0.0, math.inf),
  )
  rate_at = as_schedule(learning_rate)
  directions = adamw_directions(
    b1,
    b2,
    eps,
    weight_decay,
    not_decayed,
    multiply_by_parameter_scale,
    state_dtype,
  )
  chained = chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    at_rate(directions, rate_at, lambda state: state[0].count),
  )
  return Optimizer(chained, rate_at)


def adamw_directions(
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  not_decayed: str | None,
  multiply_by_parameter_scale: bool,
  state_dtype: StateDtype,
) -> optax.GradientTransformation:
  """What AdamW multiplies by minus the learning rate; see `adamw`."""
  check_ranges(
    b1=(b1, 0.0, BELOW_1),
    b2=(b2, 0.0, BELOW_1),
    eps=(eps, 0.0, math.inf),
  )
  adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=as_state_dtype(state_dtype))
  decay = decayed_weights(weight_decay, not_decayed)
  if multiply_by_parameter_scale:
    return optax.chain(adam, _scale_by_parameter(1e-3), decay)
  return optax.chain(adam, decay)


def as_state_dtype(name: StateDtype) -> jnp.dtype:
  if name not in ("float32", "bfloat16"):
    raise UserError(f"state_dtype = {name!r} must be 'float32' or 'bfloat16'")
  return jnp.dtype(name)


def decayed_weights(
  weight_decay: float, not_decayed: str | None
) -> optax.GradientTransformation:
  """Adds a share of the parameters whose names `not_decayed` is not in."""
  check_ranges(weight_decay=(weight_decay, 0.0, math.inf))
  if not_decayed is None:
    return optax.add_decayed_weights(weight_decay)
  keeps = trees.searcher("not_decayed", not_decayed)

  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: not keeps(trees.path_name(path)), params
    )

  return optax.add_decayed_weights(weight_decay, mask)


def _scale_by_parameter(least: float) -> optax.GradientTransformation:
  """Multiplies updates by the RMS of their parameter, or `least`."""

  def update(updates, state, params=None):
    def scale(path, u, p):
      own_axes = range("layers" in trees.path_keys(path), p.ndim)
      square = jnp.square(p.astype(jnp.float32))
      rms = jnp.sqrt(square.mean(axis=tuple(own_axes), keepdims=True))
      return u * jnp.maximum(rms, least).astype(u.dtype)

    return jax.tree_util.tree_map_with_path(scale, updates, params), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
