"""Says what is known of a run's programs, for people."""

from __future__ import annotations

from collections.abc import Sequence

from fat5_jax import console
from fat5_jax.planning.rehearse import Report
from fat5_jax.planning.search import Compiled, best_of

_GIB = 2**30


def _size(count: float) -> str:
  for unit, name in ((2**40, "TiB"), (_GIB, "GiB"), (2**20, "MiB")):
    if count >= unit:
      return f"{count / unit:,.2f} {name}"
  return f"{count / 2**10:,.1f} KiB"


def _number(x: float) -> str:
  return f"{x:,.1f}" if x >= 10 else f"{x:.2g}"


def _milliseconds(seconds: float) -> str:
  return _number(seconds * 1e3) if seconds > 5e-6 else "0"


def _needed(r: Report) -> str:
  if not r.memory.needed:
    return f"more than {_size(r.capacity)}"
  return f"{_size(r.memory.needed)} of {_size(r.capacity)}"


def one(r: Report, total_steps: int | None) -> None:
  """What a person wants to know of one topology."""
  memory = r.memory
  verdict = "fits" if r.fits else "DOES NOT FIT"
  rows = [
    ("memory a chip", f"{_needed(r)}: {verdict}"),
    ("  parameters", _size(memory.parameters)),
    ("  optimizer", _size(memory.optimizer)),
    ("  activations and scratch", _size(memory.temporary)),
    ("  program", _size(memory.program)),
  ]
  for stage in r.stages:
    sizes = "/".join(map(str, stage.lengths.values()))
    fits = "fits" if stage.fits else "DOES NOT FIT"
    needed = _size(stage.needed) if stage.needed else "more"
    rows.append(
      (
        f"memory until step {stage.until_step:,}",
        f"{needed} for {stage.batch_size} x {sizes}: {fits}",
      )
    )
  if r.collectives or r.memory_traffic:
    rows += _times(r, total_steps)
  if r.decode:
    fits = "fits" if r.decode["fits"] else "DOES NOT FIT"
    rows.append(
      ("decoding a batch", f"{_size(r.decode['needed'])} a chip: {fits}")
    )
  rows.append(("compiled in", f"{r.compile_seconds:,.0f} s"))
  devices = f"{r.devices} devices, " if r.devices > 1 else ""
  console.pairs_table(f"{r.topology}, {devices}{r.mesh}", rows)
  if not r.fits and r.sought:
    _say_change(r.change)
  if not all(stage.fits for stage in r.stages):
    console.say(
      "a stage of CURRICULUM does not fit: give it longer rows, which are"
      " fewer, or leave it out"
    )


def _times(r: Report, total_steps: int | None) -> list[tuple[str, str]]:
  again = r.step_flops - r.useful_flops
  operations = f"{_number(r.step_flops / 1e12)} TFLOP on all chips"
  if again > 0:
    operations += f", {_number(again / 1e12)} of them computed again"
  rows = [
    ("operations a step", operations),
    ("memory traffic a step", f"{_size(r.memory_traffic)} a chip"),
  ]
  rows += [
    (f"  {kind}", f"{_size(size)} in {count:,.0f}")
    for kind, (count, size) in sorted(r.collectives.items())
  ]
  rows += [
    (
      "step by roofline",
      f"{_milliseconds(r.seconds)} ms (compute"
      f" {_milliseconds(r.seconds_compute)}, memory"
      f" {_milliseconds(r.seconds_memory)}, network"
      f" {_milliseconds(r.seconds_network)}): {r.of_compute:.0%} of compute",
    ),
    ("tokens/s by roofline", f"{r.tokens / r.seconds:,.0f} (padding counted)"),
  ]
  if r.seconds_network:
    hidden = max(0.0, r.seconds_network - r.seconds_waiting)
    rows.append(
      (
        "as it is scheduled",
        f"{_milliseconds(hidden)} of the network's"
        f" {_milliseconds(r.seconds_network)} ms run beside other work;"
        f" {_milliseconds(r.seconds_scheduled)} ms a step so",
      )
    )
  if total_steps:
    hours = _number(r.seconds * total_steps / 3600)
    rows.append((f"{total_steps:,} steps by roofline", f"{hours} h"))
  return rows


def _say_change(change: list[str] | None) -> None:
  if change is None:
    console.say(
      "no change of recomputation, mesh, microbatches or batch that was tried"
      " makes it fit: take a larger topology or a smaller model"
    )
  else:
    console.say(
      "It fits with these lines in the gin file:\n  " + "\n  ".join(change)
    )


def several(found: Sequence[Report]) -> None:
  """A line a topology."""
  header = ("topology", "memory a chip", "", "step by roofline", "tokens/s")
  rows = []
  for r in found:
    if r.problem:
      rows.append((r.topology, r.problem, "", "", ""))
      continue
    timed = r.seconds > 0 and r.fits
    rows.append(
      (
        r.topology,
        _needed(r),
        "fits" if r.all_fits else "does not fit",
        f"{_milliseconds(r.seconds)} ms" if timed else "",
        f"{r.tokens / r.seconds:,.0f}" if timed else "",
      )
    )
  console.plain_table("plan", header, rows)


# ---- The fastest -------------------------------------------------------------


def ranked(found: Sequence[Compiled]) -> None:
  """Settings, best first, and the lines of the best."""
  topology = found[0].report.topology
  header = ("", "mesh", "remat", "parts", "rows", "GiB a chip")
  header += ("ms: compute / memory / network", "ms a step", "of compute")
  header += ("tokens/s",)
  rows = [_row(str(n), c) for n, c in enumerate(found, 1)]
  console.plain_table(f"{topology}, fastest by roofline first", header, rows)
  if any(c.changes_training for c in found):
    console.say("* another BATCH_SIZE than the run's: it changes the training")
  best = best_of(list(found))
  if best is None:
    console.say("none of them fits")
  elif not best.lines:
    console.say("nothing that was compiled is faster than the run as it is")
  else:
    console.say(
      "Fastest with this batch, in the gin file:\n  " + "\n  ".join(best.lines)
    )
  larger = [c for c in found if c.changes_training and c.report.fits]
  if best and larger and larger[0].seconds_a_token < best.seconds_a_token:
    console.say(
      "More tokens a second, but another training (its learning rate and steps"
      " are yours to choose):\n  " + "\n  ".join(larger[0].lines)
    )


def _row(number: str, c: Compiled) -> tuple[str, ...]:
  r = c.report
  policy = r.remat_policy
  name = number + ("" if c.lines else " now") + "*" * c.changes_training
  start = (
    name,
    r.mesh,
    policy if isinstance(policy, str) else ", ".join(policy),
    str(r.num_microbatches),
    str(r.batch_size),
    f"{r.memory.needed / _GIB:,.2f}" if r.memory.needed else "too many",
  )
  if not r.fits or not r.seconds:
    return (*start, "", "does not fit" if not r.fits else "", "", "")
  parts = (r.seconds_compute, r.seconds_memory, r.seconds_network)
  return (
    *start,
    " / ".join(map(_milliseconds, parts)),
    _milliseconds(r.seconds),
    f"{r.of_compute:.0%}",
    f"{r.tokens / r.seconds:,.0f}",
  )
