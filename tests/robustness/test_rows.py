"""Whatever a data file holds, and wherever predictions go: one line is told.

`FAT5_JAX_SEED=7 pytest tests/robustness/test_rows.py` draws other cases.
"""

import json
import os
import random
import shutil

import pytest
import rows

# One worker: it trains once.
pytestmark = pytest.mark.xdist_group("rows")

GIN = """
from __gin__ import dynamic_registration
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks
import fat5_jax.models.config as config

include 'models/byt5/base.gin'
include 'runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.Files()
  inputs = '{a}'
  targets = '{b}'
  vocabulary = %VOCABULARY
sources.Files.splits = {'train': %TRAIN_FILE}
TRAIN_FILE = 'train.tsv'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}
BATCH_SIZE = 2
TRAIN_STEPS = 1
EVAL_PERIOD = 0
EVAL_SPLIT = None
CHECKPOINT_PERIOD = 1
PACK = False
DTYPE = 'float32'
config.T5Config:
  emb_dim = 8
  num_heads = 2
  head_dim = 4
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_dim = 8
"""


@pytest.fixture(scope="module")
def user(zygote, tmp_path_factory):
  """A folder with a gin file, data, and a finished run."""
  folder = tmp_path_factory.mktemp("rows")
  (folder / "text.gin").write_text(GIN)
  (folder / "train.tsv").write_text("a\tb\nx\ty\nz\tw\n")
  (folder / "lines.txt").write_text("one\ntwo\n")
  flags = ["--gin_file=text.gin", "--gin.MODEL_DIR=run"]
  done = zygote.run("train", flags, str(folder), 120)
  assert done.status == 0, done.stderr
  return folder


class Failures:
  """All failing cases of a test, told at its end."""

  def __init__(self):
    self.count, self._found = 0, []

  def add(self, what: str, *problems: str | None) -> None:
    self.count += 1
    self._found += [f"{what}: {p}" for p in problems if p]

  def none(self) -> None:
    assert not self._found, f"of {self.count}:\n" + "\n".join(self._found)


def too_long(done, path: str) -> str | None:
  """An error is one line, however long what it is about."""
  text = done.stderr.replace(path, "PATH").strip()
  return text[:900] if done.status and len(text) > 500 else None


def test_nonsense_is_refused_in_a_line(zygote, seed, tmp_path):
  failures = Failures()
  for number, case in enumerate(rows.nonsense(random.Random(seed))):
    path = case.write(tmp_path / str(number))
    done = zygote.run("rows:read", [case.task, path], str(tmp_path))
    told = done.problem(1) or too_long(done, path)
    if told is None and case.name not in done.stderr:
      told = f"the file is not named: {done.stderr[-300:]}"
    failures.add(f"{case.name} as {case.task}, {case.what}", told)
  assert failures.count > 300
  failures.none()


def test_changed_bytes_are_read_or_refused(zygote, seed, tmp_path):
  failures = Failures()
  for number, case in enumerate(rows.mutations(random.Random(seed), 100)):
    path = case.write(tmp_path / str(number))
    done = zygote.run("rows:read", [case.task, path], str(tmp_path))
    told = done.crash() or too_long(done, path)
    if done.status:
      told = told or done.problem(1)
    failures.add(f"{case.name} as {case.task}, {case.what}", told)
  failures.none()


def test_a_path_is_a_path_before_it_is_a_pattern(zygote, seed, tmp_path):
  rng = random.Random(seed)
  failures = Failures()
  for name in ("rows[1].tsv", "a b.csv", "r*w?.jsonl", "[!x]", "{a},b.tsv"):
    kind = name.rpartition(".")[2] if "." in name else "jsonl"
    folder = tmp_path / rng.choice(("a [b] c", "who?", "*", "f[0-9]", " "))
    folder.mkdir(exist_ok=True)
    path = folder / (name if "." in name else f"{name}.jsonl")
    # What the name would match as a pattern.
    for other in ("rows1.tsv", "raws.jsonl", "y.jsonl"):
      (folder / other).write_text("no rows")
    path.write_bytes(rows.encoded(rows.good_rows(rng), kind))
    done = zygote.run("rows:read", ["text", str(path)], str(tmp_path))
    failures.add(str(path), done.stderr)
  failures.none()


# ---- Through the commands ----------------------------------------------------


def test_a_dry_run_refuses_what_training_would(zygote, seed, user):
  rng = random.Random(seed)
  cases = [case for case in rows.nonsense(rng) if case.task == "text"]
  failures = Failures()
  for number, case in enumerate(rng.sample(cases, 12)):
    path = case.write(user / f"dry{number}")
    flags = ["--gin_file=text.gin", "--gin.MODEL_DIR=new", "--dry_run"]
    # A broken row further on is found when it is read.
    flags += [f"--gin.TRAIN_FILE='{path}'", "--gin.BATCH_SIZE=30"]
    done = zygote.run("train", flags, str(user), 60)
    told = done.problem() or too_long(done, path)
    if told is None and case.name not in done.stderr:
      told = f"the file is not named: {done.stderr[-300:]}"
    failures.add(f"{case.name}, {case.what}", told)
  failures.none()
  assert not (user / "new").exists()


def infer(zygote, user, *flags, seconds=60, call="infer", **more):
  flags = [f"--gin.{flag}" for flag in ("MODEL_DIR=run", *flags)]
  return zygote.run(call, flags, str(user), seconds, **more)


SETTINGS = (
  *("INFER_BATCH_SIZE=0", "INFER_BATCH_SIZE=-3", "INFER_BATCH_SIZE=1.5"),
  *("INFER_BATCH_SIZE=None", "INFER_BATCH_SIZE=True", "INFER_BATCH_SIZE=many"),
  *(
    "INFER_BATCH_SIZE=100000000000",
    "MAX_INPUT_LENGTH=0",
    "MAX_INPUT_LENGTH=1",
  ),
  *("MAX_INPUT_LENGTH=-1", "MAX_INPUT_LENGTH='9'", "MAX_OUTPUT_LENGTH=0"),
  *("MAX_OUTPUT_LENGTH=None", "MAX_OUTPUT_LENGTH=1000000000", "USE_TEMPLATE=0"),
  *("USE_TEMPLATE=no", "OUTPUT_FORMAT=xml", "OUTPUT_FORMAT=3", "INPUT=5"),
  *("INPUT=''", "INPUT=gone.txt", "INPUT=.", "INPUT=/dev/zero", "OUTPUT=''"),
  *("OUTPUT=7", "OUTPUT=None", "CHECKPOINT_PATH=5"),
)


def test_settings_of_infer_have_a_type_and_a_range(zygote, user):
  failures = Failures()
  for setting in SETTINGS:
    name = setting.partition("=")[0]
    flags = ("INPUT=lines.txt", "OUTPUT=set.jsonl", setting)
    done = infer(zygote, user, *flags)
    told = done.problem(2)
    if told is None and name not in done.stderr and name != "INPUT":
      told = f"not named: {done.stderr}"
    failures.add(setting, told, done.stdout)
  failures.none()
  assert not list(user.glob("set.jsonl*"))


def test_output_never_takes_the_place_of_what_is_read(zygote, user):
  failures = Failures()
  keep = user / "keep"
  shutil.rmtree(keep, ignore_errors=True)
  keep.mkdir()
  content = "one\ntwo\n"
  (keep / "in.txt").write_text(content)
  (keep / "in2.txt.partial").write_text(content)
  os.symlink("in.txt", keep / "link.txt")
  os.link(keep / "in.txt", keep / "hard.txt")
  os.mkdir(keep / "folder")
  os.symlink("loop", keep / "loop")
  os.mkfifo(keep / "pipe")
  before = json.loads((user / "run/model.json").read_text())
  for given, output in (
    ("keep/in.txt", "keep/in.txt"),
    ("keep/in.txt", "./keep/../keep//in.txt"),
    ("keep/in.txt", str(keep / "in.txt")),
    ("keep/in.txt", "keep/link.txt"),
    ("keep/link.txt", "keep/in.txt"),
    ("keep/in.txt", "keep/hard.txt"),
    ("keep/in2.txt.partial", "keep/in2.txt"),
    ("lines.txt", "keep/folder"),
    ("lines.txt", "keep/folder/"),
    ("lines.txt", "keep/gone/out.jsonl"),
    ("lines.txt", "keep/in.txt/out.jsonl"),
    ("lines.txt", "keep/loop"),
    ("lines.txt", "keep/pipe"),
    ("lines.txt", "/dev/full"),
    ("lines.txt", "/dev/stdout"),
    ("lines.txt", "/proc/out.jsonl"),
    ("lines.txt", "keep/" + "x" * 300),
    ("lines.txt", "run/model.json"),
    ("lines.txt", "run/checkpoint_1/out.jsonl"),
  ):
    done = infer(zygote, user, f"INPUT={given}", f"OUTPUT={output}")
    failures.add(f"{given} to {output}", done.problem(2))
  failures.none()
  assert (keep / "in.txt").read_text() == content
  assert (keep / "in2.txt.partial").read_text() == content
  assert json.loads((user / "run/model.json").read_text()) == before
  assert len(list(keep.iterdir())) == 7


def test_a_bad_row_leaves_no_output(zygote, seed, user):
  rng = random.Random(seed)
  cases = [
    case
    for case in rows.nonsense(rng)
    # A row without b, or with nonsense in it, can be asked about.
    if case.task == "text" and "column b" not in case.what
  ]
  failures = Failures()
  for number, case in enumerate(rng.sample(cases, 8)):
    path = case.write(user / f"infer{number}")
    flags = (f"INPUT='{path}'", "OUTPUT=bad.jsonl", "MAX_OUTPUT_LENGTH=2")
    done = infer(zygote, user, *flags)
    told = done.crash() or too_long(done, path)
    if done.status == 0:
      count = (user / "bad.jsonl").read_text().count("\n")
      if f"{count} predictions" not in done.stderr:
        told = f"{count} rows written: {done.stderr}"
      os.remove(user / "bad.jsonl")
    elif list(user.glob("bad.jsonl*")):
      told = f"left {list(user.glob('bad.jsonl*'))}"
    failures.add(f"{case.name}, {case.what}", told)
  failures.none()


def test_standard_input_is_refused_like_a_file(zygote, user):
  failures = Failures()
  for given in ("", "\n\n", "one\0two\n", "one\n\udcff\n", "one\rtwo\r"):
    done = infer(zygote, user, "OUTPUT=stdin.jsonl", stdin=given)
    failures.add(repr(given), done.problem(2))
  failures.none()
  assert not list(user.glob("stdin.jsonl*"))


def test_a_full_disk_is_told_and_leaves_nothing(zygote, user):
  flags = ("INPUT=lines.txt", "MAX_OUTPUT_LENGTH=2")
  for call in ("rows:infer_on_a_full_disk", "rows:infer_to_a_full_pipe"):
    output = "-" if "pipe" in call else "full.jsonl"
    arguments = [
      [f"--gin.{f}" for f in ("MODEL_DIR=run", *flags, f"OUTPUT={output}")]
    ]
    done = zygote.run(call, arguments, str(user), 60)
    assert done.problem(2) is None, done
    assert "cannot be written" in done.stderr
  assert not list(user.glob("full.jsonl*"))


def test_a_kill_leaves_the_output_whole_or_as_it_was(zygote, seed, user):
  (user / "many.txt").write_text("one\n" * 4000)
  (user / "killed.jsonl").write_text("before\n")
  rng = random.Random(seed)
  for _ in range(2):
    seconds = rng.uniform(0.5, 6)
    flags = ("INPUT=many.txt", "OUTPUT=killed.jsonl", "MAX_OUTPUT_LENGTH=2")
    done = infer(zygote, user, *flags, seconds=seconds)
    count = (user / "killed.jsonl").read_text().count("\n")
    # It may be whole already, and the command not at its end.
    assert count == 4000 or (count == 1 and done.status != 0)
    if count == 4000:
      (user / "killed.jsonl").write_text("before\n")


def test_two_questions_of_one_id_are_not_made_one():
  from fat5_jax.errors import UserError
  from fat5_jax.inference import heads

  ids = lambda *given: [
    row["id"]
    for _, row in heads.with_own_ids(
      (f"row {n}", {"id": i}) for n, i in enumerate(given, 1)
    )
  ]
  assert ids("a", None, "b") == ["a", 1, "b"]
  for given in (("a", "b", "a"), (1, "1"), (None, "0")):
    with pytest.raises(UserError, match=f"row {len(given)}: an earlier row"):
      ids(*given)


# ---- Long rows ---------------------------------------------------------------


def grown(done) -> int:
  """MiB by which `rows:measured` grew."""
  return int(done.stdout.split()[-2])


def test_long_rows_are_predicted_in_order_in_bounded_memory(zygote, user):
  """One of 10,000 tokens among 31 short ones; one of 20 MB, cut and told."""
  lines = [f"row {i}" for i in range(31)]
  lines.insert(17, "x" * 10_000)
  huge = [*lines[:17], "word " * 4_000_000, *lines[18:]]
  for number, (given, more) in enumerate(
    ((lines, ()), (huge, ("MAX_INPUT_LENGTH=64",)))
  ):
    (user / "long.txt").write_text("\n".join(given))
    flags = ("MODEL_DIR=run", "INPUT=long.txt", f"OUTPUT=long{number}.jsonl")
    flags = [f"--gin.{f}" for f in (*flags, "MAX_OUTPUT_LENGTH=2", *more)]
    done = zygote.run("rows:measured", ["infer", flags], str(user), 120)
    assert done.status == 0, done.stderr
    assert grown(done) < 900
    text = (user / f"long{number}.jsonl").read_text()
    found = [json.loads(line)["inputs"] for line in text.splitlines()]
    assert found == given
    assert ("1 inputs cut to MAX_INPUT_LENGTH = 64" in done.stderr) == bool(
      more
    )


def test_a_row_that_would_never_end_is_refused(zygote, user):
  (user / "endless.txt").write_text("short\n" + "word " * 100_000)
  flags = ("INPUT=endless.txt", "OUTPUT=endless.jsonl", "MAX_OUTPUT_LENGTH=2")
  done = infer(zygote, user, *flags)
  assert done.problem(2) is None, done
  assert "endless.txt, row 2:" in done.stderr
  assert "MAX_INPUT_LENGTH" in done.stderr
  assert not list(user.glob("endless.jsonl*"))


def test_a_training_row_of_20_mb_is_cut(zygote, user):
  for name in ("long.tsv", "long.csv"):
    sign = "," if name.endswith("csv") else "\t"
    text = "word " * 4_000_000
    # SeqIO shuffles a thousand rows, here not all of them long.
    rest = f"x{sign}y\n" * 500
    (user / name).write_text(f"a{sign}b\n{text}{sign}z\n{rest}")
    done = zygote.run("rows:read", ["text", str(user / name)], str(user), 60)
    assert done.stdout == "501 rows\n", done
  flags = ["--gin_file=text.gin", "--gin.MODEL_DIR=new", "--dry_run"]
  flags += ["--gin.TRAIN_FILE=long.tsv"]
  done = zygote.run("rows:measured", ["train", flags], str(user), 60)
  assert done.status == 0, done.stderr[-2000:]
  assert grown(done) < 900
