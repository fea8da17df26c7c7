"""A run folder in a bucket, on emulators: what is there, when, and whose.

What is written is looked at by others: plain HTTP for Google's, boto3 for
Amazon's, orbax for a step.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import buckets
from conftest import ROOT
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash

from fat5_jax import staging, storage
from fat5_jax.checkpoints import (
  bucket,
  history,
  integrity,
  layout,
  run_folder,
  run_lock,
)
from fat5_jax.checkpoints.checkpointer import Checkpointer, SaveCheckpointConfig
from fat5_jax.convert import orbax_files
from fat5_jax.errors import UserError
from fat5_jax.optimizers import AdafactorState

# One worker: the emulators are started once.
pytestmark = pytest.mark.xdist_group("buckets")


@pytest.fixture(params=["gs", "s3"])
def kind(request):
  return request.param


@pytest.fixture
def place(bucket_ports, kind, request):
  """(address of an empty folder, its objects as another client sees them)."""
  name = request.node.originalname.removeprefix("test_")[:40] + " [1]"

  def found():
    there = buckets.objects(kind, bucket_ports[kind], f"{name}/")
    return {k.removeprefix(f"{name}/"): v for k, v in there.items()}

  return f"{kind}://{buckets.BUCKET}/{name}", found


def state(step):
  """Parameters and an optimizer's state, told by a step."""
  rng = np.random.default_rng(step)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "encoder": {
      f"layers_{i}": {"kernel": array(24, 16), "scale": array(16)}
      for i in range(2)
    },
    "half": array(8, 4).astype(jnp.bfloat16),
    "zeros": jnp.zeros((4, 4)),
  }
  slots = AdafactorState(jnp.int32(step), params, {}, {}, None)
  return params, (slots, {}), {"batches": step, "begin_step": 0}


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(address, *steps, keep=None):
  with Checkpointer(address, SaveCheckpointConfig(keep=keep)) as checkpoints:
    for step in steps:
      checkpoints.save(step, *state(step))


def downloaded(found, folder):
  for name, data in found().items():
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
      file.write(data)
  return folder


# ---- Objects -----------------------------------------------------------------


def test_what_is_written_is_seen_by_others_and_read_again(place):
  address, found = place
  data = np.random.default_rng(0).bytes(3 * 2**20)
  storage.write(f"{address}/a/b[1].txt", b"first")
  storage.write(f"{address}/a/b[1].txt", b"second")
  storage.write(f"{address}/large", data)
  storage.write(f"{address}/empty", b"")
  assert found() == {"a/b[1].txt": b"second", "large": data, "empty": b""}
  assert storage.names(address) == ["a", "empty", "large"]
  assert storage.names(f"{address}/none") == []
  assert storage.files(address) == {
    "a/b[1].txt": 6,
    "empty": 0,
    "large": len(data),
  }
  assert b"".join(storage.pieces(f"{address}/large", 2**20 + 1)) == data
  assert list(storage.pieces(f"{address}/empty")) == []
  assert storage.is_folder(f"{address}/a") and not storage.is_file(
    f"{address}/a"
  )
  assert storage.is_file(f"{address}/empty")
  with pytest.raises(FileNotFoundError):
    storage.read(f"{address}/none")
  storage.remove(f"{address}/none")
  storage.copy(f"{address}/a/b[1].txt", f"{address}/c")
  storage.remove_all(address, but="a")
  assert found() == {"a/b[1].txt": b"second"}
  storage.remove_all(address)
  assert found() == {} and not storage.exists(address)


def test_of_two_who_make_an_object_one_does(place):
  address, found = place
  assert storage.create(f"{address}/x", b"1")
  assert not storage.create(f"{address}/x", b"2")
  assert found() == {"x": b"1"}
  # Without a look before: the store itself decides.
  with pytest.raises(FileExistsError):
    storage._asked(
      f"{address}/x", lambda fs, p: fs.pipe_file(p, b"2", mode="create")
    )
  assert found() == {"x": b"1"}


def test_a_folder_goes_up_with_what_names_it_last(place, tmp_path, monkeypatch):
  address, found = place
  for name in ("config.json", "z.safetensors", "sub/a.txt"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(name)
  storage.write(f"{address}/old.bin", b"")
  storage.write(f"{address}/config.json", b"old")
  seen = []
  upload = storage.upload

  def watched(path, target):
    seen.append("config.json" in found())
    upload(path, target)

  monkeypatch.setattr(storage, "upload", watched)
  staging.upload_folder(str(tmp_path), address, ("config.json",))
  assert seen == [False] * 3
  assert {*found()} == {"config.json", "z.safetensors", "sub/a.txt"}


# ---- Steps -------------------------------------------------------------------


def test_a_step_is_orbax_s_own_and_comes_back_bit_for_bit(place, tmp_path):
  address, found = place
  save(address, 3)
  params, opt_state, data = state(3)
  # By us, onto the devices.
  checkpoints = Checkpointer(address, SaveCheckpointConfig())
  assert checkpoints.find_latest() == 3
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    {"params": params, "optimizer": opt_state},
  )
  for item, wanted in (("params", params), ("optimizer", opt_state)):
    reads = layout.open_item(f"{address}/checkpoint_3/{item}", abstract[item])
    same(layout.to_run_layout(reads, abstract[item]), wanted)
  assert integrity.read_data(f"{address}/checkpoint_3") == data
  # By orbax, from a copy.
  folder = downloaded(found, str(tmp_path / "copy"))
  with ocp.StandardCheckpointer() as orbax:
    same(orbax.restore(f"{folder}/checkpoint_3/params", params), params)
    again = orbax.restore(f"{folder}/checkpoint_3/optimizer", opt_state)
  same(again, opt_state)


def test_a_step_holds_what_was_so_when_its_save_began(place):
  """The caller goes on counting while it is written."""
  address, _ = place
  params, opt_state, data = state(1)
  data["sums"] = {"steps": 1.0}
  with Checkpointer(address, SaveCheckpointConfig()) as checkpoints:
    checkpoints.save(1, params, opt_state, data)
    data["sums"]["steps"] += 1
  found = integrity.read_data(f"{address}/checkpoint_1")
  assert found["sums"] == {"steps": 1.0}


def test_the_latest_are_kept_and_the_others_leave_nothing(place):
  address, found = place
  save(address, 1, 2, 3, keep=2)
  assert {name.split("/")[0] for name in found()} == {
    "checkpoint_2",
    "checkpoint_3",
  }
  assert history.steps(address) == [2, 3]


def test_other_bytes_in_a_bucket_are_damage_and_the_step_before_goes_on(
  place, bucket_ports, kind
):
  address, found = place
  save(address, 1, 2)
  [name, *_] = [n for n in found() if n.startswith("checkpoint_2/params/d/")]
  inside = storage._inside(f"{address}/{name}").removeprefix("bucket/")
  buckets.put(kind, bucket_ports[kind], inside, b"\0" + found()[name][1:])
  checkpoints = Checkpointer(address, SaveCheckpointConfig())
  assert checkpoints.find_latest() == 1
  assert history.steps(address) == [1]
  aside = [n for n in found() if n.startswith("checkpoint_2.damaged/")]
  assert f"checkpoint_2.damaged/{integrity.NAME}" in aside
  assert not [n for n in found() if n.startswith("checkpoint_2/")]


def whole_steps(objects):
  """Steps by what a bucket holds, of {name: bytes}; all must be whole."""
  steps = []
  for name, data in objects.items():
    folder, _, last = name.partition("/")
    if last != integrity.NAME or ".damaged" in folder:
      continue
    for inside, entry in json.loads(data)["files"].items():
      there = objects.get(f"{folder}/{inside}")
      assert there is not None, (folder, inside)
      assert len(there) == entry["bytes"]
      assert xxhash.xxh3_128_hexdigest(there) == entry["xxh3_128"]
    assert f"{folder}/params/manifest.ocdbt" in objects
    steps.append(int(folder.removeprefix("checkpoint_")))
  return sorted(steps)


def test_at_every_moment_a_step_is_whole_or_none(bucket_ports):
  # Every change that a save, and the removal of an old step, makes of a bucket
  # in turn: whatever kills a process leaves what was there after one of them.
  address = f"gs://{buckets.BUCKET}/moments"
  begin = len(buckets.changes(bucket_ports["gs"]))
  save(address, 1, 2, 3, keep=1)
  changes = [
    (name.removeprefix("moments/"), *rest)
    for name, *rest in buckets.changes(bucket_ports["gs"])[begin:]
    if name.startswith("moments/")
  ]
  there: dict[str, dict] = {}
  sums: dict[int, str] = {}
  seen = set()
  for name, digest, size, said in changes:
    if digest is None:
      there.pop(name, None)
    else:
      there[name] = {"bytes": size, "xxh3_128": digest}
    for step in (1, 2, 3):
      folder = f"checkpoint_{step}"
      if name == f"{folder}/{integrity.NAME}" and digest is not None:
        sums[step] = said
      if f"{folder}/{integrity.NAME}" not in there:
        # What is begun says so, and is removed at the next start.
        inside = [n for n in there if n.startswith(f"{folder}/")]
        assert not inside or any(
          n.startswith(f"{folder}/{bucket.MARK}/") for n in inside
        ), (name, inside)
        continue
      # Nothing of a step is missing, or other, while it counts as one.
      seen.add(step)
      for part, entry in json.loads(sums[step])["files"].items():
        assert there.get(f"{folder}/{part}") == entry, (name, part)
  assert seen == {1, 2, 3} and len(changes) > 50


_SAVES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_buckets
checkpoints = test_buckets.Checkpointer(
  sys.argv[1], test_buckets.SaveCheckpointConfig(keep=2))
latest = checkpoints.find_latest() or 0
print("ready", flush=True)
sys.stdin.readline()
for step in range(latest + 1, latest + 1000):
  checkpoints.save(step, *test_buckets.state(step))
"""


@pytest.mark.slow
def test_kill_9_leaves_whole_steps_and_the_next_start_the_rest(place, tmp_path):
  address, found = place
  program = _SAVES.format(root=ROOT, tests=os.path.join(ROOT, "tests"))
  rng, latest, kills = random.Random(0), 0, 0
  # A life long enough to get on, and not for ever.
  life = 2.0
  while kills < int(os.environ.get("FAT5_JAX_KILLS", "6")) or not latest:
    kills += 1
    assert kills < 30, "no step is ever whole"
    process = subprocess.Popen(
      [sys.executable, "-c", program, address],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert process.stdout.readline() == "ready\n"
    # The steps before are whole, and nothing else is left.
    objects = found()
    steps = whole_steps(objects)
    assert {n.split("/")[0] for n in objects} == {
      f"checkpoint_{n}" for n in steps
    }
    print(file=process.stdin, flush=True)
    time.sleep(rng.uniform(0.02, 1) * life)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = whole_steps(found())
    assert max(steps, default=0) >= latest
    life *= 0.8 if max(steps, default=0) > latest else 1.5
    latest = max(steps, default=0)
    for step in steps:
      assert integrity.problem(f"{address}/checkpoint_{step}") is None
      leaves = orbax_files.read_item(f"{address}/checkpoint_{step}/params")
      kernel = leaves["encoder", "layers_1", "kernel"].read()
      wanted = state(step)[0]["encoder"]["layers_1"]["kernel"]
      assert kernel.tobytes() == np.asarray(wanted).tobytes()


# ---- The run folder ----------------------------------------------------------


def test_one_process_trains_in_a_bucket_at_a_time(place, monkeypatch):
  address, found = place
  monkeypatch.setattr(run_lock, "SIGN_SECONDS", 0.2)
  monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.1)
  with run_lock.held(address):
    holder = json.loads(found()[run_lock.NAME])
    assert holder["process"] == os.getpid()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
      with run_lock.held(address):
        pass
  assert run_lock.NAME not in found()


def test_the_lock_of_a_dead_process_is_taken_at_once(place, monkeypatch):
  address, found = place
  monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.1)
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  holder = run_lock._holder() | {"boot": run_lock._boot(), "process": gone.pid}
  storage.write(f"{address}/{run_lock.NAME}", run_lock._text(holder))
  begin = time.monotonic()
  with run_lock.held(address):
    assert json.loads(found()[run_lock.NAME])["process"] == os.getpid()
  assert time.monotonic() - begin < 5


def test_the_lock_of_another_machine_s_is_looked_at_for_a_while(
  place, monkeypatch, capsys
):
  address, found = place
  monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.1)
  monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 1.0)
  path = f"{address}/{run_lock.NAME}"
  holder = run_lock._holder() | {"host": "another", "run": "r"}
  storage.write(path, run_lock._text(holder))
  with run_lock.held(address):
    assert json.loads(found()[run_lock.NAME])["process"] == os.getpid()
  # One that lives signs.
  storage.write(path, run_lock._text(holder))
  ended = threading.Event()

  def sign():
    while not ended.wait(0.1):
      text = run_lock._text(holder | {"sign": str(time.monotonic())})
      storage.write(path, text)

  signer = threading.Thread(target=sign)
  signer.start()
  with pytest.raises(UserError, match="in use by process .* on another"):
    with run_lock.held(address):
      pass
  ended.set()
  signer.join()


def test_a_process_whose_lock_was_taken_stops(place):
  address, found = place
  program = (
    "import sys, time\n"
    f"sys.path.insert(0, {ROOT!r})\n"
    "from fat5_jax.checkpoints import run_lock\n"
    "run_lock.SIGN_SECONDS = 0.2\n"
    "with run_lock.held(sys.argv[1]):\n"
    "  print('held', flush=True)\n"
    "  time.sleep(60)\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program, address],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  other = run_lock._holder() | {"host": "another", "run": "other"}
  storage.write(f"{address}/{run_lock.NAME}", run_lock._text(other))
  _, said = process.communicate(timeout=30)
  assert process.returncode == 1
  assert "on another" in said and "Traceback" not in said


def test_a_bucket_that_is_not_there_is_a_line(bucket_ports, kind):
  with pytest.raises(UserError, match="there is no such bucket"):
    run_folder.prepare_model_dir(f"{kind}://no-such-bucket/run")


def test_model_dir_is_on_a_disk_or_in_a_bucket_that_holds_arrays():
  with pytest.raises(UserError, match="on a disk, gs:// and s3://"):
    run_folder.prepare_model_dir("memory://run")
  with pytest.raises(UserError, match="no kind of address that is known"):
    storage.read("nonsense://run")


# ---- What goes wrong ---------------------------------------------------------


def test_a_network_that_is_away_is_tried_for_a_while_and_then_a_line(
  kind, monkeypatch, capsys
):
  storage.tell_trying.cache_clear()
  port = buckets.free_port()  # Where nobody listens.
  for name, value in buckets.environment(kind, port).items():
    monkeypatch.setenv(name, value)
  calls = []

  def call(fs, address):
    calls.append(address)
    raise OSError("Cannot connect to host")

  monkeypatch.setattr(storage, "PATIENCE_SECONDS", 2.0)
  with pytest.raises(storage.StorageError, match="not reached for .* Cannot"):
    storage._asked(f"{kind}://bucket/x", call)
  assert 2 < len(calls) < 8
  said = capsys.readouterr().err
  assert said.count(f"{kind}:// does not answer; it is tried for 2 s") == 1


def test_a_store_that_does_not_answer_is_not_an_empty_one(kind, monkeypatch):
  class Away:
    def __getattr__(self, name):
      def call(*arguments, **more):
        raise OSError("Cannot connect to host")

      return call

  monkeypatch.setattr(storage, "_file_system", lambda kind: Away())
  monkeypatch.setattr(storage, "_inside", lambda address: address)
  monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.0)
  for ask in (
    *(storage.exists, storage.is_file, storage.is_folder, storage.names),
    *(storage.files, storage.read, storage.size_of),
  ):
    with pytest.raises(storage.StorageError):
      ask(f"{kind}://bucket/run")


def test_what_passes_is_no_error(bucket_ports, kind, monkeypatch):
  calls = []

  def call(fs, address):
    calls.append(address)
    if len(calls) < 3:
      raise TimeoutError("busy")
    return "fine"

  assert storage._asked(f"{kind}://bucket/x", call) == "fine"
  assert len(calls) == 3


@pytest.mark.parametrize(
  "error",
  [
    PermissionError("x"),
    OSError("Anonymous caller does not have storage.objects.get access, 401"),
    OSError("An error occurred (InvalidAccessKeyId): it does not exist"),
  ],
)
def test_no_access_is_not_tried_again(bucket_ports, kind, error):
  calls = []

  def call(fs, address):
    calls.append(address)
    raise error

  with pytest.raises(storage.StorageError, match="no access: .* Needed: "):
    storage._asked(f"{kind}://bucket/x", call)
  assert len(calls) == 1


def test_a_bucket_that_does_not_answer_is_not_taken_for_damage(
  place, monkeypatch
):
  address, _ = place
  save(address, 1)
  integrity._problem.cache_clear()

  def away(path, *more):
    raise storage.StorageError(f"{path}: not reached")

  monkeypatch.setattr(storage, "pieces", away)
  with pytest.raises(storage.StorageError):
    history.latest_whole(address)
  monkeypatch.undo()
  assert history.latest_whole(address) == (1, [])


def test_without_the_library_of_a_store_a_line_says_what_to_install():
  program = (
    "import sys\n"
    f"sys.path.insert(0, {ROOT!r})\n"
    "sys.modules['gcsfs'] = sys.modules['s3fs'] = None\n"
    "from fat5_jax import storage\n"
    "for kind in ('gs', 's3'):\n"
    "  try:\n"
    "    storage.read(f'{kind}://bucket/x')\n"
    "  except storage.UserError as e:\n"
    "    print(e)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert "pip install 'fat5_jax[gcs]'" in done.stdout
  assert "pip install 'fat5_jax[s3]'" in done.stdout


def test_a_path_of_this_machine_s_needs_no_fsspec(tmp_path):
  program = (
    "import sys\n"
    f"sys.path.insert(0, {ROOT!r})\n"
    "sys.modules['fsspec'] = None\n"
    "from fat5_jax import fetched, staging, storage\n"
    "path = sys.argv[1]\n"
    "open(path + '/x', 'w').write('1')\n"
    "assert storage.read(path + '/x') == b'1' and storage.exists(path)\n"
    "assert storage.names(path) == ['x'] and fetched.local(path) == path\n"
    "staging.Mirror(path).push()\n"
    "assert 'huggingface_hub' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
