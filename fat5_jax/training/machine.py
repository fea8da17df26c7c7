"""What the machine does for a run: operations, memory, time to compile."""

from __future__ import annotations

from collections.abc import Mapping
import resource
import sys
from typing import Any

import jax

from fat5_jax.distributed import chips
from fat5_jax.training import flops
from fat5_jax.training.program import Program

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(batch: Mapping[str, Any]) -> Shapes:
  """What a batch is compiled for."""
  return tuple((name, array.shape) for name, array in batch.items())


class Machine:
  """The devices of a run, and what its steps ask of them.

  Attributes:
    peak_flops: a second, bfloat16, of all devices; None of those that
      distributed/chips.py does not know.
  """

  def __init__(self, program: Program):
    self._program = program
    mesh = program.partitioner.device_mesh.devices.flat
    chip = chips.of_kind(mesh[0].device_kind)
    self.peak_flops = chip.flops * len(mesh) if chip is not None else None
    self._flops: dict[Shapes, float] = {}

  def is_new(self, batch: Mapping[str, Any]) -> bool:
    """Whether no batch before had these shapes."""
    return shapes_of(batch) not in self._flops

  def flops(self, batch: Mapping[str, Any]) -> float:
    """Of a step of this batch (flops.model_flops); 0 where no peak is known."""
    shapes = shapes_of(batch)
    if shapes not in self._flops:
      self._flops[shapes] = (
        flops.model_flops(self._program, batch) if self.peak_flops else 0.0
      )
    return self._flops[shapes]

  def use(self, done: float, seconds: float) -> dict[str, float]:
    """{"mfu": ...}, the part of the peak that `done` operations were.

    Empty where no peak is known.
    """
    if not self.peak_flops:
      return {}
    return {"mfu": done / seconds / self.peak_flops}


def peak_memory() -> dict[str, float]:
  """The most that was ever in use, in GiB.

  `peak_device_gib` of this host's fullest device, where it tells; else
  `peak_process_gib`, what the process has had resident.
  """
  found = [
    stats["peak_bytes_in_use"]
    for device in jax.local_devices()
    if "peak_bytes_in_use" in (stats := device.memory_stats() or {})
  ]
  if found:
    return {"peak_device_gib": max(found) / 2**30}
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts KiB, macOS bytes.
  unit = 1 if sys.platform == "darwin" else 2**10
  return {"peak_process_gib": resident * unit / 2**30}
