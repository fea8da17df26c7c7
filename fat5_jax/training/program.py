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
import numpy as np
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
      optimizers.Optimizer. Parameters are bfloat16 where it is
      optimizers.Compensated, and float32 with all others, which would lose
      small updates.
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

  @property
  def parameter_dtype(self) -> jnp.dtype:
    return getattr(self.optimizer, "parameter_dtype", jnp.dtype(jnp.float32))

  @property
  def row_multiple(self) -> int:
    """What the rows of every batch must be a multiple of."""
    return self.partitioner.ways("batch") * (self.num_microbatches or 1)

  def _init(self) -> steps.TrainState:
    params = initial.init_params(self.model, self.seed)
    return steps.TrainState(jnp.int32(0), *self._start(params))

  def _start(self, params: Any) -> tuple[Any, Any]:
    """(parameters as they train, fresh optimizer state) of float32 ones."""
    trained, _ = trainable.split(params, self.trains)
    as_kept = jax.tree.map(lambda x: x.astype(self.parameter_dtype), params)
    return as_kept, self.optimizer.init(trained)

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

  @functools.cached_property
  def abstract_start(self) -> Any:
    """Shapes and shardings of the float32 parameters of `state_from`."""
    as_float32 = lambda x: x.update(dtype=jnp.float32)
    return jax.tree.map(as_float32, self.abstract_state.params)

  def state_from(
    self, step: int, params: Any, core: Any = None
  ) -> steps.TrainState:
    """The state of a run that begins with parameters.

    Args:
      step: the one that they are of.
      params: float32, as `abstract_start`; not to be used again.
      core: state of the optimizer (averaging.core) to go on with; None is a
        fresh one.
    """
    wanted = lambda state: state
    if core is not None:
      wanted = functools.partial(averaging.with_core, other=())
    opt_state = self.partitioner.jit(
      lambda params: wanted(self._start(params)[1]),
      out_shardings=wanted(_shardings(self.abstract_state.opt_state)),
    )(params)
    if core is not None:
      opt_state = averaging.with_core(opt_state, core)
    if self.parameter_dtype != jnp.float32:
      params = self.partitioner.jit(
        lambda params: self._start(params)[0],
        donate_argnums=0,
        out_shardings=_shardings(self.abstract_state.params),
      )(params)
    return steps.TrainState(self.counter(step), params, opt_state)

  def counter(self, step: int) -> jax.Array:
    """A state's step, lying as a training step leaves it.

    Were it anywhere else, the second step would be compiled once more.
    """
    return jax.make_array_from_callback(
      (), self.partitioner.replicated, lambda _: np.int32(step)
    )

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
