"""optax's AdamW, at the step of the run."""

from __future__ import annotations

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
import optax

from fat5_jax.optimizers._base import (
  BELOW_1,
  Optimizer,
  Schedule,
  as_schedule,
  chain,
  check_ranges,
)


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
  check_ranges(
    learning_rate=(learning_rate, 0.0, math.inf),
    b1=(b1, 0.0, BELOW_1),
    b2=(b2, 0.0, BELOW_1),
    eps=(eps, 0.0, math.inf),
    weight_decay=(weight_decay, 0.0, math.inf),
    global_norm_clip_threshold=(global_norm_clip_threshold, 0.0, math.inf),
  )
  rate_at = as_schedule(learning_rate)
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

  chained = chain(
    global_norm_clip_threshold,
    learning_rate_multipliers,
    optax.GradientTransformationExtraArgs(inner.init, update),
  )
  return Optimizer(chained, rate_at)
