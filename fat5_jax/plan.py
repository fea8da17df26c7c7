"""Rehearses a run: `python -m fat5_jax.plan --gin_file=F --topology=v5e:16x16`.

The training step of the gin file, and its decoding step, are compiled by the
chip's own compiler for the whole topology; no chip is needed. What it says of
memory is what the chip would need; times are estimates by roofline.
"""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax import cli

  raise SystemExit(cli.main("plan"))

from collections.abc import Iterator, Sequence
import dataclasses
import json
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np

from fat5_jax import checkpoints, chips, console, cost, steps
from fat5_jax.data import pipeline
from fat5_jax.errors import UserError
from fat5_jax.program import Program, prediction
from fat5_jax.sharding import Partitioner

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on the fullest chip; `needed` is what must fit.

  Attributes:
    parameters: float32.
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
class Report:
  """What is known of one program on one topology; see `_tell`."""

  topology: str
  devices: int
  mesh: str
  fits: bool
  capacity: float
  memory: Memory
  compile_seconds: float
  collectives: dict[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )
  step_flops: float = 0.0
  memory_traffic: float = 0.0
  seconds_compute: float = 0.0
  seconds_memory: float = 0.0
  seconds_network: float = 0.0
  tokens: int = 0
  decode: dict[str, Any] | None = None
  change: list[str] | None = None
  sought: bool = False
  problem: str = ""

  @property
  def seconds(self) -> float:
    """A step by roofline: what takes longest, the rest hidden behind it."""
    return max(self.seconds_compute, self.seconds_memory, self.seconds_network)


def report(
  program: Program,
  dataset_cfg: pipeline.DatasetConfig,
  total_steps: int | None,
  topologies: Sequence[str],
  output: str | None = None,
  decode: bool = True,
  seek: bool = True,
) -> None:
  """Compiles for each topology, prints, and writes JSON.

  Args:
    program: what a run of the gin file would compile.
    dataset_cfg: of its training data; none of it is read.
    total_steps: TRAIN_STEPS, for the hours.
    topologies: names such as v5e:16x16, h100:8, cpu:4; "all" is a host of each
      chip.
    output: JSON file; None is plan.json, here.
    decode: whether to compile decoding too.
    seek: whether to look for a change that fits where the run does not.

  Raises:
    UserError: for a topology, mesh, batch or length that cannot be.
  """
  output = output or "plan.json"
  folder = os.path.dirname(os.path.abspath(output))
  if not os.access(folder, os.W_OK):
    raise UserError(f"--json={output}: {folder} cannot be written")
  every = "all" in topologies
  if every:
    topologies = [
      c.example for c in chips.CHIPS.values() if c.platform != "cpu"
    ]
  shapes = pipeline.batch_shapes(dataset_cfg)
  flops = step_flops(program, shapes)
  found = []
  for topology in topologies:
    console.say(f"compiling for {topology} ...")
    try:
      result = rehearse(program, shapes, topology, flops, decode)
      if seek and not every and not result.fits:
        result = dataclasses.replace(
          result,
          sought=True,
          change=_find_change(program, shapes, topology, flops),
        )
    except UserError as e:
      if not every:
        raise
      result = Report(topology, 0, "", False, 0, Memory(), 0, problem=str(e))
    found.append(result)
    if not every:
      _tell(result, total_steps)
  if every:
    _table(found)
  values = [
    dataclasses.asdict(r) | {"seconds_by_roofline": r.seconds} for r in found
  ]
  checkpoints.write_atomically(output, json.dumps(values, indent=2) + "\n")
  console.say(f"all figures: {output}")


# ---- Compiling ---------------------------------------------------------------


def abstract_batch(
  partitioner: Partitioner, shapes: dict[str, tuple[tuple, np.dtype]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch's shapes on a mesh."""
  sharding = partitioner.batch_sharding()
  return {
    key: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for key, (shape, dtype) in shapes.items()
  }


def step_flops(program: Program, shapes) -> float:
  """Operations of one training step, recomputation included, on all devices.

  They are counted with dense attention, as is the custom.
  """
  config = program.model.config
  dense = _with_config(
    program.replace(partitioner=Partitioner(devices=jax.devices("cpu")[:1])),
    attention_implementation="reference",
    scan_layers=config.scan_layers,
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
  return cost.product_flops(jax.make_jaxpr(step)(dense.abstract_state, batch))


def _with_config(program: Program, **changes: Any) -> Program:
  model = program.model
  return program.replace(
    model=model.clone(config=model.config.replace(**changes))
  )


def rehearse(
  program: Program, shapes, topology: str, flops: float, decode: bool = True
) -> Report:
  """Compiles a program's training step for a topology, and its decoding step.

  Raises:
    UserError: if the topology does not exist, or something does not divide.
  """
  chip = chips.CHIPS[chips.chip_of(topology)]
  partitioner = dataclasses.replace(
    program.partitioner, devices=chips.devices(topology)
  )
  program = program.replace(partitioner=partitioner)
  batch_size, lengths = _sizes(shapes)
  config = program.model.config
  partitioner.check(config, batch_size, lengths, program.num_microbatches)
  state = program.abstract_state
  batch = abstract_batch(partitioner, shapes)
  begin = time.monotonic()
  capacity = chips.capacity(topology)
  memory, text, fits = _compile(program.train_step, (state, batch), capacity)
  seconds = time.monotonic() - begin
  memory = dataclasses.replace(
    memory,
    parameters=_local_bytes(state.params),
    optimizer=_local_bytes(state.opt_state),
  )
  devices = len(partitioner.device_mesh.devices.flat)
  traffic = cost.traffic(text) if text else cost.Traffic()
  domain = chips.domain(chip, devices)
  result = Report(
    topology,
    devices,
    partitioner.describe(),
    fits,
    capacity,
    memory,
    seconds,
    traffic.collectives,
    flops,
    traffic.memory,
    flops / devices / chip.flops,
    traffic.memory / chip.bandwidth,
    sum(
      size / (chip.network if group <= domain else chip.wide_network)
      for group, size in traffic.seconds.items()
    ),
    sum(math.prod(s) for k, (s, _) in shapes.items() if k.endswith("_tokens"))
    - math.prod(shapes.get("decoder_input_tokens", ((0,), None))[0]),
  )
  if decode and fits and config.is_language_model:
    result = dataclasses.replace(
      result,
      decode=_rehearse_decoding(program, batch, lengths, chip, capacity),
    )
  return result


def _sizes(shapes) -> tuple[int, dict[str, int]]:
  """(rows, lengths) of a batch."""
  rows = next(iter(shapes.values()))[0][0]
  lengths = {"inputs": shapes["encoder_input_tokens"][0][1]}
  if "decoder_target_tokens" in shapes:
    lengths["targets"] = shapes["decoder_target_tokens"][0][1]
  return rows, lengths


def _rehearse_decoding(
  program, batch, lengths, chip, capacity
) -> dict[str, Any]:
  predict = prediction(
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


def _refused(message: str, arguments: float) -> Memory:
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
    return _refused(str(e), _local_bytes(arguments)), "", False
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


def _local_bytes(tree: Any) -> float:
  """Bytes of a tree of placed shapes on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


# ---- What would fit ----------------------------------------------------------


def _find_change(program: Program, shapes, topology, flops) -> list[str] | None:
  """The gin lines of the first change, from cheap to dear, that fits."""
  for lines, changed, new_shapes in _changes(program, shapes, topology):
    console.say(f"does not fit; trying {', '.join(lines)} ...")
    try:
      result = rehearse(changed, new_shapes, topology, flops, decode=False)
    except UserError:
      continue
    if result.fits:
      return lines
  return None


def _changes(
  program: Program, shapes, topology: str
) -> Iterator[tuple[list[str], Program, Any]]:
  """(gin lines, program, batch): each keeps those before that cost no speed.

  Splitting the state over the devices that hold copies of it costs least where
  the state is what is large; then recomputation; then microbatches; then tensor
  parallelism; a smaller batch, which changes the training, is last.
  """
  partitioner = dataclasses.replace(
    program.partitioner, devices=chips.devices(topology)
  )
  sizes = partitioner.sizes
  rows = _sizes(shapes)[0]
  kept: dict[str, str] = {}
  current = program

  def lines(**more):
    return [f"{k} = {v}" for k, v in (kept | more).items()]

  def with_mesh(**changes):
    mesh = {a: n for a, n in (sizes | changes).items() if n > 1 and a != "data"}
    return mesh, current.replace(
      partitioner=dataclasses.replace(
        program.partitioner, mesh=mesh, num_partitions=None
      )
    )

  if sizes["data"] > 1 and not program.partitioner.dcn_mesh:
    mesh, current = with_mesh(fsdp=sizes["fsdp"] * sizes["data"])
    kept["MESH"] = repr(mesh)
    yield lines(), current, shapes
  config = program.model.config
  order = ("none", "minimal", "full")
  if not isinstance(config.remat_policy, str):
    order = (config.remat_policy, "full")
  for policy in order[order.index(config.remat_policy) + 1 :]:
    current = _with_config(current, remat_policy=policy)
    kept["REMAT_POLICY"] = repr(policy)
    yield lines(), current, shapes
  before = program.num_microbatches or 1
  ways = partitioner.ways("batch")
  for parts in (2, 4, 8, 16):
    if rows % (ways * before * parts) == 0:
      kept["NUM_MICROBATCHES"] = str(before * parts)
      current = current.replace(num_microbatches=before * parts)
      yield lines(), current, shapes
  for model in (2, 4, 8, 16):
    total = sizes["fsdp"] * sizes["data"]
    if model > sizes["model"] and total * sizes["model"] % model == 0:
      mesh, changed = with_mesh(
        model=model, fsdp=total * sizes["model"] // model
      )
      changed = changed.replace(num_microbatches=None)
      kept.pop("NUM_MICROBATCHES", None)
      yield lines(MESH=repr(mesh)), changed, shapes
  for smaller in (2, 4, 8, 16):
    if rows % (ways * smaller) == 0:
      size = rows // smaller
      reduced = {k: ((size, *s[1:]), d) for k, (s, d) in shapes.items()}
      changed = current.replace(num_microbatches=program.num_microbatches)
      yield lines(BATCH_SIZE=str(size)), changed, reduced


# ---- Telling -----------------------------------------------------------------


def _size(count: float) -> str:
  for unit, name in ((2**40, "TiB"), (_GIB, "GiB"), (2**20, "MiB")):
    if count >= unit:
      return f"{count / unit:,.2f} {name}"
  return f"{count / 2**10:,.1f} KiB"


def _number(x: float) -> str:
  return f"{x:,.1f}" if x >= 10 else f"{x:.2g}"


def _needed(r: Report) -> str:
  if not r.memory.needed:
    return f"more than {_size(r.capacity)}"
  return f"{_size(r.memory.needed)} of {_size(r.capacity)}"


def _tell(r: Report, total_steps: int | None) -> None:
  """What a person wants to know of one topology."""
  memory = r.memory
  verdict = "fits" if r.fits else "DOES NOT FIT"
  rows = [
    ("memory a chip", f"{_needed(r)}: {verdict}"),
    ("  parameters", _size(memory.parameters)),
    ("  optimizer", _size(memory.optimizer)),
    ("  activations and scratch", _size(memory.temporary)),
    ("  program", _size(memory.program)),
  ]
  if r.collectives or r.memory_traffic:
    rows += [
      (
        "operations a step",
        f"{_number(r.step_flops / 1e12)} TFLOP on all chips",
      ),
      ("memory traffic a step", f"{_size(r.memory_traffic)} a chip"),
    ]
    rows += [
      (f"  {kind}", f"{_size(size)} in {count:,.0f}")
      for kind, (count, size) in sorted(r.collectives.items())
    ]
    tokens = r.tokens / r.seconds
    in_ms = lambda seconds: _number(seconds * 1e3)
    rows += [
      (
        "step by roofline",
        f"{in_ms(r.seconds)} ms (compute {in_ms(r.seconds_compute)}, memory"
        f" {in_ms(r.seconds_memory)}, network {in_ms(r.seconds_network)})",
      ),
      ("tokens/s by roofline", f"{tokens:,.0f} (padding counted)"),
    ]
    if total_steps:
      rows.append(
        (
          f"{total_steps:,} steps by roofline",
          f"{_number(r.seconds * total_steps / 3600)} h",
        )
      )
  if r.decode:
    fits = "fits" if r.decode["fits"] else "DOES NOT FIT"
    rows.append(
      ("decoding a batch", f"{_size(r.decode['needed'])} a chip: {fits}")
    )
  rows.append(("compiled in", f"{r.compile_seconds:,.0f} s"))
  devices = f"{r.devices} devices, " if r.devices > 1 else ""
  console.pairs_table(f"{r.topology}, {devices}{r.mesh}", rows)
  if not r.fits and r.sought:
    if r.change is None:
      console.say(
        "no change of recomputation, mesh, microbatches or batch that was tried"
        " makes it fit: take a larger topology or a smaller model"
      )
    else:
      console.say(
        "It fits with these lines in the gin file:\n  " + "\n  ".join(r.change)
      )


def _table(found: Sequence[Report]) -> None:
  header = (
    "topology",
    "memory a chip",
    "",
    "step by roofline",
    "tokens/s",
  )
  rows = []
  for r in found:
    if r.problem:
      rows.append((r.topology, r.problem, "", "", ""))
      continue
    timed = r.seconds > 0 and r.fits
    rows.append(
      (
        r.topology,
        _needed(r),
        "fits" if r.fits else "does not fit",
        f"{_number(r.seconds * 1e3)} ms" if timed else "",
        f"{r.tokens / r.seconds:,.0f}" if timed else "",
      )
    )
  console.plain_table("plan", header, rows)
