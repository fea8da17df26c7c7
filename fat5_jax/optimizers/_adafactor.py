"""T5's Adafactor (arXiv:1804.04235), with T5X's hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fat5_jax import trees
from fat5_jax.distributed.rules import logical_axes
from fat5_jax.errors import UserError
from fat5_jax.optimizers._base import (
  BELOW_1,
  Optimizer,
  Schedule,
  as_schedule,
  chain,
  check_ranges,
)
from fat5_jax.optimizers._hyperparameters import HParamMap, factor_rules


class AdafactorState(NamedTuple):
  """Slots, trees shaped like the parameters; unused ones have shape (1,).

  `v_row` goes along the smaller axis of a parameter (of a scanned layer's, its
  layers in front), the first of equal ones; `v_col` along the larger.
  """

  count: jax.Array
  m: optax.Params
  v_row: optax.Params
  v_col: optax.Params
  v: optax.Params


def adafactor(
  learning_rate: Schedule | float,
  decay_rate: float | HParamMap = 0.8,
  step_offset: int = 0,
  beta1: float | HParamMap | None = None,
  clipping_threshold: float | HParamMap | None = 1.0,
  multiply_by_parameter_scale: bool | HParamMap = True,
  factored: bool | HParamMap = True,
  min_dim_size_to_factor: int | HParamMap = 128,
  epsilon1: float | HParamMap = 1e-30,
  epsilon2: float | HParamMap = 1e-3,
  weight_decay_rate: float | HParamMap | None = None,
  weight_decay_rate_lr_exponent: float | HParamMap | None = None,
  max_parameter_scale: float | HParamMap | None = None,
  skip_nan_updates: bool = False,
  logical_factor_rules: Mapping[str, str | None] | None = None,
  global_norm_clip_threshold: float | None = None,
  learning_rate_multipliers: Mapping[str, float] | None = None,
) -> Optimizer:
  """Adafactor (arXiv:1804.04235) with T5X's hyper-parameters.

  Parameters of scanned layers are treated a layer at a time, so scanning does
  not change the training. Where an HParamMap may stand, a hyper-parameter
  depends on the parameter's name.

  Args:
    learning_rate: schedule or number; times the parameter's RMS where
      `multiply_by_parameter_scale`.
    decay_rate: second moments decay by `1 - (count + 1) ** -decay_rate`, where
      count is that of the updates in the slots.
    step_offset: subtracted from the count in that decay, for fine-tuning from
      a checkpoint that keeps its step.
    beta1: momentum, an average of updates with their learning rate; None keeps
      none.
    clipping_threshold: limit to the RMS of an update before the learning rate.
    multiply_by_parameter_scale: updates relative to max(RMS, epsilon2).
    factored: rows and columns instead of a full second moment.
    min_dim_size_to_factor: what the two largest dimensions must reach for
      `factored`.
    epsilon1: added to squared gradients.
    epsilon2: least parameter scale.
    weight_decay_rate: share of a parameter that a step takes off; the learning
      rate does not scale it.
    weight_decay_rate_lr_exponent: that share times (or, without one, is) the
      learning rate to this power.
    max_parameter_scale: largest parameter scale.
    skip_nan_updates: elements that would become NaN, of parameters and slots,
      keep their value.
    logical_factor_rules: by logical axis, "row", "column", "none" or (layers)
      "batch", as T5X's standard_logical_factor_rules(): whether the parameters
      of layers are factored, whatever their size, as T5X does in scanned
      layers. All others go by `min_dim_size_to_factor`, as in T5X, and so do
      layers where this is None.
    global_norm_clip_threshold: limit to the norm of all gradients together.
    learning_rate_multipliers: see `scale_by_pattern`.
  """
  rules = None
  if logical_factor_rules is not None:
    rules = factor_rules(logical_factor_rules)
  check_ranges(
    learning_rate=(learning_rate, 0.0, math.inf),
    decay_rate=(decay_rate, 0.0, 1.0),
    step_offset=(step_offset, 0, 2**31 - 1),
    beta1=(beta1, 0.0, BELOW_1),
    clipping_threshold=(clipping_threshold, 0.0, math.inf),
    min_dim_size_to_factor=(min_dim_size_to_factor, 1, 2**31 - 1),
    epsilon1=(epsilon1, 0.0, math.inf),
    epsilon2=(epsilon2, 0.0, math.inf),
    weight_decay_rate=(weight_decay_rate, 0.0, math.inf),
    max_parameter_scale=(max_parameter_scale, 0.0, math.inf),
    global_norm_clip_threshold=(global_norm_clip_threshold, 0.0, math.inf),
  )
  rate_at = as_schedule(learning_rate)
  hyper = {
    "decay_rate": decay_rate,
    "beta1": beta1,
    "clipping_threshold": clipping_threshold,
    "multiply_by_parameter_scale": multiply_by_parameter_scale,
    "factored": factored,
    "min_dim_size_to_factor": min_dim_size_to_factor,
    "epsilon1": epsilon1,
    "epsilon2": epsilon2,
    "weight_decay_rate": weight_decay_rate,
    "weight_decay_rate_lr_exponent": weight_decay_rate_lr_exponent,
    "max_parameter_scale": max_parameter_scale,
  }

  def by_layer(function, params, *rest):
    """tree_map of function(hyper-parameters, leaves), a layer at a time."""
    maps = {
      name: value.values(name, params)
      for name, value in hyper.items()
      if isinstance(value, HParamMap)
    }

    def apply(path, p, *leaves):
      keys = trees.path_keys(path)
      scanned = "layers" in keys
      own = {name: values[keys] for name, values in maps.items()}
      h = types.SimpleNamespace(**hyper | own)
      h.axes = _factored_axes(h, rules, keys, p.shape[scanned:])
      run = lambda *leaves: function(h, *leaves)
      return (jax.vmap(run) if scanned else run)(p, *leaves)

    return jax.tree_util.tree_map_with_path(apply, params, *rest)

  def init(params):
    m, v_row, v_col, v = _transpose(params, by_layer(_init_leaf, params), 4)
    return AdafactorState(jnp.zeros([], jnp.int32), m, v_row, v_col, v)

  def update(grads, state, params, *, step=None, **_):
    rate = rate_at(state.count if step is None else step)
    t = jnp.maximum(state.count - step_offset, 0).astype(jnp.float32) + 1.0

    def update_leaf(h, p, g, *old):
      update, *new = _update_leaf(h, p, g, *old, rate=rate, t=t)
      if skip_nan_updates:
        new = [jnp.where(jnp.isnan(x), y, x) for x, y in zip(new, old)]
        update = jnp.where(jnp.isnan(p + update), 0.0, update)
      return update, *new

    slots = state.m, state.v_row, state.v_col, state.v
    results = by_layer(update_leaf, params, grads, *slots)
    updates, *slots = _transpose(params, results, 5)
    return updates, AdafactorState(state.count + 1, *slots)

  chained = chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    optax.GradientTransformationExtraArgs(init, update),
  )
  return Optimizer(chained, rate_at, skip_nan_updates)


def _factored_axes(h, rules, path, shape) -> tuple[int, int] | None:
  """(row, column): the two largest axes, the larger one last; or None.

  The rules say whether, and never which is the row: of a matrix, the update is
  the same either way.
  """
  if not h.factored or len(shape) < 2:
    return None
  axes = sorted(range(len(shape)), key=lambda axis: shape[axis])
  factored = shape[axes[-2]] >= h.min_dim_size_to_factor
  if rules is not None and any(key.startswith("layers") for key in path):
    # A module of one's own has no axes that have names.
    names = logical_axes(trees.name_of(path)) or ()
    for name in names:
      if name not in rules:
        raise UserError(
          f"logical_factor_rules have no {name!r}, an axis of"
          f" {trees.name_of(path)}"
        )
    factored = {"row", "column"} <= {rules[name] for name in names}
  return (axes[-2], axes[-1]) if factored else None


def _init_leaf(h, p):
  zeros = lambda shape: jnp.zeros(shape, jnp.float32)
  m = zeros((1,) if h.beta1 is None else p.shape)
  if h.axes is None:
    return m, zeros((1,)), zeros((1,)), zeros(p.shape)
  row, column = h.axes
  without = lambda axis: [n for i, n in enumerate(p.shape) if i != axis]
  return m, zeros(without(column)), zeros(without(row)), zeros((1,))


def _update_leaf(h, p, g, m, v_row, v_col, v, *, rate, t):
  """(update, m, v_row, v_col, v) of a parameter at its update number t."""
  p, g = p.astype(jnp.float32), g.astype(jnp.float32)
  squared = jnp.square(g) + h.epsilon1
  mixing = t ** (-h.decay_rate)
  decay = 1.0 - mixing
  if h.axes is None:
    v = decay * v + mixing * squared
    y = g * jax.lax.rsqrt(v)
  else:
    row, column = h.axes
    v_row = decay * v_row + mixing * squared.mean(axis=column)
    v_col = decay * v_col + mixing * squared.mean(axis=row)
    row_in_v_row = row - 1 if column < row else row
    row_mean = v_row.mean(axis=row_in_v_row, keepdims=True)
    row_factor = jnp.expand_dims(jax.lax.rsqrt(v_row / row_mean), column)
    y = g * row_factor * jnp.expand_dims(jax.lax.rsqrt(v_col), row)
  if h.clipping_threshold is not None:
    y /= jnp.maximum(1.0, _rms(y) / h.clipping_threshold)
  scale = rate
  if h.multiply_by_parameter_scale:
    scale = rate * jnp.clip(_rms(p), h.epsilon2, h.max_parameter_scale)
  update = scale * y
  if h.beta1 is not None:
    update = m = h.beta1 * m + (1 - h.beta1) * update
  shrink = h.weight_decay_rate
  if h.weight_decay_rate_lr_exponent:
    shrink = 1.0 if shrink is None else shrink
    shrink *= rate**h.weight_decay_rate_lr_exponent
  if shrink is not None:
    update += shrink * p
  return -update, m, v_row, v_col, v


def _rms(x):
  return jnp.sqrt(jnp.mean(jnp.square(x)))


def _transpose(like, tree_of_tuples, length):
  """A tree of equal tuples as a tuple of trees."""
  return tuple(
    jax.tree.map(lambda _, leaf, i=i: leaf[i], like, tree_of_tuples)
    for i in range(length)
  )
