"""A damaged checkpoint is never read as weights, and never stops a run."""

import json
import os
import random
import shutil
import subprocess
import sys

import damage
import jax.numpy as jnp
import numpy as np
import pytest
from zygote import ROOT

from fat5_jax import checkpoints
from fat5_jax.checkpoints import (
  checkpointer,
  history,
  integrity,
  run_lock,
  run_record,
)
from fat5_jax.errors import UserError

STEPS = (3, 6)


@pytest.fixture(autouse=True)
def say_again():
  history._warn_once.cache_clear()


def state(step):
  rng = np.random.default_rng(step)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {"a": {"kernel": array(40, 30)}, "b": {"scale": array(30)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run folder with two steps. Its name is a pattern to glob."""
  folder = tmp_path_factory.mktemp("runs") / "of [mine]*?%41#|é"
  folder.mkdir()
  config = checkpoints.SaveCheckpointConfig(keep=2)
  with checkpointer.Checkpointer(str(folder), config) as saver:
    for step in (0, *STEPS):
      saver.save(step, state(step), state(step + 1), {"batches": step})
  return str(folder)


@pytest.fixture
def run(saved, tmp_path):
  return str(shutil.copytree(saved, tmp_path / "a [b]"))


def restored(run, step):
  """Its parameters, as numpy."""
  folder = os.path.join(run, f"checkpoint_{step}", "params")
  from fat5_jax.convert import orbax_files

  return {k: leaf.read() for k, leaf in orbax_files.read_item(folder).items()}


def test_the_folder_may_have_any_name_and_keeps_the_latest(saved):
  assert history.steps(saved) == [*STEPS]
  assert history.latest_whole(saved) == (6, [])
  found = restored(saved, 6)
  assert np.array_equal(found["a", "kernel"], state(6)["a"]["kernel"])
  assert {x for x in os.listdir(saved) if "tmp" in x or "writing" in x} == set()


def test_a_step_holds_what_was_so_when_its_save_began(tmp_path):
  """The caller goes on counting while it is written."""
  config, data = checkpoints.SaveCheckpointConfig(), {"sums": {"steps": 1.0}}
  with checkpointer.Checkpointer(str(tmp_path), config) as saver:
    saver.save(3, state(3), state(4), data)
    data["sums"]["steps"] += 1
  found = integrity.read_data(str(tmp_path / "checkpoint_3"))
  assert found["sums"] == {"steps": 1.0}


@pytest.mark.parametrize("way", damage.WAYS)
def test_a_damaged_newest_is_passed_over_and_said(run, way, seed, capfd):
  damage.WAYS[way](os.path.join(run, "checkpoint_6"), random.Random(seed))
  with checkpointer.Checkpointer(run, checkpoints.SaveCheckpointConfig()) as it:
    assert it.find_latest() == 3
    said = capfd.readouterr().err
    assert "warning: " in said and "checkpoint_6 is damaged (" in said
    assert len(said.splitlines()) == 1
    # The step can be saved anew, and nothing is thrown away.
    it.save(6, state(6), state(7), {"batches": 6})
  assert history.latest_whole(run) == (6, [])
  assert os.path.isdir(os.path.join(run, "checkpoint_6.damaged"))


def test_any_changed_byte_is_seen(run, seed):
  rng = random.Random(seed)
  step = os.path.join(run, "checkpoint_6")
  names = [
    f
    for item in integrity.ITEMS
    for f in damage.files(os.path.join(step, item))
    if os.path.getsize(f)
  ]
  missed = []
  for n in range(150):
    path = rng.choice(names)
    with open(path, "rb") as file:
      before = file.read()
    damage.flip(path, rng)
    integrity._problem.cache_clear()
    if integrity.problem(step) is None:
      missed.append((n, path))
    with open(path, "wb") as file:
      file.write(before)
  assert not missed
  integrity._problem.cache_clear()
  assert integrity.problem(step) is None


def test_lost_sums_and_files_without_one_are_damage(run):
  step = os.path.join(run, "checkpoint_6")
  path = os.path.join(step, integrity.NAME)
  with open(path) as file:
    text = file.read()
  changed = [
    text.replace("params/", "Params/", 1),
    '{"format": 1, "files": {}}',
  ]
  for other in changed:
    with open(path, "w") as file:
      file.write(other)
    integrity._problem.cache_clear()
    assert integrity.problem(step)
  os.unlink(path)
  integrity._problem.cache_clear()
  # The one before has them, so this one had.
  assert history.latest_whole(run) == (3, [6])
  os.unlink(os.path.join(run, "checkpoint_3", integrity.NAME))
  integrity._problem.cache_clear()
  assert history.latest_whole(run) == (6, [])


def test_where_all_are_damaged_nothing_begins_anew_in_silence(run):
  for step in STEPS:
    damage.WAYS["params missing"](
      os.path.join(run, f"checkpoint_{step}"), random.Random(0)
    )
  saver = checkpointer.Checkpointer(run, checkpoints.SaveCheckpointConfig())
  with saver, pytest.raises(UserError, match="every checkpoint is damaged"):
    saver.find_latest()
  assert history.steps(run) == [*STEPS]


def test_a_folder_at_rest_can_be_checked(run):
  def check():
    done = subprocess.run(
      [sys.executable, os.path.join(ROOT, "tools", "check_checkpoint.py"), run],
      capture_output=True,
      text=True,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()

  assert check() == (0, [f"{run}/checkpoint_{n}: whole" for n in STEPS])
  damage.WAYS["arrays flipped"](f"{run}/checkpoint_6", random.Random(0))
  os.unlink(f"{run}/checkpoint_3/{integrity.NAME}")
  status, (three, six) = check()
  assert status == 1
  assert "no checksums" in three and "holds other bytes" in six


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, "3"])
def test_no_setting_keeps_nothing(keep):
  with pytest.raises(UserError, match="KEEP"):
    checkpoints.SaveCheckpointConfig(keep=keep)


@pytest.mark.parametrize("period", [0, -1, 1.5, None])
def test_no_setting_saves_never_or_always(period):
  with pytest.raises(UserError, match="CHECKPOINT_PERIOD"):
    checkpoints.SaveCheckpointConfig(period=period)


def test_what_a_full_disk_refuses_is_one_line_with_the_last_good_step(
  run, monkeypatch
):
  def full(folder):
    raise OSError(28, "No space left on device", folder)

  saver = checkpointer.Checkpointer(run, checkpoints.SaveCheckpointConfig())
  saver.find_latest()
  monkeypatch.setattr(integrity, "write", full)
  with pytest.raises(UserError) as e:
    saver.save(9, state(9), state(10), {})
    saver.wait()
  [line] = str(e.value).splitlines()
  assert "No space left on device" in line and "step 6 and untouched" in line
  monkeypatch.undo()
  saver.close()
  assert history.latest_whole(run) == (6, [])
  # What was left half-written goes when the folder is next opened.
  with checkpointer.Checkpointer(run, checkpoints.SaveCheckpointConfig()) as it:
    it.save(9, state(9), state(10), {})
  assert history.steps(run) == [3, 6, 9]
  assert not [x for x in os.listdir(run) if "tmp" in x]


# --- model.json --------------------------------------------------------------


@pytest.mark.parametrize(
  "text, told",
  [
    ("", "not valid JSON"),
    ("[]", "model.json"),
    ('{"model": 5}', "describes no model"),
    ('{"format": 9, "model": {}}', "format 9"),
    ('{"format": 1, "model": {}, "shape": 3}', "field 'shape'"),
    ('{"model": {"vocab_size": 5, "nosuch": 3}}', "nosuch"),
    ('{"model": {}}', "vocab_size"),
    ("[" * 100_000, "not valid JSON"),
  ],
)
def test_a_model_json_of_another_kind_is_one_line(tmp_path, text, told):
  (tmp_path / "model.json").write_text(text)
  with pytest.raises(UserError, match="model.json") as e:
    run_record.read_config(str(tmp_path))
  [line] = str(e.value).splitlines()
  assert told in line


# --- One writer --------------------------------------------------------------


HOLD = f"""
import sys, time
sys.path.insert(0, {ROOT!r})
from fat5_jax.checkpoints import run_lock
with run_lock.held(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def holder(folder):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
  process = holder(tmp_path)
  try:
    with pytest.raises(UserError, match=f"process {process.pid} on "):
      with run_lock.held(str(tmp_path)):
        pass
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  # A crash frees it.
  with run_lock.held(str(tmp_path)):
    pass


def sign(path, host, sign):
  with open(path, "w") as file:
    json.dump({"host": host, "process": 7, "since": "now", "sign": sign}, file)


def test_another_host_s_signature_is_watched(tmp_path, monkeypatch):
  """flock does not reach every shared file system."""
  monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.5)
  path = tmp_path / run_lock.NAME
  sign(path, "far", "1")
  with run_lock.held(str(tmp_path)):  # It is dead: nothing changes.
    pass
  sign(path, "far", "1")
  monkeypatch.setattr(
    run_lock.time, "sleep", lambda seconds: sign(path, "far", "2")
  )
  with pytest.raises(UserError, match="process 7 on far"):
    with run_lock.held(str(tmp_path)):
      pass
