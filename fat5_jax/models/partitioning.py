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
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import LossSums, flash_attention, linear_cross_entropy
from pallas_kernels.flash_attention.positions import axes as position_axes

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


def gather_kernel(kernel_IO: jax.Array, *names: str, rows: int) -> jax.Array:
  """A kernel, whole on the devices that share it and not their rows (ZeRO-3).

  Said here, cast before, it is gathered once where it is read, in 16 bits;
  its gradient is summed and split again. XLA, left to choose, gathers some a
  third time, reduces others whole, or sends them round a ring part by part.
  Few rows, as in decoding, move less than the kernel would: there XLA chooses.

  Args:
    kernel_IO: (inputs, outputs).
    *names: its logical axes.
    rows: that it is multiplied with, over all devices.
  """
  mesh = _mesh()
  inputs, outputs = kernel_IO.shape
  if mesh is None or rows * (inputs + outputs) < inputs * outputs:
    return kernel_IO
  split = mesh_axes(mesh, None, names, kernel_IO.shape)
  of_rows = _axes_of_rows(mesh)
  whole = [tuple(a for a in axes if a not in of_rows) for axes in split]
  if whole == split:
    return kernel_IO
  return _resplit(P(*split), P(*whole), kernel_IO)


def _axes_of_rows(mesh) -> set[str]:
  """The mesh axes of several devices over which rows and lengths are split."""
  names = nn.logical_to_mesh_axes(("batch", "length"))
  axes = [(a,) if isinstance(a, str) else tuple(a or ()) for a in names]
  return {a for part in axes for a in part if mesh.shape[a] > 1}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _resplit(before: P, after: P, x: jax.Array) -> jax.Array:
  x = jax.lax.with_sharding_constraint(x, before)
  return jax.lax.with_sharding_constraint(x, after)


def _resplit_back(before: P, after: P, _, g: jax.Array) -> tuple[jax.Array]:
  # Whole first: from that XLA makes one reduce-scatter; without it, on some
  # chips, a loop that sends every part round a ring, twice the bytes.
  g = jax.lax.with_sharding_constraint(g, after)
  return (jax.lax.with_sharding_constraint(g, before),)


_resplit.defvjp(
  lambda before, after, x: (_resplit(before, after, x), None), _resplit_back
)


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
  positions, so a device needs to know only where its queries begin, or where
  each of them stands.
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
    _position_specs(position, {"B": batch, "H": heads, "Q": q_length}),
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


def _position_specs(position, axes: dict[str, MeshAxes]):
  """How the arrays of a position are split, by the axes in their names."""

  def spec(path, x):
    names = position_axes(path[-1].name)
    return P(*(axes.get(n) if d > 1 else None for n, d in zip(names, x.shape)))

  if position is None:
    return P()
  return jax.tree_util.tree_map_with_path(spec, position)


def _gather(tree, axes: MeshAxes, dimension: int):
  return jax.tree.map(
    lambda x: jax.lax.all_gather(x, axes, axis=dimension, tiled=True), tree
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather_as(dtype, axes: MeshAxes, dimension: int, x: jax.Array):
  """Gathers in `dtype`; sums the gradient, and splits it, in x's own."""
  return _gather(x.astype(dtype), axes, dimension).astype(x.dtype)


def _gather_as_back(dtype, axes: MeshAxes, dimension: int, _, g: jax.Array):
  # Parts on an axis of their own: else a TPU reduces a large table whole.
  parts = jax.lax.axis_size(axes)
  before, after = g.shape[:dimension], g.shape[dimension + 1 :]
  g = g.reshape(*before, parts, g.shape[dimension] // parts, *after)
  return (jax.lax.psum_scatter(g, axes, scatter_dimension=dimension),)


_gather_as.defvjp(
  lambda dtype, axes, dimension, x: (
    _gather_as(dtype, axes, dimension, x),
    None,
  ),
  _gather_as_back,
)


def embed(
  embedding_VM: jax.Array, tokens_BL: jax.Array, dtype: str
) -> jax.Array:
  """Rows of a table, (B, L, M); an id beyond it gives NaN, not another's row.

  Where the vocabulary is split, a device looks up the ids that it holds and the
  others add nothing. Where the width is split over devices of other rows, each
  looks its columns of all their rows up, and they exchange: the table, and its
  gradient, stay where they lie. With more tokens than that saves, the table is
  gathered.
  """
  # The table's gradient is summed in its own type, float32.
  take = lambda table, ids: jnp.take(table, ids, axis=0, mode="fill")
  mesh = _mesh()
  if mesh is None:
    return take(embedding_VM, tokens_BL).astype(dtype)
  vocab, width = mesh_axes(mesh, None, ("vocab", "embed"), embedding_VM.shape)
  rows = mesh_axes(mesh, None, ("batch", "length"), tokens_BL.shape)
  gathers = set(width) <= {axis for axes in rows for axis in axes}

  def look_up(table, ids):
    if not gathers or not width:
      return take(table, ids).astype(dtype)
    # Two exchanges of tokens in 16 bits, or a table and its float32 gradient.
    if 4 * ids.size > 6 * table.shape[0]:
      return take(_gather_as(dtype, width, 1, table), ids).astype(dtype)
    found = take(table, _gather(ids, width, 0)).astype(dtype)
    return jax.lax.all_to_all(found, width, 0, found.ndim - 1, tiled=True)

  def one_device(table, ids):
    if not vocab:
      return look_up(table, ids)
    here = ids - jax.lax.axis_index(vocab) * table.shape[0]
    mine = (here >= 0) & (here < table.shape[0])
    found = look_up(table, jnp.where(mine, here, 0))
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
      kernel = _gather_as(x.dtype, width, 0, kernel)
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
