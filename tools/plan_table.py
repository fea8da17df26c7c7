"""Which T5 1.1 fits on a host of which chip: compiles all, writes a table.

  python tools/plan_table.py --results=/tmp/plans --output=docs/plans/sizes.md

Fine-tuning with Adafactor, rows of 512 + 128 tokens, 8 rows a device, bfloat16,
layers scanned, "minimal" rematerialisation, state split over all devices.
A size that does not fit is shown with what it would need. Cells that are there
already are kept, so GPUs may be added by a Python that has their compiler:
--chips a100 h100 h200.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from fat5_jax.planning import chips

SIZES = {"small": "77M", "base": "248M", "large": "783M"} | {
  "xl": "2.85B",
  "xxl": "11.1B",
}
SHAPE = {"rows": 8, "inputs": 512, "targets": 128}
GIN = """
from __gin__ import dynamic_registration
include 'runs/finetune.gin'
include 'models/t5_1_1/{size}.gin'
MIXTURE_OR_TASK_NAME = 'glue_mnli_v002'
TASK_FEATURE_LENGTHS = {{'inputs': {inputs}, 'targets': {targets}}}
TRAIN_STEPS_RELATIVE = 1000
SCAN_LAYERS = True
REMAT_POLICY = 'minimal'
"""


PAGE = """# Which T5 1.1 fits on one host

Fine-tuning with Adafactor, rows of {inputs} + {targets} tokens, {rows} rows a
device, bfloat16, layers scanned, `REMAT_POLICY = 'minimal'`, state split over
all devices (`MESH = {{'fsdp': ...}}`). In a cell: whether it fits, GiB a device
needed, and a step's time by roofline. What does not fit so may fit otherwise:
`plan` looks for a way.

{table}

Made by `tools/plan_table.py`: every cell is compiled by the chip's compiler
(jax 0.10.2, GPUs 0.11.2). Other lengths, batches, meshes: `python -m
fat5_jax.plan`.
"""


def devices(topology: str) -> int:
  """Devices of an example topology; an Ironwood chip is two."""
  name, _, shape = topology.partition(":")
  count = 1
  for size in shape.split("x"):
    count *= int(size)
  return count * (2 if name == "tpu7x" else 1)


def compile_cell(folder: str, size: str, topology: str) -> None:
  path = os.path.join(folder, f"{size}-{topology}.json")
  if os.path.exists(path):
    return
  count = devices(topology)
  gin = os.path.abspath(os.path.join(folder, f"{size}.gin"))
  with open(gin, "w", encoding="utf-8") as file:
    file.write(GIN.format(size=size, **SHAPE))
  command = [
    *(sys.executable, "-m", "fat5_jax.plan", "--no_decode"),
    *(f"--gin_file={gin}", f"--gin.BATCH_SIZE={SHAPE['rows'] * count}"),
    f"--gin.MESH={{'fsdp': {count}}}",
    *(f"--topology={topology}", "--keep", f"--json={os.path.abspath(path)}"),
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    print(f"{size} {topology}: {done.stderr.splitlines()[-1]}", flush=True)


def cell(folder: str, size: str, topology: str) -> str:
  path = os.path.join(folder, f"{size}-{topology}.json")
  if not os.path.exists(path):
    return "not compiled"
  with open(path, encoding="utf-8") as file:
    (found,) = json.load(file)
  needed = found["memory"]["needed"] / 2**30
  if not found["fits"]:
    return f"**no**, {needed:,.1f}"
  return f"yes, {needed:,.1f}; {found['seconds_by_roofline'] * 1e3:,.0f} ms"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  known = [name for name, chip in chips.CHIPS.items() if chip.platform != "cpu"]
  parser.add_argument("--results", default="plans")
  parser.add_argument("--output", default="docs/plans/sizes.md")
  parser.add_argument("--chips", nargs="*", default=known, choices=known)
  arguments = parser.parse_args()
  os.makedirs(arguments.results, exist_ok=True)
  for size in SIZES:
    for name in arguments.chips:
      compile_cell(arguments.results, size, chips.CHIPS[name].example)
  lines = [
    "| one host | GiB a device | "
    + " | ".join(f"{size}, {count}" for size, count in SIZES.items())
    + " |",
    "|---" * (len(SIZES) + 2) + "|",
  ]
  for name in known:
    chip = chips.CHIPS[name]
    row = [chip.example, f"{chip.memory / 2**30:.1f}"]
    row += [cell(arguments.results, size, chip.example) for size in SIZES]
    lines.append("| " + " | ".join(row) + " |")
  table = "\n".join(lines)
  print(table)
  with open(arguments.output, "w", encoding="utf-8") as file:
    file.write(PAGE.format(table=table, **SHAPE))


if __name__ == "__main__":
  main()
