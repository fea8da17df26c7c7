"""How to compile for chips that are not here (distributed/chips.py)."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from typing import Any

from fat5_jax.distributed.chips import CHIPS, Chip
from fat5_jax.errors import UserError, nearest

_GPUS_A_HOST = 8
# name: (compute capability, multiprocessors, shared memory a block, memory)
GPUS = {
  "a100": ((8, 0), 108, 166912, 84978434048),
  "a10": ((8, 6), 72, 101376, 23821549568),
  "l4": ((8, 9), 58, 101376, 23821549568),
  "h100": ((9, 0), 132, 232448, 84978434048),
  "h200": ((9, 0), 132, 232448, 150323855360),
  "b200": ((10, 0), 148, 232448, 191000000000),
}


def chip_of(topology: str) -> str:
  """ "v5e" of "v5e:16x16".

  Raises:
    UserError: for a name that no topology has.
  """
  name, _, shape = topology.partition(":")
  examples = ", ".join(chip.example for chip in CHIPS.values())
  if name not in CHIPS:
    raise UserError(
      f"--topology={topology}: no chip {name!r}.{nearest(name, CHIPS)} There"
      f" are: {examples}; and all"
    )
  pattern = r"\d+" if CHIPS[name].platform != "tpu" else r"\d+(x\d+){1,2}"
  if not re.fullmatch(pattern, shape):
    raise UserError(
      f"--topology={topology}: write the size as in {CHIPS[name].example}"
    )
  return name


def prepare_environment(topologies: list[str]) -> None:
  """What must be set before jax starts, to compile for these topologies."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Only a compiler is loaded: another process may have it too.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  hosts = [t for t in topologies if chip_of(t) == "cpu"]
  if hosts:
    count = max(int(t.partition(":")[2]) for t in hosts)
    flag = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


@functools.cache
def devices(topology: str) -> list[Any]:
  """The devices of a topology, to compile for.

  Raises:
    UserError: if its compiler is not installed, or knows no such topology.
  """
  import jax
  from jax.experimental import topologies

  name, _, shape = topology.partition(":")
  platform = CHIPS[chip_of(topology)].platform
  if platform == "cpu":
    return jax.devices("cpu")[: int(shape)]
  if platform == "tpu":
    description = _describe_tpu(topology)
  else:
    description = _describe_gpus(topology)
  try:
    return list(
      topologies.get_topology_desc(platform=platform, **description).devices
    )
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as e:
    reason = str(e).splitlines()[0][:300]
    raise UserError(
      f"--topology={topology}: {reason}. One that exists: {CHIPS[name].example}"
    ) from None


def _describe_tpu(topology: str) -> dict[str, Any]:
  """What get_topology_desc wants to know of a TPU slice."""
  import jax

  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--topology={topology} needs the TPU's compiler: pip install"
      f" 'jax[tpu]=={jax.__version__}' (no TPU is needed)"
    )
  name, _, shape = topology.partition(":")
  described: dict[str, Any] = {"topology_name": topology}
  if name == "v4":
    # Its two cores are one device, as jax has them there; the compiler alone
    # would take them for two.
    described["chip_config_name"] = "megacore"
  x, y = map(int, shape.split("x")[:2])
  if 1 in (x, y):
    # Less than the 2 x 2 chips that a host has by default.
    described["chips_per_host_bounds"] = [x, y, 1]
  return described


def _describe_gpus(topology: str) -> dict[str, Any]:
  """The same of GPUs."""
  import jax

  plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
  if not any(importlib.util.find_spec(name) for name in plugins):
    raise UserError(
      f"--topology={topology} needs the GPU's compiler: pip install"
      f" 'jax[cuda13]=={jax.__version__}' (no GPU is needed). On an H100 a run"
      " takes attention kernels of jax 0.11, which needs Python 3.12: plan with"
      " what will run"
    )
  name, _, shape = topology.partition(":")
  count = int(shape)
  hosts = -(-count // _GPUS_A_HOST)
  if count % hosts:
    raise UserError(
      f"--topology={topology}: beyond {_GPUS_A_HOST} GPUs, whole hosts of"
      f" {_GPUS_A_HOST}"
    )
  return {
    "topology_name": name,
    "topology": f"1x{hosts}x{count // hosts}",
    "target_config": gpu_description(name),
  }


def capacity(topology: str) -> float:
  """Bytes that a device of a topology has; fake ones share this machine's."""
  name, _, shape = topology.partition(":")
  if CHIPS[name].platform != "cpu":
    return CHIPS[name].memory
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return machine / int(shape)


def domain(chip: Chip, count: int) -> int:
  """Of `count` devices, how many talk over the fast network."""
  return min(count, _GPUS_A_HOST) if chip.platform == "cuda" else count


def gpu_description(name: str) -> str:
  """The target as XLA's GPU compiler wants it (stream_executor's text form)."""
  (major, minor), cores, shared, memory = GPUS[name]
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared + 1024}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3000000000000
  l2_cache_size: 50000000
  clock_rate_ghz: 1.7
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name.upper()}"
"""
