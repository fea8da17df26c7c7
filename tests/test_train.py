"""Whole runs through the commands that a user types, and how they can end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT
import jax
import numpy as np
import pytest

from fat5_jax import trees
from fat5_jax.checkpoints import (
  checkpointer,
  history,
  optimizer_state,
  reference,
  run_record,
  writer,
)
from fat5_jax.convert import table
from fat5_jax.gin_config import cli
from fat5_jax.loggers import metrics

TINY = """
from __gin__ import dynamic_registration

import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks
import fat5_jax.models.config as config
import fat5_jax.optimizers as optimizers

include 'models/byt5/base.gin'
include 'runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.Files()
  inputs = 'say {text}'
  targets = '{label}'
  vocabulary = %VOCABULARY
  name = 'tiny'
sources.Files.splits = {'train': %TRAIN_FILE, 'validation': %TRAIN_FILE}
TRAIN_FILE = 'rows.tsv'
TASK_FEATURE_LENGTHS = {'inputs': 40, 'targets': 16}
BATCH_SIZE = 4
TRAIN_STEPS = 12
EVAL_PERIOD = 6
CHECKPOINT_PERIOD = 3
STATS_PERIOD = 2
DTYPE = 'float32'
DROPOUT_RATE = 0.1

config.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 2
  num_decoder_layers = 1
  mlp_dim = 16

optimizers.create_learning_rate_scheduler:
  factors = 'constant'
  base_learning_rate = 0.01
"""


def write_tiny(folder, gin=TINY):
  """rows.tsv and tiny.gin, as a user has them; the folder."""
  rows = "".join(f"number {i}\t{i * 7 % 100}\n" for i in range(60))
  (folder / "rows.tsv").write_text("text\tlabel\n" + rows)
  (folder / "tiny.gin").write_text(gin)
  return folder


@pytest.fixture
def folder(tmp_path):
  """A working directory with a gin file and data, as a user has."""
  return write_tiny(tmp_path)


def command(name, *flags):
  return [sys.executable, "-m", f"fat5_jax.{name}", *flags]


def environment():
  return os.environ | {"PYTHONPATH": ROOT, "COLUMNS": "200"}


def run(folder, name, *flags, **options):
  return subprocess.run(
    command(name, *flags),
    cwd=folder,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
    **options,
  )


TRAIN = ("--gin_file=tiny.gin", "--gin.MODEL_DIR=run")


def final_state(folder, step=12):
  path = os.path.abspath(os.path.join(folder, f"checkpoint_{step}"))
  params = table.read_all(reference.open_params(reference.find(path))[1])
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as reader:
    shapes = reader.metadata(f"{path}/optimizer").item_metadata.tree
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    return params, reader.restore(f"{path}/optimizer", target)


def assert_equal_bit_for_bit(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)
  ):
    assert np.array_equal(np.asarray(x), np.asarray(y)), path


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(folder):
  """kill -9 between checkpoints, packing and dropout on; the same command."""
  done = run(folder, "train", *TRAIN)
  assert done.returncode == 0, done.stderr
  run_dir = folder / "run"

  # What MODEL_DIR holds, under the names that T5X users know.
  for name in (
    "config.gin",
    "model-info.txt",
    "model.json",
    "metrics.csv",
    "curves.png",
    "train",
    "training_eval/tiny",
    "inference_eval/tiny-metrics.jsonl",
    "inference_eval/tiny-000012.jsonl",
    "checkpoint_12",
  ):
    assert (run_dir / name).exists(), name
  assert history.steps(run_dir) == [6, 9, 12], "KEEP = 3"

  process = subprocess.Popen(
    command("train", "--gin_file=tiny.gin", "--gin.MODEL_DIR=killed"),
    cwd=folder,
    env=environment(),
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 200
  while not [s for s in history.steps(folder / "killed") if s >= 3]:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  killed_at = history.steps(folder / "killed")
  assert killed_at and killed_at[-1] < 12, "the run ended before the kill"
  done = run(folder, "train", "--gin_file=tiny.gin", "--gin.MODEL_DIR=killed")
  assert done.returncode == 0, done.stderr
  assert "going on from step" in done.stderr
  assert_equal_bit_for_bit(final_state(run_dir), final_state(folder / "killed"))

  # No step is recorded twice, and what both recorded is the same.
  keep = lambda rows: {r[:3]: r[3] for r in rows if "timing" not in r[2]}
  first = metrics.read_csv(run_dir / "metrics.csv")
  second = metrics.read_csv(folder / "killed" / "metrics.csv")
  assert len({r[:3] for r in second}) == len(second)
  assert keep(second) == keep(first)
  lines = (run_dir / "inference_eval" / "tiny-metrics.jsonl").read_text()
  assert [json.loads(line)["step"] for line in lines.splitlines()] == [6, 12]

  # The same gin file evaluates; the run folder alone predicts lines.
  done = run(folder, "eval", *TRAIN)
  assert done.returncode == 0, done.stderr
  evaluated = json.loads(
    (run_dir / "eval/inference_eval/tiny-metrics.jsonl").read_text()
  )
  assert evaluated["step"] == 12
  assert (
    evaluated["exact_match"]
    == json.loads(lines.splitlines()[-1])["exact_match"]
  )
  done = run(folder, "infer", "--gin.MODEL_DIR=run", input="a\nb\nc\n")
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row["inputs"] for row in rows] == ["say a", "say b", "say c"]
  assert all(isinstance(row["prediction"], str) for row in rows)

  # A task's split instead of lines, targets beside.
  done = run(
    folder,
    "infer",
    *TRAIN,
    "--gin_file=runs/infer_task.gin",
    "--gin.OUTPUT=task.jsonl",
  )
  assert done.returncode == 0, done.stderr
  rows = [
    json.loads(line)
    for line in (folder / "task.jsonl").read_text().splitlines()
  ]
  assert len(rows) == 60 and rows[3]["targets"] == "21"


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(folder):
  process = subprocess.Popen(
    command("train", *TRAIN, "--gin.TRAIN_STEPS=100000"),
    cwd=folder,
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  while not history.steps(folder / "run"):
    assert process.poll() is None
    time.sleep(0.05)
  time.sleep(5)
  process.terminate()
  _, text = process.communicate(timeout=120)
  assert process.returncode == 0, text
  step = int(re.search(r"stopped by SIGTERM at step (\d+)", text)[1])
  assert history.steps(folder / "run")[-1] == step
  assert "--gin.TRAIN_STEPS=100000" in text


# ---- Mistakes: one short message each, nothing half-written. -----------------


@pytest.fixture
def fails(folder, monkeypatch, capfd):
  """Runs `train` in this process; the error message."""
  import gin

  monkeypatch.chdir(folder)

  def check(*flags, name="train"):
    gin.clear_config()
    status = cli.main(name, list(flags))
    text = capfd.readouterr().err
    assert status == 1
    message = text[text.index("error: ") :]
    assert "Traceback" not in text
    assert len(message) < 2500, message
    return message

  yield check
  gin.clear_config()


def test_no_gin_file(fails):
  assert "recipes/quickstart.gin" in fails()


def test_a_missing_gin_file_names_the_nearest(fails):
  message = fails("--gin_file=recipes/quickstrt.gin")
  assert "Did you mean 'recipes/quickstart.gin'" in message


def test_a_missing_include_names_file_and_line(fails, folder):
  (folder / "bad.gin").write_text("\ninclude 'runs/finetun.gin'\n")
  message = fails("--gin_file=bad.gin")
  assert "bad.gin, line 2" in message and "runs/finetune.gin" in message


def test_includes_resolve_beside_the_including_file(fails, folder):
  (folder / "sub").mkdir()
  (folder / "sub" / "a.gin").write_text("include 'b.gin'\n")
  (folder / "sub" / "b.gin").write_text("include 'no_such_file.gin'\n")
  assert "sub/b.gin, line 1" in fails("--gin_file=sub/a.gin")


def test_an_unknown_macro_names_the_nearest(fails):
  message = fails(*TRAIN, "--gin.TRAIN_STEP=5")
  assert "'TRAIN_STEP'" in message and "'TRAIN_STEPS'" in message


def test_a_macro_that_this_run_does_not_use_names_the_file_that_does(fails):
  message = fails(*TRAIN, "--gin.LORA_RANK=4")
  assert "no gin file of this run uses LORA_RANK; lora.gin does" in message


def test_an_unknown_macro_in_a_file_names_the_file(fails, folder):
  (folder / "bad.gin").write_text("include 'tiny.gin'\nEVAL_PEROID = 5\n")
  message = fails("--gin_file=bad.gin", "--gin.MODEL_DIR=run")
  assert "bad.gin" in message and "'EVAL_PERIOD'" in message


def test_an_unknown_parameter_names_the_nearest(fails):
  message = fails(*TRAIN, "--gin.config.T5Config.num_head=2")
  assert "num_heads" in message


def test_an_unknown_configurable_names_the_nearest(fails):
  message = fails(*TRAIN, "--gin.config.T5Confg.num_heads=2")
  assert "T5Config" in message


def test_missing_required_macros_are_listed_with_their_flags(fails):
  message = fails("--gin_file=tiny.gin")
  assert "MODEL_DIR must be set" in message
  assert "--gin.MODEL_DIR=" in message


def test_an_unknown_task_names_the_nearest(fails):
  message = fails(*TRAIN, "--gin.MIXTURE_OR_TASK_NAME=glue_sst_v002")
  assert "glue_sst2_v002" in message


def test_a_missing_data_file_is_named(fails, folder):
  assert "nothing.tsv" in fails(*TRAIN, "--gin.TRAIN_FILE=nothing.tsv")
  assert not (folder / "run").exists()


def test_a_malformed_row_is_named_with_file_and_row(fails, folder):
  (folder / "rows.tsv").write_text("text\tlabel\na\t1\nb\n")
  message = fails(*TRAIN)
  assert "rows.tsv, row 3" in message
  assert not (folder / "run" / "metrics.csv").exists()


def test_an_empty_row_is_named(fails, folder):
  (folder / "rows.tsv").write_text("text\tlabel\na\t1\n\t2\n")
  assert "rows.tsv, row 3: column 'text' is empty" in fails(*TRAIN)


def test_an_empty_data_set(fails, folder):
  (folder / "rows.tsv").write_text("text\tlabel\n")
  assert "rows.tsv: no rows" in fails(*TRAIN)


def test_token_ids_beyond_the_embedding(fails):
  message = fails(*TRAIN, "--gin.config.T5Config.vocab_size=100")
  assert "384 ids" in message and "100 rows" in message


def test_an_hf_folder_with_a_missing_tensor(fails, folder):
  import hf_models
  import safetensors.numpy

  hf_models.make("t5_1_1", folder / "hf")
  path = folder / "hf" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors["extra.weight"] = tensors.pop("decoder.final_layer_norm.weight")
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  message = fails("--gin.MODEL_DIR=hf", "--gin.INPUT=rows.tsv", name="infer")
  assert "- decoder.final_layer_norm.weight" in message
  assert "+ extra.weight" in message


def test_an_initial_checkpoint_of_another_model(fails, folder):
  import hf_models

  hf_models.make("t5_1_1", folder / "hf")
  message = fails(*TRAIN, "--gin.INITIAL_CHECKPOINT_PATH=hf")
  assert "- emb_dim = 32" in message and "+ emb_dim = 16" in message
  assert "models/from_checkpoint.gin" in message


def test_a_model_dir_of_another_model(fails, folder):
  from fat5_jax.models.config import T5Config

  os.makedirs(folder / "run")
  other = T5Config(vocab_size=384, emb_dim=24)
  run_record.write(str(folder / "run"), other, None)
  before = (folder / "run" / "model.json").read_text()
  message = fails(*TRAIN)
  assert "- emb_dim = 24" in message and "+ emb_dim = 16" in message
  assert (folder / "run" / "model.json").read_text() == before


def test_a_model_dir_that_cannot_be_written(fails, folder):
  (folder / "run").write_text("a file, not a folder")
  assert "cannot be written" in fails(*TRAIN)


def test_float16_is_refused(fails):
  message = fails(*TRAIN, "--gin.DTYPE=float16")
  assert "65504" in message and "bfloat16" in message


def test_neither_or_both_kinds_of_steps(fails):
  assert "TRAIN_STEPS_RELATIVE" in fails(*TRAIN, "--gin.TRAIN_STEPS_RELATIVE=5")


def test_a_nan_names_step_and_parameter_and_keeps_the_checkpoint(fails, folder):
  message = fails(
    *TRAIN,
    "--gin.optimizers.create_learning_rate_scheduler.base_learning_rate=1e15",
  )
  assert re.search(r"step [123]: loss", message)
  assert "the gradient of " in message or "the loss" in message
  assert "last good checkpoint is step 0" in message
  assert history.steps(folder / "run") == [0]


def test_a_last_update_to_nan_is_no_checkpoint(fails, folder):
  (folder / "sgd.gin").write_text(
    """
from __gin__ import dynamic_registration
import optax
OPTIMIZER = @optax.sgd()
optax.sgd.learning_rate = 1e39
"""
  )
  message = fails(*TRAIN, "--gin_file=sgd.gin", "--gin.TRAIN_STEPS=1")
  assert "step 1: loss" in message and "norm of the weights" in message
  assert history.steps(folder / "run") == [0]


def test_what_was_being_saved_is_whole_after_a_bad_row(
  fails, folder, monkeypatch
):
  """The command ends at once, so the run waits for its checkpoint."""
  from fat5_jax.data import pipeline
  from fat5_jax.errors import UserError

  read, close = pipeline.BatchStream.__next__, checkpointer.Checkpointer.close
  seen, closed = [], []

  def three(self):
    seen.append(self)
    if len(seen) > 3:
      raise UserError("rows.tsv, row 9: bad")
    return read(self)

  def closing(self):
    close(self)
    closed.append(sorted(os.listdir(folder / "run")))

  monkeypatch.setattr(pipeline.BatchStream, "__next__", three)
  monkeypatch.setattr(checkpointer.Checkpointer, "close", closing)
  flags = ("--gin.CHECKPOINT_PERIOD=1", "--gin.EVAL_PERIOD=0")
  assert "rows.tsv, row 9: bad" in fails(*TRAIN, *flags)
  (names,) = closed
  assert "checkpoint_3" in names and not any("tmp" in name for name in names)


def test_plain_text_on_the_command_line_needs_no_quotes():
  from fat5_jax.gin_config import flags

  quote = flags._quote_plain_text
  assert quote("/tmp/run") == "'/tmp/run'"
  assert quote("'/tmp/run'") == "'/tmp/run'"
  # A pattern that begins like a tuple.
  assert quote("(head|classifier)/") == "'(head|classifier)/'"
  for literal in ("1_000", "1e-4", "None", "True", "{'a': 1}", "@f()", "%M"):
    assert quote(literal) == literal
  for literal in ("(1, 2)", "[@a/b.c(), %M]", "{'a': @f}", "(@f(),)", "''"):
    assert quote(literal) == literal


def test_dry_run_shows_the_run_and_writes_nothing(folder, monkeypatch, capfd):
  import gin

  gin.clear_config()
  monkeypatch.chdir(folder)
  assert cli.main("train", [*TRAIN, "--dry_run"]) == 0
  text = capfd.readouterr().err
  assert "encoder/layers_0/attention/query/kernel" in text
  assert "total parameters" in text
  assert "BATCH_SIZE = 4" in text.replace("gin.macro.value", "")
  assert "say number" in text
  assert not (folder / "run").exists()
  gin.clear_config()


@pytest.mark.slow
def test_a_run_starts_from_a_run_and_counts_its_steps(
  folder, monkeypatch, capfd
):
  """T5X: weights, optimizer and step come along; RELATIVE counts after it."""
  import gin

  monkeypatch.chdir(folder)
  quick = ("--gin.EVAL_PERIOD=0",)

  def train(*flags):
    gin.clear_config()
    status = cli.main("train", ["--gin_file=tiny.gin", *quick, *flags])
    text = capfd.readouterr().err
    assert status == 0, text
    return text

  train("--gin.MODEL_DIR=first", "--gin.TRAIN_STEPS=4")
  text = train(
    "--gin.MODEL_DIR=second",
    "--gin.INITIAL_CHECKPOINT_PATH=first",
    "--gin.TRAIN_STEPS=None",
    "--gin.TRAIN_STEPS_RELATIVE=2",
  )
  assert "checkpoint_4, step 4" in text
  assert history.steps("second")[-1] == 6
  # TRAIN_STEPS counts on from there.
  nothing = "step 4: nothing is left to train"
  first = "--gin.INITIAL_CHECKPOINT_PATH=first"
  assert nothing in train("--gin.MODEL_DIR=same", first, "--gin.TRAIN_STEPS=4")
  gin.clear_config()
  arguments = ["--gin_file=tiny.gin", first, "--gin.TRAIN_STEPS=3"]
  assert cli.main("train", [*arguments, "--gin.MODEL_DIR=less"]) == 1
  assert nothing in capfd.readouterr().err
  assert not history.steps("less")
  # The optimizer's count came along.
  optimizer = final_state("second", 6)[1]
  counts = [x for x in jax.tree.leaves(optimizer) if np.shape(x) == ()]
  assert counts and all(int(c) == 6 for c in counts)
  # Scanned layers read and write the same checkpoints.
  shutil.copytree("first", "scanned")
  train(
    "--gin.MODEL_DIR=scanned",
    "--gin.TRAIN_STEPS=5",
    "--gin.SCAN_LAYERS=True",
    "--gin.DROPOUT_RATE=0.0",
  )
  shutil.copytree("first", "looped")
  train(
    "--gin.MODEL_DIR=looped", "--gin.TRAIN_STEPS=5", "--gin.DROPOUT_RATE=0.0"
  )
  for a, b in zip(
    jax.tree.leaves(final_state("scanned", 5)),
    jax.tree.leaves(final_state("looped", 5)),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  gin.clear_config()


# ---- Starting from a checkpoint that counts steps ----------------------------


@pytest.fixture
def trains(folder, monkeypatch, capfd):
  """Runs `train` in this process, without evaluations; what it said."""
  import gin

  monkeypatch.chdir(folder)
  (folder / "quick.gin").write_text(
    """
from __gin__ import dynamic_registration
import fat5_jax.train as train_script

include 'tiny.gin'
train_script.Run.train_eval_dataset_cfg = None
train_script.Run.infer_eval_dataset_cfg = None
STATS_PERIOD = 1
# Compiles in half the time.
ATTENTION = 'reference'
"""
  )

  def check(model_dir, *flags):
    gin.clear_config()
    own = ("--gin_file=quick.gin", f"--gin.MODEL_DIR={model_dir}")
    status = cli.main("train", [*own, *flags])
    text = capfd.readouterr().err
    assert status == 0, text
    return text

  yield check
  gin.clear_config()


def t5x_checkpoint(folder, step, **settings):
  """TINY's model as T5X writes it after one update by the oracle."""
  from test_formats import T5X

  from fat5_jax.models.config import T5Config

  config = T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=1,
    mlp_dim=16,
    mlp_activations=("gelu", "linear"),
  )
  theirs = T5X(config, False, step - 1, **settings)
  theirs.params = {k: 0.05 * x for k, x in theirs.params.items()}
  theirs.train()
  theirs.write(folder / f"checkpoint_{step}")
  return theirs


def logged_rates(run_dir):
  rows = metrics.read_csv(run_dir / "metrics.csv")
  return {step: v for step, _, name, v in rows if name == "learning_rate"}


def test_the_logged_rate_is_the_applied_one(folder, trains):
  """From step 1000, with a part of the parameters and a fresh optimizer."""
  t5x_checkpoint(folder, 1000)
  source = reference.find("checkpoint_1000")
  config, leaves = reference.open_params(source)
  step, state = optimizer_state.adafactor_state(source, config)
  writer.write_params("begin", config, leaves, None, step, state)
  schedule = "optimizers.create_learning_rate_scheduler"
  (folder / "adamw.gin").write_text("include 'optimizers/adamw.gin'\n")
  text = trains(
    "run",
    "--gin_file=adamw.gin",
    "--gin.INITIAL_CHECKPOINT_PATH=begin",
    "--gin.TRAIN_STEPS=1002",
    "--gin.TRAINABLE=^decoder/",
    "--gin.DROPOUT_RATE=0.0",
    "--gin.CHECKPOINT_PERIOD=1",
    f"--gin.{schedule}.factors=constant * rsqrt_decay",
    f"--gin.{schedule}.base_learning_rate=1.0",
    f"--gin.{schedule}.warmup_steps=10",
  )
  assert "step 1000" in text and "a fresh optimizer" in text
  # Step 1001 is update number 1000: 1 / sqrt(1000).
  rates = logged_rates(folder / "run")
  assert rates == {
    n: pytest.approx((n - 1) ** -0.5, rel=1e-6) for n in (1001, 1002)
  }
  # Adam's first update with fresh slots is the rate times the gradient's sign.
  at = lambda n: trees.flatten(
    table.read_all(
      reference.open_params(reference.find(f"run/checkpoint_{n}"))[1]
    )
  )
  before, after = at(1000), at(1001)
  moved = {k: np.abs(after[k] - before[k]) for k in before}
  assert not any(x.any() for k, x in moved.items() if k[0] != "decoder")
  largest = max(x.max() for x in moved.values())
  assert largest == pytest.approx(rates[1001], rel=1e-4)


def test_a_t5x_checkpoint_keeps_its_step_and_its_slots(folder, trains):
  """At 1,000,000: TRAIN_STEPS counts it, RELATIVE counts after it."""
  settings = dict(beta1=0.9, weight_decay_rate=0.001)
  theirs = t5x_checkpoint(folder, 1_000_000, **settings)
  (folder / "t5x.gin").write_text(
    """
from __gin__ import dynamic_registration
import fat5_jax.optimizers as optimizers

INITIAL_CHECKPOINT_PATH = 'checkpoint_1000000'
TRAIN_STEPS = None
DROPOUT_RATE = 0.0
optimizers.adafactor.beta1 = 0.9
optimizers.adafactor.weight_decay_rate = @decay/optimizers.HParamMap()
decay/optimizers.HParamMap.rules = [('kernel$', 0.001), ('.*', None)]
optimizers.adafactor.logical_factor_rules = None
"""
  )
  flags = ("--gin_file=t5x.gin",)
  text = trains("counted", *flags, "--gin.TRAIN_STEPS=1000002")
  assert "checkpoint_1000000, step 1000000" in text
  assert "a fresh optimizer" not in text
  trains("relative", *flags, "--gin.TRAIN_STEPS_RELATIVE=2")
  end = final_state(folder / "counted", 1_000_002)
  assert_equal_bit_for_bit(end, final_state(folder / "relative", 1_000_002))
  assert sorted(logged_rates(folder / "counted")) == [1_000_001, 1_000_002]

  # What the run began with are T5X's slots.
  params, (slots, *_) = final_state(folder / "counted", 1_000_000)
  assert int(slots["count"]) == 1_000_000
  for name in ("m", "v"):
    for k, x in trees.flatten(slots[name]).items():
      wanted = np.asarray(theirs.slots[k][name], np.float32)
      np.testing.assert_array_equal(x, wanted)

  # Another optimizer starts fresh, in one line, at the same step.
  (folder / "adamw.gin").write_text("include 'optimizers/adamw.gin'\n")
  text = trains(
    "adamw",
    "--gin_file=adamw.gin",
    "--gin.INITIAL_CHECKPOINT_PATH=checkpoint_1000000",
    "--gin.TRAIN_STEPS=1000001",
  )
  assert len([x for x in text.splitlines() if "a fresh optimizer" in x]) == 1
  assert history.steps("adamw") == [1_000_000, 1_000_001]
  counts = jax.tree.leaves(final_state(folder / "adamw", 1_000_001)[1])
  assert [int(c) for c in counts if np.shape(c) == ()] == [1]


def test_skip_nan_updates_goes_on_where_a_run_would_stop(folder, trains):
  """A parameter that overflows: nothing moves, and the run says so."""
  theirs = t5x_checkpoint(folder, 1000)
  theirs.params[("decoder", "logits_dense", "kernel")][0, 0] = 3e38
  theirs.params[("decoder", "decoder_norm", "scale")][:] = 1e30
  theirs.write(folder / "checkpoint_1000")
  text = trains(
    "run",
    "--gin.INITIAL_CHECKPOINT_PATH=checkpoint_1000",
    "--gin.TRAIN_STEPS=1002",
    "--gin.optimizers.adafactor.skip_nan_updates=True",
  )
  assert text.count("skip_nan_updates: the run goes on") == 2
  before, after = (final_state("run", n)[0] for n in (1000, 1002))
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_array_equal(a, b)


def test_a_plain_optax_optimizer_trains_and_logs_no_rate(folder, trains):
  (folder / "sgd.gin").write_text(
    """
from __gin__ import dynamic_registration
import optax
OPTIMIZER = @optax.sgd()
optax.sgd.learning_rate = 0.01
"""
  )
  text = trains("run", "--gin_file=sgd.gin", "--gin.TRAIN_STEPS=2")
  assert "step 2/2  loss" in text and " lr " not in text
  assert logged_rates(folder / "run") == {}
