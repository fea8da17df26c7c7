"""What a setting costs, guessed in milliseconds: which to compile first.

Only the order matters, and what surely does not fit; what is compiled is told
from its compiled text.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from fat5_jax.distributed.rules import logical_axes
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.models.initial import abstract_params
from fat5_jax.planning import chips
from fat5_jax.training import trainable
from fat5_jax.training.program import Program
from fat5_jax.trees import path_keys


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step by roofline, and bytes a chip."""

  seconds: float
  memory: float


@dataclasses.dataclass(frozen=True)
class _Parameters:
  """Numbers of elements on a device."""

  # As they lie; as they are where they are used; of these in the layers, and in
  # the projection to logits.
  split: float
  whole: float
  whole_in_layers: float
  projection: float
  # Over how many devices that share rows' work they are split.
  shares: int


class Estimator:
  """Guesses for the settings of one run on one topology."""

  def __init__(self, program: Program, topology: str):
    self._chip = chips.CHIPS[chips.chip_of(topology)]
    shapes = abstract_params(program.model)
    self._sizes = {
      "/".join(path_keys(path)): float(leaf.size)
      for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    moving, _ = trainable.split(shapes, program.trains)
    self._optimizer_bytes = sum(
      math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
      for x in jax.tree.leaves(jax.eval_shape(program.optimizer.init, moving))
    )

  def __call__(self, program: Program, shapes, flops: float) -> Estimate:
    """Guesses for a program whose partitioner has the topology's devices.

    Args:
      program: what would be compiled.
      shapes: of a batch.
      flops: of a step, on all devices, see rehearse.step_flops.
    """
    chip = self._chip
    partitioner, config = program.partitioner, program.model.config
    parts = program.num_microbatches or 1
    params = self._parameters(program)
    policy = config.remat_policy
    compute = flops / math.prod(partitioner.sizes.values()) / chip.flops
    # Parameters are gathered in 16 bits, where they are not kept again to go
    # back; gradients are summed in 16 bits, the projection's in 32. What the
    # embedding's rows exchange is little.
    gathers = 1 if policy in ("none", "gathered") else 2
    share = (params.shares - 1) / params.shares
    sent = (
      parts
      * share
      * (2 * (gathers + 1) * params.whole_in_layers + 6 * params.projection)
    )
    copies = partitioner.sizes["data"]
    sent += parts * 2 * (copies - 1) / copies * 2 * params.whole / params.shares
    sides = _tokens(partitioner, shapes)
    model = partitioner.ways("mlp")
    rows = sum(sides)
    if model > 1:
      encoder, decoder = sides
      times = 4 * config.num_encoder_layers * encoder
      times += config.num_decoder_layers * (6 * decoder + encoder)
      sent += 2 * 2 * config.emb_dim * times * (model - 1) / model
    length = partitioner.ways("length")
    layers = max(config.num_encoder_layers, config.num_decoder_layers)
    heads = config.num_heads * config.head_dim / model
    if length > 1:
      sent += 3 * 2 * 2 * heads * rows * layers * (length - 1)
    # Elements that a token leaves in a layer, for the way back.
    width, inner = config.emb_dim, config.mlp_dim / model
    minimal = 3 * width + 4 * heads + len(config.mlp_activations) * inner
    kept = {
      "full": width,
      "minimal": minimal,
      "gathered": minimal,
      "none": 3 * minimal,
    }.get(policy, minimal)
    moved = 10 * (params.whole + params.split) + 2 * 8 * minimal * rows * layers
    # What hides behind the longest never hides wholly.
    times = (compute, sent / chip.network, moved / chip.bandwidth)
    seconds = 0.9 * max(times) + 0.1 * sum(times)
    # What of an optimizer's state is as large as parameters lies as they do.
    total, state = sum(self._sizes.values()), self._optimizer_bytes
    state *= params.split / total if state > total else 1.0
    # Parameters, and gradients of their type.
    memory = params.split * 2 * program.parameter_dtype.itemsize + state
    memory += 2 * rows / parts * layers * kept
    if policy in ("none", "gathered"):
      memory += 2 * params.whole_in_layers * 1.5
    if parts > 1:
      memory += 4 * params.split
    return Estimate(seconds, memory)

  def _parameters(self, program: Program) -> _Parameters:
    partitioner = program.partitioner
    of_rows = {
      a for name in ("batch", "length") for a in partitioner.axes_of(name)
    }
    ways = {
      name: (partitioner.ways(name), set(partitioner.axes_of(name)) <= of_rows)
      for name, _ in partitioner.logical_axis_rules
    }
    split = whole = in_layers = projection = 0.0
    tied = program.model.config.logits_via_embedding
    of_logits = (
      "token_embedder/embedding" if tied else "decoder/logits_dense/kernel",
    )
    for name, size in self._sizes.items():
      local = kept = size
      for axis in logical_axes(name) or ():
        count, gathered = ways.get(axis, (1, False))
        local /= count
        kept /= 1 if gathered else count
      split, whole = split + local, whole + kept
      in_layers += kept if "/layers" in name else 0.0
      projection += kept if name in of_logits else 0.0
    return _Parameters(
      split, whole, in_layers, projection, ways.get("embed", (1, True))[0]
    )


def _tokens(partitioner: Partitioner, shapes) -> tuple[float, float]:
  """(encoder's, decoder's) tokens of a device's rows."""
  ways = partitioner.ways("batch") * partitioner.ways("length")
  count = lambda key: (
    math.prod(shapes[key][0]) / ways if key in shapes else 0.0
  )
  return count("encoder_input_tokens"), count("decoder_input_tokens")
