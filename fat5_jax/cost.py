"""What a step costs: products by its jaxpr, traffic by its compiled text.

XLA's own cost analysis counts the body of a loop once, and a scan over layers
is a loop; here a loop counts as often as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr
import numpy as np

# ---- Products ----------------------------------------------------------------


def product_flops(jaxpr: Any) -> float:
  """Floating-point operations of the matrix products of a jaxpr.

  A multiplication and an addition are two. Loops of unknown length count once,
  of a conditional the dearest branch.
  """
  total = 0.0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      width = math.prod(left[axis] for axis in contracted)
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * width
      continue
    inner = [product_flops(j) for j in _inner_jaxprs(eqn.params)]
    if name == "scan":
      total += eqn.params["length"] * sum(inner)
    elif name == "cond":
      total += max(inner, default=0.0)
    else:
      total += sum(inner)
  return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (ClosedJaxpr, Jaxpr)):
        yield item


# ---- Traffic -----------------------------------------------------------------

_BYTES = {
  "pred": 1,
  **{f"{k}{n}": max(1, n // 8) for k in "su" for n in (2, 4, 8, 16, 32, 64)},
  **{"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16},
}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVE = re.compile(
  r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
  r"(-start)?$"
)
# What moves nothing in memory.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "conditional", "call", "after-all", "partition-id"),
  *("opt-barrier", "iota", "replica-id"),
}


class Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: list[str]
  # Of a constant its value, of a parameter its number.
  number: int
  attributes: str


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
  computations, entry = _parse(text)
  found = Traffic()
  _walk(computations, entry, 1.0, found, memory=True)
  return found


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  computations: dict[str, list[Instruction]] = {}
  current, entry = [], ""
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if header and not line.startswith(" "):
      current = computations.setdefault(header[2], [])
      if header[1]:
        entry = header[2]
      continue
    instruction = _parse_instruction(line)
    if instruction:
      current.append(instruction)
  return computations, entry


def _parse_instruction(line: str) -> Instruction | None:
  match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
  if not match:
    return None
  rest = line[match.end() :]
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, bracket, _ = rest.partition("(")
  if not bracket:
    return None
  end = _closing(rest, len(opcode))
  inside = rest[len(opcode) + 1 : end]
  return Instruction(
    match[1],
    shape,
    opcode,
    re.findall(r"%([\w.\-]+)", inside),
    int(inside) if inside.isdigit() else -1,
    rest[end + 1 :],
  )


def _closing(text: str, start: int) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text) - 1


def _bytes(shape: str, everywhere: bool = False) -> int:
  """Bytes of a shape; those that stay on the chip (S(1)) only if asked."""
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    if kind in _BYTES and (everywhere or "S(" not in layout):
      total += _BYTES[kind] * math.prod(
        map(int, filter(None, sizes.split(",")))
      )
  return total


def _called(instruction: Instruction, key: str) -> list[str]:
  match = re.search(
    rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes
  )
  return re.findall(r"%([\w.\-]+)", match[1]) if match else []


def _walk(computations, name: str, times: float, found: Traffic, memory: bool):
  instructions = computations.get(name, [])
  shapes = {i.name: i.shape for i in instructions}
  started = any("AsyncCollectiveStart" in i.attributes for i in instructions)
  for i in instructions:
    match = _COLLECTIVE.match(i.opcode)
    if match and (started or not name.startswith("async_collective_fusion")):
      scattered = name.startswith("all-reduce-scatter")
      kind = "reduce-scatter" if scattered else match[1]
      _add_collective(found, kind, i, shapes, times)
    if i.opcode == "while":
      (condition,), (body,) = _called(i, "condition"), _called(i, "body")
      count = _trips(i, computations.get(condition, []))
      _walk(computations, body, times * count, found, memory)
    elif i.opcode == "conditional":
      branches = _called(i, "branch_computations") or [
        *_called(i, "true_computation"),
        *_called(i, "false_computation"),
      ]
      for branch in branches:
        _walk(computations, branch, times / len(branches), found, memory)
    elif i.opcode in ("call", "async-start", "call-start"):
      # What starts by itself moves its operands and results, as is seen here.
      inside = memory and i.opcode == "call"
      for called in _called(i, "to_apply") or _called(i, "calls"):
        _walk(computations, called, times, found, inside)
    elif i.opcode == "fusion":
      for called in _called(i, "calls"):
        _walk(computations, called, times, found, False)
    if memory and i.opcode not in _FREE and not i.opcode.endswith("-done"):
      found.memory += times * _moved(i, shapes, computations)


def _trips(loop: Instruction, condition: list[Instruction]) -> int:
  """How often a loop runs: what XLA knows, or its condition's constant."""
  known = re.search(r"known_trip_count[^0-9]+(\d+)", loop.attributes)
  if known:
    return int(known[1])
  constants = [i.number for i in condition if i.opcode == "constant"]
  return max([1, *constants])


def _moved(i: Instruction, shapes, computations) -> float:
  """Bytes that an instruction reads and writes."""
  reads = [_bytes(shapes.get(operand, "")) for operand in i.operands]
  # What starts a copy or a collective gives (source or result, ...) back.
  writes = _bytes(i.shape)
  if i.opcode.endswith("-start"):
    writes = max(0, writes - sum(reads))
  if i.opcode in ("slice", "dynamic-slice"):
    return 2 * writes
  if i.opcode == "slice-start":
    # The whole array, the slice (often on the chip), a flag of four bytes.
    source = sum(_bytes(shapes.get(o, ""), True) for o in i.operands)
    return writes + _bytes(i.shape, True) - source
  if i.opcode == "dynamic-update-slice":
    return 2 * reads[1]
  if i.opcode == "fusion":
    (called,) = _called(i, "calls") or [""]
    inside = computations.get(called, [])
    inner_shapes = {j.name: j.shape for j in inside}
    parameters = [j for j in inside if j.opcode == "parameter"]
    for j in parameters:
      index = j.number
      names, users = _uses(inside, j.name)
      # A slice of the stacked layers is read, not all of them.
      if (
        0 <= index < len(reads)
        and users
        and all(
          u.opcode in ("dynamic-slice", "dynamic-update-slice")
          and u.operands[0] in names
          for u in users
        )
      ):
        slices = [_bytes(u.shape) for u in users if u.opcode == "dynamic-slice"]
        reads[index] = min(reads[index], sum(slices))
    for j in inside:
      if j.opcode == "dynamic-update-slice":
        # Written in place.
        whole, part = _bytes(j.shape), inner_shapes.get(j.operands[1], "")
        writes -= max(0, min(writes, whole) - _bytes(part, True))
  return sum(reads) + writes


def _uses(
  inside: list[Instruction], name: str
) -> tuple[set[str], list[Instruction]]:
  """(names under which a value goes, who uses it).

  A bitcast, or a fusion whose result is its operand in another layout, is
  another name of the same bytes.
  """
  names, users = {name}, []
  for i in inside:
    if names.isdisjoint(i.operands):
      continue
    if i.opcode == "bitcast" or "output_to_operand_aliasing" in i.attributes:
      names.add(i.name)
    else:
      users.append(i)
  return names, users


def _add_collective(found, kind, i: Instruction, shapes, times) -> None:
  size = max(
    _bytes(i.shape, True) // (2 if i.opcode.endswith("-start") else 1),
    sum(_bytes(shapes.get(o, ""), True) for o in i.operands),
  )
  count, total = found.collectives.get(kind, (0.0, 0.0))
  found.collectives[kind] = (count + times, total + times * size)
  group = _group_size(i.attributes)
  if group > 1 or kind == "collective-permute":
    # A ring: all but a device's own part passes each link, twice to reduce and
    # to spread.
    share = 1.0 if kind == "collective-permute" else (group - 1) / group
    passes = 2 if kind == "all-reduce" else 1
    found.seconds[group] = (
      found.seconds.get(group, 0.0) + times * size * share * passes
    )


def _group_size(attributes: str) -> int:
  match = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if match:
    return len(match[1].split(","))
  match = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
  if match:
    return int(match[2])
  match = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
  if match:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    axes = re.findall(r"'([^']+)'", match[2])
    return int(np.prod([int(sizes[a]) for a in axes]))
  match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  return 2 if match else 1
