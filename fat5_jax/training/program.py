"""What a run computes, on a mesh: its state's shapes, its compiled steps.

`train` runs them, `plan` compiles them for chips that are not here. This module
runs where seqio, TensorFlow and gin are not installed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fat5_jax import trees
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.models import initial, layer_stack
from fat5_jax.training import averaging, steps, trainable


@dataclasses.dataclass(frozen=True)
class Program:
  """A model, how it is trained, and the mesh it is on.

  Attributes:
    model: a `models.t5.Transformer`, or a head.
    partitioner: the mesh, and where arrays lie on it.
    optimizer: an optax transformation, its learning rate inside; see
      optimizers.Optimizer.
    seed: of initial parameters and dropout.
    z_loss: see steps.make_train_step, as for the rest.
    trainable: see trainable.choose.
    frozen: likewise.
  """

  model: Any
  partitioner: Partitioner
  optimizer: optax.GradientTransformation
  seed: int = 42
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  loss_normalizing_factor: float | str | None = None
  num_microbatches: int | None = None
  trainable: str | None = None
  frozen: str | None = None

  def replace(self, **changes: Any) -> Program:
    return dataclasses.replace(self, **changes)

  @functools.cached_property
  def trains(self) -> frozenset[tuple[str, ...]]:
    """The paths of the parameters that train."""
    params = initial.abstract_params(self.model)
    trainable.check_lora(params, self.model.config)
    return trainable.choose(params, self.trainable, self.frozen)

  def _init(self) -> steps.TrainState:
    params = initial.init_params(self.model, self.seed)
    trained, _ = trainable.split(params, self.trains)
    return steps.TrainState(jnp.int32(0), params, self.optimizer.init(trained))

  @functools.cached_property
  def abstract_state(self) -> steps.TrainState:
    """Shapes, types and shardings of the state."""
    state, place = jax.eval_shape(self._init), self.partitioner.place
    return steps.TrainState(
      jax.ShapeDtypeStruct((), jnp.int32, sharding=self.partitioner.replicated),
      place(state.params),
      place(state.opt_state, state.params),
    )

  @functools.cached_property
  def trained(self) -> Any:
    """Those of the abstract parameters that train."""
    return trainable.split(self.abstract_state.params, self.trains)[0]

  def init_state(self) -> steps.TrainState:
    """A fresh state, made where it lies."""
    return self.partitioner.jit(
      self._init, out_shardings=_shardings(self.abstract_state)
    )()

  def fresh_params(self, names: list[str]) -> dict[str, jax.Array]:
    """Fresh values of some parameters, named as on disk."""

    def init():
      params = layer_stack.unstack(initial.init_params(self.model, self.seed))
      return {
        trees.path_name(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if trees.path_name(path) in names
      }

    where = {
      name: self.partitioner.parameter_sharding(name, x.shape)
      for name, x in jax.eval_shape(init).items()
    }
    return self.partitioner.jit(init, out_shardings=where)()

  def swapped(self, state: steps.TrainState) -> steps.TrainState:
    """The state with its average as parameters, as it is kept; or back."""
    params, opt_state = averaging.swapped(
      state.params, state.opt_state, self.trains
    )
    return steps.TrainState(state.step, params, opt_state)

  def averaged(self, inner: Any, params: Any) -> averaging.AveragedState:
    """The state of an average that begins with parameters."""
    trained, _ = trainable.split(params, self.trains)
    # A copy: a step gives up the parameters and the average, each once.
    start = self.partitioner.jit(
      lambda tree: jax.tree.map(jnp.copy, tree),
      out_shardings=_shardings(self.abstract_state.opt_state.average),
    )(trained)
    return averaging.AveragedState(inner, start, jnp.int32(0))

  def init_optimizer(self, params: Any) -> Any:
    """A fresh optimizer state for parameters."""
    trained, _ = trainable.split(params, self.trains)
    return self.partitioner.jit(
      self.optimizer.init,
      out_shardings=_shardings(self.abstract_state.opt_state),
    )(trained)

  @functools.cached_property
  def train_step(self):
    """(state, batch) -> (state, sums); the state is donated."""
    lie = _shardings(self.trained)
    step = steps.make_train_step(
      self.model,
      self.optimizer,
      seed=self.seed,
      z_loss=self.z_loss,
      label_smoothing=self.label_smoothing,
      loss_normalizing_factor=self.loss_normalizing_factor,
      num_microbatches=self.num_microbatches,
      trains=self.trains,
      lay_out=lambda grads: jax.lax.with_sharding_constraint(grads, lie),
    )
    return self.partitioner.jit(
      step,
      donate_argnums=0,
      out_shardings=(
        _shardings(self.abstract_state),
        self.partitioner.replicated,
      ),
    )

  @functools.cached_property
  def eval_step(self):
    """(params, batch) -> sums."""
    step = steps.make_eval_step(
      self.model,
      z_loss=self.z_loss,
      label_smoothing=self.label_smoothing,
      loss_normalizing_factor=self.loss_normalizing_factor,
    )
    return self.partitioner.jit(step, out_shardings=self.partitioner.replicated)


def _shardings(abstract: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, abstract)
