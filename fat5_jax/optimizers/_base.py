"""What every optimizer here is made of: a rate, ranges, factors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fat5_jax import trees
from fat5_jax.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]
# The most that a rate of decay may be.
BELOW_1 = math.nextafter(1.0, 0.0)


def check_ranges(**named: tuple[Any, float, float]) -> None:
  """Raises UserError for a number beyond (value, least, most).

  What is no number (None, a schedule, an HParamMap) has no range.
  """
  for name, (value, least, most) in named.items():
    is_number = isinstance(value, (int, float))
    if is_number and not least <= value <= most:
      end = "or more" if math.isinf(most) else f"to {most:g}"
      raise UserError(f"{name} = {value} must be {least:g} {end}")


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
    made.learning_rate = as_schedule(learning_rate)
    made.skip_nan_updates = skip_nan_updates
    return made


def keep_attributes(made: Any, inner: Any) -> Any:
  """`made`, around an optimizer, with what an Optimizer says beside optax."""
  for name in ("learning_rate", "skip_nan_updates"):
    if hasattr(inner, name):
      setattr(made, name, getattr(inner, name))
  return made


def as_schedule(learning_rate: Schedule | float) -> Schedule:
  return learning_rate if callable(learning_rate) else lambda _: learning_rate


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
  patterns = trees.Patterns("learning_rate_multipliers", list(multipliers))

  def init(params):
    patterns.of(params)
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    found = patterns.of(updates)

    def scale(path, update):
      pattern = found[trees.path_keys(path)]
      return update if pattern is None else update * multipliers[pattern]

    return jax.tree_util.tree_map_with_path(scale, updates), state

  return optax.GradientTransformation(init, update)


def chain(clip_threshold, multipliers, *transforms):
  if clip_threshold is not None:
    transforms = (optax.clip_by_global_norm(clip_threshold), *transforms)
  if multipliers:
    transforms = (*transforms, scale_by_pattern(multipliers))
  return optax.chain(*transforms)


def at_rate(
  transform: optax.GradientTransformation,
  rate_at: Schedule,
  count: Callable[[Any], jax.Array],
) -> optax.GradientTransformationExtraArgs:
  """A transformation, times minus the rate of the step.

  Args:
    transform: gives directions.
    rate_at: the schedule.
    count: of the transformation's state; the step where a run tells none.
  """

  def update(grads, state, params=None, *, step=None, **_):
    rate = rate_at(count(state) if step is None else step)
    updates, state = transform.update(grads, state, params)
    return jax.tree.map(
      lambda u: jnp.asarray(-rate, u.dtype) * u, updates
    ), state

  return optax.GradientTransformationExtraArgs(transform.init, update)
