"""Reads a compiled program: HLO text, as XLA prints one partition's.

What is scheduled stands in the order in which it runs.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

_BYTES = {
  "pred": 1,
  **{f"{k}{n}": max(1, n // 8) for k in "su" for n in (2, 4, 8, 16, 32, 64)},
  **{"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16},
}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
COLLECTIVE = re.compile(
  r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
  r"(-start)?$"
)
# What moves nothing in memory.
FREE = {
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


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
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


def size_of(shape: str, everywhere: bool = False) -> int:
  """Bytes of a shape; those that stay on the chip (S(1)) only if asked."""
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    if kind in _BYTES and (everywhere or "S(" not in layout):
      total += _BYTES[kind] * math.prod(
        map(int, filter(None, sizes.split(",")))
      )
  return total


def dimensions(shape: str) -> list[int]:
  """The sizes of an array."""
  match = _ARRAY.search(shape)
  return [int(n) for n in match[2].split(",") if n] if match else []


def called(instruction: Instruction, key: str) -> list[str]:
  match = re.search(
    rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes
  )
  return re.findall(r"%([\w.\-]+)", match[1]) if match else []


def role(name: str, instructions: list[Instruction]) -> str:
  """What a computation has to do with the collectives in it, on a TPU.

  One that runs beside products is named in the fusion where it starts, in all
  in which it goes on, and in the one where it is done: "start", "on", "done",
  "both" where one is done and another starts, "" for what is all of it.
  """
  marks = "".join(
    i.attributes for i in instructions if i.opcode == "custom-call"
  )
  starts, done = ("AsyncCollective" + x in marks for x in ("Start", "Done"))
  if starts or done:
    return "both" if starts and done else "start" if starts else "done"
  return "on" if name.startswith("async_collective_fusion") else ""


def kind_of(name: str, opcode: str) -> str:
  """The kind of a collective in a computation of this name."""
  return "reduce-scatter" if name.startswith("all-reduce-scatter") else opcode


def trips(loop: Instruction, condition: list[Instruction]) -> int:
  """How often a loop runs: what XLA knows, or its condition's constant."""
  known = re.search(r"known_trip_count[^0-9]+(\d+)", loop.attributes)
  if known:
    return int(known[1])
  constants = [i.number for i in condition if i.opcode == "constant"]
  return max([1, *constants])


def moved(i: Instruction, shapes, computations) -> float:
  """Bytes that an instruction reads and writes."""
  reads = [size_of(shapes.get(operand, "")) for operand in i.operands]
  # What starts a copy or a collective gives (source or result, ...) back.
  writes = size_of(i.shape)
  if i.opcode.endswith("-start"):
    writes = max(0, writes - sum(reads))
  if i.opcode in ("slice", "dynamic-slice"):
    return 2 * writes
  if i.opcode == "slice-start":
    # The whole array, the slice (often on the chip), a flag of four bytes.
    source = sum(size_of(shapes.get(o, ""), True) for o in i.operands)
    return writes + size_of(i.shape, True) - source
  if i.opcode == "dynamic-update-slice":
    return 2 * reads[1]
  if i.opcode == "fusion":
    (body,) = called(i, "calls") or [""]
    inside = computations.get(body, [])
    inner_shapes = {j.name: j.shape for j in inside}
    for j in inside:
      if j.opcode == "parameter" and 0 <= j.number < len(reads):
        # A slice of the stacked layers is read, not all of them.
        part = _sliced(computations, body, j.number)
        if part is not None:
          reads[j.number] = min(reads[j.number], part)
    for j in inside:
      if j.opcode == "dynamic-update-slice":
        # Written in place.
        whole, part = size_of(j.shape), inner_shapes.get(j.operands[1], "")
        writes -= max(0, min(writes, whole) - size_of(part, True))
  return sum(reads) + writes


def _sliced(computations, name: str, number: int) -> int | None:
  """Bytes that a fusion reads of an operand of which it takes slices alone.

  None if it reads it otherwise. A fusion inside may be the one that slices.
  """
  inside = computations.get(name, [])
  (parameter,) = [i for i in inside if i.number == number and _is_input(i)]
  names, users = _uses(inside, parameter.name)
  total = 0
  for user in users:
    if user.opcode == "fusion":
      (body,) = called(user, "calls") or [""]
      parts = [
        _sliced(computations, body, index)
        for index, operand in enumerate(user.operands)
        if operand in names
      ]
    elif user.opcode == "dynamic-slice" and user.operands[0] in names:
      parts = [size_of(user.shape)]
    elif user.opcode == "dynamic-update-slice" and user.operands[0] in names:
      parts = [0]
    else:
      return None
    if None in parts:
      return None
    total += sum(parts)
  return total if users else None


def _is_input(i: Instruction) -> bool:
  return i.opcode == "parameter"


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


def wire(
  kind: str, i: Instruction, shapes: dict[str, str]
) -> tuple[int, float, float]:
  """(devices in a group, bytes of the whole array, bytes that pass a device).

  A ring: all but a device's own part passes each link, twice to reduce and to
  spread.
  """
  size = max(
    size_of(i.shape, True) // (2 if i.opcode.endswith("-start") else 1),
    sum(size_of(shapes.get(o, ""), True) for o in i.operands),
  )
  group = group_size(i.attributes)
  if kind == "collective-permute":
    return group, size, size
  passes = 2 if kind == "all-reduce" else 1
  return group, size, size * passes * (group - 1) / group


def group_size(attributes: str) -> int:
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
