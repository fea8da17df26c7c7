"""The chips that devices are, and what each can do.

Figures are the makers' for one JAX device, dense bfloat16: Google's system
architecture pages for v4, v5e, v5p, v6e, Ironwood (an Ironwood chip is two
devices, so half of it each), NVIDIA's data sheets for A100 80GB SXM, H100 SXM,
H200 SXM. Network is what one device sends to its neighbours in the slice or the
NVLink domain, in one direction; `wide_network` what it sends beyond.

A TPU's is half of what all its links send, as a group of chips seldom has the
links of every axis of the torus, or their ends joined, to itself: of v4 half of
2,400 Gbit/s, of v5e 1,600, of v5p 4,800, of v6e 3,584, of Ironwood, by device,
half of 300 GB/s. (v5e: four links of 50 GB/s; Google has 400 GB/s in both
directions, and 1.6 TB/s through the middle of 16 x 16, which 32 links cross.)
Which links a mesh really has is not looked at.
"""

from __future__ import annotations

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device.

  Attributes:
    platform: "tpu", "cuda" or "cpu".
    flops: a second, bfloat16.
    memory: bytes that a program may use; see `capacity`.
    bandwidth: of the memory, bytes a second.
    network: bytes a second to the other devices of its slice or host.
    wide_network: bytes a second to those beyond.
    example: a topology of one host.
  """

  platform: str
  flops: float
  memory: float
  bandwidth: float
  network: float
  wide_network: float
  example: str


CHIPS = {
  "v4": Chip("tpu", 275e12, 30.75 * _GIB, 1228e9, 150e9, 6e9, "v4:2x2x1"),
  "v5e": Chip("tpu", 197e12, 15.75 * _GIB, 819e9, 100e9, 6e9, "v5e:2x4"),
  "v5p": Chip("tpu", 459e12, 95.74 * _GIB, 2765e9, 300e9, 6e9, "v5p:2x2x1"),
  "v6e": Chip("tpu", 918e12, 31.25 * _GIB, 1640e9, 224e9, 6e9, "v6e:2x4"),
  "tpu7x": Chip(
    "tpu", 1153e12, 94.75 * _GIB, 3690e9, 150e9, 6e9, "tpu7x:2x2x1"
  ),
  "a100": Chip("cuda", 312e12, 79.1 * _GIB, 2039e9, 300e9, 25e9, "a100:8"),
  "h100": Chip("cuda", 989e12, 79.1 * _GIB, 3350e9, 450e9, 50e9, "h100:8"),
  "h200": Chip("cuda", 989e12, 140 * _GIB, 4800e9, 450e9, 50e9, "h200:8"),
  "cpu": Chip("cpu", 1e11, 8 * _GIB, 20e9, 5e9, 1e9, "cpu:8"),
}
# A part of what jax calls a device -> its chip; the first that fits. None are
# chips that share a name with another and are slower.
_KINDS = {
  "H200": "h200",
  "H100 PCIe": None,
  "H100 NVL": None,
  "H100": "h100",
  "A100": "a100",
  "TPU v4 lite": None,
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
}


def of_kind(device_kind: str) -> Chip | None:
  """The chip that jax calls so (`Device.device_kind`), None if unknown."""
  for name, chip in _KINDS.items():
    if name in device_kind:
      return CHIPS[chip] if chip else None
  return None
