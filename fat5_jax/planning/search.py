"""Other settings of a run: what would fit, what would be faster.

A setting is lines of the gin file: `MESH`, `REMAT_POLICY`, `NUM_MICROBATCHES`,
and `BATCH_SIZE`, which changes the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

import jax

from fat5_jax import console
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.planning import chips
from fat5_jax.planning.estimate import Estimator
from fat5_jax.planning.rehearse import (
  Report,
  rehearse,
  sizes_of,
  step_flops,
  with_config,
)
from fat5_jax.training.program import Program

# From what keeps most to what keeps least.
_POLICIES = ("none", "gathered", "minimal", "full")
_MICROBATCHES = (1, 2, 4, 8, 16)
# A guess of memory that is this much too large is still compiled.
_SLACK = 1.3


@dataclasses.dataclass(frozen=True)
class Setting:
  """A program, a batch, and the gin lines by which it differs from the run."""

  lines: tuple[str, ...]
  program: Program
  shapes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A setting, and what its compiler made of it.

  Attributes:
    setting: no lines are the run as it is.
    report: of it.
    changes_training: its batch is another.
  """

  setting: Setting
  report: Report
  changes_training: bool = False

  @property
  def lines(self) -> tuple[str, ...]:
    return self.setting.lines

  @property
  def seconds_a_token(self) -> float:
    return self.report.seconds / self.report.tokens

  def as_dict(self) -> dict[str, Any]:
    """For the JSON file."""
    figures = dataclasses.asdict(self.report)
    for key in ("decode", "change", "sought", "fastest"):
      figures.pop(key)
    return figures | {
      "lines": list(self.lines),
      "changes_training": self.changes_training,
      "seconds_by_roofline": self.report.seconds,
      "of_compute": self.report.of_compute,
    }


# ---- What would be faster ----------------------------------------------------


def fastest(
  program: Program,
  shapes,
  now: Report,
  count: int,
  keep: Callable[[list[Compiled]], None] = lambda found: None,
) -> list[Compiled]:
  """The run as it is and `count` settings, best first by roofline.

  Settings are compiled in the order that a cheap estimate suggests. Those that
  do not fit are last. When the batch as it is has been searched, the best
  setting is tried with twice and four times as many rows.

  Args:
    program: of the run.
    shapes: of its batch.
    now: the report of the run as it is.
    count: how many to compile.
    keep: called with what has been found whenever there is more.
  """
  found = [Compiled(Setting((), program, shapes), now)]
  flops = _Flops(program, shapes, now)
  for setting in _promising(program, shapes, now, count, flops):
    _compile(setting, now.topology, flops, found)
    keep(found)
  best = best_of(found)
  if best is not None and best.report.of_compute < 0.95:
    for setting in _larger(program, shapes, best):
      _compile(setting, now.topology, flops, found, changes_training=True)
      keep(found)
  return by_rank(found)


def by_rank(found: list[Compiled]) -> list[Compiled]:
  """Best first by roofline, what does not fit last."""
  return sorted(
    found, key=lambda c: (not c.report.fits, c.seconds_a_token, c.lines)
  )


def best_of(found: list[Compiled]) -> Compiled | None:
  """The fastest that fits and leaves the training as it is, if any does."""
  same = [c for c in found if c.report.fits and not c.changes_training]
  return min(same, key=lambda c: (c.seconds_a_token, c.lines), default=None)


class _Flops:
  """(useful, all) operations of a step, by setting: they are counted once."""

  def __init__(self, program: Program, shapes, now: Report):
    self._program, self._shapes, self._useful = (
      program,
      shapes,
      now.useful_flops,
    )
    self._rows = sizes_of(shapes)[0]
    self._found = {
      "none": now.useful_flops,
      program.model.config.remat_policy: now.step_flops,
    }

  def __call__(self, setting: Setting) -> tuple[float, float]:
    policy = setting.program.model.config.remat_policy
    if policy not in self._found:
      changed = with_config(self._program, remat_policy=policy)
      self._found[policy] = step_flops(changed, self._shapes)
    times = sizes_of(setting.shapes)[0] / self._rows
    return self._useful * times, self._found[policy] * times


def _compile(
  setting: Setting,
  topology: str,
  flops: _Flops,
  found: list[Compiled],
  changes_training: bool = False,
) -> None:
  """Adds what a setting makes; one that the compiler refuses is said."""
  said = ", ".join(setting.lines)
  console.say(f"compiling with {said} ...")
  try:
    report = rehearse(
      *(setting.program, setting.shapes, topology, flops(setting)), decode=False
    )
  except (UserError, jax.errors.JaxRuntimeError) as e:
    console.say(f"  not compiled: {str(e).splitlines()[0][:200]}")
    return
  found.append(Compiled(setting, report, changes_training))
  if report.fits:
    console.say(
      f"  {report.seconds * 1e3:,.1f} ms by roofline,"
      f" {report.of_compute:.0%} of compute"
    )
  else:
    console.say("  does not fit")


def _promising(
  program: Program, shapes, now: Report, count: int, flops: _Flops
) -> list[Setting]:
  """Settings with this batch, best guess first; not the run's own."""
  topology, guesses = now.topology, []
  estimate = Estimator(program, topology)
  policies = dict.fromkeys((*_POLICIES, program.model.config.remat_policy))
  own = _key(program, topology)
  for partitioner in _meshes(program, topology):
    for policy in policies:
      changed = with_config(
        program.replace(partitioner=partitioner), remat_policy=policy
      )
      for parts in _MICROBATCHES:
        setting = _setting(
          program, changed.replace(num_microbatches=parts), shapes
        )
        if not _divides(setting):
          continue
        guess = estimate(setting.program, shapes, flops(setting)[1])
        if guess.memory > _SLACK * now.capacity:
          continue
        if _key(setting.program, topology) != own:
          guesses.append((guess.seconds, guess.memory, setting))
        # More microbatches only save memory.
        if guess.memory < 0.8 * now.capacity:
          break
  # Of those within some 2 % the leanest is first; of those that share a model's
  # parts and a policy, which differ little, the first before all the others.
  bucket = lambda seconds: round(50 * math.log(seconds))
  guesses.sort(key=lambda g: (bucket(g[0]), g[1], g[2].lines))
  seen, first, others = {_kind(program, topology)}, [], []
  for *_, setting in guesses:
    kind = _kind(setting.program, topology)
    (others if kind in seen else first).append(setting)
    seen.add(kind)
  return [*first, *others][:count]


def _meshes(program: Program, topology: str) -> Iterator[Partitioner]:
  """Partitioners of every mesh that a run on these devices may have."""
  now = dataclasses.replace(
    program.partitioner, devices=chips.devices(topology)
  )
  between = 1
  for size in (now.dcn_mesh or {}).values():
    between *= size
  devices = len(now.devices) // between
  # The length stays as it is: it is split where a row is too long for a chip.
  length = (now.mesh or {}).get("sequence", 1)
  for model in _divisors(devices // length, 16):
    rows = devices // length // model
    for fsdp in _divisors(rows):
      mesh = {"fsdp": fsdp, "sequence": length, "model": model}
      yield _with_mesh(now, {a: n for a, n in mesh.items() if n > 1})


def _divisors(count: int, most: int | None = None) -> list[int]:
  return [n for n in range(1, (most or count) + 1) if count % n == 0]


def _with_mesh(partitioner: Partitioner, mesh: dict[str, int]) -> Partitioner:
  return dataclasses.replace(
    partitioner, mesh=mesh, num_partitions=None, model_parallel_submesh=None
  )


def _kind(program: Program, topology: str):
  """What most of a setting's time follows from."""
  sizes, policy, _ = _key(program, topology)
  return dict(sizes)["model"], policy


def _key(program: Program, topology: str):
  """What makes two settings one."""
  placed = dataclasses.replace(
    program.partitioner, devices=chips.devices(topology)
  )
  return (
    tuple(placed.sizes.items()),
    program.model.config.remat_policy,
    program.num_microbatches or 1,
  )


def _divides(setting: Setting) -> bool:
  program, shapes = setting.program, setting.shapes
  rows, lengths = sizes_of(shapes)
  config = program.model.config
  try:
    program.partitioner.check(config, rows, lengths, program.num_microbatches)
  except UserError:
    return False
  return True


def _setting(run: Program, changed: Program, shapes, rows=None) -> Setting:
  """A setting with the lines that make the run's gin file it."""
  before, after = run.partitioner, changed.partitioner
  policy = changed.model.config.remat_policy
  lines = []
  for name, macro in (
    ("num_partitions", "NUM_PARTITIONS"),
    ("model_parallel_submesh", "MODEL_PARALLEL_SUBMESH"),
  ):
    if getattr(before, name) is not None and getattr(after, name) is None:
      lines.append(f"{macro} = None")
  if dict(after.mesh or {}) != dict(before.mesh or {}):
    lines.append(f"MESH = {dict(after.mesh or {})!r}")
  if policy != run.model.config.remat_policy:
    lines.append(f"REMAT_POLICY = {policy!r}")
  if (changed.num_microbatches or 1) != (run.num_microbatches or 1):
    lines.append(f"NUM_MICROBATCHES = {changed.num_microbatches or 1}")
  if rows is not None:
    lines.append(f"BATCH_SIZE = {rows}")
  return Setting(tuple(lines), changed, shapes)


def _larger(program: Program, shapes, best: Compiled) -> Iterator[Setting]:
  """The best setting with more rows, as many as may fit."""
  memory, rows = best.report.memory, sizes_of(shapes)[0]
  for times in (2, 4):
    # What is temporary grows with the rows at most.
    if (
      memory.needed + (times / 2 - 1) * memory.temporary < best.report.capacity
    ):
      larger = _with_rows(shapes, rows * times)
      yield _setting(program, best.setting.program, larger, rows * times)


def _with_rows(shapes, rows: int) -> dict[str, Any]:
  return {k: ((rows, *s[1:]), d) for k, (s, d) in shapes.items()}


# ---- What would fit ----------------------------------------------------------


def find_change(program: Program, shapes, topology, flops) -> list[str] | None:
  """The gin lines of the first change, from cheap to dear, that fits."""
  for setting in _changes(program, shapes, topology):
    console.say(f"does not fit; trying {', '.join(setting.lines)} ...")
    try:
      result = rehearse(
        setting.program, setting.shapes, topology, flops, decode=False
      )
    except UserError:
      continue
    if result.fits:
      return list(setting.lines)
  return None


def _changes(program: Program, shapes, topology: str) -> Iterator[Setting]:
  """Each keeps those before that cost no speed.

  Splitting the state over the devices that hold copies of it costs least where
  the state is what is large; then recomputation; then microbatches; then tensor
  parallelism; a smaller batch, which changes the training, is last.
  """
  partitioner = dataclasses.replace(
    program.partitioner, devices=chips.devices(topology)
  )
  sizes = partitioner.sizes
  rows = sizes_of(shapes)[0]
  current = program

  def with_mesh(**changes):
    mesh = {a: n for a, n in (sizes | changes).items() if n > 1 and a != "data"}
    return current.replace(partitioner=_with_mesh(program.partitioner, mesh))

  if sizes["data"] > 1 and not program.partitioner.dcn_mesh:
    current = with_mesh(fsdp=sizes["fsdp"] * sizes["data"])
    yield _setting(program, current, shapes)
  order: tuple = _POLICIES
  policy = program.model.config.remat_policy
  if not isinstance(policy, str):
    order = (policy, "full")
  for leaner in order[order.index(policy) + 1 :]:
    current = with_config(current, remat_policy=leaner)
    yield _setting(program, current, shapes)
  before = program.num_microbatches or 1
  ways = partitioner.ways("batch")
  for parts in (2, 4, 8, 16):
    if rows % (ways * before * parts) == 0:
      current = current.replace(num_microbatches=before * parts)
      yield _setting(program, current, shapes)
  total = sizes["fsdp"] * sizes["data"] * sizes["model"]
  for model in (2, 4, 8, 16):
    if model > sizes["model"] and total % model == 0:
      changed = with_mesh(model=model, fsdp=total // model)
      changed = changed.replace(num_microbatches=program.num_microbatches)
      yield _setting(program, changed, shapes)
  for smaller in (2, 4, 8, 16):
    if rows % (ways * smaller) == 0:
      changed = current.replace(num_microbatches=program.num_microbatches)
      fewer = _with_rows(shapes, rows // smaller)
      yield _setting(program, changed, fewer, rows // smaller)
