"""The memory that plan foretells beside what a run takes, on this machine.

  python tools/bench_plan.py [--devices 4] [--rows 16]

T5 1.1 small in float32 with AdamW, fsdp over the devices (one by default); the
process's growth from before the state is made to the highest of three steps.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def memory(field: str) -> int:
  """VmRSS or VmHWM (the highest since the last reset) in bytes."""
  with open("/proc/self/status", encoding="utf-8") as file:
    line = next(line for line in file if line.startswith(field))
  return int(line.split()[1]) * 1024


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--length", type=int, default=128)
  arguments = parser.parse_args()
  from fat5_jax.planning import chips, rehearse

  topology = f"cpu:{arguments.devices}"
  chips.prepare_environment([topology])
  import jax
  import numpy as np

  from fat5_jax import optimizers
  from fat5_jax.distributed.sharding import Partitioner
  from fat5_jax.models import factory
  from fat5_jax.models.config import T5Config
  from fat5_jax.training.program import Program

  config = T5Config(
    vocab_size=32128,
    emb_dim=512,
    num_heads=6,
    head_dim=64,
    num_encoder_layers=8,
    num_decoder_layers=8,
    mlp_dim=1024,
    mlp_activations=("gelu", "linear"),
    dtype="float32",
    scan_layers=True,
  )
  program = Program(
    factory.create(config),
    Partitioner(
      mesh={"fsdp": arguments.devices}, devices=chips.devices(topology)
    ),
    optimizers.adamw(1e-4),
    loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
  )
  shape = (arguments.rows, arguments.length)
  names = ("encoder_input_tokens", "decoder_input_tokens") + (
    "decoder_target_tokens",
    "decoder_loss_weights",
  )
  shapes = {name: (shape, np.dtype(np.int32)) for name in names}
  found = rehearse.rehearse(program, shapes, topology, (0.0, 0.0), decode=False)
  planned = found.memory.needed * arguments.devices
  # Compiled before the measurement, as the compiler takes memory of its own.
  batch = rehearse.abstract_batch(program.partitioner, shapes)
  step = program.train_step.lower(program.abstract_state, batch).compile()
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  before = memory("VmRSS")
  state = program.init_state()
  jax.block_until_ready(state)
  with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
    file.write("5")
  rng = np.random.default_rng(0)
  batch = program.partitioner.to_devices(
    {name: rng.integers(1, 100, shape).astype(np.int32) for name in names},
    0,
    arguments.rows,
  )
  for _ in range(3):
    state, sums = step(state, batch)
    jax.block_until_ready(sums)
  measured = memory("VmHWM") - before
  gib = 2**30
  print(
    f"{topology}: planned {planned / gib:.2f} GiB, measured"
    f" {measured / gib:.2f} GiB, {measured / planned:.2f}x"
  )
  print(json.dumps({"planned": planned, "measured": measured}))


if __name__ == "__main__":
  main()
