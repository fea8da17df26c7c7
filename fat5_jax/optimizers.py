"""T5's Adafactor, AdamW, and T5X's learning-rate schedules, as optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fat5_jax.errors import UserError, nearest
from fat5_jax.trainable import searcher

Schedule = Callable[[jax.Array], jax.Array]

_FACTORS = (
  "constant",
  "linear_warmup",
  "linear_decay",
  "rsqrt_decay",
  "rsqrt_normalized_decay",
  "decay_every",
  "cosine_decay",
)


def create_learning_rate_scheduler(
  factors: str = "constant * linear_warmup * rsqrt_decay",
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> Schedule:
  """A schedule as a product of named factors, with T5X's names and meaning.

  * constant: base_learning_rate.
  * linear_warmup: rises from 0 to 1 over warmup_steps.
  * linear_decay: warm-up to base_learning_rate, then a fall of decay_factor of
    it a step; stands alone.
  * rsqrt_decay: divides by sqrt(max(step, warmup_steps)).
  * rsqrt_normalized_decay: the same, 1 until warmup_steps.
  * decay_every: times decay_factor every steps_per_decay.
  * cosine_decay: cosine from 1 to 0 in cycles of steps_per_cycle.

  `step_offset` is subtracted from the step; the result never falls below
  `min_learning_rate`.

  Raises:
    ValueError: for an unknown factor.
  """
  names = [name.strip() for name in factors.split("*")]
  for name in names:
    if name not in _FACTORS:
      raise ValueError(
        f"learning-rate factor {name!r} is unknown.{nearest(name, _FACTORS)}"
        f" Known: {', '.join(_FACTORS)}"
      )

  def schedule(step):
    step = jnp.maximum(0, jnp.asarray(step) - step_offset).astype(jnp.float32)
    past_warmup = jnp.maximum(step, warmup_steps)
    rate = jnp.float32(1.0)
    for name in names:
      if name == "constant":
        rate *= base_learning_rate
      elif name == "linear_warmup":
        rate *= jnp.minimum(1.0, step / warmup_steps)
      elif name == "linear_decay":
        rate *= base_learning_rate * jnp.minimum(
          step / warmup_steps, 1.0 + decay_factor * (warmup_steps - step)
        )
      elif name == "rsqrt_decay":
        rate /= jnp.sqrt(past_warmup)
      elif name == "rsqrt_normalized_decay":
        rate *= jnp.sqrt(warmup_steps / past_warmup)
      elif name == "decay_every":
        rate *= decay_factor ** jnp.floor(step / steps_per_decay)
      else:
        progress = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
        rate *= jnp.maximum(
          0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (progress % 1.0)))
        )
    return jnp.maximum(rate, min_learning_rate)

  return schedule


class AdafactorState(NamedTuple):
  """Slots, trees shaped like the parameters; unused ones have shape (1,)."""

  count: jax.Array
  m: optax.Params
  v_row: optax.Params
  v_col: optax.Params
  v: optax.Params


def adafactor(
  learning_rate: Schedule | float,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  beta1: float | None = None,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  factored: bool = True,
  min_dim_size_to_factor: int = 128,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  global_norm_clip_threshold: float | None = None,
  learning_rate_multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
  """Adafactor (arXiv:1804.04235) with T5X's hyper-parameters.

  Parameters of scanned layers are treated a layer at a time, so scanning does
  not change the training.

  Args:
    learning_rate: schedule or number; times the parameter's RMS where
      `multiply_by_parameter_scale`.
    decay_rate: second moments decay by `1 - (step + 1) ** -decay_rate`.
    step_offset: subtracted from the step in that decay, for fine-tuning from
      a checkpoint that keeps its step.
    beta1: momentum; None keeps none.
    clipping_threshold: limit to the RMS of an update before the learning rate.
    multiply_by_parameter_scale: updates relative to max(RMS, epsilon2).
    factored: rows and columns instead of a full second moment, where the two
      largest dimensions reach `min_dim_size_to_factor`.
    min_dim_size_to_factor: see `factored`.
    epsilon1: added to squared gradients.
    epsilon2: least parameter scale.
    global_norm_clip_threshold: limit to the norm of all gradients together.
    learning_rate_multipliers: see `scale_by_pattern`.
  """

  def factored_axes(shape):
    """(row, column): the two largest axes, the larger one last; or None."""
    if not factored or len(shape) < 2:
      return None
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if shape[axes[-2]] < min_dim_size_to_factor:
      return None
    return axes[-2], axes[-1]

  def init_leaf(p):
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)
    m = zeros((1,) if beta1 is None else p.shape)
    axes = factored_axes(p.shape)
    if axes is None:
      return m, zeros((1,)), zeros((1,)), zeros(p.shape)
    row, column = axes
    without = lambda axis: [n for i, n in enumerate(p.shape) if i != axis]
    return m, zeros(without(column)), zeros(without(row)), zeros((1,))

  def update_leaf(g, p, m, v_row, v_col, v, decay):
    g = g.astype(jnp.float32)
    squared = jnp.square(g) + epsilon1
    axes = factored_axes(p.shape)
    if axes is None:
      v = decay * v + (1 - decay) * squared
      update = g * jax.lax.rsqrt(v)
    else:
      row, column = axes
      v_row = decay * v_row + (1 - decay) * squared.mean(axis=column)
      v_col = decay * v_col + (1 - decay) * squared.mean(axis=row)
      row_in_v_row = row - 1 if column < row else row
      row_mean = v_row.mean(axis=row_in_v_row, keepdims=True)
      row_factor = jnp.expand_dims(jax.lax.rsqrt(v_row / row_mean), column)
      update = g * row_factor * jnp.expand_dims(jax.lax.rsqrt(v_col), row)
    if clipping_threshold is not None:
      update /= jnp.maximum(1.0, _rms(update) / clipping_threshold)
    if multiply_by_parameter_scale:
      update *= jnp.maximum(_rms(p.astype(jnp.float32)), epsilon2)
    if beta1 is not None:
      m = beta1 * m + (1 - beta1) * update
      update = m
    return update, m, v_row, v_col, v

  def init(params):
    slots = _by_layer(init_leaf, params)
    m, v_row, v_col, v = _transpose(params, slots, 4)
    return AdafactorState(jnp.zeros([], jnp.int32), m, v_row, v_col, v)

  def update(updates, state, params):
    t = jnp.maximum(state.count - step_offset, 0).astype(jnp.float32) + 1.0
    decay = 1.0 - t ** (-decay_rate)
    results = _by_layer(
      lambda *leaf: update_leaf(*leaf, decay),
      updates,
      params,
      state.m,
      state.v_row,
      state.v_col,
      state.v,
    )
    updates, m, v_row, v_col, v = _transpose(params, results, 5)
    return updates, AdafactorState(state.count + 1, m, v_row, v_col, v)

  return _chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(learning_rate),
  )


def adamw(
  learning_rate: Schedule | float,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  global_norm_clip_threshold: float | None = None,
  learning_rate_multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
  """optax.adamw, after clipping the norm of all gradients together.

  `learning_rate_multipliers`: see `scale_by_pattern`; decay is scaled too.
  """
  return _chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    optax.adamw(
      learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
    ),
  )


def scale_by_pattern(
  multipliers: Mapping[str, float],
) -> optax.GradientTransformation:
  """Multiplies updates by the factor of the first pattern in their name.

  Args:
    multipliers: regular expression, searched in names such as
      `encoder/layers_0/attention/query/kernel`, to factor. Scanned layers
      are named `layers`, without a number.

  Raises (when the state is made):
    UserError: for a pattern that is the first in no parameter's name.
  """

  searchers = {p: searcher("learning_rate_multipliers", p) for p in multipliers}

  def pattern_of(path):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next((p for p, found in searchers.items() if found(name)), None)

  def init(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    used = {pattern_of(path) for path, _ in leaves}
    for pattern in multipliers:
      if pattern not in used:
        raise UserError(
          f"learning_rate_multipliers: {pattern!r} is the first match of no"
          " parameter that trains"
        )
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params

    def scale(path, update):
      pattern = pattern_of(path)
      return update if pattern is None else update * multipliers[pattern]

    return jax.tree_util.tree_map_with_path(scale, updates), state

  return optax.GradientTransformation(init, update)


def _chain(clip_threshold, multipliers, *transforms):
  if clip_threshold is not None:
    transforms = (optax.clip_by_global_norm(clip_threshold), *transforms)
  if multipliers:
    transforms = (*transforms, scale_by_pattern(multipliers))
  return optax.chain(*transforms)


def _rms(x):
  return jnp.sqrt(jnp.mean(jnp.square(x)))


def _by_layer(function, tree, *rest):
  """tree_map of `function`, mapped over the layer axis of scanned leaves."""

  def apply(path, *leaves):
    if any(getattr(key, "key", None) == "layers" for key in path):
      return jax.vmap(function)(*leaves)
    return function(*leaves)

  return jax.tree_util.tree_map_with_path(apply, tree, *rest)


def _transpose(like, tree_of_tuples, length):
  """A tree of equal tuples as a tuple of trees."""
  return tuple(
    jax.tree.map(lambda _, leaf, i=i: leaf[i], like, tree_of_tuples)
    for i in range(length)
  )
