"""What is read at an address: copies of files, of checkpoints, of the hub's."""

import json
import os
import pathlib
import subprocess
import sys

import buckets
from conftest import ROOT
import hub_server
import numpy as np
import pytest

sys.path.append(os.path.join(ROOT, "tests", "robustness"))

import whole_folders

from fat5_jax import fetched, storage
from fat5_jax.checkpoints import integrity, reference
from fat5_jax.convert import folders, hf, table
from fat5_jax.data import files, glue, vocabularies
from fat5_jax.errors import UserError
from fat5_jax.inference import output_file

pytestmark = pytest.mark.xdist_group("buckets")


@pytest.fixture(params=["gs", "s3"])
def place(bucket_ports, request, tmp_path, monkeypatch):
  """(an address, a function that puts bytes below it)."""
  kind = request.param
  folder = request.node.name.replace("[", "-").replace("]", "")
  monkeypatch.setenv("FAT5_JAX_CACHE", str(tmp_path / "cache"))
  fetched._copy.cache_clear()

  def put(name, data):
    buckets.put(kind, bucket_ports[kind], f"{folder}/{name}", data)

  return f"{kind}://{buckets.BUCKET}/{folder}", put


@pytest.fixture
def reads(monkeypatch):
  """The addresses whose bytes are read."""
  found, pieces = [], storage.pieces

  def watched(path, *more):
    found.append(path)
    return pieces(path, *more)

  monkeypatch.setattr(storage, "pieces", watched)
  return found


def again():
  """As another process would ask."""
  fetched._copy.cache_clear()


# ---- Buckets -----------------------------------------------------------------


def test_a_data_file_is_copied_once_until_it_changes(place, reads):
  address, put = place
  put("train.tsv", b"text\tlabel\na\t1\n")
  path = f"{address}/train.tsv"
  [here] = files.expand(path)
  assert pathlib.Path(here).read_bytes() == b"text\tlabel\na\t1\n"
  assert files.file_record(here)["path"] == path
  again()
  assert files.expand(path) == [here] and reads == [path]
  put("train.tsv", b"text\tlabel\nb\t2\n")
  again()
  [now] = files.expand(path)
  assert pathlib.Path(now).read_bytes() == b"text\tlabel\nb\t2\n"
  assert reads == [path] * 2


def test_a_pattern_finds_what_a_bucket_holds(place):
  address, put = place
  for name in ("part-1.jsonl", "part-0.jsonl", "other.txt"):
    put(f"data/{name}", name.encode())
  found = files.expand([f"{address}/data/part-*.jsonl"])
  read = [pathlib.Path(path).read_text() for path in found]
  assert read == ["part-0.jsonl", "part-1.jsonl"]
  with pytest.raises(UserError, match="nothing is there"):
    files.expand(f"{address}/data/none.txt")
  with pytest.raises(UserError, match="no such data file"):
    files.expand(f"{address}/none/*.txt")


def test_a_folder_of_data_is_copied_and_known_by_its_address(place):
  address, put = place
  for name in ("train", "dev"):
    put(f"SST-2/{name}.tsv", b"sentence\tlabel\ngood\t1\n")
  source, _ = glue.source("sst2", address)
  assert {*source.splits} == {"train", "validation"}
  [(_, row)] = source.rows("train")
  assert row["sentence"] == "good"
  recorded = json.dumps(source.record())
  assert f"{address}/SST-2/train.tsv" in recorded


def test_a_copy_that_is_cut_short_leaves_nothing(place, monkeypatch, tmp_path):
  address, put = place
  put("config.json", b"{}")
  put("model.safetensors", b"x" * 1000)

  def cut(path, *more):
    yield b"half"
    raise storage.StorageError("the network is away")

  monkeypatch.setattr(storage, "pieces", cut)
  with pytest.raises(storage.StorageError):
    fetched.local(address)
  assert os.listdir(tmp_path / "cache" / "copies") == []


def test_a_vocabulary_lies_in_a_bucket(place):
  address, put = place
  put("spiece.model", whole_folders.spiece())
  path = vocabularies.file(f"{address}/spiece.model")
  vocabulary = vocabularies._sentencepiece(path, 10)
  assert vocabulary.vocab_size == 40
  # And goes into a run folder there.
  told = vocabularies.save(vocabulary, f"{address}/run")
  assert storage.read(f"{address}/run/spiece.model") == whole_folders.spiece()
  assert vocabularies.load(told, f"{address}/run").vocab_size == 40


@pytest.mark.parametrize("kind", whole_folders.KINDS)
def test_a_checkpoint_of_any_format_in_a_bucket(place, kind, tmp_path):
  address, put = place
  folder = tmp_path / "it"
  whole_folders.make(kind, folder)
  if kind == "peft":
    folder = folder / "it"
  for path in folder.rglob("*"):
    if path.is_file():
      put(str(path.relative_to(folder)), path.read_bytes())
  config, here = reference.open_params(reference.find(str(folder)))
  there_config, there = reference.open_params(reference.find(address))
  assert there_config == config and there.keys() == here.keys()
  for name, leaf in here.items():
    assert leaf.read().tobytes() == there[name].read().tobytes()


def test_a_bucket_without_a_checkpoint_is_told_and_not_copied(place, reads):
  address, put = place
  put("notes.txt", b"x")
  put("deep/er/config.json", b"{}")
  with pytest.raises(UserError, match="neither a Hugging Face folder"):
    reference.find(address)
  assert reads == []


def test_an_export_goes_to_a_bucket_whole(place, tmp_path):
  address, put = place
  config = whole_folders._config()
  leaves = whole_folders._leaves()
  hf.to_pretrained(config, leaves, f"{address}/out", None)
  again_config, found = reference.open_params(reference.find(f"{address}/out"))
  assert again_config.architecture() == config.architecture()
  one, two = table.read_all(leaves), table.read_all(found)
  np.testing.assert_array_equal(
    one["token_embedder"]["embedding"], two["token_embedder"]["embedding"]
  )
  # In its place another goes; what is no export stays.
  hf.to_pretrained(config, leaves, f"{address}/out", None)
  put("mine/notes.txt", b"x")
  with pytest.raises(UserError, match="exists and is no Hugging Face folder"):
    hf.to_pretrained(config, leaves, f"{address}/mine", None)
  with pytest.raises(ZeroDivisionError):
    with folders.whole_folder(f"{address}/new"):
      1 / 0  # noqa: B018
  assert not storage.exists(f"{address}/new")


def test_an_output_in_a_bucket_is_whole_or_not_there(place):
  address, _ = place
  path = f"{address}/out.jsonl"
  output_file.check(path)
  assert storage.files(address) == {}
  with pytest.raises(ZeroDivisionError):
    with output_file.opened(path) as file:
      file.write("half")
      1 / 0  # noqa: B018
  assert not storage.exists(path)
  with output_file.opened(path) as file:
    file.write("whole")
  assert storage.read(path) == b"whole"
  with pytest.raises(UserError, match="also what is read"):
    output_file.check(path, [path])
  with pytest.raises(UserError, match="a part of the run"):
    output_file.check_beside_run(
      f"{address}/run/metrics.csv",
      f"{address}/run",
      f"{address}/run/checkpoint_1",
    )
  with pytest.raises(UserError, match="no such bucket"):
    output_file.check(f"{path.split(':')[0]}://no-such-bucket/out.jsonl")


def test_a_step_in_a_bucket_that_is_damaged_is_named(place, tmp_path):
  address, put = place
  whole_folders.make("run", tmp_path / "run")
  for path in (tmp_path / "run").rglob("*"):
    if path.is_file():
      data = path.read_bytes()
      if path.name == integrity.NAME:
        data = data.replace(b'"bytes": ', b'"bytes": 1')
      put(str(path.relative_to(tmp_path / "run")), data)
  with pytest.raises(UserError, match="every checkpoint is damaged"):
    reference.find(address)


# ---- The hub -----------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
  with hub_server.served() as (found, address):
    yield found, address


@pytest.fixture
def ask(hub, tmp_path):
  """Runs lines of Python with `fetched` and `reference`; what they print."""
  found, address = hub
  found.asked.clear()
  found.private.clear()
  found.failures = 0

  def ask(lines, **more):
    program = (
      f"import sys; sys.path.insert(0, {ROOT!r})\n"
      "import os\n"
      "from fat5_jax import fetched, storage\n"
      "from fat5_jax.checkpoints import reference\n"
      "from fat5_jax.data import files\n"
      "storage.PATIENCE_SECONDS = 2\n"
      "try:\n  "
      + lines.replace("\n", "\n  ")
      + "\nexcept storage.UserError as e: print('error:', e)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
      [sys.executable, "-c", program],
      env=env | own | more,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()

  return ask


def model_files(tmp_path):
  whole_folders.make("safetensors", tmp_path / "model")
  return {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}


_SUM = (
  "config, leaves = reference.open_params(reference.find({!r}))\n"
  "found = leaves['token_embedder', 'embedding'].read()\n"
  "print(len(leaves), float(found.sum()))"
)


def test_a_model_of_the_hub_is_fetched_pinned_and_found_offline(
  hub, ask, tmp_path
):
  found, _ = hub
  wanted = model_files(tmp_path)
  more = {
    "pytorch_model.bin": b"never",
    "modeling_evil.py": b"never",
    "onnx/model.safetensors": b"never",
  }
  sha = found.commit("org/tiny", wanted | more)
  here = ask(_SUM.format(str(tmp_path / "model")))
  assert found.asked == [], "without hf:// nothing is asked"
  assert ask(_SUM.format("hf://org/tiny")) == here
  got = {line.rsplit("/", 1)[-1] for line in found.asked if "/resolve/" in line}
  assert got == {*wanted}
  pinned = ask("print(fetched.pinned('hf://org/tiny'))")
  assert pinned == f"hf://org/tiny@{sha}"
  # Later: from the cache, the server away or not asked at all.
  found.asked.clear()
  offline = ask(_SUM.format("hf://org/tiny"), HF_HUB_OFFLINE="1")
  assert offline == here and found.asked == []
  found.failures = 10**6
  assert ask(_SUM.format("hf://org/tiny")) == here
  assert not [line for line in found.asked if line.startswith("GET /org")]


def test_a_revision_is_that_of_then(hub, ask, tmp_path):
  found, _ = hub
  wanted = model_files(tmp_path)
  old = found.commit("org/moves", wanted)
  changed = whole_folders.tensors() | {}
  name = next(iter(changed))
  changed[name] = changed[name] + 1
  import safetensors.numpy

  safetensors.numpy.save_file(changed, tmp_path / "model/model.safetensors")
  data = (tmp_path / "model/model.safetensors").read_bytes()
  found.commit("org/moves", wanted | {"model.safetensors": data})
  now, then = ask(_SUM.format("hf://org/moves")), None
  then = ask(_SUM.format(f"hf://org/moves@{old}"))
  assert now != then and now == ask(_SUM.format(str(tmp_path / "model")))


@pytest.mark.parametrize(
  "address,message",
  [
    ("hf://org/none", "not on the hub, or private"),
    ("hf://org/bins", "no safetensors there, and pickles are not fetched"),
    ("hf://org/bins@v9", "org/bins has no revision 'v9'"),
    ("hf://org/gated", "its authors give access on request"),
    ("hf://org/bins/none.model", "has no such file"),
    ("hf://@main", "no address of the hub"),
  ],
)
def test_what_the_hub_refuses_is_a_line(hub, ask, address, message):
  found, _ = hub
  found.commit("org/bins", {"config.json": b"{}", "pytorch_model.bin": b"x"})
  found.commit("org/gated", {"config.json": b"{}"})
  found.private.add("org/gated")
  said = ask(f"reference.find({address!r})")
  assert said.startswith("error: ") and message in said and "\n" not in said


def test_a_hub_that_is_away_is_tried_for_a_while(hub, ask):
  found, _ = hub
  found.commit("org/busy", {"config.json": b"{}", "model.safetensors": b""})
  found.failures = 10**6
  said = ask("fetched.local('hf://org/busy')")
  assert said.startswith("error: ") and "not reached for" in said
  assert 2 <= len([x for x in found.asked if "org/busy" in x]) < 50
  found.failures = 3
  assert "busy" in ask("print(fetched.local('hf://org/busy'))")


def test_offline_and_never_fetched_is_a_line(hub, ask):
  found, _ = hub
  said = ask("fetched.local('hf://org/none')", HF_HUB_OFFLINE="1")
  assert "not in the hub's cache on this machine" in said
  assert found.asked == []


def test_files_of_a_data_set(hub, ask):
  found, _ = hub
  found.commit(
    "org/data",
    {"train-0.jsonl": b"0", "train-1.jsonl": b"1", "load.py": b"never"},
    "datasets",
  )
  said = ask(
    "paths = files.expand('hf://datasets/org/data/train-*.jsonl')\n"
    "print([open(p).read() for p in paths])\n"
    "print(files.file_record(paths[0])['path'])\n"
    "print(sorted(os.listdir(fetched.local('hf://datasets/org/data'))))"
  ).splitlines()
  assert said[0] == "['0', '1']"
  assert said[1] == "hf://datasets/org/data/train-0.jsonl"
  assert said[2] == "['train-0.jsonl', 'train-1.jsonl']"
  assert not [line for line in found.asked if line.endswith("load.py")]
