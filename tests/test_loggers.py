"""Where a run's numbers go: each once, whatever a kill does, in order.

What a tool has is read by its own reader; W&B's files by their format and its
own protocol buffers, as it has no reader on this side of its server.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types

from conftest import ROOT
import pytest

from fat5_jax import console
from fat5_jax.errors import UserError
from fat5_jax.gin_config import cli
from fat5_jax.loggers import metrics, sender, tensorboard
from fat5_jax.loggers.logger import Logger

TRACKERS = ("mlflow", "trackio", "wandb")

# Writes rows of steps as a run does: FOLDER LOGGERS FIRST_STEP LAST_STEP END.
PROGRAM = """
import os, signal, sys
from fat5_jax.loggers import metrics
folder, loggers, first, last, end = sys.argv[1:]
log = metrics.MetricsLog(folder, int(first), loggers.split(","))
log.settings({"batch_size": 8, "task": "tiny"}, "BATCH_SIZE = 8")
for step in range(int(first) + 1, int(last) + 1):
  log.write(step, "train", {"loss": 1 / step, "timing/mfu": 0.5})
  if step % 3 == 0:
    log.write(step, "training_eval/tiny", {"loss": 2 / step})
    log.write(step, "inference_eval/tiny", {"exact_match": float(step)})
if end == "killed":
  os.kill(os.getpid(), signal.SIGKILL)
log.close()
"""


def environment(folder):
  """Where no tool knows the network, nor a person's account."""
  return os.environ | {
    "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]),
    "WANDB_MODE": "offline",
    "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    "TRACKIO_DIR": f"{folder}/trackio",
  }


def write_rows(folder, loggers, first, last, end="closed"):
  os.makedirs(folder / "runs" / "rte", exist_ok=True)
  done = subprocess.run(
    [
      *(sys.executable, "-c", PROGRAM, f"{folder}/runs/rte"),
      *(",".join(loggers), str(first), str(last), end),
    ],
    env=environment(folder),
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=120,
  )
  wanted = 0 if end == "closed" else -signal.SIGKILL
  assert done.returncode == wanted, done.stderr


def rows_of_steps(last):
  """[(step, name, value)] that PROGRAM writes of steps 1 to `last`."""
  found = []
  for step in range(1, last + 1):
    found += [(step, "train/loss", 1 / step), (step, "train/timing/mfu", 0.5)]
    if step % 3 == 0:
      found += [(step, "training_eval/tiny/loss", 2 / step)]
      found += [(step, "inference_eval/tiny/exact_match", float(step))]
  return sorted(found)


def write_in(log, steps, but=None):
  """The same rows here; no evaluation of step `but`."""
  for step in steps:
    log.write(step, "train", {"loss": 1 / step, "timing/mfu": 0.5})
    if step % 3 == 0 and step != but:
      log.write(step, "training_eval/tiny", {"loss": 2 / step})
      log.write(step, "inference_eval/tiny", {"exact_match": float(step)})


READ = {
  "mlflow": """
import json, mlflow
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("runs")
(run,) = client.search_runs([experiment.experiment_id])
rows = [
  (m.step, m.key, m.value)
  for key in run.data.metrics
  for m in client.get_metric_history(run.info.run_id, key)
]
about = [run.info.run_name, run.info.status, run.data.params["batch_size"]]
print(json.dumps([rows, about]))
""",
  "trackio": """
import json
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
(run,) = Api().runs("runs")
rows = [
  (log["step"], key, value)
  for log in SQLiteStorage.get_logs("runs", run.name)
  for key, value in log.items()
  if key not in ("step", "timestamp")
]
name = run.name.rpartition("-")[0]
print(json.dumps([rows, [name, "FINISHED", str(run.config["batch_size"])]]))
""",
  "wandb": """
import glob, json
from wandb.proto import wandb_internal_pb2 as pb

def records(path):
  # LevelDB's log: blocks of 32 KiB, records of crc, length, kind.
  data, place, part = open(path, "rb").read(), 7, b""
  while place + 7 <= len(data):
    if (left := 32768 - place % 32768) < 7:
      place += left
      continue
    size = int.from_bytes(data[place + 4 : place + 6], "little")
    part += data[place + 7 : place + 7 + size]
    if data[place + 6] in (1, 4):
      yield pb.Record.FromString(part)
      part = b""
    place += 7 + size

# What `wandb sync` would take.
(path,) = glob.glob("runs/rte/wandb/offline-run-*/*.wandb")
rows, about = [], {}
for record in records(path):
  if record.HasField("run"):
    about = {"name": record.run.display_name, "project": record.run.project}
  for item in record.run.config.update:
    about[item.key] = item.value_json
  for item in record.config.update:
    about[item.key] = item.value_json
  found = {
    (i.key or "/".join(i.nested_key)): json.loads(i.value_json)
    for i in record.history.item
  }
  rows += [(found["step"], k, v) for k, v in found.items()
           if k != "step" and not k.startswith("_")]
assert about["project"] == "runs"
print(json.dumps([rows, [about["name"], "FINISHED", about["batch_size"]]]))
""",
}


def rows_in(folder, tracker):
  """(rows, [run, state, batch size]) that a tracker has."""
  done = subprocess.run(
    [sys.executable, "-c", READ[tracker]],
    env=environment(folder),
    cwd=folder,
    capture_output=True,
    text=True,
    check=True,
  )
  rows, about = json.loads(done.stdout.splitlines()[-1])
  return sorted(map(tuple, rows)), about


def events_in(folder):
  """[(step, name, value)] that TensorBoard reads."""
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  found = []
  for dataset in ("train", "training_eval/tiny"):
    path = os.path.join(folder, dataset)
    reader = event_accumulator.EventAccumulator(path, purge_orphaned_data=False)
    reader.Reload()
    for tag in reader.Tags()["tensors"]:
      found += [
        (e.step, f"{dataset}/{tag}", tensor_util.make_ndarray(e.tensor_proto))
        for e in reader.Tensors(tag)
      ]
  return sorted((step, name, float(v)) for step, name, v in found)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_has_every_value_once_after_a_kill(tmp_path, tracker):
  """Killed at step 7, gone on with from step 4, then from 9 in peace."""
  pytest.importorskip(tracker)
  write_rows(tmp_path, [tracker], 0, 7, "killed")
  write_rows(tmp_path, [tracker], 4, 9)
  write_rows(tmp_path, [tracker], 9, 10)
  rows, about = rows_in(tmp_path, tracker)
  assert [row[:2] for row in rows] == [row[:2] for row in rows_of_steps(10)]
  wanted = [value for _, _, value in rows_of_steps(10)]
  assert [value for _, _, value in rows] == pytest.approx(wanted)
  assert about == ["rte", "FINISHED", "8"]


def test_tensorboard_has_every_value_once_after_a_kill(tmp_path):
  folder = str(tmp_path)
  killed = metrics.MetricsLog(folder, 0, ["tensorboard"])
  write_in(killed, range(1, 8))
  # As a kill within a write leaves it.
  (path,) = (tmp_path / "train").iterdir()
  path.write_bytes(path.read_bytes()[:-3])
  log = metrics.MetricsLog(folder, 4, ["tensorboard"])
  write_in(log, range(5, 11))
  log.close()
  wanted = [r for r in rows_of_steps(10) if not r[1].startswith("inference")]
  found = events_in(folder)
  assert [row[:2] for row in found] == [row[:2] for row in wanted]
  assert [r[2] for r in found] == pytest.approx([r[2] for r in wanted])


def test_a_logger_that_comes_later_gets_what_was_before(tmp_path):
  folder = str(tmp_path)
  log = metrics.MetricsLog(folder, 0)
  for step in (1, 2, 3):
    log.write(step, "train", {"loss": float(step)})
  log.close()
  metrics.MetricsLog(folder, 2, ["tensorboard"]).close()
  os.makedirs(tmp_path / "training_eval/tiny")
  assert events_in(folder) == [(1, "train/loss", 1.0), (2, "train/loss", 2.0)]


class StandIn:
  """W&B's server: takes steps in order, and says where a run goes on."""

  def __init__(self, monkeypatch):
    self.rows, self.inits, self._step, self._open = [], [], 0, {}
    module = types.ModuleType("wandb")
    module.init, module.Settings = self._init, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)

  def _init(self, **options):
    self.resumed = any(o["id"] == options["id"] for o in self.inits)
    self.inits.append(options)
    self.offline, self.starting_step = False, self._step
    self.config = types.SimpleNamespace(update=lambda *_, **__: None)
    return self

  def define_metric(self, *_, **__):
    pass

  def log(self, row, step=None):
    """A row of a step is there when another begins: _step in the real one."""
    if step is not None:
      if step < self._step:
        return  # "less than current step ... dropped".
      if step > self._step:
        self._commit(step)
      self._open |= row
    else:
      self._open |= row
      self._commit(self._step + 1)

  def _commit(self, step):
    at = self._open.pop("step", None)
    self.rows += [(at, name, value) for name, value in self._open.items()]
    self._open, self._step = {}, step

  def kill(self):
    """What was not complete is lost."""
    self._open = {}

  def finish(self, exit_code):
    self._commit(self._step + 1)


def test_a_run_that_is_synced_goes_on_in_the_same_run(monkeypatch, tmp_path):
  server = StandIn(monkeypatch)
  folder = str(tmp_path / "runs" / "rte")
  os.makedirs(folder)
  log = metrics.MetricsLog(folder, 0, ["wandb"])
  write_in(log, range(1, 8))
  while len(server._open) < 3 or server._open.get("step") != 7:
    time.sleep(0.01)  # Its thread has handed in all.
  server.kill()
  log = metrics.MetricsLog(folder, 4, ["wandb"])
  # Stopped at a step whose evaluation is then made by the next process.
  write_in(log, range(5, 10), but=9)
  log.close()
  log = metrics.MetricsLog(folder, 9, ["wandb"])
  log.write(9, "training_eval/tiny", {"loss": 2 / 9})
  log.write(9, "inference_eval/tiny", {"exact_match": 9.0})
  write_in(log, [10])
  log.close()
  assert sorted(server.rows) == rows_of_steps(10)
  assert len({o["id"] for o in server.inits}) == 1
  assert {(o["project"], o["name"]) for o in server.inits} == {("runs", "rte")}
  monkeypatch.setenv("WANDB_PROJECT", "mine")
  metrics.MetricsLog(folder, 10, ["wandb"]).close()
  assert server.inits[-1]["project"] is None


class Away(Logger):
  """A tracker that does not answer for a while."""

  def __init__(self, failures):
    super().__init__()
    self.failures, self.rows, self.closed = failures, [], None

  def add(self, step, dataset, values):
    if self.failures:
      self.failures -= 1
      raise ConnectionError("no route to host\nTraceback ...")
    self.rows.append((step, dataset, dict(values)))

  def close(self, failed=False):
    self.closed = failed


@pytest.fixture
def said(monkeypatch):
  lines = []
  monkeypatch.setattr(console, "say", lines.append)
  return lines


def test_a_tracker_that_is_away_is_told_once_and_loses_nothing(said):
  tracker = Away(failures=3)
  hands = sender.Sender("mlflow", tracker)
  for step in range(5):
    hands.metrics(step, "train", {"loss": 1.0})
  hands.close(failed=True)
  assert [row[0] for row in tracker.rows] == [0, 1, 2, 3, 4]
  assert tracker.closed is True
  assert len(said) == 1 and "mlflow: no route to host." in said[0]


def test_a_tracker_that_stays_away_does_not_hold_the_end(said, monkeypatch):
  monkeypatch.setattr(sender, "PATIENCE_SECONDS", 0.1)
  tracker = Away(failures=100)
  hands = sender.Sender("mlflow", tracker)
  hands.metrics(1, "train", {"loss": 1.0})
  hands.close()
  assert "metrics.csv has it" in said[-1] and len(said) == 2
  slow = Away(failures=0)
  slow.add = lambda *_: time.sleep(1)
  hands = sender.Sender("mlflow", slow)
  hands.metrics(1, "train", {"loss": 1.0})
  begin = time.monotonic()
  hands.close()
  assert time.monotonic() - begin < 0.9 and "metrics.csv has it" in said[-1]


def test_a_tracker_that_cannot_be_opened_ends_a_new_run_alone(
  said, monkeypatch, tmp_path
):
  server = StandIn(monkeypatch)
  works = server._init

  def refuses(**options):
    raise RuntimeError("api_key not configured")

  sys.modules["wandb"].init = refuses
  with pytest.raises(UserError, match="wandb cannot be opened: api_key not"):
    metrics.MetricsLog(str(tmp_path), 0, ["wandb"])
  sys.modules["wandb"].init = works
  log = metrics.MetricsLog(str(tmp_path), 0, ["wandb"])
  log.write(1, "train", {"loss": 1.0})
  log.close()
  sys.modules["wandb"].init = refuses
  log = metrics.MetricsLog(str(tmp_path), 1, ["wandb"])
  log.write(2, "train", {"loss": 1.0})
  log.close()
  assert "Training goes on without it" in said[-1]
  sys.modules["wandb"].init = works
  metrics.MetricsLog(str(tmp_path), 2, ["wandb"]).close()
  assert sorted(server.rows) == [(1, "train/loss", 1.0), (2, "train/loss", 1.0)]


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize(
  "loggers,message",
  [
    ("['tensorbord']", "must be a list of 'tensorboard', 'wandb', 'mlflow'"),
    ("['wandb']", "wandb is not installed here: pip install wandb"),
  ],
)
def test_what_cannot_log_is_told_before_anything_is_done(
  loggers, message, flags, capfd, tmp_path, monkeypatch
):
  find = importlib.util.find_spec
  # W&B writes a folder `wandb` where it runs, which Python finds too.
  absent = types.SimpleNamespace(origin=None)
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name, *rest: absent if name == "wandb" else find(name, *rest),
  )
  status = cli.main(
    "train",
    [
      "--gin_file=recipes/quickstart.gin",
      f"--gin.MODEL_DIR={tmp_path}/run",
      f"--gin.LOGGERS={loggers}",
      *flags,
    ],
  )
  assert status == 1 and message in capfd.readouterr().err
  assert not os.path.exists(tmp_path / "run")


def test_a_name_that_is_nearly_a_logger_is_suggested():
  with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
    metrics.check_loggers(["tensorbord"])


def test_an_event_file_of_seqio_is_left_alone():
  name = "events.out.tfevents.1.host"
  assert tensorboard.is_event_file(f"training_eval/x/{name}")
  assert not tensorboard.is_event_file(f"inference_eval/x/{name}")
