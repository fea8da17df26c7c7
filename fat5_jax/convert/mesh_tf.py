"""Mesh TensorFlow checkpoints (the original T5's), read; TensorFlow reads them.

Their arrays have T5X's minimal layout; only the names differ.
"""

from __future__ import annotations

from collections.abc import Mapping
import glob
import os
import re
from typing import Any

import numpy as np

from fat5_jax.convert import t5x
from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

_SLOT = re.compile(r"_slot_(vr|vc|v|m)$")
_SLOT_NAMES = {"vr": "v_row", "vc": "v_col", "v": "v", "m": "m"}
# Of two equal axes Mesh TensorFlow's rows go along the second, T5X's along the
# first.
_SQUARE = {"vr": "vc", "vc": "vr"}
_NORMS = {
  "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
  "decoder": (
    "pre_self_attention_layer_norm",
    "pre_cross_attention_layer_norm",
    "pre_mlp_layer_norm",
  ),
}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def prefix_of(path: str) -> str | None:
  """What TensorFlow calls the checkpoint at a path: a prefix, one of its files,
  or a folder (its latest); None if there is none.
  """
  if os.path.isdir(path):
    found = glob.glob(os.path.join(glob.escape(path), "*.index"))
    steps = [(int((re.findall(r"\d+", f) or [0])[-1]), f) for f in found]
    return max(steps)[1].removesuffix(".index") if steps else None
  prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path)
  return prefix if os.path.exists(f"{prefix}.index") else None


def our_path(name: str) -> tuple[str, ...] | None:
  """T5X's path of a variable; None for one that is no parameter.

  Raises:
    UserError: for a name that no T5 has.
  """
  if name == "global_step":
    return None
  if name == "shared/embedding":
    return ("token_embedder", "embedding")
  if name == "decoder/logits/kernel":
    return ("decoder", "logits_dense", "kernel")
  match = re.fullmatch(
    r"(encoder|decoder)/(?:final_layer_norm|rms_norm)/scale", name
  )
  if match:
    return (match[1], f"{match[1]}_norm", "scale")
  match = re.fullmatch(r"(encoder|decoder)/block_(\d+)/layer_(\d+)/(.*)", name)
  if match is None:
    raise UserError(f"variable {name} is not one of T5's")
  stack, block, layer, rest = match[1], int(match[2]), int(match[3]), match[4]
  where = (stack, f"layers_{block}")
  own = "attention" if stack == "encoder" else "self_attention"
  if rest in ("layer_norm/scale", "rms_norm/scale") and layer < len(
    _NORMS[stack]
  ):
    return (*where, _NORMS[stack][layer], "scale")
  match = re.fullmatch(r"(SelfAttention|EncDecAttention)/([qkvo])", rest)
  if match:
    is_cross = match[1] == "EncDecAttention"
    part = "encoder_decoder_attention" if is_cross else own
    return (*where, part, _PROJECTIONS[match[2]], "kernel")
  if rest == "SelfAttention/relative_attention_bias":
    return (*where, "relpos_bias", "rel_embedding")
  match = re.fullmatch(r"DenseReluDense/(wi|wi_0|wi_1|wo)/kernel", rest)
  if match:
    return (*where, "mlp", match[1], "kernel")
  raise UserError(f"variable {name} is not one of T5's")


def _open(path: str):
  import tensorflow as tf  # Only for these checkpoints.

  prefix = prefix_of(path)
  try:
    reader = tf.train.load_checkpoint(prefix)
    shapes = reader.get_variable_to_shape_map()
    dtypes = reader.get_variable_to_dtype_map()
  except Exception as e:  # TensorFlow raises its own unrelated types
    raise UserError(f"{path}: not a complete TensorFlow checkpoint: {e}") from (
      None
    )

  def read(name) -> np.ndarray:
    try:
      return np.asarray(reader.get_tensor(name))
    except Exception as e:
      raise UserError(f"{path}: {name}: damaged: {e}") from None

  return {
    name: Leaf(tuple(shape), dtypes[name].name, lambda name=name: read(name))
    for name, shape in shapes.items()
  }


def open_model(
  path: str, overrides: Mapping[str, Any] | None = None
) -> tuple[T5Config, Leaves]:
  """The config and the tensors of a checkpoint; see t5x.open_model."""
  variables = _open(path)
  target = {}
  for name, leaf in variables.items():
    if _SLOT.search(name):
      continue
    where = our_path(name)
    if where is not None:
      target[where] = leaf
  return t5x.as_model(_shared_bias(target), overrides, path)


def read_step(path: str) -> int | None:
  """As t5x.read_step."""
  step = _open(path).get("global_step")
  return None if step is None else t5x.step_of(step, path)


def open_slots(path: str) -> tuple[int, dict[str, Leaves]]:
  """As t5x.open_slots; a slot that is not there is a zero of shape (1,)."""
  variables = _open(path)
  if "global_step" not in variables or not any(map(_SLOT.search, variables)):
    raise UserError(f"{path}: no optimizer state in it")
  params = {n: our_path(n) for n in variables if not _SLOT.search(n)}

  def slot(name: str, theirs: str) -> Leaf:
    shape = variables[name].shape
    if len(shape) == 2 and shape[0] == shape[1]:
      theirs = _SQUARE.get(theirs, theirs)
    return variables.get(f"{name}_slot_{theirs}", t5x.UNUSED_SLOT)

  slots: dict[str, Leaves] = {}
  for theirs, ours in _SLOT_NAMES.items():
    slots[ours] = _shared_bias(
      {
        where: slot(name, theirs)
        for name, where in params.items()
        if where is not None
      }
    )
  return t5x.step_of(variables["global_step"], path), slots


def _shared_bias(target: Leaves) -> Leaves:
  """A table that only the first block of a stack has belongs to the stack."""
  found = dict(target)
  for stack in ("encoder", "decoder"):
    tables = [k for k in target if k[0] == stack and "relpos_bias" in k]
    if len(tables) == 1:
      shared = (stack, "relpos_bias", "rel_embedding")
      found[shared] = found.pop(tables[0])
  return found
