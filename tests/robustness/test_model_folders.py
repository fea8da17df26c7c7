"""A broken or hostile model folder gets one answer, and leaves no trace.

FAT5_JAX_SEED draws other damage, FAT5_JAX_FUZZ_SECONDS fuzzes longer.
"""

import os
import pathlib
import random
import shutil

import model_folders
import pytest
import reader_fuzz
import safetensors.numpy
import whole_folders

# Beyond what the process had: the folders are of kilobytes, an eager jax isn't.
MOST_MIB = 400
# Of the readers alone, fuzzed for a while.
MOST_READERS_MIB = 150
# What no conversion may touch lies beside.
BESIDE = {"spiece.model": "mine", "away.safetensors": ""}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A valid folder of every kind."""
  root = tmp_path_factory.mktemp("whole")
  for kind in whole_folders.KINDS:
    whole_folders.make(kind, root / kind)
  return root


def broken(case, whole, folder: pathlib.Path, seed) -> pathlib.Path:
  """A copy of a whole folder, damaged."""
  source = folder / "source"
  shutil.copytree(whole / case.kind, source)
  case.damage(source, random.Random(f"{seed} {case.name}"))
  return source


def listing(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  """All that is there, with size and time of change."""
  found = {}
  for here, folders, files in os.walk(folder):
    for name in folders + files:
      path = os.path.join(here, name)
      status = os.lstat(path)
      found[path] = (status.st_size, status.st_mtime_ns)
  return found


def report(problems: list[str], count: int, seed: int) -> None:
  assert not problems, (
    f"{len(problems)} of {count} cases, FAT5_JAX_SEED={seed}:\n"
    + "\n".join(problems)
  )


def of_convert(zygote, case, whole, folder, seed) -> str | None:
  """What is wrong with how a conversion of a broken folder ends."""
  source = broken(case, whole, folder, seed)
  before = listing(folder)
  arguments = [str(source), str(folder / "new" / "dest"), "--no_transformers"]
  outcome = zygote.run("convert", arguments, str(folder))
  problem = outcome.problem()
  if not case.nonsense and outcome.status == 0:
    problem = outcome.crash()
    if not problem and not (folder / "new" / "dest").is_dir():
      problem = "accepted, and nothing is there"
  elif not problem and listing(folder) != before:
    problem = f"refused, and left {set(listing(folder)) - set(before)}"
  if not problem and outcome.mib > MOST_MIB:
    problem = f"took {outcome.mib:.0f} MiB"
  return problem


@pytest.mark.parametrize("part", range(4))
def test_a_broken_folder_is_refused_by_convert(
  part, zygote, whole, seed, tmp_path
):
  problems, cases = [], model_folders.cases(seed)[part::4]
  for number, case in enumerate(cases):
    folder = tmp_path / str(number)
    folder.mkdir()
    problem = of_convert(zygote, case, whole, folder, seed)
    if problem:
      problems.append(f"{case.kind}: {case.name}: {problem}")
    shutil.rmtree(folder)
  report(problems, len(cases), seed)


def test_a_broken_folder_is_refused_by_infer(zygote, whole, seed, tmp_path):
  rng = random.Random(seed)
  cases = rng.sample([x for x in model_folders.cases(seed) if x.nonsense], 60)
  problems = []
  for number, case in enumerate(cases):
    folder = tmp_path / str(number)
    folder.mkdir()
    source = broken(case, whole, folder, seed)
    (folder / "lines.txt").write_text("a b\n")
    arguments = [
      f"--gin.MODEL_DIR={source}",
      f"--gin.INPUT={folder}/lines.txt",
      f"--gin.OUTPUT={folder}/out.jsonl",
    ]
    outcome = zygote.run("infer", arguments, str(folder), seconds=40)
    problem = outcome.problem()
    if not problem and (folder / "out.jsonl").exists():
      problem = "refused, and wrote predictions"
    if problem:
      problems.append(f"{case.kind}: {case.name}: {problem}")
    shutil.rmtree(folder)
  report(problems, len(cases), seed)


@pytest.mark.parametrize("kind", whole_folders.KINDS)
def test_a_whole_folder_is_converted(kind, zygote, whole, tmp_path):
  arguments = [str(whole / kind), "dest", "--no_transformers"]
  outcome = zygote.run("convert", arguments, str(tmp_path), seconds=60)
  assert outcome.status == 0, outcome.stderr
  if kind == "run":
    found = safetensors.numpy.load_file(tmp_path / "dest/model.safetensors")
    assert found.keys() == whole_folders.tensors().keys()


def test_links_of_the_hubs_cache_are_read(zygote, whole, tmp_path):
  """Its folders hold links to files beside, which have no names."""
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshot").mkdir()
  for number, path in enumerate((whole / "safetensors").iterdir()):
    shutil.copy(path, tmp_path / "blobs" / str(number))
    (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
  arguments = ["snapshot", "dest", "--to", "hf", "--no_transformers"]
  outcome = zygote.run("convert", arguments, str(tmp_path), seconds=60)
  assert outcome.status == 0, outcome.stderr
  assert not (tmp_path / "dest" / "spiece.model").is_symlink()


def test_the_nan_tensor_is_named(zygote, whole, tmp_path):
  case = next(x for x in model_folders.cases(0) if x.name == "NaN")
  source = broken(case, whole, tmp_path, 0)
  outcome = zygote.run("convert", [str(source), "dest"], str(tmp_path))
  assert "encoder/layers_0/attention/query/kernel" in outcome.stderr
  assert "NaN" in outcome.stderr and not (tmp_path / "dest").exists()


def test_a_destination_that_cannot_be_is_refused(zygote, whole, tmp_path):
  """Each leaves what is there as it is."""
  (tmp_path / "file").write_text("mine")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes.txt").write_text("mine")
  (tmp_path / "nowhere").symlink_to("gone")
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "to_full").symlink_to("full")
  # An earlier export around the source.
  (tmp_path / "around").mkdir()
  (tmp_path / "around" / "config.json").write_text("{}")
  shutil.copytree(whole / "safetensors", tmp_path / "around" / "source")
  source = str(tmp_path / "around" / "source")
  problems, before = [], listing(tmp_path)
  dests = (
    *("file", "full", "nowhere", "loop", "to_full", "around", "file/in/it"),
    *("around/source", "around/source/.", "nowhere/in/it", "/", "x" * 300),
    *("/proc/fat5", "/dev/null", "", "."),
  )
  for dest in dests:
    for to in ("fat5", "hf"):
      arguments = [source, dest, "--to", to, "--no_transformers"]
      outcome = zygote.run("convert", arguments, str(tmp_path))
      problem = outcome.problem()
      if not problem and listing(tmp_path) != before:
        problem = "left a trace"
      if problem:
        problems.append(f"DEST {dest!r} --to {to}: {problem}")
  report(problems, 2 * len(dests), 0)


def test_a_link_in_the_destination_is_not_followed(whole, tmp_path):
  """A vocabulary is written beside a checkpoint, never through a link."""
  from fat5_jax.data import vocabularies

  (tmp_path / "mine").write_text("mine")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "spiece.model").symlink_to(tmp_path / "mine")
  vocabulary = vocabularies.from_hf(str(whole / "safetensors"))
  vocabularies.save(vocabulary, str(tmp_path / "run"))
  assert (tmp_path / "mine").read_text() == "mine"
  written = (tmp_path / "run" / "spiece.model").read_bytes()
  assert written == whole_folders.spiece()


@pytest.mark.parametrize("kind", reader_fuzz.KINDS)
def test_readers_take_or_refuse_any_bytes(kind, zygote, seed, tmp_path):
  """Each refuses or reads what is in the file; none crashes or grows."""
  seconds = float(os.environ.get("FAT5_JAX_FUZZ_SECONDS", "2"))
  outcome = zygote.run(
    "reader_fuzz:run", [kind, seed, seconds], str(tmp_path), seconds + 60
  )
  last = outcome.stdout.strip().splitlines()[-1:]
  told = f"FAT5_JAX_SEED={seed}, {kind}, {last}: {outcome.stderr[-2000:]}"
  assert outcome.crash() is None and outcome.status == 0, told
  assert outcome.mib < MOST_READERS_MIB, f"{outcome.mib:.0f} MiB; {told}"
  print(f"{kind}: {last[0]}")
