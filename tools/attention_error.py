"""The error of attention at the sizes of T5's scores, over that of naive one.

  python tools/attention_error.py [--implementations chunked triton] [--json F]

T5 does not divide scores by sqrt(head dim), so they reach thousands. For each
size of scores and each implementation: the error of o, dq, dk, dv and the
position's gradient, divided by that of dense bfloat16 attention differentiated
by jax, against numpy in float64. Kernels of chips that are not here run in
their interpreters; "mosaic_gpu" needs jax 0.11 and
XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import attention_suite as suite
import test_flash_attention as contexts

from pallas_kernels.flash_attention import tiling


def ratios(implementation: str, case: suite.Case) -> dict[str, float]:
  """Error over naive error by result; 0 / 0 is 0."""
  with contexts.CONTEXTS[implementation]():
    found = suite.gradients(suite.kernel_attention(case, implementation), case)
  errors = suite.errors(found, case)
  return {name: e.error / max(e.naive, 1e-30) for name, e in errors.items()}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--implementations",
    nargs="+",
    choices=list(contexts.CONTEXTS),
    default=list(contexts.CONTEXTS),
  )
  parser.add_argument("--json", metavar="FILE", help="also write rows there")
  options = parser.parse_args()
  # Interpreters stand in for the chips.
  tiling.chip_is = lambda maker: True
  rows = []
  print(f"| scores | implementation | {' | '.join(suite.NAMES)} |")
  print("|---|---|" + "---|" * len(suite.NAMES), flush=True)
  for name, case in suite.T5_SCORES.items():
    scores = name.removeprefix("scores ")
    for implementation in options.implementations:
      row = ratios(implementation, case)
      rows.append(dict(scores=scores, implementation=implementation, **row))
      numbers = " | ".join(f"{x:.2f}" for x in row.values())
      print(f"| {scores} | {implementation} | {numbers} |", flush=True)
  if options.json:
    with open(options.json, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)


if __name__ == "__main__":
  main()
