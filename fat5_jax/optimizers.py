"""T5's Adafactor, AdamW, and T5X's learning-rate schedules, as optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fat5_jax import sharding, trainable
from fat5_jax.errors import UserError, nearest

Schedule = Callable[[jax.Array], jax.Array]
_BELOW_1 = math.nextafter(1.0, 0.0)

_FACTORS = (
  "constant",
  "linear_warmup",
  "linear_decay",
  "rsqrt_decay",
  "rsqrt_normalized_decay",
  "decay_every",
  "cosine_decay",
)


def _check_ranges(**named: tuple[Any, float, float]) -> None:
  """Raises UserError for a number beyond (value, least, most).

  What is no number (None, a schedule, an HParamMap) has no range.
  """
  for name, (value, least, most) in named.items():
    is_number = isinstance(value, (int, float))
    if is_number and not least <= value <= most:
      end = "or more" if math.isinf(most) else f"to {most:g}"
      raise UserError(f"{name} = {value} must be {least:g} {end}")


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
  _check_ranges(
    base_learning_rate=(base_learning_rate, 0.0, math.inf),
    warmup_steps=(warmup_steps, 0, 2**31 - 1),
    decay_factor=(decay_factor, 0.0, math.inf),
    steps_per_decay=(steps_per_decay, 1, 2**31 - 1),
    steps_per_cycle=(steps_per_cycle, 1, 2**31 - 1),
    min_learning_rate=(min_learning_rate, 0.0, math.inf),
  )
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


class Optimizer(optax.GradientTransformationExtraArgs):
  """An optax transformation that says at which rate it trains.

  Its `update` takes the step of the run, `update(grads, state, params,
  step=step)`, and applies `learning_rate(step)`; without a step it counts its
  updates, as optax does.

  Attributes:
    learning_rate: step to rate; a run logs it.
    skip_nan_updates: whether it does nothing where an update is NaN; a run then
      goes on.
  """

  def __new__(
    cls,
    transform: optax.GradientTransformation,
    learning_rate: Schedule | float,
    skip_nan_updates: bool = False,
  ):
    transform = optax.with_extra_args_support(transform)
    made = super().__new__(cls, transform.init, transform.update)
    made.learning_rate = _as_schedule(learning_rate)
    made.skip_nan_updates = skip_nan_updates
    return made


def _as_schedule(learning_rate: Schedule | float) -> Schedule:
  return learning_rate if callable(learning_rate) else lambda _: learning_rate


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
    self._patterns = trainable.Patterns("HParamMap", list(self._values))

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
          f"HParamMap: no pattern of {name} is in {trainable.name_of(path)};"
          " put ('.*', value) last for all others"
        )
    return {path: self._values[pattern] for path, pattern in found.items()}


def standard_logical_factor_rules() -> dict[str, str]:
  """T5X's: what a logical axis (sharding.PARAMETER_AXES) is to Adafactor."""
  return {
    "vocab": "column",
    "embed": "row",
    "mlp": "column",
    "heads": "column",
    "kv": "column",
    "joined_kv": "column",
    "relpos_buckets": "none",
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


def _factor_rules(rules: Mapping[str, str | None]) -> dict[str, str]:
  """Rules in our words.

  Raises:
    UserError: for an unknown axis or kind, or layers that are not a batch.
  """
  found = {}
  for axis, kind in rules.items():
    known = standard_logical_factor_rules()
    if axis not in known:
      raise UserError(
        f"logical_factor_rules: no parameter has an axis {axis!r}."
        f"{nearest(axis, known)} Axes: {', '.join(known)}"
      )
    found[axis] = _FACTOR_KINDS.get(str(kind).lower())
    if found[axis] is None:
      raise UserError(
        f"logical_factor_rules: {axis!r} is {kind!r}; it may be"
        f" {', '.join(_FACTOR_KINDS)}"
      )
    if (axis == "layers") != (found[axis] == "batch"):
      raise UserError(
        f"logical_factor_rules: {axis!r} is {kind!r}; 'layers' is a batch, and"
        " no other axis is"
      )
  return found


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
    rules = _factor_rules(logical_factor_rules)
  _check_ranges(
    learning_rate=(learning_rate, 0.0, math.inf),
    decay_rate=(decay_rate, 0.0, 1.0),
    step_offset=(step_offset, 0, 2**31 - 1),
    beta1=(beta1, 0.0, _BELOW_1),
    clipping_threshold=(clipping_threshold, 0.0, math.inf),
    min_dim_size_to_factor=(min_dim_size_to_factor, 1, 2**31 - 1),
    epsilon1=(epsilon1, 0.0, math.inf),
    epsilon2=(epsilon2, 0.0, math.inf),
    weight_decay_rate=(weight_decay_rate, 0.0, math.inf),
    max_parameter_scale=(max_parameter_scale, 0.0, math.inf),
    global_norm_clip_threshold=(global_norm_clip_threshold, 0.0, math.inf),
  )
  rate_at = _as_schedule(learning_rate)
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
      keys = sharding.path_keys(path)
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

  chain = _chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    optax.GradientTransformationExtraArgs(init, update),
  )
  return Optimizer(chain, rate_at, skip_nan_updates)


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
    names = sharding.logical_axes(trainable.name_of(path)) or ()
    for name in names:
      if name not in rules:
        raise UserError(
          f"logical_factor_rules have no {name!r}, an axis of"
          f" {trainable.name_of(path)}"
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


def adamw(
  learning_rate: Schedule | float,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  global_norm_clip_threshold: float | None = None,
  learning_rate_multipliers: Mapping[str, float] | None = None,
) -> Optimizer:
  """optax.adamw, after clipping the norm of all gradients together.

  `learning_rate_multipliers`: see `scale_by_pattern`.
  """
  _check_ranges(
    learning_rate=(learning_rate, 0.0, math.inf),
    b1=(b1, 0.0, _BELOW_1),
    b2=(b2, 0.0, _BELOW_1),
    eps=(eps, 0.0, math.inf),
    weight_decay=(weight_decay, 0.0, math.inf),
    global_norm_clip_threshold=(global_norm_clip_threshold, 0.0, math.inf),
  )
  rate_at = _as_schedule(learning_rate)
  inner = optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay),
  )

  def update(grads, state, params=None, *, step=None, **_):
    rate = rate_at(state[0].count if step is None else step)
    updates, state = inner.update(grads, state, params)
    return jax.tree.map(
      lambda u: jnp.asarray(-rate, u.dtype) * u, updates
    ), state

  chain = _chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    optax.GradientTransformationExtraArgs(inner.init, update),
  )
  return Optimizer(chain, rate_at)


def scale_by_pattern(
  multipliers: Mapping[str, float],
) -> optax.GradientTransformation:
  """Multiplies updates by the factor of the first pattern in their name.

  It is the last thing that an optimizer does: the factor scales all that a step
  adds to a parameter, the share of momentum and weight decay included, so 0
  leaves the parameter as it is. Slots know nothing of it.

  Args:
    multipliers: regular expression, searched in names such as
      `encoder/layers_0/attention/query/kernel`, scanned or not, to factor.

  Raises (when the state is made):
    UserError: for a pattern that is the first in no parameter's name.
  """
  patterns = trainable.Patterns("learning_rate_multipliers", list(multipliers))

  def init(params):
    patterns.of(params)
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    found = patterns.of(updates)

    def scale(path, update):
      pattern = found[sharding.path_keys(path)]
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


def _transpose(like, tree_of_tuples, length):
  """A tree of equal tuples as a tuple of trees."""
  return tuple(
    jax.tree.map(lambda _, leaf, i=i: leaf[i], like, tree_of_tuples)
    for i in range(length)
  )
