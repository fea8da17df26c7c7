"""The memory of restoring a large checkpoint onto eight fake devices.

  python tools/bench_restore.py [--layers N] [--from run|fat5|hf]

Makes a checkpoint of T5 1.1 XXL's shapes (4096 wide, 64 heads) with fewer
layers, restores it in another process on a mesh of eight devices, layers
stacked, and compares the process's growth to the state's own bytes: on fake
devices that is what the shards take, the rest is what the host held meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

from fat5_jax import checkpoints, trees
from fat5_jax.checkpoints import checkpointer, layout, load, writer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
GIB = 2**30
# A run's own, with its optimizer; weights alone; a Hugging Face folder.
KINDS = ("run", "fat5", "hf")


def config(layers: int):
  from fat5_jax.models.config import T5Config

  return T5Config(
    vocab_size=32128,
    emb_dim=4096,
    num_heads=64,
    head_dim=64,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    mlp_dim=10240,
    mlp_activations=("gelu", "linear"),
    scan_layers=True,
  )


def program(layers: int, mesh: dict[str, int]):
  from fat5_jax import optimizers
  from fat5_jax.distributed.sharding import Partitioner
  from fat5_jax.models import factory
  from fat5_jax.training.program import Program

  return Program(
    factory.create(config(layers)),
    Partitioner(mesh=mesh),
    optimizers.adafactor(1e-3),
  )


def save(folder: str, layers: int, kind: str) -> None:
  """A checkpoint of zeros: what it holds costs nothing to make."""
  import jax
  import numpy as np

  from fat5_jax.convert import hf, table

  made = program(layers, {"fsdp": 8})
  on_disk = layout.to_disk_layout(made.abstract_state.params)
  leaves = {
    where: table.Leaf(x.shape, "float32", lambda x=x: np.zeros(x.shape, "f4"))
    for where, x in trees.flatten(on_disk).items()
  }
  if kind == "hf":
    hf.to_pretrained(config(layers), leaves, folder)
  elif kind == "fat5":
    writer.write_params(folder, config(layers), leaves)
  else:
    state = jax.tree.map(
      lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
      made.abstract_state,
    )
    saver = checkpointer.Checkpointer(
      folder, checkpoints.SaveCheckpointConfig()
    )
    saver.save(0, state.params, state.opt_state, {})
    saver.wait()
    saver.close()


def restore(folder: str, layers: int, kind: str) -> None:
  import jax

  from tools.bench_plan import memory

  made = program(layers, {"fsdp": 4, "model": 2})
  abstract = made.abstract_state
  before = memory("VmRSS")
  if kind == "run":
    reader = checkpointer.Checkpointer(
      folder, checkpoints.SaveCheckpointConfig()
    )
    params, _, _ = reader.restore(
      0, abstract.params, abstract.opt_state, made.partitioner
    )
  else:
    params, _, _ = load.load_params(
      folder, config(layers), abstract.params, made.partitioner
    )
  jax.block_until_ready(params)
  sizes = [x.nbytes for x in jax.tree.leaves(params)]
  shards = sum(
    shard.data.nbytes
    for x in jax.tree.leaves(params)
    for shard in x.addressable_shards
  )
  print(
    json.dumps(
      {
        "shards": shards,
        "largest": max(sizes),
        "peak": memory("VmHWM") - before,
      }
    )
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--from", dest="kind", choices=KINDS)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    role, folder = arguments.child
    if role == "save":
      save(folder, arguments.layers, arguments.kind)
    else:
      restore(folder, arguments.layers, arguments.kind)
    return
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": ROOT,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
  }
  for kind in [arguments.kind] if arguments.kind else KINDS:
    folder = os.path.join(tempfile.mkdtemp(), "checkpoint")
    command = [sys.executable, __file__, f"--layers={arguments.layers}"]
    command += [f"--from={kind}", "--child"]
    subprocess.run([*command, "save", folder], env=environment, check=True)
    done = subprocess.run(
      [*command, "restore", folder],
      env=environment,
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    )
    shutil.rmtree(os.path.dirname(folder))
    found = json.loads(done.stdout.splitlines()[-1])
    over = found["peak"] - found["shards"]
    print(
      f"{kind}: shards {found['shards'] / GIB:.2f} GiB, peak"
      f" {found['peak'] / GIB:.2f} GiB: {over / GIB:.2f} GiB beyond them; the"
      f" largest (stacked) tensor has {found['largest'] / GIB:.2f} GiB"
    )


if __name__ == "__main__":
  main()
