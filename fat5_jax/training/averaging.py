"""An exponential moving average of the parameters that train.

It is a part of the optimizer's state, so it is saved, sharded and restored as
that is. What a person wants of a run with an average is the average: a
checkpoint has it as its parameters, and the live ones in its place in the
optimizer, so that eval, infer, convert and the next run read it as any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fat5_jax.optimizers import CompensatedState, keep_attributes
from fat5_jax.training import trainable


class AveragedState(NamedTuple):
  """`updates` counts those that the average has seen."""

  inner: Any
  average: Any
  updates: jax.Array


class Averaged(optax.GradientTransformationExtraArgs):
  """An optimizer that averages what it makes; it trains as it did.

  The average of step t is d * before + (1 - d) * parameters, d = min(decay,
  (1 + t) / (10 + t)): at first the parameters of the start soon count little.
  """

  def __new__(cls, optimizer: optax.GradientTransformation, decay: float):
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
      start = jax.tree.map(jnp.array, params)
      return AveragedState(inner.init(params), start, jnp.int32(0))

    def update(grads, state, params=None, **more):
      updates, inner_state = inner.update(grads, state.inner, params, **more)
      seen = state.updates + 1
      share = 1 - jnp.minimum(decay, (1.0 + seen) / (10.0 + seen))
      average = jax.tree.map(
        lambda a, p: a + (share * (p - a)).astype(a.dtype),
        state.average,
        optax.apply_updates(params, updates),
      )
      return updates, AveragedState(inner_state, average, seen)

    made = super().__new__(cls, init, update)
    return keep_attributes(made, optimizer)


def swapped(params: Any, opt_state: Any, trains: Any) -> tuple[Any, Any]:
  """The average in the place of the parameters, those in its place; or back.

  As they are, where there is no average.
  """
  if isinstance(opt_state, CompensatedState):
    params, inner = swapped(params, opt_state.inner, trains)
    return params, opt_state._replace(inner=inner)
  if not isinstance(opt_state, AveragedState):
    return params, opt_state
  live, frozen = trainable.split(params, trains)
  average = opt_state.average
  return (
    trainable.merge(average, frozen) if frozen else average,
    opt_state._replace(average=live),
  )


def core(opt_state: Any) -> Any:
  """The state of the optimizer itself, without what is kept around it."""
  while isinstance(opt_state, AveragedState | CompensatedState):
    opt_state = opt_state.inner
  return opt_state


def with_core(opt_state: Any, other: Any) -> Any:
  """The inverse of `core`: what is kept around an optimizer, around another."""
  if not isinstance(opt_state, AveragedState | CompensatedState):
    return other
  return opt_state._replace(inner=with_core(opt_state.inner, other))
