"""Memory of one update against the length of a document, from the compilers.

  python tools/memory_curve.py --results=/tmp/curve --chips v5e v5p

T5 1.1 base, one document with 512 tokens of targets, bfloat16, Adafactor,
layers scanned and recomputed (`REMAT_POLICY = 'full'`), one chip. Every point
is what the chip's own compiler needs, whether it fits or not. Beside it Hugging
Face's T5 by arithmetic, recomputed layer by layer too: its parameters,
gradients and Adafactor's state, and of one layer the scores, the bias, the
softmax and their gradients, heads x length x length each.

Points that are there already are kept, so a GPU's may be added by a Python that
has its compiler: --chips h100. The table and the plot (docs/plans/memory.md,
.png) are written of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

LENGTHS = tuple(1024 << i for i in range(8))
TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "h100": "h100:1"}
GIN = """
from __gin__ import dynamic_registration
include 'runs/finetune.gin'
include 'models/t5_1_1/base.gin'
MIXTURE_OR_TASK_NAME = 'cnn_dailymail_v002'
TASK_FEATURE_LENGTHS = {{'inputs': {length}, 'targets': 512}}
BATCH_SIZE = 1
PACK = False
TRAIN_STEPS_RELATIVE = 1000
SCAN_LAYERS = True
REMAT_POLICY = 'full'
"""
PAGE = """# Memory against the length of a document

T5 1.1 base, one update of one document with 512 tokens of targets, bfloat16,
Adafactor, `REMAT_POLICY = 'full'`, one chip; GiB. Ours is what the chip's own
compiler needs. Hugging Face's T5, recomputed layer by layer too, by arithmetic:
parameters, gradients and state, and of one layer five arrays of heads x length
x length.

{table}

![memory against length](memory.png)

The slope is of the logarithms over the last three lengths: 1 is linear, 2 the
square of the length.

Made by `tools/memory_curve.py`.
"""


def of_huggingface(length: int) -> float:
  """Bytes of an update with dense attention; see the module's docstring."""
  parameters, heads, width, layers = 247_577_856, 12, 768, 24
  state = parameters * (4 + 4)
  square = heads * length**2
  # Scores and bias are float32 in the softmax; its result, and the gradients of
  # both, are what autograd holds of a layer.
  layer = square * (4 + 4 + 2 + 2 + 2)
  kept = layers * length * width * 2
  return state + layer + kept


def measure(folder: str, chip: str, length: int) -> None:
  path = os.path.join(folder, f"{chip}-{length}.json")
  if os.path.exists(path):
    return
  gin = os.path.abspath(os.path.join(folder, f"{length}.gin"))
  with open(gin, "w", encoding="utf-8") as file:
    file.write(GIN.format(length=length))
  command = [
    *(sys.executable, "-m", "fat5_jax.plan", "--no_decode", "--keep"),
    *(f"--gin_file={gin}", f"--topology={TOPOLOGIES[chip]}"),
    f"--json={os.path.abspath(path)}",
  ]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  # 1 says that it does not fit.
  said = (done.stderr or done.stdout).strip().splitlines()[-1:]
  print(f"{chip} {length:,}: {done.returncode} {said}", flush=True)


def read(folder: str) -> dict[str, dict[int, float]]:
  """Bytes by chip and length, of the points that are there."""
  found: dict[str, dict[int, float]] = {}
  for chip in TOPOLOGIES:
    for length in LENGTHS:
      path = os.path.join(folder, f"{chip}-{length}.json")
      if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
          (report,) = json.load(file)
        needed = report["memory"]["needed"]
        if needed:
          found.setdefault(chip, {})[length] = needed
  return found


def slope(points: dict[int, float]) -> float:
  """Of the logarithms, over the last three lengths."""
  last = sorted(points)[-3:]
  if len(last) < 2:
    return float("nan")
  values = [points[length] for length in last]
  return float(np.polyfit(np.log(last), np.log(values), 1)[0])


def write(found: dict[str, dict[int, float]], output: str) -> None:
  columns = found | {"Hugging Face": {n: of_huggingface(n) for n in LENGTHS}}
  lines = ["| tokens | " + " | ".join(columns) + " |"]
  lines.append("|---" * (len(columns) + 1) + "|")
  for length in LENGTHS:
    cells = [
      f"{points[length] / 2**30:,.2f}" if length in points else ""
      for points in columns.values()
    ]
    lines.append("| " + " | ".join([f"{length:,}", *cells]) + " |")
  slopes = [f"{slope(points):.2f}" for points in columns.values()]
  lines.append("| slope | " + " | ".join(slopes) + " |")
  table = "\n".join(lines)
  print(table)
  with open(f"{output}.md", "w", encoding="utf-8") as file:
    file.write(PAGE.format(table=table))
  plot(columns, f"{output}.png")


def plot(columns: dict[str, dict[int, float]], path: str) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
  for name, points in columns.items():
    style = "--" if name == "Hugging Face" else "-o"
    values = [points[length] / 2**30 for length in sorted(points)]
    axes.plot(sorted(points), values, style, label=name, markersize=4)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
  axes.set(xlabel="tokens of the document", ylabel="GiB")
  axes.set_title("T5 1.1 base, one update of one document")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--results", default="curve")
  parser.add_argument("--output", default="docs/plans/memory")
  parser.add_argument(
    "--chips", nargs="*", default=["v5e", "v5p"], choices=TOPOLOGIES
  )
  parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
  flags = parser.parse_args()
  os.makedirs(flags.results, exist_ok=True)
  for chip in flags.chips:
    for length in flags.lengths:
      measure(flags.results, chip, length)
  write(read(flags.results), flags.output)


if __name__ == "__main__":
  main()
