"""T5X's Adafactor by hand, in numpy's float64: an oracle, not our code.

One parameter at a time, in T5X's own layout: `kinds` says of every axis whether
it is a "row", a "column", a "batch" (of layers) or "none", as T5X's
logical_factor_rules do; None is its heuristic for parameters of up to two axes,
the larger of which is the column.
"""

import numpy as np


def _axes(shape, kinds, factored, min_dim):
  """(axes over which means go, rows, columns or None)."""
  everything = tuple(range(len(shape)))
  if not factored:
    return everything, None
  if kinds is None:
    if len(shape) < 2 or min(shape) < min_dim:
      return everything, None
    order = np.argsort(shape, kind="stable")
    return everything, ((int(order[0]),), (int(order[1]),))
  of = lambda kind: tuple(i for i, k in enumerate(kinds) if k == kind)
  means = tuple(i for i in everything if kinds[i] != "batch")
  if not (of("row") and of("column")):
    return means, None
  return means, (of("row"), of("column"))


def init(shape, kinds=None, factored=True, beta1=None, min_dim=128):
  """The slots of a parameter; unused ones have shape (1,)."""
  slots = {name: np.zeros(1) for name in ("m", "v", "v_row", "v_col")}
  if beta1 is not None:
    slots["m"] = np.zeros(shape)
  _, pair = _axes(shape, kinds, factored, min_dim)
  if pair is None:
    slots["v"] = np.zeros(shape)
  else:
    rows, columns = pair
    slots["v_row"] = np.zeros(np.delete(shape, columns))
    slots["v_col"] = np.zeros(np.delete(shape, rows))
  return slots


def update(
  param,
  slots,
  grad,
  rate,
  count,
  kinds=None,
  factored=True,
  beta1=None,
  min_dim=128,
  decay_rate=0.8,
  step_offset=0,
  clipping_threshold=1.0,
  scaled=True,
  epsilon1=1e-30,
  epsilon2=1e-3,
  weight_decay_rate=None,
  weight_decay_rate_lr_exponent=None,
  max_parameter_scale=None,
  skip_nan_updates=False,
):
  """(parameter, slots) after update number `count` (from 0)."""
  means, pair = _axes(param.shape, kinds, factored, min_dim)
  rms = lambda x: np.sqrt(np.mean(x * x, axis=means, keepdims=True))
  decay = 1.0 - (count - step_offset + 1.0) ** -decay_rate
  old, slots = slots, dict(slots)
  square = grad * grad + epsilon1
  if pair is None:
    slots["v"] = decay * old["v"] + (1.0 - decay) * square
    y = grad / np.sqrt(slots["v"])
  else:
    rows, columns = pair
    for name, axes in (("v_row", columns), ("v_col", rows)):
      mean = np.mean(square, axis=axes)
      slots[name] = decay * old[name] + (1.0 - decay) * mean
    row = np.expand_dims(slots["v_row"], columns)
    column = np.expand_dims(slots["v_col"], rows)
    row = row / np.mean(row, axis=rows, keepdims=True)
    y = grad / np.sqrt(row) / np.sqrt(column)
  if clipping_threshold is not None:
    y = y / np.maximum(1.0, rms(y) / clipping_threshold)
  scale = rate
  if scaled:
    size = np.maximum(rms(param), epsilon2)
    if max_parameter_scale is not None:
      size = np.minimum(size, max_parameter_scale)
    scale = rate * size
  change = scale * y
  if beta1 is not None:
    change = slots["m"] = beta1 * old["m"] + (1.0 - beta1) * change
  kept = param
  if weight_decay_rate_lr_exponent:
    weight_decay_rate = (
      1.0 if weight_decay_rate is None else weight_decay_rate
    ) * rate**weight_decay_rate_lr_exponent
  if weight_decay_rate is not None:
    kept = (1.0 - weight_decay_rate) * param
  new = kept - change
  if skip_nan_updates:
    new = np.where(np.isnan(new), param, new)
    slots = {k: np.where(np.isnan(x), old[k], x) for k, x in slots.items()}
  return new, slots


def scanned(flat, head_dim):
  """A table of a minimal T5 as T5X's scalable layout has it.

  Layers stand along axis 1, heads and their dimension apart.
  """
  found = {}
  for path, x in flat.items():
    if len(path) < 2 or not path[1].startswith("layers_"):
      found[path] = x
    elif path[1] == "layers_0":
      names = [k for k in flat if k[0] == path[0] and k[2:] == path[2:]]
      layers = [
        flat[(path[0], f"layers_{i}", *path[2:])] for i in range(len(names))
      ]
      if path[-2] == "out":
        layers = [x.reshape(-1, head_dim, x.shape[1]) for x in layers]
      elif path[-2] in ("query", "key", "value"):
        layers = [x.reshape(x.shape[0], -1, head_dim) for x in layers]
      found[(path[0], path[0], *path[2:])] = np.stack(layers, 1)
  return found


def standard_kinds(path, shape):
  """What standard_logical_factor_rules make of the axes of that layout."""
  if path[:2] not in (("encoder", "encoder"), ("decoder", "decoder")):
    return None
  if path[-2] in ("query", "key", "value"):
    return "row", "batch", "column", "column"
  if path[-2] == "out":
    return "column", "batch", "column", "row"
  if path[-2] == "wo":
    return "column", "batch", "row"
  if path[-2] in ("wi", "wi_0", "wi_1"):
    return "row", "batch", "column"
  return ("none", "batch", "none")[: len(shape)]
