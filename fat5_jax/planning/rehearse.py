"""Compiles a run's programs for a topology: memory, operations, time.

What it says of memory is what the chip would need; times are estimates by
roofline.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
import re
import time
from typing import Any

import jax
import numpy as np

from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.inference.decoding import make_predict_step
from fat5_jax.planning import chips, cost, schedule
from fat5_jax.training import flops as flops_lib
from fat5_jax.training import steps
from fat5_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on the fullest chip; `needed` is what must fit.

  Attributes:
    parameters: as they train, float32 or bfloat16.
    optimizer: its state.
    temporary: activations, gathered parameters, gradients, scratch.
    program: the code.
    needed: of the whole step; 0 where the compiler refused it untold.
  """

  parameters: float = 0.0
  optimizer: float = 0.0
  temporary: float = 0.0
  program: float = 0.0
  needed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
  """An earlier stage of a curriculum of lengths; `needed` as Memory's."""

  until_step: int
  batch_size: int
  lengths: dict[str, int]
  needed: float
  fits: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of one program on one topology; tell.py says it.

  Attributes:
    step_flops: of the products, those that are computed again included.
    useful_flops: those without.
    seconds_scheduled: of a step in the order in which the compiler has put it.
    seconds_waiting: of these, those in which only the network is busy.
    fastest: settings that were compiled beside this one (search.py).
    stages: of a curriculum, those before the last, which is all the rest.
  """

  topology: str
  devices: int
  mesh: str
  fits: bool
  capacity: float
  memory: Memory
  compile_seconds: float
  batch_size: int = 0
  num_microbatches: int = 1
  remat_policy: str | tuple[str, ...] = ""
  collectives: dict[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )
  step_flops: float = 0.0
  useful_flops: float = 0.0
  memory_traffic: float = 0.0
  seconds_compute: float = 0.0
  seconds_memory: float = 0.0
  seconds_network: float = 0.0
  seconds_scheduled: float = 0.0
  seconds_waiting: float = 0.0
  tokens: int = 0
  decode: dict[str, Any] | None = None
  change: list[str] | None = None
  sought: bool = False
  fastest: list[dict[str, Any]] | None = None
  problem: str = ""
  stages: Sequence[Stage] = ()

  @property
  def all_fits(self) -> bool:
    """Whether every stage of a curriculum does too."""
    return self.fits and all(stage.fits for stage in self.stages)

  @property
  def seconds(self) -> float:
    """A step by roofline: what takes longest, the rest hidden behind it."""
    return max(self.seconds_compute, self.seconds_memory, self.seconds_network)

  @property
  def of_compute(self) -> float:
    """The part of a step by roofline that useful products take."""
    if not self.seconds or not self.step_flops:
      return 0.0
    useful = self.useful_flops / self.step_flops * self.seconds_compute
    return useful / self.seconds


def abstract_batch(
  partitioner: Partitioner, shapes: dict[str, tuple[tuple, np.dtype]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch's shapes on a mesh."""
  sharding = partitioner.batch_sharding()
  return {
    key: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for key, (shape, dtype) in shapes.items()
  }


def step_flops(program: Program, shapes, **config: Any) -> float:
  """Operations of one training step, recomputation included, on all devices.

  They are counted with dense attention, as is the custom.

  Args:
    program: what is trained.
    shapes: of a batch.
    **config: fields of the model's configuration to change first.
  """
  dense = with_config(
    program.replace(partitioner=Partitioner(devices=jax.devices("cpu")[:1])),
    attention_implementation="reference",
    **config,
  )
  batch = {k: jax.ShapeDtypeStruct(s, d) for k, (s, d) in shapes.items()}
  step = steps.make_train_step(
    dense.model,
    dense.optimizer,
    seed=0,
    z_loss=dense.z_loss,
    label_smoothing=dense.label_smoothing,
    loss_normalizing_factor=dense.loss_normalizing_factor,
    num_microbatches=dense.num_microbatches,
    trains=dense.trains,
  )
  return flops_lib.product_flops(
    jax.make_jaxpr(step)(dense.abstract_state, batch)
  )


def useful_and_all_flops(program: Program, shapes) -> tuple[float, float]:
  """Operations of a step without those that are computed again, and with."""
  useful = step_flops(program, shapes, remat_policy="none")
  if program.model.config.remat_policy == "none":
    return useful, useful
  return useful, step_flops(program, shapes)


def with_config(program: Program, **changes: Any) -> Program:
  """The program, fields of its model's configuration changed."""
  model = program.model
  return program.replace(
    model=model.clone(config=model.config.replace(**changes))
  )


def on_topology(program: Program, topology: str) -> Program:
  """The program, for the devices of a topology in the place of its own."""
  partitioner = dataclasses.replace(
    program.partitioner, devices=chips.devices(topology)
  )
  return program.replace(partitioner=partitioner)


def rehearse(
  program: Program,
  shapes,
  topology: str,
  flops: tuple[float, float],
  decode: bool = True,
) -> Report:
  """Compiles a program's training step for a topology, and its decoding step.

  Args:
    program: what is trained; the topology's devices replace its own.
    shapes: of a batch.
    topology: as chips.devices wants it.
    flops: see useful_and_all_flops.
    decode: whether to compile decoding too.

  Raises:
    UserError: if the topology does not exist, or something does not divide.
  """
  chip = chips.CHIPS[chips.chip_of(topology)]
  program = on_topology(program, topology)
  partitioner = program.partitioner
  batch_size, lengths = sizes_of(shapes)
  config = program.model.config
  partitioner.check(config, batch_size, lengths, program.num_microbatches)
  state = program.abstract_state
  batch = abstract_batch(partitioner, shapes)
  begin = time.monotonic()
  capacity = chips.capacity(topology)
  memory, text, fits = _compile(program.train_step, (state, batch), capacity)
  seconds = time.monotonic() - begin
  devices = len(partitioner.device_mesh.devices.flat)
  useful, total = flops
  result = Report(
    topology,
    devices,
    partitioner.describe(),
    fits,
    capacity,
    dataclasses.replace(
      memory,
      parameters=local_bytes(state.params),
      optimizer=local_bytes(state.opt_state),
    ),
    seconds,
    batch_size,
    program.num_microbatches or 1,
    config.remat_policy,
    step_flops=total,
    useful_flops=useful,
    tokens=_tokens(shapes),
  )
  if text:
    result = _timed(result, text, chip)
  if decode and fits and config.is_language_model:
    result = dataclasses.replace(
      result,
      decode=_rehearse_decoding(program, batch, lengths, chip, capacity),
    )
  return result


def rehearse_stage(
  program: Program, shapes, topology: str, until_step: int
) -> Stage:
  """Compiles the training step for the batches of an earlier stage."""
  found = rehearse(program, shapes, topology, (0.0, 0.0), decode=False)
  sizes = sizes_of(shapes)
  return Stage(until_step, *sizes, found.memory.needed, found.fits)


def _timed(result: Report, text: str, chip: chips.Chip) -> Report:
  """The report with what its compiled text tells."""
  traffic = cost.traffic(text)
  compute = result.step_flops / result.devices / chip.flops
  domain = chips.domain(chip, result.devices)

  def seconds(group: int, size: float) -> float:
    return size / (chip.network if group <= domain else chip.wide_network)

  scheduled = schedule.follow(text, compute, chip.bandwidth, seconds)
  return dataclasses.replace(
    result,
    collectives=traffic.collectives,
    seconds_compute=compute,
    memory_traffic=traffic.memory,
    seconds_memory=traffic.memory / chip.bandwidth,
    seconds_network=sum(seconds(*item) for item in traffic.seconds.items()),
    seconds_scheduled=scheduled.seconds,
    seconds_waiting=scheduled.waiting,
  )


def _tokens(shapes) -> int:
  """Tokens of a batch, its padding counted, its decoder's once."""
  count = lambda key: math.prod(shapes[key][0])
  return sum(
    count(key)
    for key in shapes
    if key.endswith("_tokens") and key != "decoder_input_tokens"
  )


def sizes_of(shapes) -> tuple[int, dict[str, int]]:
  """(rows, lengths) of a batch."""
  rows = next(iter(shapes.values()))[0][0]
  lengths = {"inputs": shapes["encoder_input_tokens"][0][1]}
  if "decoder_target_tokens" in shapes:
    lengths["targets"] = shapes["decoder_target_tokens"][0][1]
  return rows, lengths


def _rehearse_decoding(
  program, batch, lengths, chip, capacity
) -> dict[str, Any]:
  predict = make_predict_step(
    program.model, program.partitioner, lengths.get("targets")
  )
  begin = time.monotonic()
  tokens = {"encoder_input_tokens": batch["encoder_input_tokens"]}
  arguments = (program.abstract_state.params, tokens)
  memory, text, fits = _compile(predict, arguments, capacity)
  return {
    "fits": fits,
    "needed": memory.needed,
    "new_tokens": lengths.get("targets"),
    "seconds_memory": cost.traffic(text).memory / chip.bandwidth,
    "compile_seconds": time.monotonic() - begin,
  }


# The TPU's compiler tells either of temporaries alone or of everything.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])")
_EVERYTHING = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def refused(message: str, arguments: float) -> Memory:
  """What a program that the compiler finds too large would need.

  Args:
    message: of the compiler.
    arguments: bytes of the program's arguments on a device.
  """
  for pattern, rest in ((_TEMPORARIES, 0), (_EVERYTHING, arguments)):
    if match := pattern.search(message):
      temporary = float(match[1]) * _UNITS[match[2]] - rest
      return Memory(temporary=temporary, needed=arguments + temporary)
  return Memory()


def _compile(function, arguments, capacity) -> tuple[Memory, str, bool]:
  """(memory, compiled text, whether it fits) of a function on its mesh."""
  try:
    compiled = function.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return refused(str(e), local_bytes(arguments)), "", False
  stats = compiled.memory_analysis()
  temporary = (
    stats.temp_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
  )
  program_size = stats.generated_code_size_in_bytes
  needed = stats.argument_size_in_bytes + temporary + program_size
  memory = Memory(temporary=temporary, program=program_size, needed=needed)
  return memory, compiled.as_text(), needed <= capacity


def local_bytes(tree: Any) -> float:
  """Bytes of a tree of placed shapes on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
