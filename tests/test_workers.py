"""Reading in processes of their own: the same batches; none is left behind."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT
import pytest
from test_reading import (
  BYTES,
  SHARD,
  configs,
  dataset,
  equal,
  rows,
  stores,
  text_task,
)

from fat5_jax.data import pipeline, sources, tasks
from fat5_jax.errors import UserError


def script(folder, num_workers, rest):
  """A command that reads the first of its `batches`, and does the rest."""
  text_task(folder)
  path = folder / "program.py"
  path.write_text(f"""
import os, pathlib, signal, sys
sys.path.insert(0, {os.path.join(ROOT, "tests")!r})
import conftest, test_reading
if __name__ == "__main__":
  task = test_reading.text_task(pathlib.Path({str(folder)!r}))
  batches = test_reading.pipeline.train_batches(
    test_reading.dataset(task, num_workers={num_workers}), 384
  )
  first = next(batches)
{rest}""")
  return [sys.executable, str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "mixture", "head in buckets"])
def test_worker_processes_prepare_and_read_the_same(name, tmp_path):
  """Two processes against a thread of this one: stores, batches, positions."""
  one = configs(tmp_path)[name]
  one = dataclasses.replace(one, cache_dir=str(tmp_path / "one"))
  two = dataclasses.replace(one, cache_dir=str(tmp_path / "two"), num_workers=2)
  batches = [pipeline.train_batches(config, 384) for config in (one, two)]
  for _ in range(30):
    a, b = map(next, batches)
    equal(a, b)
    assert batches[0].position == batches[1].position
    assert batches[0].epochs == batches[1].epochs
  batches[1].close()
  names = stores(tmp_path / "one")
  assert names == stores(tmp_path / "two")
  for folder, file in itertools.product(names, ("index.json", SHARD)):
    paths = [tmp_path / where / folder / file for where in ("one", "two")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_process_may_end_amid_a_stream(num_workers, tmp_path):
  """A script that has seen enough is not aborted by a thread that reads on."""
  command = script(tmp_path, num_workers, "  print(len(first))")
  done = subprocess.run(
    command,
    env=os.environ | {"PYTHONPATH": ROOT},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0 and done.stdout == "8\n", done.stderr
  assert "Exception" not in done.stderr and "Error" not in done.stderr


AMONG_READERS = """
  import test_workers
  def readers():
    found = test_workers.processes(os.environ["READERS"])
    return [pid for pid in found if pid != os.getpid()]
  print(len(readers()), flush=True)
  if sys.argv[1] == "parent":
    os.kill(os.getpid(), signal.SIGKILL)
  for pid in readers():
    os.kill(pid, signal.SIGKILL)
  try:
    while True:
      next(batches)
  except test_reading.UserError as e:
    print(e)
"""


def processes(mark):
  """Ids of the processes whose environment holds a text."""
  found = []
  for entry in os.listdir("/proc"):
    try:
      with open(f"/proc/{entry}/environ", "rb") as file:
        if mark.encode() in file.read():
          found.append(int(entry))
    except (OSError, ValueError):
      continue
  return found


@pytest.mark.slow
def test_readers_end_with_their_parent_and_a_dead_reader_is_a_line(tmp_path):
  command = script(tmp_path, 2, AMONG_READERS)
  for case in ("parent", "readers"):
    mark = f"READERS={tmp_path}/{case}"
    done = subprocess.run(
      [*command, case],
      env=os.environ | {"PYTHONPATH": ROOT, "READERS": f"{tmp_path}/{case}"},
      stdout=subprocess.PIPE,
      text=True,
      timeout=300,
    )
    count, _, said = done.stdout.partition("\n")
    assert int(count) >= 2
    if case == "parent":
      assert done.returncode == -signal.SIGKILL
    else:
      assert "NUM_WORKERS = 2: a process that reads data has ended" in said
    end = time.monotonic() + 30
    while processes(mark) and time.monotonic() < end:
      time.sleep(0.2)
    assert not processes(mark), "they outlive their parent"


@pytest.mark.slow
def test_a_bad_row_in_a_worker_process_is_the_same_line(tmp_path):
  path = tmp_path / "bad.jsonl"
  lines = [json.dumps(row) + "\n" for row in rows(3000)]
  lines[2100] = '{"text": "", "label": "x"}\n'
  path.write_text("".join(lines))
  task = tasks.text_to_text(
    sources.Files({"train": str(path)}), "{text}", "{label}", BYTES, name="bad"
  )
  config = dataset(task, num_workers=2, cache_dir=str(tmp_path / "cache"))
  with pytest.raises(UserError, match="bad.jsonl, row 2101: column 'text' is"):
    pipeline.train_batches(config, 384)
  assert stores(tmp_path / "cache") == []
