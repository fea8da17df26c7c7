"""A day with a chip keeps what it found, whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

from conftest import ROOT
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, ROOT)

from tools import bench_attention, chip_runner, chip_table, chip_units, on_chip
from tools.chip_runner import Phase, Refusal, Rows, Runner, Unit, to_do

TOOL = os.path.join(ROOT, "tools", "on_chip.py")
IDENTITY = {"chip": "cpu", "jax": "0.0", "commit": "abc", "smoke": True}
# Workers without jax.
WORKER = f"""
import os, sys, time
sys.path.insert(0, {ROOT!r})
from tools import chip_runner

def fine(x):
  print("a library says hello", flush=True)
  return {{"x": x, "pid": os.getpid()}}

def hang(dumps=False):
  if dumps:
    open(os.path.join(os.environ["DUMPS"], "kernel.ptx"), "w").write("ret;")
  print("before it hung", file=sys.stderr, flush=True)
  time.sleep(1000)

def crash():
  os.kill(os.getpid(), 11)

def error():
  raise ValueError("no such block")

def without():
  raise chip_runner.Skip("no flax")

chip_runner.serve(dict(
  fine=fine, hang=hang, crash=crash, error=error, without=without
))
"""


def fine(n, **more):
  return Unit(f"test, {n}", "fine", {"x": n}, **more)


@pytest.fixture
def path(tmp_path):
  return str(tmp_path / "rows.jsonl")


def run(path, phase, units=None, seconds=60, keep=lambda *_: None):
  """The rows of a file after a run of a phase."""
  rows = Rows(path, IDENTITY)
  runner = Runner(
    rows,
    [sys.executable, "-c", WORKER],
    time.monotonic() + seconds,
    lambda line: None,
    keep,
  )
  todo = to_do(phase.units, rows, retries=False, again=False)
  runner.run(phase, todo if units is None else units)
  return rows.all


def test_a_hang_or_a_crash_ends_its_unit_alone(path, tmp_path):
  units = [
    fine(1),
    Unit("test, hang", "hang", {}, limit=0.5),
    fine(2),
    Unit("test, crash", "crash", {}),
    Unit("test, error", "error", {}),
    Unit("test, without", "without", {}),
    fine(3),
  ]
  rows = {row["key"]: row for row in run(path, Phase("test", units))}
  assert rows == {row["key"]: row for row in chip_runner.read_rows(path)}
  assert [rows[unit.key]["status"] for unit in units] == [
    *("ok", "timeout", "ok", "failed", "failed", "skipped", "ok")
  ]
  said = rows["test, hang"]["stderr"]
  assert "before it hung" in said
  assert any("in hang" in line for line in said), said
  assert rows["test, crash"]["reason"] == ["signal 11"]
  assert rows["test, error"]["reason"] == ["ValueError: no such block"]
  assert rows["test, without"]["reason"] == ["no flax"]
  assert rows["test, 1"].items() >= (IDENTITY | {"x": 1}).items()
  # Each that ended badly took its worker along; skipping is no bad end.
  assert len({rows[f"test, {n}"]["pid"] for n in (1, 2, 3)}) == 3
  table = chip_table.table([row | {"phase": "launch"} for row in rows.values()])
  assert "| test, hang | timeout: killed after 0.5 s |" in table
  assert "| test, 1 | ok |" in table


def test_the_dumps_of_a_launch_that_hangs_are_kept(path, tmp_path):
  archive = str(tmp_path / "dumps.zip")
  units = [
    Unit(f"launch, {n}", "hang", {"dumps": True}, limit=0.5) for n in (1, 2)
  ]
  phase = Phase("launch", units, fresh=True, environment={"DUMPS": "{dumps}"})
  run(path, phase, keep=lambda *x: on_chip.keep_dumps(archive, *x))
  with zipfile.ZipFile(archive) as file:
    names = [f"launch, {n}/kernel.ptx" for n in (1, 2)]
    assert file.namelist() == names and file.read(names[0]) == b"ret;"


def test_several_workers_share_units(path):
  rows = run(path, Phase("suite", [fine(n) for n in range(20)], workers=2))
  assert sorted(row["x"] for row in rows) == list(range(20))


def test_a_second_run_does_what_is_missing_and_failures_once_more(path):
  units = [fine(1), Unit("test, error", "error", {}), fine(2)]
  phase = Phase("test", units)
  run(path, phase, units[:2])
  with open(path, "rb") as file:
    first = file.read()
  # A machine that dies writes half a line.
  with open(path, "ab") as file:
    file.write(b'{"key": "test, 2", "pha')
  rows = Rows(path, IDENTITY)
  keys = lambda **how: [u.key for u in to_do(units, rows, **how)]
  assert keys(retries=False, again=False) == ["test, 2"]
  assert keys(retries=True, again=False) == ["test, error"]
  del rows
  rows = run(path, phase)
  assert [row["key"] for row in rows] == ["test, 1", "test, error", "test, 2"]
  rows = run(path, phase, units[1:2])
  assert [row["attempt"] for row in rows if row["key"] == "test, error"] == [
    *(1, 2)
  ]
  with open(path, "rb") as file:
    assert file.read().startswith(first)
  rows = Rows(path, IDENTITY)
  assert keys(retries=True, again=False) == []
  assert keys(retries=True, again=True) == ["test, error"]


def test_what_does_not_fit_into_the_time_waits_for_the_next_run(path):
  units = [
    fine(1, needs=0.1),
    Unit("test, hang", "hang", {}, limit=100, needs=0.1),
    fine(2, needs=0.1),
  ]
  rows = run(path, Phase("test", units), seconds=3)
  assert [row["key"] for row in rows] == ["test, 1"]


@pytest.mark.parametrize("name", IDENTITY)
def test_rows_of_another_chip_jax_or_commit_are_refused(path, name):
  Rows(path, IDENTITY).add({"key": "machine", "status": "ok"})
  with pytest.raises(Refusal, match=f"rows of {name} .* name another --out"):
    Rows(path, IDENTITY | {name: "other"})
  rows = Rows(path, IDENTITY)
  with pytest.raises(Refusal, match="another process writes"):
    Rows(path, IDENTITY)
  del rows


def test_a_folder_without_rows_says_so(tmp_path):
  done = subprocess.run(
    [sys.executable, TOOL, "--table", str(tmp_path)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
  assert "has no rows.jsonl: run with --out" in done.stderr


HOPPER = {
  "platform": "gpu",
  "cores": 16,
  "kernels": ["mosaic_gpu", "triton"],
  "cases": ["scores to 10", "offset"],
  "sides": {
    "ours, mosaic_gpu": "jax",
    "ours, chunked": "jax",
    "jax.nn cudnn + bias": "jax",
    "torch SDPA cudnn + bias": "torch",
  },
  "knobs": {
    f"mosaic_gpu {dim}": ["as in tiling.py", "dq=1", "dkv=1"]
    for dim in (64, 128)
  },
}


def test_a_chip_s_plan_is_in_the_order_of_worth():
  phases = chip_units.plan(HOPPER, smoke=False)
  assert tuple(phase.name for phase in phases) == on_chip.PHASES
  keys = {phase.name: [u.key for u in phase.units] for phase in phases}
  every = [key for part in keys.values() for key in part]
  assert len(set(every)) == len(every)
  assert keys["launch"][:2] == [
    *("launch, mosaic_gpu, forward", "launch, triton, forward")
  ]
  assert keys["suite"][0] == "suite, mosaic_gpu, scores to 10"
  assert keys["bench"][:3] == [
    "bench, 4096 whole, ours, mosaic_gpu",
    "bench, 4096 whole, ours, chunked",
    "bench, 4096 packed, ours, mosaic_gpu",
  ]
  lengths = [int(key.split()[1]) for key in keys["bench"]]
  assert list(dict.fromkeys(lengths)) == [4096, 512, 16384, 32768]
  assert [u.do for phase in phases for u in phase.units if not u.limit] == []
  for phase in phases:
    assert phase.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert all(unit.do in chip_units.FUNCTIONS for unit in phase.units)


def test_the_backward_pass_is_timed_without_the_forward_one():
  x = jnp.linspace(0.0, 1.0, 64)
  o, vjp, backward, memory = bench_attention.split_vjp(
    lambda x, y: jnp.exp(jnp.sin(x)) * y, (x,), (2 * x,), jnp.ones_like(x)
  )
  (found,) = backward(vjp, jnp.ones_like(x))
  np.testing.assert_allclose(found, jnp.cos(x) * o, rtol=1e-5)
  text = backward.as_text()
  assert not any(f"{name}(" in text for name in ("exponential", "cosine"))
  assert memory >= 0


def call(folder, *more):
  return subprocess.Popen(
    [sys.executable, TOOL, "--smoke", "--out", str(folder), *more],
    env=os.environ | {"FAT5_JAX_COMMIT": "tested"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow
def test_smoke_killed_halfway_keeps_its_rows_and_goes_on(tmp_path):
  path = tmp_path / "rows.jsonl"
  read = lambda: path.read_bytes() if path.exists() else b""
  process = call(tmp_path)
  while b'"phase": "bench"' not in read() and process.poll() is None:
    time.sleep(0.1)
  workers = children(process.pid)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  first = read()
  assert workers and first.endswith(b"\n")
  # Nobody is left on the chip.
  until = time.monotonic() + 20
  while workers and time.monotonic() < until:
    workers = [pid for pid in workers if runs(pid)]
  assert not workers

  process = call(tmp_path)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert read().startswith(first)
  rows = chip_runner.read_rows(str(path))
  keys = [row["key"] for row in rows]
  assert len(set(keys)) == len(keys)
  phases = {row["phase"] for row in rows}
  assert phases == {"machine", *on_chip.PHASES}
  # A machine may lack compute-sanitizer; nothing else may be missing here.
  missing = {row["phase"] for row in rows if row["status"] != "ok"}
  assert missing <= {"sanitizer", "races"}
  assert f"{len(rows) - 1} of {len(rows) - 1} rows, 0 of them" in output
  names = {"rows.jsonl", "table.md", "log.txt", "dumps.zip"}
  assert set(os.listdir(tmp_path)) == names
  table = (tmp_path / "table.md").read_text()
  assert all(key.partition(", ")[2] in table for key in keys)

  # Nothing is left to do, and a real run does not join a smoke one.
  process = call(tmp_path)
  process.communicate()
  assert process.returncode == 0 and len(read().splitlines()) == len(rows)
  found = [json.loads(line) for line in read().splitlines()]
  assert found == rows


def status(pid) -> tuple[str, int]:
  """A process's state and its parent; ("X", 0) where there is none."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      state, parent = file.read().rpartition(")")[2].split()[:2]
  except (FileNotFoundError, ProcessLookupError):
    return "X", 0
  return state, int(parent)


def runs(pid) -> bool:
  return status(pid)[0] not in ("X", "Z")


def children(pid: int) -> list[int]:
  every = map(int, filter(str.isdigit, os.listdir("/proc")))
  return [child for child in every if status(child)[1] == pid]
