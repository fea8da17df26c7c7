"""The launchers print what they would do, and it is well formed."""

import os
import subprocess

from conftest import ROOT
import pytest
import yaml

FOLDER = os.path.join(ROOT, "tools", "launch")
SETTINGS = {
  **{"NAME": "xl", "ZONE": "a", "TYPE": "v5litepod-16", "BUCKET": "b"},
  **{"HOSTS": "4", "IMAGE": "me/fat5_jax:1", "CLAIM": "c", "JOBSET": "j.yaml"},
  **{"NODES": "2", "GPUS": "4"},
}
MESH = "--gin.MESH={'fsdp': 8, 'model': 2}"


def launch(script, action, *flags):
  done = subprocess.run(
    ["bash", f"{FOLDER}/{script}.sh", "--print", action, *flags],
    env=os.environ | SETTINGS,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("script", ["tpu", "slurm", "kubernetes"])
def test_every_action_prints_and_does_nothing(script, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for action in ("create", "install", "run", "logs", "stop", "delete"):
    assert launch(script, action, "--gin_file=a.gin", MESH).strip()
  assert not os.listdir(tmp_path)
  done = subprocess.run(
    ["bash", f"{FOLDER}/{script}.sh", "--print", "destroy"],
    env=os.environ | SETTINGS,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and "no action destroy" in done.stderr


def test_flags_reach_the_hosts_of_a_tpu_as_they_were_typed():
  command = launch("tpu", "run", "--gin_file=a.gin", MESH)
  # What the local shell hands to gcloud, and the host's shell to Python.
  show = 'printf "%s\\n" "$@"'
  outer = subprocess.run(
    ["bash", "-c", f"set -- {command}\n{show}"], capture_output=True, text=True
  ).stdout
  remote = next(a for a in outer.splitlines() if a.startswith("--command="))
  words = remote.removeprefix("--command=nohup ").split(" > ")[0]
  inner = subprocess.run(
    ["bash", "-c", f"set -- {words}\n{show}"], capture_output=True, text=True
  ).stdout
  assert inner.splitlines() == [
    *("venv/bin/python", "-m", "fat5_jax.train", "--gin_file=a.gin", MESH)
  ]


def test_the_batch_script_of_slurm_is_bash_with_a_process_a_gpu(tmp_path):
  text = launch("slurm", "run", "--gin_file=a.gin", MESH)
  script = text[: text.rindex("sbatch ")]
  path = tmp_path / "run.sbatch"
  path.write_text(script)
  subprocess.run(["bash", "-n", path], check=True)
  assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4" in script


def test_the_jobset_has_every_host_and_flag():
  text = launch("kubernetes", "run", "--gin_file=a.gin", MESH)
  jobset = yaml.safe_load(text[: text.rindex("kubectl ")])
  (job,) = jobset["spec"]["replicatedJobs"]
  pods = job["template"]["spec"]
  assert pods["parallelism"] == pods["completions"] == 4
  (container,) = pods["template"]["spec"]["containers"]
  assert container["args"][-2:] == ["--gin_file=a.gin", MESH]
  assert "--coordinator_address=xl-hosts-0-0.xl:8476" in container["args"]
