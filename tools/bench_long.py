"""A training step on a long document: linear attention against dense.

  JAX_PLATFORMS=cpu python tools/bench_long.py
  python tools/bench_long.py --lengths 4096 32768 --implementations chunked

Times one update of T5 1.1 small (a --size of gin/models/t5_1_1 by its numbers)
on one document of each length with 128 target tokens, each side in a process
of its own so that peak memory is its own. A side whose program needs more
memory than the machine has is not run, and what the compiler says it needs is
shown instead.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

TARGETS = 128


def run(implementation: str, length: int, steps: int) -> dict:
  import jax
  import numpy as np

  from fat5_jax import optimizers
  from fat5_jax.models import config, initial, t5
  from fat5_jax.training import steps as train

  model = t5.Transformer(
    config.T5Config(
      vocab_size=32128,
      emb_dim=512,
      num_heads=6,
      num_encoder_layers=8,
      num_decoder_layers=8,
      head_dim=64,
      mlp_dim=1024,
      mlp_activations=("gelu", "linear"),
      logits_via_embedding=False,
      dropout_rate=0.0,
      dtype="float32",
      attention_implementation=implementation,
    )
  )
  optimizer = optimizers.adafactor(1e-3)
  step = train.make_train_step(model, optimizer, seed=0)
  rng = np.random.default_rng(0)
  tokens = lambda n: rng.integers(1, 32000, (1, n)).astype(np.int32)
  batch = {
    "encoder_input_tokens": tokens(length),
    "decoder_input_tokens": tokens(TARGETS),
    "decoder_target_tokens": tokens(TARGETS),
    "decoder_loss_weights": np.ones((1, TARGETS), np.int32),
  }

  def start():
    params = initial.init_params(model, 0)
    return train.TrainState(np.int32(0), params, optimizer.init(params))

  jitted = jax.jit(step, donate_argnums=0)
  compiled = jitted.lower(jax.eval_shape(start), batch).compile()
  memory = compiled.memory_analysis()
  needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  found = {"needed": needed}
  machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if jax.default_backend() == "cpu" and needed > machine:
    return found
  state = jax.jit(start)()
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    state, sums = compiled(state, batch)
    jax.block_until_ready(sums)
    seconds.append(time.perf_counter() - start)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return found | {
    "seconds": min(seconds),
    "peak": peak,
    "loss": float(sums["loss"]) / TARGETS,
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
  parser.add_argument(
    "--implementations", nargs="+", default=["chunked", "reference"]
  )
  parser.add_argument("--steps", type=int, default=3)
  parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    name, length = arguments.implementations[0], arguments.lengths[0]
    print("\n" + json.dumps(run(name, length, arguments.steps)))
    return
  print("| length | attention | s a step | peak memory | compiler's | loss |")
  print("|---|---|---|---|---|---|")
  for length in arguments.lengths:
    for name in arguments.implementations:
      command = [sys.executable, os.path.abspath(__file__), "--child"]
      command += ["--lengths", str(length), "--implementations", name]
      command += ["--steps", str(arguments.steps)]
      output = subprocess.run(command, stdout=subprocess.PIPE, text=True)
      if output.returncode:
        print(f"| {length:,} | {name} | failed | | | |", flush=True)
        continue
      found = json.loads(output.stdout.splitlines()[-1])
      needed = f"{found['needed'] / 2**30:.2f} GiB"
      if "seconds" not in found:
        print(f"| {length:,} | {name} | does not fit | | {needed} | |")
        continue
      print(
        f"| {length:,} | {name} | {found['seconds']:.2f} |"
        f" {found['peak'] / 2**30:.2f} GiB | {needed} |"
        f" {found['loss']:.4f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
