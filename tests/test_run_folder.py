"""A run folder belongs to one run, and tells eval and infer what it asks."""

import contextlib
import functools
import io
import json
import os
import runpy
import shutil
import sys

from conftest import ROOT
import flax.linen as nn
import numpy as np
import pytest

from fat5_jax.gin_config import cli
from fat5_jax.models import initial
import gin

# One worker: its fixtures are made once.
pytestmark = pytest.mark.xdist_group("run_folder")

# A T5 so small that a run takes seconds, on bytes.
MODEL = """
from __gin__ import dynamic_registration
import fat5_jax.models.config as config

include 'models/byt5/base.gin'
include 'runs/pretrain.gin'

BATCH_SIZE = 4
TRAIN_STEPS = 2
EVAL_PERIOD = 0
EVAL_STEPS = 2
CHECKPOINT_PERIOD = 2
DTYPE = 'float32'
ATTENTION = 'reference'
SCHEDULE = 'constant'
LEARNING_RATE = 0.01
config.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_dim = 16
"""
TEXT = """
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks

MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.Files()
  inputs = %INPUTS
  targets = '{answer}'
  vocabulary = %VOCABULARY
INPUTS = 'say {text} loudly'
sources.Files.splits = {'train': %TRAIN_FILE, 'validation': 'dev.tsv'}
TRAIN_FILE = 'train.tsv'
TASK_FEATURE_LENGTHS = {'inputs': 40, 'targets': 8}
"""
PAIRS = """
import fat5_jax.data.head_tasks as head_tasks
import fat5_jax.data.sources as sources

include 'heads/sequence_classification.gin'

MIXTURE_OR_TASK_NAME = @head_tasks.classification()
head_tasks.classification:
  source = @sources.Files()
  inputs = ('{claim}', 'because {reason}')
  label = 'verdict'
  label_names = %LABELS
  vocabulary = %VOCABULARY
LABELS = ('yes', 'no')
sources.Files.splits = {'train': 'pairs.tsv', 'validation': 'pairs.tsv'}
TASK_FEATURE_LENGTHS = {'inputs': 48}
Z_LOSS = 0.0
"""


def train_each(folder, runs):
  """Runs by name, of what comes after MODEL in their gin files; the folder."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    for name, text in runs.items():
      (folder / f"{name}.gin").write_text(MODEL + text)
      flags = [f"--gin_file={name}.gin", f"--gin.MODEL_DIR={name}"]
      with contextlib.redirect_stderr(io.StringIO()) as said:
        assert command("train", *flags) == 0, said.getvalue()
      (folder / f"{name}.log").write_text(said.getvalue())
  return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A working folder with data, gin files, and two finished runs."""
  folder = tmp_path_factory.mktemp("user")
  rows = "".join(f"number {i}\tthe answer {i}\n" for i in range(12))
  for name in ("train", "dev"):
    (folder / f"{name}.tsv").write_text("text\tanswer\n" + rows)
  (folder / "pairs.tsv").write_text(
    "claim\treason\tverdict\n"
    + "".join(f"it is {i}\tso\t{('yes', 'no')[i % 2]}\n" for i in range(8))
  )
  return train_each(folder, {"text": TEXT, "pairs": PAIRS})


@pytest.fixture
def user(made, tmp_path, monkeypatch):
  """A copy of it of one's own, the working folder of a test."""
  shutil.copytree(made, tmp_path / "user")
  monkeypatch.chdir(tmp_path / "user")
  return tmp_path / "user"


def command(name, *flags):
  gin.clear_config()
  try:
    return cli.main(name, list(flags))
  finally:
    gin.clear_config()


def run(capfd, name, *flags, status=0):
  capfd.readouterr()
  found = command(name, *flags)
  captured = capfd.readouterr()
  assert found == status, captured.err
  return captured


TEXT_RUN = ("--gin_file=text.gin", "--gin.MODEL_DIR=text")
PAIRS_RUN = ("--gin_file=pairs.gin", "--gin.MODEL_DIR=pairs")


def contents(folder):
  """Every file of a folder, as bytes."""
  return {
    os.path.join(parent, name): open(os.path.join(parent, name), "rb").read()
    for parent, _, names in os.walk(folder)
    for name in names
  }


# ---- One folder, one run -----------------------------------------------------


@pytest.mark.parametrize(
  "change, told",
  [
    (("--gin.LABELS=('no', 'yes')",), "labels = ('yes', 'no')"),
    (
      ("--gin.head_tasks.classification.inputs=('{claim}', '{reason}')",),
      "due",
    ),
    (("--gin.head_tasks.classification.label=reason",), "label"),
  ],
)
def test_other_labels_or_templates_are_refused(user, capfd, change, told):
  before = contents("pairs")
  text = run(
    capfd, "train", *PAIRS_RUN, *change, "--gin.TRAIN_STEPS=4", status=1
  ).err
  if told == "due":
    assert "- arguments.inputs = ['{claim}', 'because {reason}']" in text
    assert "+ arguments.inputs = ['{claim}', '{reason}']" in text
  else:
    assert told in text
  assert contents("pairs") == before


def test_another_task_of_the_same_shape_is_refused(user, capfd):
  """As RTE's folder took MRPC: a model of two labels either way."""
  (user / "other.tsv").write_text(
    "claim\treason\tverdict\n" + "that\tis\tno\n" * 8
  )
  before = contents("pairs")
  splits = {"train": "other.tsv", "validation": "pairs.tsv"}
  text = run(
    capfd,
    "train",
    *PAIRS_RUN,
    f"--gin.sources.Files.splits={splits}",
    "--gin.TRAIN_STEPS=4",
    status=1,
  ).err
  assert "holds a run on other data" in text and "sha256" in text
  assert contents("pairs") == before


def test_a_changed_row_is_another_data_set_a_moved_file_is_not(user, capfd):
  os.rename("train.tsv", "moved.tsv")
  done = run(
    capfd,
    "train",
    *TEXT_RUN,
    "--gin.TRAIN_FILE=moved.tsv",
    "--gin.TRAIN_STEPS=3",
    "--gin.LEARNING_RATE=0.02",
  )
  assert "going on from step 2" in done.err
  assert "settings changed" not in done.err
  # What may change is said in a line.
  (line,) = [x for x in done.err.splitlines() if x.startswith("changed since")]
  assert "TRAIN_STEPS 2 -> 3" in line and "LEARNING_RATE 0.01 -> 0.02" in line
  rows = (user / "moved.tsv").read_text().replace("number 3", "number 4")
  (user / "moved.tsv").write_text(rows)
  text = run(
    capfd,
    "train",
    *TEXT_RUN,
    "--gin.TRAIN_FILE=moved.tsv",
    "--gin.TRAIN_STEPS=4",
    status=1,
  ).err
  assert "holds a run on other data" in text


def test_the_order_of_the_data_depends_on_what_it_is(user):
  import seqio

  from fat5_jax.data import pipeline, sources, tasks

  def fingerprint(**changes):
    settings = {"inputs": "say {text}", "name": "prints"} | changes
    task = tasks.text_to_text(
      sources.Files({"train": changes.pop("file", "train.tsv")}),
      settings["inputs"],
      "{answer}",
      seqio.ByteVocabulary(),
      "prints",
    )
    return pipeline.DatasetConfig(
      task,
      {"inputs": 8, "targets": 8},
      "train",
      4,
      use_cached=changes.get("use_cached", False),
    ).fingerprint()

  first = fingerprint()
  assert fingerprint() == first
  assert fingerprint(inputs="ask {text}") != first
  assert fingerprint(use_cached=True) != first
  (user / "train.tsv").write_text("text\tanswer\na\tb\n")
  assert fingerprint() != first


def test_seed_none_in_a_data_set_is_the_runs_seed(user, capfd, monkeypatch):
  from fat5_jax.data import pipeline

  seen = []
  original = pipeline.first_batch

  def spy(config, *args, **kwargs):
    seen.append(config.seed)
    return original(config, *args, **kwargs)

  monkeypatch.setattr(pipeline, "first_batch", spy)
  run(
    capfd,
    "train",
    "--gin_file=text.gin",
    "--gin.MODEL_DIR=seeded",
    "--gin.train/pipeline.DatasetConfig.seed=None",
    "--gin.RANDOM_SEED=7",
    "--dry_run",
  )
  assert seen == [7]


def test_code_is_known_by_what_it_does_not_by_where_it_lies(user):
  """Tasks of SeqIO's own, functions, and objects that are called."""
  import seqio

  from fat5_jax.data import records, sources

  def prefix(dataset, text):
    return dataset.map(lambda x: text + x)

  def record(file="train.tsv", text="say: "):
    name = "own_seqio_task"
    seqio.TaskRegistry.remove(name)
    task = seqio.TaskRegistry.add(
      name,
      source=seqio.TextLineDataSource({"train": file}),
      preprocessors=[functools.partial(prefix, text=text)],
      output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
    )
    return json.loads(json.dumps(records.describe(task)))

  assert not records.difference(record(), record())
  assert records.difference(record(), record(text="ask: "))
  (user / "other.tsv").write_text("a\n")
  assert records.difference(record(), record("other.tsv"))

  def closing_over(value):
    return lambda: value

  class Called:
    def __init__(self, value):
      self.value = value

    def __call__(self):
      return self.value

  name = sources.code_name
  for make in (closing_over, Called):
    assert name(make("a")) == name(make("a")) != name(make("b"))
    assert " at 0x" not in name(make("a"))
  one, other = lambda x: x + 1, lambda x: x + 2
  assert name(one) != name(other)
  # Names in a record are not those of what may change.
  for key in ("metrics", "path", "data_dir"):
    before = {"mixture": {key: {"factory": "a", "metrics": ["x"]}}}
    assert records.difference(before, {"mixture": {key: {"factory": "b"}}})
    now = {"mixture": {key: {"factory": "a", "metrics": ["y"]}}}
    assert not records.difference(before, now)


def test_a_change_in_a_long_value_is_told(tmp_path, capfd):
  from fat5_jax.training import same_run

  wrapped = "a.b = \\\n    {'x': 1.0,\n     'y': %s}\nTRAIN_STEPS = 2\n"
  (tmp_path / "config.gin").write_text(wrapped % "2.0")
  same_run.tell_changes(str(tmp_path), wrapped % "3.0")
  assert "changed since: a.b" in capfd.readouterr().err


# ---- infer and eval ask as training did --------------------------------------


def lines_of(captured):
  return [json.loads(line) for line in captured.out.splitlines()]


def test_a_column_of_the_template_is_filled_into_it(user, capfd):
  (user / "rows.jsonl").write_text('{"text": "number 3", "other": 1}\n')
  flags = ("--gin.MODEL_DIR=text", "--gin.MAX_OUTPUT_LENGTH=4")
  (row,) = lines_of(run(capfd, "infer", *flags, "--gin.INPUT=rows.jsonl"))
  assert row["inputs"] == "say number 3 loudly"
  # A line of text is the template's column; blank lines are counted.
  (user / "lines.txt").write_text("number 3\n\n  \nnumber 4\n")
  done = run(capfd, "infer", *flags, "--gin.INPUT=lines.txt")
  assert [row["inputs"] for row in lines_of(done)] == [
    "say number 3 loudly",
    "say number 4 loudly",
  ]
  assert "2 blank lines left out" in done.err
  assert lines_of(done)[0]["prediction"] == row["prediction"]
  # Whole inputs are asked for in so many words.
  done = run(
    capfd, "infer", *flags, "--gin.INPUT=lines.txt", "--gin.USE_TEMPLATE=False"
  )
  assert lines_of(done)[0]["inputs"] == "number 3"
  (user / "whole.jsonl").write_text('{"inputs": "say it"}\n')
  done = run(capfd, "infer", *flags, "--gin.INPUT=whole.jsonl")
  assert lines_of(done)[0]["inputs"] == "say it"
  assert "template is not filled" in done.err
  (user / "wrong.jsonl").write_text('{"txt": "say it"}\n')
  text = run(capfd, "infer", *flags, "--gin.INPUT=wrong.jsonl", status=1).err
  assert (
    "wrong.jsonl, row 1: no column 'text'. Did you mean 'txt'? Columns: txt\n"
    in text
  )


def test_a_classifier_of_pairs_is_asked_by_its_columns(user, capfd):
  (user / "rows.tsv").write_text("id\treason\tclaim\n1\tso\tit is 3\n")
  done = run(capfd, "infer", "--gin.MODEL_DIR=pairs", "--gin.INPUT=rows.tsv")
  (row,) = lines_of(done)
  assert row["inputs"] == "it is 3 </s> because so"
  assert row["prediction"] in ("yes", "no")
  (user / "lines.txt").write_text("it is 3\n")
  text = run(
    capfd,
    "infer",
    "--gin.MODEL_DIR=pairs",
    "--gin.INPUT=lines.txt",
    status=1,
  ).err
  assert "columns claim and reason" in text


@pytest.mark.parametrize("name", ["text", "pairs"])
def test_the_folder_alone_is_evaluated(user, capfd, name):
  run(capfd, "eval", f"--gin.MODEL_DIR={name}")
  task = {"text": "text_to_text", "pairs": "classification"}[name]
  read = lambda path: json.loads(
    (user / path / f"inference_eval/{task}-metrics.jsonl").read_text()
  )
  assert read(f"{name}/eval") == read(name)
  wrong = run(
    capfd,
    "eval",
    f"--gin.MODEL_DIR={name}",
    "--gin.EVAL_SPLIT=validatin",
    status=1,
  ).err
  assert "Did you mean 'validation'?" in wrong


def test_a_file_is_read_as_the_training_read_its_own(user, capfd):
  for file in ("train", "dev"):
    rows = (user / f"{file}.tsv").read_text().replace("\t", ";")
    (user / f"{file}.csv").write_text(rows.replace("number 0", '"say ""0"""'))
  splits = {"train": "train.csv", "validation": "dev.csv"}
  run(
    capfd,
    "train",
    "--gin_file=text.gin",
    "--gin.MODEL_DIR=semicolons",
    f"--gin.sources.Files.splits={splits}",
    "--gin.sources.Files.delimiter=';'",
    "--gin.TRAIN_STEPS=1",
    "--gin.EVAL_SPLIT=None",
  )
  done = run(
    capfd,
    "infer",
    "--gin.MODEL_DIR=semicolons",
    "--gin.INPUT=dev.csv",
    "--gin.MAX_OUTPUT_LENGTH=2",
  )
  assert lines_of(done)[0]["inputs"] == 'say say "0" loudly'


def test_nested_columns_are_asked_about_beside_a_column_inputs(user):
  import seqio

  from fat5_jax.data import sources, tasks
  from fat5_jax.inference import rows

  task = tasks.text_to_text(
    sources.Function({"train": lambda: []}),
    "say {doc.text}",
    "{b}",
    seqio.ByteVocabulary(),
  )
  assert rows._asks(task, {"doc": {"text": "x"}, "inputs": "extra"})
  assert not rows._asks(task, {"inputs": "extra"})


def test_a_long_row_is_predicted_alone(user, capfd):
  from fat5_jax.inference import batches

  lengths = [10, 600, 20, 9000, 30, 30]
  groups = list(batches.group(lengths, lambda n: n, 4))
  assert [n for group in groups for n in group] == lengths
  assert [9000] in groups
  shapes = batches.Shapes(4)
  for group in groups:
    rows, length = shapes.of(group)
    assert rows >= len(group) and length >= max(group)
    assert rows * length <= 2 * 4 * 512 or rows == 1
  (user / "lines.txt").write_text(f"short\n{'long ' * 1000}\nshort\n")
  flags = (
    "--gin.MODEL_DIR=text",
    "--gin.INPUT=lines.txt",
    "--gin.MAX_OUTPUT_LENGTH=4",
  )
  done = run(capfd, "infer", *flags)
  rows = lines_of(done)
  assert rows[0]["prediction"] == rows[2]["prediction"]
  assert len(rows[1]["inputs"]) > 5000 and "cut" not in done.err
  done = run(capfd, "infer", *flags, "--gin.MAX_INPUT_LENGTH=50")
  assert "1 inputs cut to MAX_INPUT_LENGTH = 50" in done.err


def test_evaluation_scores_the_whole_target_and_cuts_are_told(user):
  """Targets have 12 and 13 bytes and an end; TASK_FEATURE_LENGTHS is 8."""
  said = (user / "text.log").read_text()
  assert "cut to TASK_FEATURE_LENGTHS" in said
  assert "of targets (longest 14 tokens)" in said
  path = user / "text/inference_eval/text_to_text-000002.jsonl"
  targets = [json.loads(line)["target"] for line in path.open()]
  assert targets == [f"the answer {i}" for i in range(12)]


def test_a_mixed_row_file_names_its_place(user, capfd):
  (user / "rows.jsonl").write_text(
    '{"claim": "a", "reason": "b"}\n{"claim": ["a"], "reason": "b"}\n'
  )
  text = run(
    capfd,
    "infer",
    "--gin.MODEL_DIR=pairs",
    "--gin.INPUT=rows.jsonl",
    status=1,
  ).err
  assert "rows.jsonl, row 2: column 'claim' holds a list, not text" in text


# ---- A head module of one's own ----------------------------------------------

OWN_HEAD = """
import flax.linen as nn

print("own_head_module is imported")


class Own(nn.Module):
  width: int = 4

  @nn.compact
  def __call__(self, x, *, enable_dropout):
    return nn.gelu(nn.Dense(self.width)(x))
"""


def test_a_head_module_is_imported_when_the_command_says_so(
  user, capfd, monkeypatch
):
  monkeypatch.syspath_prepend(str(user))
  (user / "own_head_module.py").write_text(OWN_HEAD)
  (user / "own.gin").write_text(
    MODEL
    + PAIRS
    + """
import fat5_jax.models.factory as factory
import own_head_module

factory.create.head_layers = @own_head_module.Own()
own_head_module.Own.width = 6
"""
  )
  run(capfd, "train", "--gin_file=own.gin", "--gin.MODEL_DIR=own")
  sys.modules.pop("own_head_module")
  record = json.loads((user / "own/model.json").read_text())["own_head"]
  assert record == {"module": "own_head_module:Own", "fields": {"width": 6}}
  flags = ("--gin.MODEL_DIR=own", "--gin.INPUT=pairs.tsv")
  refused = run(capfd, "infer", *flags, status=1)
  assert "--gin.HEAD_MODULE=own_head_module:Own" in refused.err
  assert "is imported" not in refused.out
  flags = (*flags, "--gin.HEAD_MODULE=own_head_module:Own")
  done = run(capfd, "infer", *flags)
  assert "own_head_module is imported" in done.out
  assert len(done.out.splitlines()) == 9
  run(
    capfd,
    "eval",
    "--gin.MODEL_DIR=own",
    "--gin.HEAD_MODULE=own_head_module:Own",
  )

  # Nothing else can say what it computes.
  tool = os.path.join(ROOT, "tools", "convert_checkpoint.py")
  monkeypatch.setattr(sys, "argv", [tool, "own", "out", "--to", "hf"])
  assert runpy.run_path(tool)["main"]() == 1
  assert "a module of your own" in capfd.readouterr().err
  assert not (user / "out").exists()


def test_a_head_module_that_cannot_be_made_again_is_refused():
  from fat5_jax.models import factory
  from fat5_jax.models.config import HeadConfig, T5Config

  class Local(nn.Module):
    @nn.compact
    def __call__(self, x, *, enable_dropout):
      return x

  config = T5Config(vocab_size=8, emb_dim=8)
  model = factory.create(
    config, HeadConfig("sequence_classification"), head_layers=Local()
  )
  with pytest.raises(ValueError, match="at the top of a module"):
    factory.own_head(model)


# ---- One task, one name, one error -------------------------------------------


def test_two_tasks_of_one_name_are_each_scored_as_themselves(user):
  import jax
  import seqio

  from fat5_jax.data import pipeline, sources, tasks
  from fat5_jax.distributed.sharding import Partitioner
  from fat5_jax.evaluation.generation import InferenceEvaluator
  from fat5_jax.models import factory
  from fat5_jax.models.config import T5Config

  def task(text):
    rows = lambda: [{"a": text, "b": text}] * 2
    return tasks.text_to_text(
      sources.Function({"validation": rows}),
      "{a}",
      "{b}",
      seqio.ByteVocabulary(),
    )

  first, _ = task("first"), task("second")
  config = T5Config(vocab_size=384, emb_dim=8, num_heads=1, head_dim=8)
  config = config.replace(num_encoder_layers=1, num_decoder_layers=1, mlp_dim=8)
  model = factory.create(config)
  evaluator = InferenceEvaluator(
    model,
    pipeline.DatasetConfig(first, None, "validation", 2),
    str(user / "scored"),
    Partitioner(devices=jax.devices()[:1]),
  )
  params = jax.jit(initial.init_params, static_argnums=(0, 1))(model, 0)
  evaluator.evaluate(params, 1)
  path = user / "scored/inference_eval/text_to_text-000001.jsonl"
  targets = [json.loads(line)["target"] for line in path.open()]
  assert targets == ["first", "first"]
  # A mixture that nobody registered is scored too.
  mixture = seqio.Mixture("unregistered", [(first, 1.0)])
  evaluator = InferenceEvaluator(
    model,
    pipeline.DatasetConfig(mixture, None, "validation", 2),
    str(user / "scored"),
    Partitioner(devices=jax.devices()[:1]),
  )
  assert evaluator.task_names == ["text_to_text"]


def test_an_evaluation_leaves_a_pending_error_of_the_training_data():
  """The second stream ends well while the first is about to fail."""
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds

  from fat5_jax.data import seqio_source, sources, tasks
  from fat5_jax.errors import UserError

  def stream(name, rows):
    task = tasks.text_to_text(
      sources.Function({"train": lambda: rows}),
      "{a}",
      "{b}",
      seqio.ByteVocabulary(),
      name,
    )
    data = task.get_dataset(None, "train", shuffle=False)
    return iter(tfds.as_numpy(data.prefetch(tf.data.AUTOTUNE)))

  training = stream("training", [{"a": "x", "b": "y"}] + [{"a": "x"}])
  with pytest.raises(UserError, match="row 2: no column 'b'"):
    with seqio_source.reraise():
      next(training)
      # Its second row has failed by now, in the background.
      with seqio_source.reraise():
        assert len(list(stream("evaluation", [{"a": "x", "b": "y"}]))) == 1
      next(training)


def test_a_metric_of_what_nobody_computes_is_refused_in_words():
  import seqio

  from fat5_jax.data import sources, tasks
  from fat5_jax.errors import UserError

  def perplexity(targets, losses):
    return {"perplexity": float(np.mean(losses))}

  with pytest.raises(UserError, match="perplexity asks for targets, losses"):
    tasks.text_to_text(
      sources.Function({"train": lambda: []}),
      "{a}",
      "{b}",
      seqio.ByteVocabulary(),
      metrics=(perplexity,),
    )


# ---- What a dry run tells ----------------------------------------------------


def test_a_dry_run_tells_new_parameters_and_both_sentences(user, capfd):
  said = run(
    capfd,
    "train",
    "--gin_file=pairs.gin",
    "--gin.MODEL_DIR=new",
    "--gin.INITIAL_CHECKPOINT_PATH=pairs",
    "--gin.REINITIALIZE=^classifier/",
    "--dry_run",
  ).err
  assert "initialised: classifier/bias, classifier/kernel" in said
  assert " </s> because so" in said
  assert said.index("total parameters") < said.index("total optimizers")
  assert not (user / "new").exists()


def test_a_dry_run_notices_a_missing_split_and_a_batch_above_the_data(
  user, capfd
):
  only = "--gin.sources.Files.splits={'train': 'train.tsv'}"
  flags = ("--gin_file=text.gin", "--gin.MODEL_DIR=new", "--dry_run")
  said = run(capfd, "train", *flags, only, status=1).err
  assert "has no split 'validation'" in said
  run(capfd, "train", *flags, only, "--gin.EVAL_SPLIT=None")
  said = run(capfd, "train", *flags, "--gin.BATCH_SIZE=13", status=1).err
  assert "has 12 rows, fewer than BATCH_SIZE = 13" in said
