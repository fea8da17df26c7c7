"""One command for a day with a chip: does it run, is it right, how fast is it?

  python tools/on_chip.py --minutes 25 --out DIR      (again: goes on)
  python tools/on_chip.py --table DIR                 (prints DIR's table)
  python tools/on_chip.py --smoke --out DIR           (all of it on a CPU)

In this order: tiny launches of each kernel, each in a process of its own;
compute-sanitizer's memcheck over them, where there is one; the cases of
tests/attention_suite.py with this chip's implementations in their own blocks,
T5's sizes of scores first; bench_attention.py beside every peer here; a
training step of T5 1.1 base and large beside HF torch; each tuning knob alone;
the sanitizer's slower tools. Needs a bare machine with jax, numpy and, for what
they take part in, flax and optax, torch and transformers; no gin, seqio or
TensorFlow, no network.

DIR gets four files. rows.jsonl: a line of JSON for each row, written and synced
the moment it is known, with chip, jax, commit and date. table.md: made from it.
log.txt: what was said. dumps.zip: the tiny launches' PTX and compiled programs,
those of a launch that hung too. A row's status is "ok"; "wrong", when it ran
and its result is wrong; "skipped", with what is missing; "failed" or "timeout",
when it ended its process, and only that. A second call does what has no row
yet, and what failed or hung once more (--again: however often). It refuses a
DIR of another chip, jax or commit ($FAT5_JAX_COMMIT, git's, or a digest of the
sources). Status 1 says that a launch, the sanitizer or the suite is not well.

On a machine whose commands run 10 minutes at most: --minutes 9, then carry DIR
there again.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from tools import chip_runner, chip_table
from tools.chip_runner import Refusal, Unit

PHASES = ("launch", "sanitizer", "suite", "bench", "train", "tune", "races")
JUDGED = ("launch", "sanitizer", "suite", "races")
# What a run's result depends on.
SOURCES = ("pallas_kernels", "fat5_jax", "tools", "tests/attention_suite.py")
DUMPS = ("*.ptx", "*.ptxas", "*.resources.txt", "*after_optimizations.txt")
# Bytes of a dump, and of all of them, that are kept.
DUMP_LIMIT, DUMPS_LIMIT = 4 * 2**20, 14 * 2**20


def commit() -> str:
  """What names the sources: git's commit, or a digest where that is unknown."""
  if named := os.environ.get("FAT5_JAX_COMMIT"):
    return named
  git = lambda *words: subprocess.run(
    ["git", "-C", ROOT, *words], capture_output=True, text=True
  )
  try:
    head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
    if head and not git("status", "--porcelain", "--", *SOURCES).stdout:
      return head
  except FileNotFoundError:
    head = ""
  digest = hashlib.sha256()
  for source in SOURCES:
    pattern = os.path.join(ROOT, source, "**", "*.py")
    whole = [os.path.join(ROOT, source)]
    for path in sorted(glob.glob(pattern, recursive=True)) or whole:
      with open(path, "rb") as file:
        digest.update(file.read())
  return f"{head or 'no commit'}, sources {digest.hexdigest()[:12]}"


def keep_dumps(archive: str, key: str, folder: str) -> None:
  """Adds a launch's dumps to the archive, which is whole at any moment."""
  found = sorted(
    path
    for pattern in DUMPS
    for path in glob.glob(os.path.join(folder, pattern))
    if os.path.getsize(path) <= DUMP_LIMIT
  )
  if not found:
    return
  new = archive + ".new"
  if os.path.exists(archive):
    shutil.copy(archive, new)
  with zipfile.ZipFile(new, "a", zipfile.ZIP_DEFLATED) as file:
    for path in found:
      if os.path.getsize(new) < DUMPS_LIMIT:
        file.write(path, os.path.join(key, os.path.basename(path)))
  os.replace(new, archive)


def run(flags) -> int:
  from tools import chip_units

  ends = time.monotonic() + 60 * flags.minutes
  inside = lambda name: os.path.join(flags.out, name)
  command = [sys.executable, os.path.abspath(__file__), "--worker"]
  environment = chip_units.environment(flags.smoke)
  machine = chip_runner.ask(command, Unit("machine", "probe", {}), environment)
  if machine["platform"] == "cpu" and not flags.smoke:
    raise Refusal(
      "jax sees no chip here, only a CPU: install its plugin for the chip, or"
      " add --smoke"
    )
  os.makedirs(flags.out, exist_ok=True)
  log = open(inside("log.txt"), "a", encoding="utf-8")

  def say(line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {line}"
    print(line, flush=True)
    print(line, file=log, flush=True)

  identity = {
    "chip": machine["chip"],
    "jax": machine["versions"]["jax"],
    "commit": commit(),
    "smoke": flags.smoke,
  }
  rows = chip_runner.Rows(inside("rows.jsonl"), identity)
  if not rows.of("machine"):
    listed = {k: machine[k] for k in ("python", "cores", "versions")}
    rows.add({"key": "machine", "phase": "machine", "status": "ok"} | listed)
  say(f"{identity['chip']}, jax {identity['jax']}, {identity['commit']}")

  runner = chip_runner.Runner(
    rows,
    command,
    ends,
    say,
    lambda key, folder: keep_dumps(inside("dumps.zip"), key, folder),
  )
  phases = [
    dataclasses.replace(
      phase,
      units=[unit for unit in phase.units if flags.matching.search(unit.key)],
    )
    for phase in chip_units.plan(machine, flags.smoke)
  ]
  wanted = [phase for phase in phases if phase.name in flags.only]
  # What failed in an earlier call waits until everything had its turn.
  retries = [
    (
      phase,
      chip_runner.to_do(phase.units, rows, retries=True, again=flags.again),
    )
    for phase in wanted
  ]
  new = [
    (phase, chip_runner.to_do(phase.units, rows, retries=False, again=False))
    for phase in wanted
  ]
  try:
    for phase, units in new + retries:
      if units:
        runner.run(phase, units)
        write_table(flags.out)
  finally:
    write_table(flags.out)
  last = {row["key"]: row for row in rows.all}
  units = [unit for phase in phases for unit in phase.units]
  missing = [unit for unit in units if unit.key not in last]
  bad = [row for row in last.values() if row["status"] not in ("ok", "skipped")]
  say(
    f"{len(units) - len(missing)} of {len(units)} rows, {len(bad)} of them"
    f" not well; the table is {inside('table.md')}"
    + ("; call again to go on" if missing else "")
  )
  return int(any(row["phase"] in JUDGED for row in bad))


def write_table(folder: str) -> str:
  rows = chip_runner.read_rows(os.path.join(folder, "rows.jsonl"))
  if not rows:
    raise Refusal(f"{folder} has no rows.jsonl: run with --out {folder} first")
  text = chip_table.table(rows)
  path = os.path.join(folder, "table.md")
  with open(path + ".new", "w", encoding="utf-8") as file:
    file.write(text)
  os.replace(path + ".new", path)
  return text


def pattern(text: str) -> re.Pattern:
  try:
    return re.compile(text)
  except re.error as error:
    raise argparse.ArgumentTypeError(f"{text!r} is no regex: {error}") from None


def parse(words=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=25)
  parser.add_argument("--out", metavar="DIR", help="rows, table, log, dumps")
  parser.add_argument("--table", metavar="DIR", help="make its table, no more")
  parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
  parser.add_argument(
    "--only", nargs="+", choices=PHASES, default=PHASES, help="parts of it"
  )
  parser.add_argument(
    "--matching",
    type=pattern,
    default="",
    metavar="REGEX",
    help="the rows whose key this finds",
  )
  parser.add_argument(
    "--again", action="store_true", help="what failed, however often it did"
  )
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  flags = parser.parse_args(words)
  if not (flags.out or flags.table or flags.worker):
    parser.error("name a folder: --out DIR, or --table DIR")
  return flags


def main() -> None:
  flags = parse()
  # However it is asked to stop, the table is made.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    if flags.worker:
      from tools import chip_units

      chip_runner.serve(chip_units.FUNCTIONS, chip_units.start)
    elif flags.table:
      print(write_table(flags.table))
    else:
      sys.exit(run(flags))
  except Refusal as error:
    sys.exit(f"on_chip: {error}")


if __name__ == "__main__":
  main()
