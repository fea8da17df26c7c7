"""Optimizer states to start from: our own, T5X's and Mesh TensorFlow's."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fat5_jax import storage, trees
from fat5_jax.checkpoints import integrity, layout
from fat5_jax.checkpoints.load import put
from fat5_jax.checkpoints.reference import SLOT_READERS, CheckpointRef
from fat5_jax.convert import hf, orbax_files, t5x, table
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config
from fat5_jax.optimizers import AdafactorState


class OtherOptimizerError(UserError):
  """A checkpoint's optimizer is not the run's."""


def load_optimizer(
  source: CheckpointRef,
  abstract: Any,
  abstract_params: Any,
  partitioner: Partitioner,
) -> Any:
  """Optimizer state of a checkpoint to start a run from.

  Of one of bfloat16 parameters, that without the compensation.

  Args:
    source: the checkpoint.
    abstract: shapes of the state, in the run's layout.
    abstract_params: those of the parameters that it is for.
    partitioner: where it lies.

  Raises:
    OtherOptimizerError: if it is that of another optimizer.
  """
  on_disk = partitioner.place(
    layout.to_disk_layout(abstract), layout.to_disk_layout(abstract_params)
  )
  if source.kind in SLOT_READERS:
    found = _adafactor_reads(source, on_disk)
  else:
    if reason := integrity.problem(source.path, ("optimizer",)):
      raise UserError(f"{source.path} is damaged ({reason})")
    try:
      within = ("inner",) if _compensation(source) else ()
      path = os.path.join(source.path, "optimizer")
      found = layout.open_item(path, on_disk, within)
    except storage.StorageError:
      raise
    except (ValueError, KeyError, TypeError) as e:
      raise OtherOptimizerError(
        f"{source.path} holds the state of another optimizer than the gin file"
        f" asks for ({str(e).splitlines()[0]}). Export it with"
        " tools/convert_checkpoint.py and start from the weights alone"
      ) from None
  return layout.to_run_layout(found, abstract)


def has_average(source: CheckpointRef) -> bool:
  """Whether its parameters are an average (training/averaging.py)."""
  return any(
    where[0] == "average" or where[:2] == ("inner", "average")
    for where in _leaves(source)
  )


def compensated(
  source: CheckpointRef, params: Any, partitioner: Partitioner
) -> Any:
  """float32 parameters of a checkpoint, in full.

  Those of a bfloat16 run are rounded, and its optimizer has the rest.
  """
  leaves = _compensation(source)
  if not leaves or has_average(source):
    return params
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
    params,
  )

  def read(path, target):
    leaf = leaves.get(trees.path_keys(path))
    if leaf is None:  # It did not train.
      return functools.partial(jnp.zeros, target.shape, target.dtype)
    return functools.partial(put, target, leaf)

  reads = jax.tree_util.tree_map_with_path(
    read, partitioner.place(layout.to_disk_layout(abstract))
  )
  rest = layout.to_run_layout(reads, abstract)
  return jax.jit(
    lambda params, rest: jax.tree.map(jnp.add, params, rest), donate_argnums=0
  )(params, rest)


def _compensation(source: CheckpointRef) -> table.Leaves:
  """The compensation of parameters (optimizers.Compensated) by their paths."""
  return {
    where[1:]: leaf
    for where, leaf in _leaves(source).items()
    if where[0] == "compensation"
  }


def _leaves(source: CheckpointRef) -> table.Leaves:
  if source.kind != "fat5":
    return {}
  return orbax_files.read_item(os.path.join(source.path, "optimizer"))


def _adafactor_reads(source: CheckpointRef, on_disk: Any) -> Any:
  """Functions that read T5X's or Mesh TensorFlow's slots; see to_run_layout."""
  is_slots = lambda x: isinstance(x, AdafactorState)
  parts = jax.tree.leaves(on_disk, is_leaf=is_slots)
  if len(parts) != 1 or not is_slots(parts[0]):
    raise OtherOptimizerError("the checkpoint's is Adafactor, the run's is not")
  try:
    step, slots = SLOT_READERS[source.kind].open_slots(source.path)
  except storage.StorageError:
    raise
  except UserError as e:
    raise OtherOptimizerError(str(e)) from None
  reads = {"count": functools.partial(put, parts[0].count, _counter(step))}
  for name in t5x.SLOTS:
    targets, found = trees.flatten(getattr(parts[0], name)), slots[name]
    for where in {**targets, **found}:
      there = found[where].shape if where in found else None
      wanted = targets[where].shape if where in targets else None
      if there != wanted:
        raise OtherOptimizerError(
          f"slot {name} of {'/'.join(where)} is {there} in the checkpoint, and"
          f" {wanted} in the run's Adafactor (beta1, factored,"
          " min_dim_size_to_factor, logical_factor_rules)"
        )
    reads[name] = trees.nest(
      {k: functools.partial(put, x, found[k]) for k, x in targets.items()}
    )
  reads = AdafactorState(**reads)
  return jax.tree.map(lambda _: reads, on_disk, is_leaf=is_slots)


def _counter(step: int) -> table.Leaf:
  return table.leaf_of(np.asarray(step, np.int32))


def adafactor_state(source: CheckpointRef, config: T5Config) -> tuple[int, Any]:
  """(step, state of optimizers.adafactor) of a T5X or Mesh TensorFlow
  checkpoint, unstacked, to be written with its weights.

  Raises:
    UserError: if it has no Adafactor state, or not one of the model's shapes.
  """
  step, slots = SLOT_READERS[source.kind].open_slots(source.path)
  shapes = {row.path: row.shape for row in hf.rows(config)}
  for name, found in slots.items():
    where = f"{source.path}: optimizer slot {name}"
    table.check_names(map("/".join, shapes), map("/".join, found), where)
  for path, shape in shapes.items():
    own = {name: slots[name][path].shape for name in t5x.SLOTS}
    full, unused = {"v": shape, "v_row": (1,), "v_col": (1,)}, (1,)
    if own["v"] == unused and len(shape) == 2:
      small, large = sorted(shape)
      full = {"v": unused, "v_row": (small,), "v_col": (large,)}
    full["m"] = shape if own["m"] != unused else unused
    where = f"{source.path}: optimizer slots of {'/'.join(path)}"
    table.check_shapes(full, own, where)
  read = lambda x: np.asarray(x.read(), np.float32)
  state = {
    name: trees.nest({k: read(x) for k, x in slots[name].items()})
    for name in t5x.SLOTS
  }
  return step, (AdafactorState(np.int32(step), **state),)
