"""Many hosts: who is there, who differs, who is gone; whole runs of four."""

from concurrent.futures import ThreadPoolExecutor
import json
import os
import signal
import socket
import subprocess
import sys
import time

from conftest import with_devices
import numpy as np
import pytest
from test_train import (
  TINY,
  assert_equal_bit_for_bit,
  final_state,
  write_tiny,
)

from fat5_jax.distributed import hosts
from fat5_jax.errors import UserError
from fat5_jax.loggers import metrics


def free_address():
  """localhost and a port that is free, as is the one after it."""
  while True:
    with socket.socket() as a, socket.socket() as b:
      a.bind(("127.0.0.1", 0))
      port = a.getsockname()[1]
      try:
        b.bind(("127.0.0.1", port + 1))
      except OSError:
        continue
      return f"127.0.0.1:{port}"


def meet(indices, count, timeout=20.0, then=lambda call: call):
  """What `then` gives, or the UserError, for each of some processes."""
  address = free_address()

  def one(index):
    try:
      call = hosts.RollCall(hosts.Place(address, count, index), timeout)
    except UserError as e:
      return e
    try:
      return then(call)
    except UserError as e:
      return e
    finally:
      call.leave()

  with ThreadPoolExecutor(len(indices)) as pool:
    return list(pool.map(one, indices))


def test_a_host_that_does_not_come_is_named_to_all():
  found = meet([0, 1, 3], 4, timeout=1.0)
  assert all(isinstance(e, UserError) for e in found)
  for error in found:
    assert "1 of 4 hosts did not come within 1 s: 2." in str(error)


def test_without_host_0_the_others_say_where_they_looked():
  (error,) = meet([1], 2, timeout=0.5)
  assert "host 0 does not answer at 127.0.0.1" in str(error)


def test_a_port_that_is_taken_is_named():
  address = free_address()
  port = int(address.split(":")[1]) + 1
  with socket.create_server(("", port)):
    with pytest.raises(UserError, match=f"cannot listen on port {port}"):
      hosts.RollCall(hosts.Place(address, 2, 0), 1.0)


def test_two_processes_of_one_number_are_told_apart():
  for error in meet([0, 1, 1], 3, timeout=5.0):
    assert "says that it is number 1 of 3" in str(error)


def test_hosts_that_agree_go_on():
  def then(call):
    call.agree("the configuration", "a = 1")
    call.agree("step", [3, {"batches": 3}])
    return "fine"

  assert meet([0, 1, 2], 3, then=then) == ["fine"] * 3


def test_the_host_that_differs_is_named_with_the_line():
  def then(call):
    value = "same\nb = 1" if call.index != 2 else "same\nb = 2"
    call.agree("the configuration", value)

  for error in meet([0, 1, 2, 3], 4, then=then):
    text = str(error)
    assert "hosts differ in the configuration: 2 (" in text
    assert "'b = 1'" in text and "'b = 2'" in text


@pytest.mark.parametrize(
  "flags,message",
  [
    (("localhost:1", None, None), "also give --process_count, --process_index"),
    (("localhost", 2, 0), "write HOST:PORT"),
    (("localhost:1", 2, 2), "not one of 0 to 1"),
  ],
)
def test_flags_that_make_no_place_are_an_error(flags, message):
  with pytest.raises(UserError, match=message):
    hosts.find_place(*flags)


def test_the_environment_of_slurm_and_open_mpi_gives_the_place(monkeypatch):
  assert hosts.find_place() is None
  for name, value in {
    "OMPI_MCA_orte_hnp_uri": "1714880512.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  }.items():
    monkeypatch.setenv(name, value)
  place = hosts.find_place()
  assert (place.count, place.index) == (4, 3)
  assert place.address.startswith("10.96.0.1:")
  for name in list(os.environ):
    if name.startswith("OMPI_"):
      monkeypatch.delenv(name)
  for name, value in {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "node[003-006]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
  }.items():
    monkeypatch.setenv(name, value)
  place = hosts.find_place()
  assert (place.count, place.index) == (8, 5)
  assert place.address.startswith("node003:")


# ---- Whole runs --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  return write_tiny(tmp_path, TINY.replace("BATCH_SIZE = 4", "BATCH_SIZE = 8"))


class Run:
  """A command on several processes of this machine, two devices each.

  They share `folder`, but where `apart` says that each works in its own.
  """

  def __init__(self, folder, name, count, *flags, apart=False, env=None):
    address = free_address()
    self.logs = [folder / f"{name}.{count}.{i}.log" for i in range(count)]
    self.processes = [
      subprocess.Popen(
        [
          *(sys.executable, "-m", f"fat5_jax.{name}", "--gin_file=tiny.gin"),
          *(f"--coordinator_address={address}", f"--process_count={count}"),
          *(f"--process_index={i}", *flags),
        ],
        cwd=folder / f"host{i}" if apart else folder,
        env=with_devices(2) | (env or {}),
        stdout=subprocess.DEVNULL,
        stderr=log.open("w"),
      )
      for i, log in enumerate(self.logs)
    ]

  def wait(self, timeout=400):
    end = time.monotonic() + timeout
    try:
      return [p.wait(max(1, end - time.monotonic())) for p in self.processes]
    finally:
      for p in self.processes:
        p.kill()

  def said(self, index):
    return self.logs[index].read_text()

  def succeeds(self):
    codes = self.wait()
    assert codes == [0] * len(codes), self.said(0) + self.said(1)
    return self


def wait_for(path, run):
  while not path.exists():
    assert all(p.poll() is None for p in run.processes), run.said(0)
    time.sleep(0.05)


def curves(run_dir):
  """{(step, data set, metric): value} but for what a clock tells."""
  rows = metrics.read_csv(str(run_dir / "metrics.csv"))
  return {
    (step, dataset, metric): value
    for step, dataset, metric, value in rows
    if not metric.startswith("timing/")
  }


FSDP = "--gin.MESH={'fsdp': 4, 'model': 2}"


@pytest.mark.slow
def test_four_hosts_train_lose_one_and_go_on_as_two(folder):
  whole = Run(folder, "train", 4, "--gin.MODEL_DIR=whole", FSDP)
  whole.succeeds()
  assert "results in" in whole.said(0)
  assert "results in" not in whole.said(1), "only host 0 speaks"

  killed = Run(folder, "train", 4, "--gin.MODEL_DIR=cut", FSDP)
  wait_for(folder / "cut" / "checkpoint_3", killed)
  killed.processes[2].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  codes = killed.wait()
  assert time.monotonic() - begin < 60
  assert codes[2] == -signal.SIGKILL
  for i in (0, 1, 3):
    assert codes[i] == 1
    name = socket.gethostname()
    assert f"host 2 ({name}) is gone" in killed.said(i), killed.said(i)

  # Half the hosts, half the devices, another mesh.
  mesh = "--gin.MESH={'data': 2, 'sequence': 2}"
  again = Run(folder, "train", 2, "--gin.MODEL_DIR=cut", mesh)
  again.succeeds()
  assert "going on from step" in again.said(0)
  one, two = curves(folder / "whole"), curves(folder / "cut")
  assert one.keys() == two.keys()
  for key, value in one.items():
    np.testing.assert_allclose(two[key], value, rtol=1e-5, err_msg=str(key))

  # Evaluation and inference by two hosts, with what four have trained.
  Run(folder, "eval", 2, "--gin.MODEL_DIR=whole", mesh).succeeds()
  results = folder / "whole/eval/inference_eval/tiny-metrics.jsonl"
  found = json.loads(results.read_text().splitlines()[-1])
  assert found["exact_match"] == one[12, "inference_eval/tiny", "exact_match"]
  (folder / "lines.txt").write_text("number 1\nnumber 2\n3\n")
  flags = ("--gin.INPUT=lines.txt", "--gin.OUTPUT=out.jsonl")
  Run(folder, "infer", 2, "--gin.MODEL_DIR=whole", *flags).succeeds()
  rows = (folder / "out.jsonl").read_text().splitlines()
  assert [json.loads(r)["inputs"] for r in rows] == [
    *("say number 1", "say number 2", "say 3")
  ]


@pytest.mark.slow
def test_sigterm_to_one_host_saves_all_and_resuming_is_exact(folder):
  flags = (FSDP, "--gin.SCAN_LAYERS=True", "--gin.EVAL_PERIOD=0")
  Run(folder, "train", 4, "--gin.MODEL_DIR=whole", *flags).succeeds()
  flags += ("--gin.MODEL_DIR=cut",)
  stopped = Run(folder, "train", 4, *flags)
  wait_for(folder / "cut" / "checkpoint_3", stopped)
  stopped.processes[1].send_signal(signal.SIGTERM)
  stopped.succeeds()
  assert "stopped by SIGTERM" in stopped.said(0)
  assert not (folder / "cut" / "checkpoint_12").exists()
  Run(folder, "train", 4, *flags).succeeds()
  for one, two in zip(
    final_state(folder / "whole"), final_state(folder / "cut"), strict=True
  ):
    assert_equal_bit_for_bit(one, two)
  assert curves(folder / "whole") == curves(folder / "cut")
