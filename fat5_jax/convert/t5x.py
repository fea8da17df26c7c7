"""T5X checkpoints, read: legacy msgpack, orbax with placeholders, OCDBT.

Layouts: minimal (`encoder/layers_0/...`, our own tree) and scalable (one stack
of all layers along axis 1, heads and their dimension apart). T5X writes no
config beside its checkpoints; shapes tell all of it but the activation, the
number of position buckets' distance, and whether an untied output is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
import os
import re
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from fat5_jax.convert import hf, orbax_files, plain_files, table
from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

_PLACEHOLDER = "PLACEHOLDER://"
_LAYER = re.compile(r"layers_\d+$")
# numpy's axes: the tree of a checkpoint has no other lists.
_MOST_AXES = 64
# By the names that flax writes; V2 is how bfloat16 was once called.
_DTYPES = {
  name: np.dtype(name)
  for name in (
    *("float16", "float32", "float64", "bool", "uint8", "uint16", "uint32"),
    *("uint64", "int8", "int16", "int32", "int64"),
  )
} | dict.fromkeys(("bfloat16", "V2"), np.dtype(ml_dtypes.bfloat16))
SLOTS = ("m", "v", "v_row", "v_col")
# What stands in for a slot that a parameter does not use.
UNUSED_SLOT = Leaf((1,), "float32", lambda: np.zeros(1, np.float32))


def is_checkpoint(path: str) -> bool:
  """Whether a file or a `checkpoint_<step>` folder is T5X's."""
  if os.path.isfile(path):
    with open(path, "rb") as file:
      # A msgpack map of a few keys.
      first = file.read(1)
    return bool(first) and 0x81 <= first[0] <= 0x8F
  return any(
    os.path.exists(os.path.join(path, name))
    for name in ("state/_METADATA", "checkpoint")
  ) and not os.path.isdir(os.path.join(path, "params"))


def open_model(
  path: str, overrides: Mapping[str, Any] | None = None
) -> tuple[T5Config, Leaves]:
  """The config and the tensors of a T5X checkpoint, to be read when wanted.

  Args:
    path: a `checkpoint_<step>` folder, or a bare msgpack file.
    overrides: fields of T5Config that shapes do not tell, such as
      mlp_activations=("silu", "linear").

  Raises:
    UserError: with a `-`/`+` list if it holds no T5; if it is damaged.
  """
  target, _ = _open(path)
  if not target:
    raise UserError(f"{path}: no parameters (target) in it")
  target = _minimal(target, path)
  return as_model(target, overrides, path)


def as_model(
  target: Leaves, overrides: Mapping[str, Any] | None, where: str
) -> tuple[T5Config, Leaves]:
  """Parameters under T5X's minimal names, checked, and the config they tell."""
  config = config_of(target, overrides or {}, where)
  table.check_layers(config, len(target), where)
  expected = {row.path: row.shape for row in hf.rows(config)}
  name = "/".join
  table.check_names(map(name, expected), map(name, target), where)
  table.check_shapes(
    {name(k): shape for k, shape in expected.items()},
    {name(k): leaf.shape for k, leaf in target.items()},
    where,
  )
  table.check_floats({name(k): leaf for k, leaf in target.items()}, where)
  return config, target


def read_step(path: str) -> int | None:
  """The step that a checkpoint counts, or None."""
  step = _open(path)[1].get(("step",))
  return None if step is None else step_of(step, path)


def step_of(leaf: Leaf, where: str) -> int:
  """The number of steps that a checkpoint's counter holds."""
  if leaf.shape not in ((), (1,)) or np.dtype(leaf.dtype).kind not in "iu":
    raise UserError(f"{where}: its step is {leaf.dtype}{leaf.shape}, no count")
  step = int(leaf.read().reshape(()))
  if not 0 <= step < 2**31:
    raise UserError(f"{where}: its step is {step}")
  return step


def open_slots(path: str) -> tuple[int, dict[str, Leaves]]:
  """(step, Adafactor's slots by name, each a table by parameter).

  They are those of the minimal layout: of a matrix, `v_row` goes along the
  smaller axis, the first of equal ones. A slot that a parameter does not use
  has shape (1,), as T5X writes it.

  Raises:
    UserError: if the checkpoint has none, or slots of scanned layers that
      cannot be taken apart.
  """
  target, state = _open(path)
  own: dict[tuple[str, ...], dict[str, Leaf]] = {}
  for where, leaf in state.items():
    if where[0] == "param_states" and where[-1] in SLOTS:
      own.setdefault(where[1:-1], {})[where[-1]] = leaf
  if ("step",) not in state or not own:
    raise UserError(f"{path}: no Adafactor state in it")
  slots: dict[str, Leaves] = {name: {} for name in SLOTS}
  for where, leaf in target.items():
    if where not in own:
      raise UserError(f"{path}: no Adafactor slots of {'/'.join(where)}")
    found = {name: own[where].get(name, UNUSED_SLOT) for name in SLOTS}
    for name, i in _layers_of(where, leaf):
      for slot, x in _slots_of_layer(where, leaf, found, i, path).items():
        slots[slot][name] = x
  return step_of(state[("step",)], path), slots


# ---- Files -------------------------------------------------------------------


def _open(path: str) -> tuple[Leaves, Leaves]:
  """(target, optimizer state) of a checkpoint."""
  if os.path.isdir(os.path.join(path, "state")):
    found = orbax_files.read_item(os.path.join(path, "state"))
    return _parts(found, path)
  folder = path
  if os.path.isfile(path):
    folder = os.path.dirname(path)
  else:
    path = os.path.join(path, "checkpoint")
  tree = _read_msgpack(path)
  flat = {}
  # Asked for if an array is beside; a bare file may lie anywhere.
  stored = functools.cache(lambda: plain_files.tree_bytes(folder))
  try:
    for where, value in _walk(tree):
      leaf = _leaf(where, value, folder, stored)
      if leaf is not None:
        flat[where] = leaf
  except UserError:
    raise
  except Exception as e:
    # A tree of the wrong things in the wrong places.
    reason = str(e)[:200] or type(e).__name__
    raise UserError(f"{path}: not a T5X checkpoint: {reason}") from None
  return _parts(flat, path)


def _parts(flat: Leaves, path: str) -> tuple[Leaves, Leaves]:
  target: Leaves = {}
  state: Leaves = {}
  for where, leaf in flat.items():
    if where[0] == "optimizer":
      where = where[1:]
    if where in ((), ("target",), ("params",), ("state",)):
      raise UserError(f"{path}: an array where a tree of them is expected")
    if where[0] in ("target", "params"):
      target[where[1:]] = leaf
    elif where[0] == "state":
      state[where[1:]] = leaf
    elif where[0] in ("step", "param_states"):
      state[where] = leaf
  return target, state


def _read_msgpack(path: str) -> dict[str, Any]:
  data = plain_files.read_bytes(path)
  try:
    tree = msgpack.unpackb(
      data,
      ext_hook=_extension,
      raw=False,
      strict_map_key=False,
      max_array_len=_MOST_AXES,
    )
  except (ValueError, TypeError, msgpack.UnpackException) as e:
    reason = str(e)[:200] or type(e).__name__
    raise UserError(
      f"{path}: not a complete T5X checkpoint (msgpack): {reason}"
    ) from None
  if not isinstance(tree, dict):
    raise UserError(f"{path}: not a T5X checkpoint")
  return tree


def _extension(code: int, data: bytes) -> Any:
  """flax.serialization's array (1) and numpy scalar (3)."""
  if code not in (1, 3):
    raise ValueError(f"unknown record {code}")
  shape, dtype_name, buffer = msgpack.unpackb(
    data, raw=True, max_array_len=_MOST_AXES
  )
  dtype = isinstance(dtype_name, bytes) and _DTYPES.get(dtype_name.decode())
  if not dtype or not isinstance(buffer, bytes):
    raise ValueError(f"no array of {str(dtype_name)[:80]}")
  return np.frombuffer(buffer, dtype).reshape(_counts(shape))


def _counts(shape: Any) -> list[int]:
  if not isinstance(shape, (list, tuple)) or not all(
    type(n) is int and n >= 0 for n in shape
  ):
    raise ValueError("no shape of an array")
  return list(shape)


def _walk(node: Any, path: tuple[str, ...] = ()):
  """(path, value) of leaves: arrays, numbers, text, TensorStore's specs."""
  is_spec = isinstance(node, dict) and {"driver", "kvstore", "metadata"} <= set(
    node
  )
  if isinstance(node, dict) and "__msgpack_chunked_array__" in node:
    shape = [n for _, n in sorted(node["shape"].items(), key=_number)]
    parts = [part for _, part in sorted(node["chunks"].items(), key=_number)]
    whole = np.concatenate([p.reshape(-1) for p in parts])
    yield path, whole.reshape(_counts(shape))
  elif isinstance(node, dict) and not is_spec:
    for key, value in node.items():
      yield from _walk(value, (*path, str(key)))
  else:
    yield path, node


def _number(item) -> int:
  return int(item[0])


def _leaf(
  where: tuple[str, ...],
  value: Any,
  folder: str,
  stored: Callable[[], int],
) -> Leaf | None:
  if isinstance(value, np.ndarray):
    return _as_bfloat16(table.leaf_of(value))
  if isinstance(value, (int, float)):
    return table.leaf_of(np.asarray(value))
  name = ".".join(where[1:] if where[0] == "optimizer" else where)
  if isinstance(value, dict):
    # The recorded path may be that of a bucket; the array lies beside.
    path = value["kvstore"].get("path") or value.get("path") or name
  elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
    path = value.removeprefix(_PLACEHOLDER)
  else:
    return None
  path = os.path.basename(path.rstrip("/"))
  return _beside(folder, [path, name, ".".join(where)], name, stored)


def _beside(
  folder: str, candidates: list[str], name: str, stored: Callable[[], int]
) -> Leaf:
  for candidate in candidates:
    path = plain_files.beside(folder, candidate, f"{folder}: {name}")
    if os.path.isdir(path):
      store = {"driver": "file", "path": path + "/"}
      zarr3 = os.path.exists(os.path.join(path, "zarr.json"))
      driver = "zarr3" if zarr3 else "zarr"
      return _as_bfloat16(orbax_files.array(driver, store, path, stored()))
  if os.path.exists(os.path.join(folder, "manifest.ocdbt")):
    base = {"driver": "file", "path": os.path.abspath(folder) + "/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{candidates[0]}/"}
    return _as_bfloat16(
      orbax_files.array("zarr", store, f"{folder}: {name}", stored())
    )
  raise UserError(f"{folder}: the folder of {name} is missing")


def _as_bfloat16(leaf: Leaf) -> Leaf:
  """T5X once wrote bfloat16 as its bits, uint16."""
  if leaf.dtype != "uint16":
    return leaf
  return Leaf(
    leaf.shape, "bfloat16", lambda: leaf.read().view(ml_dtypes.bfloat16)
  )


# ---- Layouts -----------------------------------------------------------------


def _minimal(target: Leaves, where: str) -> Leaves:
  """The minimal layout of either.

  Raises:
    UserError: if what is stacked tells of layers that cannot be.
  """
  depths: dict[str, int] = {}
  sizes: dict[str, int] = {}
  for path, leaf in target.items():
    axis = _scan_axis(path, leaf)
    if axis is not None:
      depth = leaf.shape[axis] if len(leaf.shape) > axis else 0
      depths[path[0]] = first = depths.get(path[0], depth)
      if depth != first or depth < 1 or 0 in leaf.shape:
        raise UserError(
          f"{where}: {'/'.join(path)} {leaf.shape} is no stack of {first}"
          " layers"
        )
      sizes[path[0]] = sizes.get(path[0], 0) + math.prod(leaf.shape)
  for stack, depth in depths.items():
    # Every layer costs memory here, and may not if it holds hardly a number.
    if depth > sizes[stack] // depth:
      raise UserError(
        f"{where}: {depth} layers in {stack}, of {sizes[stack] // depth}"
        " numbers each"
      )
  return {
    name: _two_axes(name, _slice(leaf, _scan_axis(path, leaf), i))
    for path, leaf in target.items()
    for name, i in _layers_of(path, leaf)
  }


def _scan_axis(path: tuple[str, ...], leaf: Leaf) -> int | None:
  """The axis of a parameter along which layers are stacked, or None."""
  if path[:2] not in (("encoder", "encoder"), ("decoder", "decoder")):
    return None
  return 0 if len(leaf.shape) == 1 else 1


def _layers_of(path: tuple[str, ...], leaf: Leaf):
  """(minimal path, number of the layer or None) of a parameter's layers."""
  axis = _scan_axis(path, leaf)
  if axis is None:
    return [(path, None)]
  return [
    ((path[0], f"layers_{i}", *path[2:]), i) for i in range(leaf.shape[axis])
  ]


def _slice(leaf: Leaf, axis: int | None, i: int | None) -> Leaf:
  if axis is None:
    return leaf
  shape = leaf.shape[:axis] + leaf.shape[axis + 1 :]
  return Leaf(
    shape,
    leaf.dtype,
    lambda: np.ascontiguousarray(np.take(leaf.read(), i, axis)),
  )


def _two_axes(path: tuple[str, ...], leaf: Leaf) -> Leaf:
  """A kernel with heads and their dimension joined."""
  if path[-1] != "kernel" or len(leaf.shape) != 3:
    return leaf
  a, b, c = leaf.shape
  shape = (a * b, c) if path[-2] == "out" else (a, b * c)
  return _shaped(leaf, shape)


def _shaped(leaf: Leaf, shape: tuple[int, ...]) -> Leaf:
  return Leaf(shape, leaf.dtype, lambda: leaf.read().reshape(shape))


def _slots_of_layer(
  path: tuple[str, ...],
  leaf: Leaf,
  slots: Mapping[str, Leaf],
  i: int | None,
  where: str,
) -> dict[str, Leaf]:
  """Adafactor's slots of a parameter, or of layer `i` of it, as open_slots.

  T5X's logical_factor_rules average over the width of the model (`v_col` is
  left) and over all other axes but that of layers (`v_row`).
  """
  layers = _scan_axis(path, leaf)
  found = {}
  for name in ("m", "v"):
    found[name] = slots[name]
    if slots[name].shape == leaf.shape:
      found[name] = _two_axes(path, _slice(slots[name], layers, i))
  factors = {name: slots[name] for name in ("v_row", "v_col")}
  by_size = layers is None and len(leaf.shape) < 3
  if by_size or all(x.shape == (1,) for x in factors.values()):
    return found | factors
  width = len(leaf.shape) - 1 if path[-2] in ("out", "wo") else 0
  axes = {
    "v_row": [n for n in range(len(leaf.shape)) if n in (width, layers)],
    "v_col": [n for n in range(len(leaf.shape)) if n != width],
  }
  vectors = []
  for name, kept in axes.items():
    x = factors[name]
    if x.shape != tuple(leaf.shape[n] for n in kept):
      raise UserError(
        f"{where}: the optimizer's {name} {x.shape} of {'/'.join(path)}"
        f" {leaf.shape} is not one a layer, as T5X's"
        " standard_logical_factor_rules make it, and cannot be taken apart"
      )
    axis = None if layers is None else kept.index(layers)
    x = _slice(x, axis, i)
    vectors.append(_shaped(x, (math.prod(x.shape),)))
  if width:
    vectors.reverse()
  # Now in the order of the matrix's two axes.
  if vectors[1].shape < vectors[0].shape:
    vectors.reverse()
  return found | dict(zip(axes, vectors))


def config_of(
  target: Leaves, overrides: Mapping[str, Any], where: str
) -> T5Config:
  """The T5Config that the shapes of a minimal tree tell.

  Raises:
    UserError: naming the first parameter of a T5 that is not there.
  """

  def shape(*path):
    if path not in target:
      raise UserError(
        f"{where}: no T5: {'/'.join(path)} is missing. It has"
        f" {', '.join(sorted({'/'.join(k[:2]) for k in target})[:8])}"
      )
    return target[path].shape

  def depth(stack):
    numbers = {k[1] for k in target if k[0] == stack and _LAYER.match(k[1])}
    return len(numbers)

  def matrix(*path):
    found = shape(*path)
    if len(found) != 2 or 0 in found:
      raise UserError(f"{where}: {'/'.join(path)} {found} is no matrix")
    return found

  vocab_size, emb_dim = matrix("token_embedder", "embedding")
  first = ("encoder", "layers_0")
  per_layer = (*first, "relpos_bias", "rel_embedding") in target
  owner = first if per_layer else ("encoder",)
  num_heads, buckets = matrix(*owner, "relpos_bias", "rel_embedding")
  width = matrix(*first, "attention", "query", "kernel")[1]
  gated = (*first, "mlp", "wi_0", "kernel") in target
  mlp_dim = matrix(*first, "mlp", "wi_0" if gated else "wi", "kernel")[1]
  fields = {
    "vocab_size": vocab_size,
    "emb_dim": emb_dim,
    "num_heads": num_heads,
    "head_dim": width // num_heads,
    "num_encoder_layers": depth("encoder"),
    "num_decoder_layers": depth("decoder"),
    "mlp_dim": mlp_dim,
    "mlp_activations": ("gelu", "linear") if gated else ("relu",),
    "logits_via_embedding": ("decoder", "logits_dense", "kernel") not in target,
    "relative_attention_num_buckets": buckets,
    "relative_attention_per_layer": per_layer,
    "model_type": "umt5" if per_layer else "t5",
    "dtype": "bfloat16",
  }
  try:
    return T5Config(**fields | dict(overrides))
  except (TypeError, ValueError) as e:
    raise UserError(f"{where}: {e}") from None
