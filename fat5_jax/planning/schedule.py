"""A step in the order in which the compiler has put it: who waits for whom.

A roofline lets products, memory and network hide behind one another. This
follows the schedule: what the compiler starts ahead of its use runs beside what
stands in between, everything else stops the chip while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
import re

from fat5_jax.planning import hlo

# (devices in a group, bytes that pass a device) -> seconds.
Network = Callable[[int, float], float]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Seconds of a step, and those in which only the network is busy."""

  seconds: float
  waiting: float


def follow(
  text: str, compute: float, bandwidth: float, network: Network
) -> Schedule:
  """Follows a compiled program.

  Args:
    text: of the program.
    compute: seconds that all of its products take; each takes its part.
    bandwidth: of the memory, bytes a second.
    network: how long a collective takes alone.
  """
  computations, entry = hlo.parse(text)
  total = _flops(computations, entry)
  reader = _Reader(
    computations, compute / total if total else 0.0, bandwidth, network
  )
  clock = _Clock()
  reader.run(entry, clock)
  clock.wait(clock.free)
  # A kernel's products are not in the text: they come on top.
  return Schedule(clock.now, clock.waiting)


@dataclasses.dataclass
class _Clock:
  """Where a device is in its program, and its network in what it was given."""

  now: float = 0.0
  free: float = 0.0
  waiting: float = 0.0
  pending: dict[str, float] = dataclasses.field(default_factory=dict)

  def wait(self, until: float) -> None:
    self.waiting += max(0.0, until - self.now)
    self.now = max(self.now, until)

  def send(self, seconds: float) -> float:
    """When the network will be done with this, after all before it."""
    self.free = max(self.free, self.now) + seconds
    return self.free


class _Reader:
  """Moves a clock over a program's computations."""

  def __init__(self, computations, per_flop, bandwidth, network):
    self._computations = computations
    self._per_flop, self._bandwidth = per_flop, bandwidth
    self._network = network

  def run(self, name: str, clock: _Clock) -> None:
    instructions = self._computations.get(name, [])
    shapes = {i.name: i.shape for i in instructions}
    for i in instructions:
      if i.opcode == "while":
        inner = _Clock()
        (condition,) = hlo.called(i, "condition")
        (body,) = hlo.called(i, "body")
        self.run(body, inner)
        inner.wait(inner.free)
        times = hlo.trips(i, self._computations.get(condition, []))
        clock.now += times * inner.now
        clock.waiting += times * inner.waiting
      elif i.opcode in ("call", "conditional"):
        for inner in hlo.called(i, "to_apply")[:1]:
          self.run(inner, clock)
      else:
        self._step(i, shapes, clock)

  def _step(self, i: hlo.Instruction, shapes, clock: _Clock) -> None:
    if i.opcode.endswith("-done"):
      for operand in i.operands[:1]:
        clock.wait(clock.pending.pop(operand, clock.now))
      return
    role, sent = self._collectives(i, shapes)
    for key, seconds in sent.items():
      if role == "done" or (role and key in clock.pending):
        if role in ("done", "both"):
          clock.wait(clock.pending.pop(key, clock.now))
      elif role == "":
        clock.wait(clock.send(seconds))
      elif role != "on":
        clock.pending[key] = clock.send(seconds)
    if i.opcode in hlo.FREE or i.opcode.endswith("-start"):
      return
    products = self._per_flop * _flops_of(i, shapes, self._computations)
    moved = hlo.moved(i, shapes, self._computations) / self._bandwidth
    clock.now += max(products, moved)

  def _collectives(self, i: hlo.Instruction, shapes):
    """(role, {which: seconds}) of the collectives that an instruction names."""
    match = hlo.COLLECTIVE.match(i.opcode)
    if match:
      role = "start" if i.opcode.endswith("-start") else ""
      return role, {i.name: self._seconds(match[1], i, shapes)}
    sent, role = {}, ""
    for name in hlo.called(i, "calls") or hlo.called(i, "to_apply"):
      instructions = self._computations.get(name, [])
      role = hlo.role(name, instructions)
      inner_shapes = {j.name: j.shape for j in instructions}
      for j in instructions:
        match = hlo.COLLECTIVE.match(j.opcode)
        if match:
          kind = hlo.kind_of(name, match[1])
          sent[_channel(j)] = self._seconds(kind, j, inner_shapes)
    if i.opcode in ("call-start", "async-start"):
      # On the sparse cores, or so.
      return "start", {i.name: sum(sent.values())} if sent else {}
    return role, sent

  def _seconds(self, kind: str, i: hlo.Instruction, shapes) -> float:
    group, _, passes = hlo.wire(kind, i, shapes)
    return self._network(group, passes) if group > 1 else 0.0


def _channel(i: hlo.Instruction) -> str:
  match = re.search(r"channel_id=(\d+)", i.attributes)
  return match[1] if match else i.name


def _flops(computations, name: str) -> float:
  """Products of a computation, loops as often as they run."""
  instructions = computations.get(name, [])
  shapes = {i.name: i.shape for i in instructions}
  total = 0.0
  for i in instructions:
    if i.opcode == "while":
      (condition,), (body,) = hlo.called(i, "condition"), hlo.called(i, "body")
      times = hlo.trips(i, computations.get(condition, []))
      total += times * _flops(computations, body)
    elif i.opcode == "call":
      total += sum(_flops(computations, n) for n in hlo.called(i, "to_apply"))
    else:
      total += _flops_of(i, shapes, computations)
  return total


def _flops_of(i: hlo.Instruction, shapes, computations) -> float:
  """Products of one instruction, and of what is fused in it."""
  if i.opcode == "fusion":
    return sum(_flops(computations, name) for name in hlo.called(i, "calls"))
  if i.opcode not in ("dot", "convolution"):
    return 0.0
  left, right = (hlo.dimensions(shapes.get(o, "")) for o in i.operands[:2])
  width = 1
  if i.opcode == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    for axis in filter(None, (found[1] if found else "").split(",")):
      width *= left[int(axis)]
  elif found := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes):
    sizes = (left, right, hlo.dimensions(i.shape))
    by = [dict(zip(found[n + 1], sizes[n])) for n in range(3)]
    width *= by[1].get("i", 1)
    for axis in filter(str.isdigit, found[2]):
      width *= _taps(*(sizes.get(axis, 1) for sizes in by), i.attributes)
  return 2.0 * math.prod(hlo.dimensions(i.shape)) * width


def _taps(inputs: int, window: int, outputs: int, attributes: str) -> float:
  """Products that a window along one axis makes for each output.

  The TPU's compiler writes a product's further axes as such: kept ones as space
  that is padded (each output meets one input) or diluted.
  """
  if "lhs_dilate" in attributes:
    return 1.0
  if outputs == inputs - window + 1:
    return float(min(inputs, window))
  return inputs * window / outputs
