"""The compiled steps: train, evaluate, predict. Pure functions of arrays.

This module runs where seqio, TensorFlow and gin are not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fat5_jax import objectives, trees
from fat5_jax.models.config import T5Config
from fat5_jax.objectives import totals
from fat5_jax.training import trainable

Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
  """What training changes; `step` counts the updates made."""

  step: jax.Array
  params: Any
  opt_state: Any


def has_dropout(config: T5Config) -> bool:
  parts = (config, config.head, config.lora)
  return any(part is not None and part.dropout_rate > 0 for part in parts)


def make_train_step(
  model,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  loss_normalizing_factor: float | str | None = None,
  num_microbatches: int | None = None,
  trains: frozenset[tuple[str, ...]] | None = None,
  lay_out: Callable[[Any], Any] = lambda gradients: gradients,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """One update: (state, batch) -> (state, sums).

  The randomness of a step follows from `seed` and the step number alone.
  Microbatches accumulate float32 gradients of the same objective, because the
  normalizer is that of the whole batch.

  `trains` holds the paths of the parameters that train (trainable.choose), None
  all. The others are constants: no gradient is computed for them, and
  `state.opt_state` knows only those that train.

  `lay_out` says where gradients lie on a mesh: as the parameters do, so that
  devices which share a batch sum each its own part of them.

  The optimizer is told the step (optimizers.Optimizer); any other optax
  transformation keeps its own count.

  The sums hold `bad_leaf`: the index, in tree order, of the first parameter
  that trains whose gradient is not finite, or -1; the `learning_rate` of this
  update, where the optimizer tells it; and the L2 norms, over all parameters
  that train, of the gradient, of the update as it is added to them, and of what
  they are then.

  Raises:
    UserError: if the model's objective has no such option.
    ValueError: if the batch does not divide into the microbatches.
  """
  objective = objectives.of(
    model.config, z_loss, label_smoothing, loss_normalizing_factor
  )
  dropout = has_dropout(model.config)
  microbatches = num_microbatches or 1
  objective.check_microbatches(microbatches)
  rate_at = getattr(optimizer, "learning_rate", None)
  optimizer = optax.with_extra_args_support(optimizer)

  def gradients(params, batch, weights_BL, normalizer, rng):
    trained, frozen = params

    def loss_fn(trained):
      both = _as_used(trainable.merge(trained, frozen))
      return objective.loss_and_sums(
        model, both, batch, weights_BL, normalizer, rng
      )

    (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    return lay_out(grads), sums

  def accumulate(params, batch, weights_BL, normalizer, rng):
    rows = weights_BL.shape[0]
    if rows % microbatches:
      raise ValueError(
        f"a batch of {rows} rows does not divide into {microbatches}"
        " microbatches"
      )
    # Every microbatch takes rows of every device: a device's rows are
    # neighbours in the batch.
    split = lambda x: jnp.swapaxes(
      x.reshape(-1, microbatches, *x.shape[1:]), 0, 1
    )
    parts = jax.tree.map(split, (dict(batch), weights_BL))

    def add(carry, part):
      index, batch, weights_BL = part
      part_rng = None if rng is None else jax.random.fold_in(rng, index)
      new = gradients(params, batch, weights_BL, normalizer, part_rng)
      return jax.tree.map(jnp.add, carry, new), None

    shapes = jax.eval_shape(
      lambda: gradients(
        params, *jax.tree.map(lambda x: x[0], parts), normalizer, rng
      )
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    zero = lay_out(zero[0]), zero[1]
    return jax.lax.scan(add, zero, (jnp.arange(microbatches), *parts))[0]

  def train_step(state: TrainState, batch: Batch):
    rng = None
    if dropout:
      rng = jax.random.fold_in(jax.random.key(seed), state.step)
    weights_BL, normalizer = objective.weights_and_normalizer(batch)
    run = gradients if microbatches == 1 else accumulate
    trained, frozen = state.params, {}
    if trains is not None:
      trained, frozen = trainable.split(state.params, trains)
    grads, sums = run((trained, frozen), batch, weights_BL, normalizer, rng)
    squares = _squares(grads)
    bad = ~jnp.isfinite(squares)
    sums["gradient_norm"] = jnp.sqrt(squares.sum())
    sums["bad_leaf"] = jnp.where(bad.any(), jnp.argmax(bad), -1)
    sums["steps"] = jnp.float32(1)
    if rate_at is not None:
      sums["learning_rate"] = jnp.float32(rate_at(state.step))
    updates, opt_state = optimizer.update(
      grads, state.opt_state, trained, step=state.step
    )
    params = optax.apply_updates(trained, updates)
    sums["update_norm"] = jnp.sqrt(_squares(updates).sum())
    sums["weight_norm"] = jnp.sqrt(_squares(params).sum())
    if frozen:
      params = trainable.merge(params, frozen)
    return TrainState(state.step + 1, params, opt_state), sums

  return train_step


def _as_used(params: Any) -> Any:
  """bfloat16 parameters as float32, those of the layers' products excepted.

  Gradients of the others are sums over tokens and devices, which bfloat16 would
  not hold. Those of the layers' kernels are products in the dtype of the
  products anyway, and a scan would keep the float32 ones of all its layers.
  """

  def used(path, x):
    *where, name = trees.path_keys(path)
    is_product = name == "kernel" and any(k.startswith("layers") for k in where)
    return x if is_product else x.astype(jnp.float32)

  return jax.tree_util.tree_map_with_path(used, params)


def _squares(tree: Any) -> jax.Array:
  """(P,): the sum of the squares of each array of a tree."""
  square = lambda x: jnp.square(x.astype(jnp.float32))
  return jnp.stack([jnp.sum(square(x)) for x in jax.tree.leaves(tree)])


def make_eval_step(
  model,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  loss_normalizing_factor: float | str | None = None,
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
  """(params, batch) -> sums, without dropout.

  Of batches of many sizes they add up to those of one: a batch counts, in
  `steps`, by what its loss is divided by.
  """
  objective = objectives.of(
    model.config, z_loss, label_smoothing, loss_normalizing_factor
  )

  def eval_step(params, batch):
    weights_BL, normalizer = objective.weights_and_normalizer(batch)
    _, sums = objective.loss_and_sums(
      model, params, batch, weights_BL, normalizer, None
    )
    weight = jnp.float32(normalizer)
    losses = {name: sums[name] * weight for name in totals.NORMALISED}
    return sums | losses | {"steps": weight}

  return eval_step
