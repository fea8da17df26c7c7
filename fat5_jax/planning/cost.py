"""What a step moves, by its compiled text.

XLA's own cost analysis counts the body of a loop once, and a scan over layers
is a loop; here a loop counts as often as it runs.
"""

from __future__ import annotations

import dataclasses

from fat5_jax.planning import hlo


@dataclasses.dataclass
class Traffic:
  """What one device does in one run of a program.

  Attributes:
    memory: bytes to and from its memory.
    collectives: {kind: (times, bytes)}; bytes of the whole array that is
      gathered, reduced or sent.
    seconds: what the collectives take at one byte a second, by the number of
      devices in a group: to be divided by the network's bandwidth.
  """

  memory: float = 0.0
  collectives: dict[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )
  seconds: dict[int, float] = dataclasses.field(default_factory=dict)


def traffic(text: str) -> Traffic:
  """Reads a compiled program (HLO text of one partition)."""
  computations, entry = hlo.parse(text)
  found = Traffic()
  _walk(computations, entry, 1.0, found, memory=True)
  return found


def _walk(computations, name: str, times: float, found: Traffic, memory: bool):
  instructions = computations.get(name, [])
  shapes = {i.name: i.shape for i in instructions}
  # What starts in one fusion goes on in others and is done in a last; it counts
  # where it starts.
  role = hlo.role(name, instructions)
  for i in instructions:
    match = hlo.COLLECTIVE.match(i.opcode)
    if match and role in ("", "start", "both"):
      kind = hlo.kind_of(name, match[1])
      group, size, passes = hlo.wire(kind, i, shapes)
      count, total = found.collectives.get(kind, (0.0, 0.0))
      found.collectives[kind] = (count + times, total + times * size)
      if group > 1:
        found.seconds[group] = found.seconds.get(group, 0.0) + times * passes
    if i.opcode == "while":
      (condition,), (body,) = hlo.called(i, "condition"), hlo.called(i, "body")
      count = hlo.trips(i, computations.get(condition, []))
      _walk(computations, body, times * count, found, memory)
    elif i.opcode == "conditional":
      branches = hlo.called(i, "branch_computations") or [
        *hlo.called(i, "true_computation"),
        *hlo.called(i, "false_computation"),
      ]
      for branch in branches:
        _walk(computations, branch, times / len(branches), found, memory)
    elif i.opcode in ("call", "async-start", "call-start"):
      # What starts by itself moves its operands and results, as is seen here.
      inside = memory and i.opcode == "call"
      for called in hlo.called(i, "to_apply") or hlo.called(i, "calls"):
        _walk(computations, called, times, found, inside)
    elif i.opcode == "fusion":
      for called in hlo.called(i, "calls"):
        _walk(computations, called, times, found, False)
    if memory and i.opcode not in hlo.FREE and not i.opcode.endswith("-done"):
      found.memory += times * hlo.moved(i, shapes, computations)
