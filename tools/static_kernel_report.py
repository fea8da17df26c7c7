"""What the compilers say about our kernels, for chips that are not here.

  python tools/static_kernel_report.py v5e v6e
  python tools/static_kernel_report.py h100 a100 b200  (jax 0.11, cuda plugin)

For each chip, from programs compiled by its real compiler: issue slots a tile
(VLIW bundles on a TPU, SASS instructions a warp on a GPU), registers, spills,
and temporary memory of a layer's forward and backward pass by length. On a TPU
jax's own attention kernels, which have no such bias, stand beside ours.

TPUs need libtpu, GPUs jax's CUDA plugin with nvidia-cuda-nvcc and nvidia-nvvm,
and nvdisasm for instruction counts (the `triton` wheel brings it). No chip, no
driver. CONTRIBUTING.md has the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fat5_jax.planning import chips

TPUS = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "v7x": "tpu7x:2x2x1",
}
# What ptxas calls them.
GPUS = {"a100": "sm_80", "h100": "sm_90a", "b200": "sm_100a"}
# wgmma, mma.sync and tcgen05.mma as SASS has them.
PRODUCTS = r"HGMMA|HMMA|UTC\w*MMA"
# Multiplications and additions of a core's matrix units a cycle: the peak in
# planning/chips.py over 1.05, 1.5, 1.75, 1.75 and 2.2 GHz.
TPU_PRODUCTS = dict.fromkeys(("v4", "v5e", "v5p"), 2**16) | dict.fromkeys(
  ("v6e", "v7x"), 2**18
)
BATCH, HEADS, HEAD_DIM = 1, 12, 64
LENGTHS = (4096, 8192, 16384)
LONG = 131072


def topology(target: str):
  from jax.experimental import topologies

  if target in TPUS:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=TPUS[target]
    )
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name=target,
    topology="1x1x1",
    target_config=chips.gpu_description(target),
  )


def compile_for(target: str, function, *shapes):
  """`function` on (shape, dtype) pairs, compiled for one chip of the target."""
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec
  import numpy as np

  mesh = Mesh(np.array(topology(target).devices[:1]), ("x",))
  sharding = NamedSharding(mesh, PartitionSpec())
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for shape, dtype in shapes
  ]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).lower(*arguments).compile()


def layer(
  implementation,
  *,
  length,
  bias=True,
  causal=False,
  packed=False,
  dim=HEAD_DIM,
  heads=HEADS,
  dtype="bfloat16",
  batch=BATCH,
):
  """(gradient of an attention layer, its argument shapes).

  `bias` is T5's where True, None where False, or "alibi".
  """
  import jax
  import jax.numpy as jnp

  from pallas_kernels import Alibi, RelativeBuckets, flash_attention

  width = heads * dim

  def position(table):
    if bias == "alibi":
      return Alibi(table[:, :2])
    return RelativeBuckets(table, bidirectional=not causal) if bias else None

  def loss(q, k, v, table, do, ids):
    split = lambda x: x.reshape(batch, length, heads, dim)
    o = flash_attention(
      split(q),
      split(k),
      split(v),
      position=position(table),
      causal=causal,
      q_segment_ids=ids if packed else None,
      kv_segment_ids=ids if packed else None,
      implementation=implementation,
    )
    return jnp.sum(o.reshape(do.shape).astype(jnp.float32) * do)

  x = ((batch, length, width), jnp.dtype(dtype))
  shapes = (
    x,
    x,
    x,
    ((heads, 32), jnp.float32),
    x,
    ((batch, length), jnp.int32),
  )
  return jax.grad(loss, argnums=(0, 1, 2, 3)), shapes


# --- TPU: VLIW bundles -------------------------------------------------------


def tpu_segments(dump: str, kernel: str):
  """[(bundles, matrix slots, spill slots)] of each straight run of a kernel.

  A run ends at a branch or its target. One bundle is one issue cycle; stalls
  on memory are not in it.
  """
  [bundles] = glob.glob(f"{dump}/*{kernel}*-[0-9]*-final_bundles.txt")
  [slots] = glob.glob(
    f"{dump}/*{kernel}*final_hlo-static-per-bundle-utilization.txt"
  )
  rows = []
  with open(slots, encoding="utf-8") as file:
    body = file.read().split("== UTIL")[-1]
  for line in body.splitlines():
    if re.fullmatch(r"[\d\s]+", line.strip() or "x"):
      rows.append([int(x) for x in line.split()])
  cuts, count = {0}, 0
  with open(bundles, encoding="utf-8") as file:
    for line in file:
      match = re.match(r"^ *(?:0x[0-9a-f]+|0) +([A-Z ]*):?", line)
      if not match or "{" not in line:
        continue
      if match[1].strip():
        cuts.add(count)
      count += 1
      if re.search(r"\bsbr\.|\bbr\b", line):
        cuts.add(count)
  edges = sorted(c for c in cuts if c < count) + [count]
  mxu, spill = 0, 8
  return [
    (
      end - start,
      sum(row[mxu] for row in rows[start:end]),
      sum(row[spill] for row in rows[start:end]),
    )
    for start, end in zip(edges, edges[1:])
  ]


def tpu_tiles(dump: str, kernel: str, heads: int) -> list[int]:
  """Bundles a tile and head of the runs that are mostly matrix products."""
  segments = tpu_segments(dump, kernel)
  most = max(mxu for _, mxu, _ in segments)
  return [
    round(length / heads) for length, mxu, _ in segments if mxu > most / 2
  ]


def jax_peers(length: int):
  """jax's own TPU attention, without a relative bias: the ceiling."""
  import jax
  from jax.experimental.pallas.ops.tpu import flash_attention as flash
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  import jax.numpy as jnp

  x = ((BATCH, HEADS, length, HEAD_DIM), jnp.dtype("bfloat16"))
  blocks = flash.BlockSizes(
    **{
      name: 512
      for name in (
        "block_q",
        "block_k_major",
        "block_k",
        "block_q_major_dkv",
        "block_k_major_dkv",
        "block_k_dkv",
        "block_q_dkv",
        "block_k_major_dq",
        "block_k_dq",
        "block_q_dq",
      )
    },
    block_b=1,
  )

  def jax_flash(q, k, v):
    o = flash.flash_attention(q, k, v, block_sizes=blocks)
    return o.astype(jnp.float32).sum()

  mask = splash.MultiHeadMask([splash.FullMask((length, length))] * HEADS)
  sizes = splash.BlockSizes(
    block_q=512,
    block_kv=512,
    block_kv_compute=512,
    block_q_dkv=512,
    block_kv_dkv=512,
    block_kv_dkv_compute=512,
    use_fused_bwd_kernel=True,
  )
  kernel = splash.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )

  def jax_splash(q, k, v):
    return jax.vmap(kernel)(q, k, v).astype(jnp.float32).sum()

  for name, function in (("jax flash", jax_flash), ("jax splash", jax_splash)):
    yield name, jax.grad(function, argnums=(0, 1, 2)), (x, x, x)


def tpu_report(target: str, dump: str, quick: bool):
  """Rows; bundles are a head's, of 512 x 512 pairs whatever the blocks are."""
  variants = {"T5 bias": {}}
  if not quick:
    variants |= {
      "no bias": dict(bias=False),
      "T5 bias, causal, packed": dict(causal=True, packed=True),
      "T5 bias, heads of 128": dict(dim=128, heads=6),
    }
  for name, options in variants.items():
    clear(dump)
    blocks = []
    function, shapes = layer("mosaic_tpu", length=8192, **options)
    with record_blocks(blocks):
      compile_for(target, function, *shapes)
    part_of_tile = math.prod(blocks[0]) / 512**2
    dim = options.get("dim", HEAD_DIM)
    for kernel, products in (("forward", 2), ("backward", 5)):
      heads = 2 if dim == 64 else 1
      tiles = tpu_tiles(dump, f"flash_attention_{kernel}", heads)
      floor = products * 512 * 512 * dim / TPU_PRODUCTS[target]
      yield dict(
        kernel=f"ours, {name}",
        part=kernel,
        blocks=blocks[0],
        floor=round(floor),
        tiles=[round(t / part_of_tile) for t in tiles],
      )
  if quick or target == "v4":
    return
  for name, function, shapes in jax_peers(8192):
    clear(dump)
    compile_for(target, function, *shapes)
    for file in sorted(glob.glob(f"{dump}/*-[0-9]*-final_bundles.txt")):
      kernel = os.path.basename(file).split("-", 1)[1].rsplit("-", 2)[0]
      if "flash" not in kernel and "splash" not in kernel:
        continue
      tiles = tpu_tiles(dump, kernel, heads=1)
      yield dict(kernel=f"{name}, no bias", part=kernel, tiles=[max(tiles)])


@contextlib.contextmanager
def record_blocks(found: list):
  """Appends the (bq, bk) that kernels are compiled for meanwhile."""
  from pallas_kernels.flash_attention import tiling

  choose = tiling.tpu_blocks
  tiling.tpu_blocks = lambda *x: found.append(choose(*x)) or found[-1]
  try:
    yield
  finally:
    tiling.tpu_blocks = choose


# --- GPU: SASS instructions --------------------------------------------------


def find_tool(name: str) -> str | None:
  """A CUDA binary from a pip wheel, or from PATH."""
  import shutil
  import sysconfig

  packages = sysconfig.get_paths()["purelib"]
  for pattern in ("nvidia/*/bin", "triton/backends/nvidia/bin"):
    for path in glob.glob(os.path.join(packages, pattern, name)):
      return path
  return shutil.which(name)


def warnings(log: str) -> list[str]:
  """What ptxas warns of: wgmma run one by one (C7510), setmaxnreg ignored."""
  lines = (line.strip() for line in log.splitlines())
  return sorted(
    {x for x in lines if re.search(r"warning|Potential Performance Loss", x)}
  )


def sass(ptx: str, arch: str) -> dict:
  """Registers, spilled bytes, warnings, products, tiles of a kernel.

  `products` are the instructions that multiply matrices, `tiles` how many
  instructions each softmax loop has: one that takes a tile's exponentials.
  """
  cubin = ptx + ".cubin"
  result = subprocess.run(
    [find_tool("ptxas"), "-v", "-O3", f"-arch={arch}", ptx, "-o", cubin],
    capture_output=True,
    text=True,
    check=True,
  )
  log = result.stderr
  found = dict(
    registers=int(re.search(r"Used (\d+) registers", log)[1]),
    spills=int(re.search(r"(\d+) bytes spill stores", log)[1]),
    warnings=warnings(log),
    products=[],
    tiles=[],
  )
  disassembler = find_tool("nvdisasm")
  if disassembler is None:
    return found
  text = subprocess.run(
    [disassembler, "-c", cubin], capture_output=True, text=True, check=True
  ).stdout
  labels, instructions, loops = {}, [], []
  for line in text.splitlines():
    if match := re.match(r"^(\.L_\S+):", line):
      labels[match[1]] = len(instructions)
    elif match := re.match(
      r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line
    ):
      instructions.append((match[1], match[2]))
  for end, (name, rest) in enumerate(instructions):
    target = re.search(r"(\.L_\w+)", rest)
    if (
      name.startswith("BRA")
      and target
      and labels.get(target[1], end + 1) <= end
    ):
      loops.append((labels[target[1]], end + 1))
  exponentials = lambda a, b: sum(
    name.startswith("MUFU.EX2") for name, _ in instructions[a:b]
  )
  # A wait that fails jumps out of a loop and back, which looks like a larger
  # one: of loops that overlap the smallest counts.
  inner = []
  for a, b in sorted(loops, key=lambda loop: loop[1] - loop[0]):
    if exponentials(a, b) >= 16 and all(b <= c or d <= a for c, d in inner):
      inner.append((a, b))
  inner.sort()
  names = (name.partition(".")[0] for name, _ in instructions)
  products = sorted({name for name in names if re.fullmatch(PRODUCTS, name)})
  return found | dict(products=products, tiles=[b - a for a, b in inner])


def gpu_report(target: str, dump: str, quick: bool):
  names = ["mosaic_gpu", "triton"] if target == "h100" else ["triton"]
  variants = {"T5 bias": {}}
  if not quick:
    variants |= {
      "no bias": dict(bias=False),
      "ALiBi": dict(bias="alibi"),
      "T5 bias, causal, packed": dict(causal=True, packed=True),
      "T5 bias, heads of 128": dict(dim=128, heads=6),
    }
  for implementation in names:
    for name, options in variants.items():
      clear(dump)
      compile_for(
        target, *flatten(layer(implementation, length=4096, **options))
      )
      for file in sorted(glob.glob(f"{dump}/*.ptx")):
        with open(file, encoding="utf-8") as text:
          entry = re.search(r"\.entry (flash_attention_[a-z]+)", text.read())
        if not entry:
          continue
        yield dict(
          kernel=f"{implementation}, {name}",
          part=entry[1].replace("flash_attention_", "").split("_")[0],
          **sass(file, GPUS[target]),
        )


# --- both --------------------------------------------------------------------


def flatten(pair):
  function, shapes = pair
  return function, *shapes


def clear(folder: str) -> None:
  for path in glob.glob(f"{folder}/*"):
    os.remove(path)


def memory_report(target: str, quick: bool):
  """Temporary bytes of a base-size layer, forward and backward, by length."""
  implementation = "triton" if target in GPUS else "mosaic_tpu"
  if target == "h100":
    implementation = "mosaic_gpu"
  for length in LENGTHS if quick else (*LENGTHS, LONG):
    compiled = compile_for(
      target, *flatten(layer(implementation, length=length))
    )
    memory = compiled.memory_analysis()
    yield dict(
      length=length,
      temporary_bytes=memory.temp_size_in_bytes,
      other_bytes=memory.argument_size_in_bytes + memory.output_size_in_bytes,
      dense_bytes=BATCH * HEADS * length * length * 4,
    )


def report(target: str, part: str, quick: bool) -> list | str:
  """Rows of one part of the report, or why there are none.

  Runs in a process of its own: compilers read their flags when they load, and
  writing what the kernels' counts come from takes longer than compiling.
  """
  with tempfile.TemporaryDirectory() as dump:
    os.environ.pop("XLA_FLAGS", None)
    chips.prepare_environment([])
    if part == "kernels" and target in TPUS:
      os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
      )
    elif part == "kernels":
      os.environ["MOSAIC_GPU_DUMP_TO"] = dump
      os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_emitter_re=.*"
    compiler = "libtpu" if target in TPUS else "jax_cuda13_plugin"
    if importlib.util.find_spec(compiler) is None:
      return f"{compiler} is not installed"
    if part == "memory":
      return list(memory_report(target, quick))
    rows = tpu_report if target in TPUS else gpu_report
    return list(rows(target, dump, quick))


def show(found: dict) -> None:
  if "skipped" in found:
    print(f"## {found['target']}: skipped, {found['skipped']}\n")
    return
  print(f"## {found['target']}, jax {found['jax']}\n")
  if found["kernels"]:
    show_kernels(found)
  print("| length | temporary | arguments and results | dense scores, once |")
  print("|---|---|---|---|")
  for row in found["memory"]:
    sizes = [
      f"{row[f'{name}_bytes'] / 2**20:,.1f} MiB"
      for name in ("temporary", "other", "dense")
    ]
    print(f"| {row['length']:,} | {' | '.join(sizes)} |")
  print()


def show_kernels(found: dict) -> None:
  if found["target"] in TPUS:
    print("| kernel | part | blocks | bundles a tile | arithmetic alone |")
    print("|---|---|---|---|---|")
    for row in found["kernels"]:
      blocks = " x ".join(map(str, row.get("blocks", ())))
      print(
        f"| {row['kernel']} | {row['part']} | {blocks} | {_tiles(row)} |"
        f" {row.get('floor', '')} |"
      )
  else:
    print(
      "| kernel | part | instructions a tile | registers | spilled bytes |"
      " products |"
    )
    print("|---|---|---|---|---|---|")
    for row in found["kernels"]:
      print(
        f"| {row['kernel']} | {row['part']} | {_tiles(row)} |"
        f" {row['registers']} | {row['spills']} |"
        f" {', '.join(row['products'])} |"
      )
  for row in found["kernels"]:
    for line in row.get("warnings", ()):
      print(f"\n{row['kernel']}, {row['part']}: {line}")
  print()


def _tiles(row: dict) -> str:
  return " / ".join(map(str, row["tiles"])) or "not counted"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("targets", nargs="+", choices=[*TPUS, *GPUS])
  parser.add_argument("--json", metavar="FILE", help="write the numbers here")
  parser.add_argument(
    "--quick", action="store_true", help="T5's bias alone, without 131,072"
  )
  parser.add_argument(
    "--memory-only", action="store_true", help="count no instructions"
  )
  parser.add_argument(
    "--part", choices=["kernels", "memory"], help=argparse.SUPPRESS
  )
  arguments = parser.parse_args()
  if arguments.part:
    rows = report(arguments.targets[0], arguments.part, arguments.quick)
    print("\n" + json.dumps(rows))
    return
  from importlib.metadata import version

  found = []
  for target in arguments.targets:
    one = {"target": target, "jax": version("jax"), "kernels": []}
    for part in ("memory", "kernels")[: 1 if arguments.memory_only else 2]:
      command = [sys.executable, os.path.abspath(__file__), target]
      command += ["--part", part] + ["--quick"] * arguments.quick
      output = subprocess.run(command, stdout=subprocess.PIPE, text=True)
      if output.returncode:
        sys.exit(f"{target}: failed, see above")
      rows = json.loads(output.stdout.splitlines()[-1])
      if isinstance(rows, str):
        one = {"target": target, "skipped": rows}
        break
      one[part] = rows
    found.append(one)
    show(one)
  if arguments.json:
    with open(arguments.json, "w", encoding="utf-8") as file:
      json.dump(found, file, indent=1)


if __name__ == "__main__":
  main()
