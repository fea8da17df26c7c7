"""Learning-rate schedules: T5X's, and those that end with the run."""

from __future__ import annotations

import math

import jax.numpy as jnp

from fat5_jax.errors import UserError, nearest
from fat5_jax.optimizers._base import Schedule, check_ranges

_FACTORS = (
  "constant",
  "linear_warmup",
  "linear_decay",
  "rsqrt_decay",
  "rsqrt_normalized_decay",
  "decay_every",
  "cosine_decay",
  "cosine_to_end",
  "linear_to_end",
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
  total_steps: int | None = None,
  decay_steps: int | None = None,
  end_factor: float = 0.0,
) -> Schedule:
  """A schedule as a product of named factors; T5X's have T5X's meaning.

  * constant: base_learning_rate.
  * linear_warmup: rises from 0 to 1 over warmup_steps.
  * linear_decay: warm-up to base_learning_rate, then a fall of decay_factor of
    it a step; stands alone.
  * rsqrt_decay: divides by sqrt(max(step, warmup_steps)).
  * rsqrt_normalized_decay: the same, 1 until warmup_steps.
  * decay_every: times decay_factor every steps_per_decay.
  * cosine_decay: cosine from 1 to 0 in cycles of steps_per_cycle.
  * cosine_to_end: 1, then over the last decay_steps before total_steps half a
    cosine to end_factor, which stays.
  * linear_to_end: the same along a line.

  Where `decay_steps` is None the fall begins at warmup_steps. So the cosine
  schedule is "constant * linear_warmup * cosine_to_end", and with decay_steps
  "constant * linear_warmup * linear_to_end" is warm-up, stable, decay
  (arXiv:2404.06395).

  `step_offset` is subtracted from the step, total_steps included; the result
  never falls below `min_learning_rate`.

  Raises:
    ValueError: for an unknown factor.
    UserError: for a number that makes no sense, or a fall to the end of a run
      that does not tell its end.
  """
  check_ranges(
    base_learning_rate=(base_learning_rate, 0.0, math.inf),
    warmup_steps=(warmup_steps, 0, 2**31 - 1),
    decay_factor=(decay_factor, 0.0, math.inf),
    steps_per_decay=(steps_per_decay, 1, 2**31 - 1),
    steps_per_cycle=(steps_per_cycle, 1, 2**31 - 1),
    min_learning_rate=(min_learning_rate, 0.0, math.inf),
    decay_steps=(decay_steps, 1, 2**31 - 1),
    end_factor=(end_factor, 0.0, 1.0),
  )
  names = [name.strip() for name in factors.split("*")]
  for name in names:
    if name not in _FACTORS:
      raise ValueError(
        f"learning-rate factor {name!r} is unknown.{nearest(name, _FACTORS)}"
        f" Known: {', '.join(_FACTORS)}"
      )

  decay_begins, decay_ends = 0, 1
  if any(name.endswith("_to_end") for name in names):
    if total_steps is None:
      raise UserError(
        f"the learning rate {factors!r} falls until total_steps: set"
        " TRAIN_STEPS (with TRAIN_STEPS_RELATIVE the last step is not known)"
      )
    decay_ends = total_steps - step_offset
    decay_begins = warmup_steps
    if decay_steps is not None:
      decay_begins = decay_ends - decay_steps
    if not 0 <= decay_begins < decay_ends:
      raise UserError(
        f"the learning rate {factors!r} falls from step {decay_begins} to step"
        f" {decay_ends} (warmup_steps = {warmup_steps}, decay_steps ="
        f" {decay_steps}, total_steps = {total_steps}): no step is left for it"
      )

  # Without a warm-up T5X divides 0 by 0 in the first step.
  at_warmup = max(warmup_steps, 1)

  def schedule(step):
    step = jnp.maximum(0, jnp.asarray(step) - step_offset).astype(jnp.float32)
    past_warmup = jnp.maximum(step, at_warmup)
    warmed = jnp.minimum(1.0, step / at_warmup) if warmup_steps else 1.0
    rate = jnp.float32(1.0)
    for name in names:
      if name == "constant":
        rate *= base_learning_rate
      elif name == "linear_warmup":
        rate *= warmed
      elif name == "linear_decay":
        rate *= base_learning_rate * jnp.minimum(
          warmed, 1.0 + decay_factor * (warmup_steps - step)
        )
      elif name == "rsqrt_decay":
        rate /= jnp.sqrt(past_warmup)
      elif name == "rsqrt_normalized_decay":
        rate *= jnp.sqrt(at_warmup / past_warmup)
      elif name == "decay_every":
        rate *= decay_factor ** jnp.floor(step / steps_per_decay)
      elif name.endswith("_to_end"):
        left = (decay_ends - step) / (decay_ends - decay_begins)
        left = jnp.clip(left, 0.0, 1.0)
        if name == "cosine_to_end":
          left = 0.5 * (1.0 - jnp.cos(jnp.pi * left))
        rate *= end_factor + (1.0 - end_factor) * left
      else:
        progress = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
        rate *= jnp.maximum(
          0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * (progress % 1.0)))
        )
    return jnp.maximum(rate, min_learning_rate)

  return schedule
