"""Is a run folder at rest still what was written?

  python tools/check_checkpoint.py MODEL_DIR ...

Reads every checkpoint of each folder (or the one that is named) and compares
all bytes with the checksums that were written with them. One line each:
`whole`, `damaged` with what is, or `no checksums` for those of an older
fat5_jax, of which the structure alone is checked. Status 1 if any is damaged.
"""

from __future__ import annotations

import argparse
import os
import sys

from fat5_jax import storage
from fat5_jax.checkpoints import history

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def check(folder: str) -> str:
  """The verdict on one checkpoint."""
  from fat5_jax.checkpoints import integrity
  from fat5_jax.errors import UserError

  try:
    items, summed = integrity.items_of(folder)
  except UserError as e:
    return f"damaged: {e}"
  # One of a converter has no optimizer and no data.
  reason = integrity.problem(folder, sorted({"params", *items}))
  if reason is not None:
    return f"damaged: {reason}"
  if not summed:
    return "no checksums: its structure is whole, its numbers are not known"
  return "whole"


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folders", nargs="+", metavar="MODEL_DIR")
  flags = parser.parse_args()

  status = 0
  for given in flags.folders:
    folder = storage.absolute(given)
    found = [
      os.path.join(folder, f"checkpoint_{step}")
      for step in history.steps(folder)
    ]
    if history.STEP_FOLDER.match(os.path.basename(folder)):
      found = [folder]
    if not found:
      print(f"{given}: there is no checkpoint_<step> in it")
      status = 1
    for path in found:
      verdict = check(path)
      print(f"{path}: {verdict}", flush=True)
      status |= verdict.startswith("damaged")
  return status


if __name__ == "__main__":
  sys.exit(main())
