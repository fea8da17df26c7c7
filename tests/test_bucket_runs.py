"""Whole runs with everything in a bucket, on hosts that share no disk."""

import json
import os
import signal
import subprocess
import sys
import time

import buckets
from conftest import ROOT, with_devices
import pytest
from test_buckets import downloaded, whole_steps
from test_hosts import Run, curves
from test_train import TINY, assert_equal_bit_for_bit, final_state

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bucket_runs")]


@pytest.fixture(params=["gs", "s3"])
def world(request, tmp_path):
  """(a folder of two hosts', the bucket's address, its objects, a run)."""
  kind = request.param
  rows = "".join(f"number {i}\t{i * 7 % 100}\n" for i in range(60))
  gin = TINY.replace("BATCH_SIZE = 4", "BATCH_SIZE = 8")
  with buckets.emulator(kind) as port:
    buckets.put(kind, port, "data/rows.tsv", b"text\tlabel\n" + rows.encode())
    address = f"{kind}://{buckets.BUCKET}"
    for i in range(2):
      (tmp_path / f"host{i}").mkdir()
      (tmp_path / f"host{i}" / "tiny.gin").write_text(gin)
    (tmp_path / "tiny.gin").write_text(gin)
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows)
    env = buckets.environment(kind, port) | {
      "FAT5_JAX_CACHE": str(tmp_path / "cache")
    }

    def run(command, *flags):
      files = f"--gin.TRAIN_FILE={address}/data/rows.tsv"
      more = (files, *flags)
      return Run(tmp_path, command, 2, *more, apart=True, env=env)

    def found(prefix=""):
      there = buckets.objects(kind, port, prefix)
      return {k.removeprefix(prefix): v for k, v in there.items()}

    yield tmp_path, address, found, run, env


def test_a_whole_run_in_a_bucket_is_that_of_a_shared_disk(world):
  folder, address, found, run, env = world
  Run(folder, "train", 2, "--gin.MODEL_DIR=disk").succeeds()
  flags = (f"--gin.MODEL_DIR={address}/run",)

  # Killed at once with kill -9, the other host sees it; then it goes on.
  killed = run("train", *flags)
  while not found("run/checkpoint_3/checksums.json"):
    assert all(p.poll() is None for p in killed.processes), killed.said(0)
    time.sleep(0.1)
  killed.processes[1].send_signal(signal.SIGKILL)
  assert killed.wait()[0] == 1
  assert "host 1" in killed.said(0) and "Traceback" not in killed.said(0)
  assert 3 in whole_steps(found("run/"))
  again = run("train", *flags).succeeds()
  assert "going on from step" in again.said(0)

  # The same bits and curves as on a disk that both hosts see.
  copy = folder / "copy"
  downloaded(lambda: found("run/"), str(copy))
  assert whole_steps(found("run/")) == [6, 9, 12]
  assert ".lock" not in found("run/")
  for one, two in zip(final_state(folder / "disk"), final_state(copy)):
    assert_equal_bit_for_bit(one, two)
  assert curves(folder / "disk") == curves(copy)
  for name in ("config.gin", "model-info.txt", "curves.png"):
    assert (copy / name).stat().st_size > 100
  assert list((copy / "train").glob("events.out.tfevents.*"))
  # Nothing of it lies on a host.
  for i in range(2):
    assert os.listdir(folder / f"host{i}") == ["tiny.gin"]

  run("eval", *flags).succeeds()
  scores = found("run/eval/inference_eval/")["tiny-metrics.jsonl"]
  last = json.loads(scores.splitlines()[-1])
  there = curves(folder / "disk")[12, "inference_eval/tiny", "exact_match"]
  assert last["exact_match"] == there

  rows = [f"number {i}" for i in range(5)]
  env_port = int(next(v for v in env.values() if "://" in v).split(":")[-1])
  kind = address.split(":")[0]
  buckets.put(kind, env_port, "lines.txt", "\n".join(rows).encode())
  output = f"{address}/out/predictions.jsonl"
  asked = (f"--gin.INPUT={address}/lines.txt", f"--gin.OUTPUT={output}")
  run("infer", *flags, *asked).succeeds()
  lines = found("out/")["predictions.jsonl"].decode().splitlines()
  assert [json.loads(x)["inputs"] for x in lines] == [f"say {r}" for r in rows]

  # Out as a folder of Hugging Face's, and in again as a beginning.
  done = subprocess.run(
    [
      *(sys.executable, os.path.join(ROOT, "tools/convert_checkpoint.py")),
      *(f"{address}/run", f"{address}/hf", "--no_transformers"),
    ],
    env=with_devices(1) | env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "equal bit for bit" in done.stdout
  assert {"config.json", "model.safetensors"} <= {*found("hf/")}
  begin = (
    f"--gin.INITIAL_CHECKPOINT_PATH={address}/hf",
    f"--gin.MODEL_DIR={address}/next",
    *("--gin.TRAIN_STEPS=3", "--gin.EVAL_PERIOD=0"),
  )
  said = run("train", *begin).succeeds().said(0)
  assert "starting from" in said and "not in it" not in said
  assert whole_steps(found("next/")) == [0, 3]
  record = json.loads(found("next/")["model.json"])
  assert record["base"] == f"{address}/hf"
