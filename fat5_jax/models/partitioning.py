"""How activations, and the kernels that read them, lie on a mesh of devices.

A model says which logical axes (T5X's names: batch, length, embed, heads, kv,
joined_kv, mlp, vocab) an array has; the rules of the run say over which mesh
axes those are split (sharding.py makes both and enters them). XLA splits most
operations by itself; attention, the embedding and the loss are split here: a
kernel is opaque to XLA, and a gather and a softmax over a split vocabulary are
better said than guessed. Without a mesh, or on one device, nothing of this
happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import LossSums, flash_attention, linear_cross_entropy

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
MeshAxes = tuple[str, ...]


@contextlib.contextmanager
def using(mesh: jax.sharding.Mesh, rules: Rules) -> Iterator[None]:
  """Traces and runs what is inside on a mesh, by these rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def _mesh():
  """The mesh in use if it has more than one device, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  # Inside shard_map all is said already.
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return None
  return mesh


def mesh_axes(
  mesh, rules: Rules | None, names: Sequence[str | None], shape: Sequence[int]
) -> list[MeshAxes]:
  """The mesh axes over which each axis of an array is split.

  A mesh axis is used once an array, by the first rule that asks for it. An axis
  that does not divide is not split: a cache's one new token, the row that
  initialises a model. What a run needs to divide, sharding.py checks.
  """
  found = []
  for axes, size in zip(nn.logical_to_mesh_axes(names, rules), shape):
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    axes = tuple(a for a in axes if mesh.shape[a] > 1)
    found.append(axes if size % _size(mesh, axes) == 0 else ())
  return found


def _size(mesh, axes: MeshAxes) -> int:
  size = 1
  for axis in axes:
    size *= mesh.shape[axis]
  return size


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """`x`, split as the rules say for its logical axes."""
  mesh = _mesh()
  if mesh is None:
    return x
  axes = mesh_axes(mesh, None, names, x.shape)
  return jax.lax.with_sharding_constraint(x, P(*axes))


def attention(
  q_BQHD: jax.Array,
  k_BKHD: jax.Array,
  v_BKHD: jax.Array,
  *,
  position=None,
  q_segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  q_offset: int | jax.Array = 0,
  **options,
) -> jax.Array:
  """`flash_attention`, split over batch and heads, and queries over `length`.

  Where the length is split, every device gathers all keys and values of its
  heads (linear memory) and attends from its own queries; the bias follows from
  positions, so a device needs to know only where its queries begin.
  """
  mesh = _mesh()
  if mesh is None:
    return flash_attention(
      q_BQHD,
      k_BKHD,
      v_BKHD,
      position=position,
      q_segment_ids=q_segment_ids,
      kv_segment_ids=kv_segment_ids,
      q_offset=q_offset,
      **options,
    )
  names = ("batch", "length", "heads", "kv")
  batch, q_length, heads, _ = mesh_axes(mesh, None, names, q_BQHD.shape)
  kv_length = mesh_axes(mesh, None, names, k_BKHD.shape)[1]
  if not q_length or not kv_length:
    q_length = kv_length = ()

  def one_device(q, k, v, position, q_ids, kv_ids, q_offset):
    if kv_length:
      k, v = _gather((k, v), kv_length, 1)
      if kv_ids is not None:
        kv_ids = _gather(kv_ids, kv_length, 1)
      q_offset += jax.lax.axis_index(q_length) * q.shape[1]
    return flash_attention(
      q,
      k,
      v,
      position=position,
      q_segment_ids=q_ids,
      kv_segment_ids=kv_ids,
      q_offset=q_offset,
      **options,
    )

  static_offset = isinstance(q_offset, int)
  operands = (q_BQHD, k_BKHD, v_BKHD, position, q_segment_ids, kv_segment_ids)
  q_spec, kv_spec = P(batch, q_length, heads), P(batch, kv_length, heads)
  specs = (
    *(q_spec, kv_spec, kv_spec),
    # A table's first axis is heads.
    P(heads),
    *(P(batch, q_length), P(batch, kv_length)),
  )
  if static_offset:
    function = lambda *args: one_device(*args, q_offset)
  else:
    function, operands, specs = (
      one_device,
      (*operands, q_offset),
      (*specs, P()),
    )
  return jax.shard_map(function, in_specs=specs, out_specs=q_spec)(*operands)


def _gather(tree, axes: MeshAxes, dimension: int):
  return jax.tree.map(
    lambda x: jax.lax.all_gather(x, axes, axis=dimension, tiled=True), tree
  )


def embed(
  embedding_VM: jax.Array, tokens_BL: jax.Array, dtype: str
) -> jax.Array:
  """Rows of a table, (B, L, M); an id beyond it gives NaN, not another's row.

  Where the vocabulary is split, a device looks up the ids that it holds and the
  others add nothing.
  """
  # The table's gradient is summed in its own type, float32.
  take = lambda table, ids: jnp.take(table, ids, axis=0, mode="fill")
  mesh = _mesh()
  if mesh is None:
    return take(embedding_VM, tokens_BL).astype(dtype)
  vocab, width = mesh_axes(mesh, None, ("vocab", "embed"), embedding_VM.shape)
  rows = mesh_axes(mesh, None, ("batch", "length"), tokens_BL.shape)
  gathers = set(width) <= {axis for axes in rows for axis in axes}

  def one_device(table, ids):
    if gathers and width:
      table = _gather(table, width, 1)
    if not vocab:
      return take(table, ids).astype(dtype)
    here = ids - jax.lax.axis_index(vocab) * table.shape[0]
    mine = (here >= 0) & (here < table.shape[0])
    found = take(table, jnp.where(mine, here, 0)).astype(dtype)
    found = jnp.where(mine[..., None], found, 0)
    known = (ids >= 0) & (ids < embedding_VM.shape[0])
    return jnp.where(known[..., None], jax.lax.psum(found, vocab), jnp.nan)

  return jax.shard_map(
    one_device,
    in_specs=(P(vocab, width if gathers else None), P(*rows)),
    out_specs=P(*rows),
  )(embedding_VM, tokens_BL)


def token_cross_entropy(
  x_BLM: jax.Array,
  kernel_MV: jax.Array,
  targets_BL: jax.Array,
  weights_BL: jax.Array,
  **options,
) -> LossSums:
  """`linear_cross_entropy` of tokens that are split, as is the vocabulary."""
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  mesh = _mesh()
  if mesh is None:
    return linear_cross_entropy(
      flat(x_BLM), kernel_MV, flat(targets_BL), flat(weights_BL), **options
    )
  rows = mesh_axes(mesh, None, ("batch", "length"), targets_BL.shape)
  width, vocab = mesh_axes(mesh, None, ("embed", "vocab"), kernel_MV.shape)
  row_axes = tuple(axis for axes in rows for axis in axes)
  gathers = set(width) <= set(row_axes)

  def one_device(x, kernel, targets, weights):
    if gathers and width:
      kernel = _gather(kernel, width, 0)
    sums = linear_cross_entropy(
      flat(x),
      kernel,
      flat(targets),
      flat(weights),
      vocab_axis=vocab or None,
      **options,
    )
    if row_axes:
      sums = jax.tree.map(lambda s: jax.lax.psum(s, row_axes), sums)
    return sums

  return jax.shard_map(
    one_device,
    in_specs=(
      P(*rows),
      P(width if gathers else None, vocab),
      P(*rows),
      P(*rows),
    ),
    out_specs=P(),
  )(x_BLM, kernel_MV, targets_BL, weights_BL)
