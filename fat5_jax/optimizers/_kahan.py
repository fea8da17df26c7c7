"""Kahan's compensated summation for parameters in bfloat16."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fat5_jax.optimizers._base import keep_attributes


class CompensatedState(NamedTuple):
  """`compensation`: what the bfloat16 parameters lack, bfloat16 like them."""

  inner: Any
  compensation: optax.Params


class Compensated(optax.GradientTransformationExtraArgs):
  """An optimizer of bfloat16 parameters that keeps what rounding takes.

  bfloat16 has 8 bits: of an update below 1/512 of its parameter nothing is
  left. Here what rounding takes from a parameter is kept beside it, and added
  before the next update (Kahan, CACM 8(1), 1965). The optimizer inside sees
  float32 gradients, and as parameters the float32 sum of the two: 16 bits, so
  that an update below 1e-5 of its parameter is coarse, and one below 2^-18
  nothing.

  The sum of n updates is off by at most n (2^-17 + 2^-23) times the largest
  value that the parameter takes: the compensation is at most half a unit in the
  parameter's last place, 2^-8 of its power of two, and its own rounding 2^-9 of
  that; float32 rounds twice. That is the O(n u^2) of Higham, Accuracy and
  Stability of Numerical Algorithms, section 4.3, u = 2^-8; without compensation
  it is O(n u).
  """

  parameter_dtype = jnp.dtype(jnp.bfloat16)

  def __new__(cls, optimizer: optax.GradientTransformation):
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
      """Takes float32 parameters, too, and keeps what bfloat16 will lack."""
      params = _float32(params)
      return CompensatedState(inner.init(params), _lack(params))

    def update(grads, state, params=None, **more):
      params = _float32(params)
      sums = jax.tree.map(jnp.add, params, _float32(state.compensation))
      updates, inner_state = inner.update(
        _float32(grads), state.inner, sums, **more
      )
      sums = jax.tree.map(jnp.add, sums, updates)
      # Added, they give the rounded sums: the difference is exact, or it is
      # off by far less than the last place of the sum in bfloat16.
      updates = jax.tree.map(lambda s, p: _rounded(s) - p, sums, params)
      return updates, CompensatedState(inner_state, _lack(sums))

    made = super().__new__(cls, init, update)
    return keep_attributes(made, optimizer)


def _float32(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _lack(tree: Any) -> Any:
  """What rounding to bfloat16 takes away, in bfloat16."""
  return jax.tree.map(lambda x: (x - _rounded(x)).astype(jnp.bfloat16), tree)


def _rounded(x: jax.Array) -> jax.Array:
  """The nearest bfloat16, as float32.

  XLA may leave out a cast to bfloat16 and back (xla_allow_excess_precision),
  and with it all that is to be kept.
  """
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
