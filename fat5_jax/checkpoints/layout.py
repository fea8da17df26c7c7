"""Layers as they lie on disk, each alone, and as a run has them, stacked."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fat5_jax.convert import orbax_files
from fat5_jax.distributed.sharding import put_parts
from fat5_jax.models import layer_stack


def to_disk_layout(abstract: Any) -> Any:
  """Shapes of a state as they lie on disk."""
  return jax.eval_shape(layer_stack.unstack, abstract)


def to_run_layout(reads: Any, abstract: Any) -> Any:
  """A state in a run's layout, from functions that read it from disk.

  Layers are read and stacked one parameter at a time, and what was read is
  freed, so the devices hold one parameter twice, never all.

  Args:
    reads: functions without arguments, of arrays on the devices, unstacked.
    abstract: the state's shapes, and where they lie.
  """

  def join(like, *layers):
    arrays = [read() for read in layers]
    stacked = jax.jit(lambda *x: jnp.stack(x), out_shardings=like.sharding)(
      *arrays
    )
    stacked.block_until_ready()
    for array in arrays:
      array.delete()
    return stacked

  def stack(node, like):
    if not layer_stack.is_loop(node) or not layer_stack.is_scan(like):
      return jax.tree.map(lambda read: read(), node)
    layers, rest = layer_stack.apart(node)
    stacked = jax.tree.map(join, like["layers"], *layers)
    return jax.tree.map(lambda read: read(), rest) | {"layers": stacked}

  return jax.tree.map(stack, reads, abstract, is_leaf=layer_stack.is_loop)


def to_hosts(stacked: jax.Array) -> Sequence[jax.Array]:
  """The slices of a scanned layer's parameter, in the hosts' memory.

  A save takes one parameter after the other there: the devices have no room
  for the state twice.
  """
  sharding = stacked.sharding
  if not isinstance(sharding, NamedSharding):
    return list(stacked)
  there = NamedSharding(
    sharding.mesh, P(*sharding.spec[1:]), memory_kind="pinned_host"
  )
  split = jax.jit(list, out_shardings=[there] * len(stacked))
  return jax.block_until_ready(split(stacked))


def open_item(folder: str, abstract: Any, within: tuple[str, ...] = ()) -> Any:
  """Functions that read the arrays of an item of a checkpoint.

  They are for to_run_layout. Each reads one array, of it the parts that this
  host's devices hold, and places it as `abstract` says: orbax's own reader
  keeps many whole tensors in memory at once.

  Args:
    folder: that of the item.
    abstract: shapes of its arrays, and where they shall lie.
    within: the path, in the item, of the subtree that is read.

  Raises:
    ValueError: if the item holds other arrays.
  """
  leaves = {
    where[len(within) :]: leaf
    for where, leaf in orbax_files.read_item(folder).items()
    if where[: len(within)] == within
  }
  paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
  reads = []
  for path, target in paths:
    where = tuple(jax.tree_util.keystr((k,), simple=True) for k in path)
    leaf = leaves.pop(where, None)
    if leaf is None or leaf.shape != target.shape:
      found = "nothing" if leaf is None else leaf.shape
      raise ValueError(f"{'/'.join(where)}: {found}, not {target.shape}")
    reads.append(functools.partial(put_parts, target, leaf.read_part))
  # Schedules once had a count of their own; the run's step is theirs now.
  leaves = {where: x for where, x in leaves.items() if where[-1] != "count"}
  if leaves:
    raise ValueError(f"{'/'.join(next(iter(leaves)))} is not wanted")
  return jax.tree.unflatten(structure, reads)
