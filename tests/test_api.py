"""Python's door: what `fat5_jax.load` gives does what the commands do."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

from conftest import ROOT
import hf_models
import jax
import numpy as np
import pytest

import fat5_jax
from fat5_jax import trees
from fat5_jax.errors import UserError
from fat5_jax.gin_config import cli
import gin

# One worker: its fixtures are made once.
pytestmark = pytest.mark.xdist_group("api")

ROWS = [{"text": f"number {i}", "answer": str(i)} for i in range(12)]
# Settings of a run that takes seconds.
QUICK = {"steps": 2, "batch_size": 4, "max_target_tokens": 8}


def make_byt5(folder, **changes):
  """A tiny random model with its tokenizer; transformers' model."""
  model = hf_models.make("byt5", folder, vocab_size=384, **changes)
  config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """(folder, transformers' model)."""
  folder = tmp_path_factory.mktemp("api") / "hf"
  folder.mkdir()
  return folder, make_byt5(folder, num_layers=1)


def load(theirs, **options):
  quick = {"dtype": "float32", "attention": "reference"}
  return fat5_jax.load(theirs[0], **quick | options)


def their_scores(model, inputs, targets):
  """-loss * tokens of each pair, by transformers, one at a time."""
  import torch

  ids = lambda text: torch.tensor([[b + 3 for b in text.encode()] + [1]])
  with torch.no_grad():
    losses = [
      model(input_ids=ids(x), labels=ids(y)).loss.item() * ids(y).shape[1]
      for x, y in zip(inputs, targets)
    ]
  return -np.array(losses)


def bits(parameters):
  flat = trees.flatten(parameters)
  return {name: np.asarray(x).tobytes() for name, x in flat.items()}


# ---- The package -------------------------------------------------------------


def test_the_package_answers_before_jax_is_there():
  program = (
    "import sys, time; t = time.monotonic()\n"
    "import fat5_jax; t = time.monotonic() - t\n"
    "assert not {'jax', 'tensorflow', 'seqio', 'numpy'} & set(sys.modules)\n"
    "assert fat5_jax.__version__ and 'load' in dir(fat5_jax)\n"
    "assert t < 0.3, t\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    _ = fat5_jax.laod


# ---- Predictions -------------------------------------------------------------


def test_a_folder_of_hugging_face_predicts_in_three_lines(theirs):
  import torch

  texts = ["hello", "été 日本", "a much longer text than the others, 1234"]
  model = load(theirs)
  answers = model.generate(texts, max_tokens=12)
  for text, answer in zip(texts, answers):
    ids = torch.tensor([[b + 3 for b in text.encode()] + [1]])
    tokens = theirs[1].generate(ids, max_new_tokens=12, do_sample=False)[0][1:]
    end = tokens.tolist().index(1) if 1 in tokens else len(tokens)
    assert answer == model.vocabulary.decode(tokens.tolist()[:end])


@pytest.mark.parametrize("family", ["byt5", "t5_1_0"])
def test_scores_are_those_of_transformers(family, tmp_path):
  """-loss * tokens, of projections of their own and tied ones."""
  model = hf_models.make(family, tmp_path, vocab_size=384)
  config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  inputs = ["a", "a longer one " * 9, "日本"]
  targets = ["yes", "n", "é" * 40]
  ours = fat5_jax.load(tmp_path, dtype="float32")
  found = ours.score(inputs, targets, batch_size=2)
  wanted = their_scores(model, inputs, targets)
  np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-5)
  # An empty target is its end alone; order and batches change nothing.
  both = ours.score(["c", *inputs[::-1]], ["", *targets[::-1]])
  np.testing.assert_allclose(both[1:], found[::-1], rtol=1e-6, atol=1e-5)
  last = their_scores(model, ["c"], [""])
  np.testing.assert_allclose(both[:1], last, rtol=2e-6, atol=2e-5)


def test_a_vector_is_the_mean_of_the_encoder_of_length_one(theirs):
  import torch

  texts = ["hello", "a longer text", "é"]
  found = load(theirs).embed(texts)
  for text, vector in zip(texts, found):
    ids = torch.tensor([[b + 3 for b in text.encode()] + [1]])
    with torch.no_grad():
      x = theirs[1].encoder(ids).last_hidden_state[0].numpy().mean(axis=0)
    np.testing.assert_allclose(vector, x / np.linalg.norm(x), atol=2e-6)
  assert load(theirs).embed([]).shape == (0, 32)


def test_heads_answer_with_probabilities(theirs):
  model = load(theirs)
  pairs = model.with_head("sequence_classification", labels=["no", "yes", "?"])
  for found in pairs.classify([("a", "b"), ("é", "longer " * 20)]):
    assert abs(sum(found["probabilities"].values()) - 1) < 1e-5
    assert found["probability"] == max(found["probabilities"].values())
    assert found["probabilities"][found["prediction"]] == found["probability"]
  single, alone = pairs.classify(["a"]), pairs.classify([{"inputs": "a"}])
  assert single == alone

  words = [["New York", "is", "日本"], ["one"], "by spaces too"]
  tagger = model.with_head("token_classification", labels=["O", "B-X"])
  for given, found in zip(words, tagger.tag(words)):
    wanted = given.split() if isinstance(given, str) else given
    assert found["words"] == wanted
    assert len(found["tags"]) == len(found["probabilities"]) == len(wanted)
    assert all(0.5 <= p <= 1 for p in found["probabilities"])

  finder = model.with_head("question_answering")
  (found,) = finder.answer(["where?"], ["in the old house"])
  assert found["text"] in "in the old house" and found["text"]
  # The product of two softmaxes over what may be an answer.
  ids = [b + 3 for b in b"where?"] + [1]
  first, context = len(ids), [b + 3 for b in b"in the old house"]
  tokens = np.array([[*ids, *context, 1]], np.int32)
  logits = finder._load().model.apply({"params": finder.parameters}, tokens)
  start, end = np.asarray(logits)[0, first : first + len(context)].T
  product = np.exp(start) / np.exp(start).sum()
  product = product[:, None] * np.exp(end) / np.exp(end).sum()
  # No answer ends before it begins.
  wanted = np.triu(product).max()
  np.testing.assert_allclose(found["probability"], wanted, atol=2e-6)


# ---- Rows --------------------------------------------------------------------


def kinds_of_rows(tmp_path):
  import datasets
  import pandas

  frame = pandas.DataFrame(ROWS)
  frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
  frame.to_csv(tmp_path / "rows.csv", index=False)
  frame.to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
  frame.to_parquet(tmp_path / "rows.parquet")
  yield "frame", frame
  yield "data set", datasets.Dataset.from_list(ROWS)
  for ending in ("jsonl", "csv", "tsv", "parquet"):
    yield ending, tmp_path / f"rows.{ending}"


def test_all_kinds_of_rows_are_the_same_examples(theirs, tmp_path):
  from fat5_jax.api import data

  model = load(theirs)

  def examples(rows, validation):
    task, split = data.task_of(
      rows, validation, model.config, model.vocabulary, "say {text}", "answer"
    )
    assert split == "validation"
    return [list(task.source.examples(s)) for s in ("train", split)]

  wanted = examples(ROWS, ROWS)
  assert wanted[0][3] == {"inputs": "say number 3", "targets": "3"}
  for kind, rows in kinds_of_rows(tmp_path):
    assert examples(rows, rows) == wanted, kind
    assert examples(rows, ROWS) == wanted, kind
  # A SeqIO task is taken as it is.
  task, _ = data.task_of(
    ROWS, None, model.config, model.vocabulary, "text", "{answer}"
  )
  assert data.task_of(task, None, model.config, model.vocabulary) == (
    task,
    None,
  )
  assert data.longest(task) == (12, {"inputs": 10, "targets": 3})


def test_missing_cells_and_class_labels_are_read_as_hugging_face_means(theirs):
  import datasets
  import pandas

  from fat5_jax.api import data

  names = datasets.ClassLabel(names=["no", "yes"])
  features = datasets.Features({"x": datasets.Value("string"), "y": names})
  rows = datasets.Dataset.from_list(
    [{"x": "a", "y": 1}, {"x": "b", "y": 0}], features=features
  )
  model = load(theirs)
  task, _ = data.task_of(rows, None, model.config, model.vocabulary, "x", "y")
  assert [e["targets"] for e in task.source.examples("train")] == ["yes", "no"]
  frame = pandas.DataFrame({"x": ["a", None], "y": ["b", "c"]})
  task, _ = data.task_of(frame, None, model.config, model.vocabulary, "x", "y")
  with pytest.raises(UserError, match="rows, row 2: column 'x' is empty"):
    list(task.source.examples("train"))


# ---- Fine-tuning -------------------------------------------------------------


def close(targets, predictions):
  """A metric of one's own."""
  return {"same_length": float(len(targets) == len(predictions))}


@pytest.fixture(scope="module")
def trained(theirs):
  """(the run, the model before as bits)."""
  model = load(theirs)
  before = bits(model.parameters)
  run = model.fine_tune(
    ROWS,
    "say {text}",
    "answer",
    validation=ROWS,
    metrics=["exact_match", close],
    **QUICK,
  )
  assert run.model is model
  return run, before


def test_a_fine_tuned_model_scores_and_transformers_loads_its_export(
  trained, tmp_path
):
  import transformers

  run, before = trained
  model = run.model
  assert bits(model.parameters) != before
  folder = model.export(tmp_path / "out", to="hf", check_transformers=False)
  again = transformers.T5ForConditionalGeneration.from_pretrained(folder)
  found = model.score(["number 3", "number 11"], ["3", "11"])
  # The model is asked in the words of its training.
  wanted = their_scores(
    again.eval(), ["say number 3", "say number 11"], ["3", "11"]
  )
  np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-5)
  whole = model.score(["say number 3"], ["3"], use_template=False)
  np.testing.assert_allclose(whole, found[:1], rtol=1e-6)
  assert model.generate(["number 3"]) == model.generate([{"text": "number 3"}])
  # What the tool writes of the run folder is the same.
  tool = os.path.join(ROOT, "tools", "convert_checkpoint.py")
  by_tool = tmp_path / "by_tool"
  arguments = [run.folder, str(by_tool), "--to", "hf", "--no_transformers"]
  subprocess.run(
    [sys.executable, tool, *arguments],
    check=True,
    env=os.environ | {"PYTHONPATH": ROOT},
  )
  read = lambda p: (p / "model.safetensors").read_bytes()
  assert read(by_tool) == read(tmp_path / "out")


def test_another_optimizer_needs_the_weights_alone(trained, tmp_path):
  run, _ = trained
  model = fat5_jax.load(run.folder)
  with pytest.raises(UserError, match="to='fat5'.*writes"):
    model.fine_tune(ROWS, "text", "answer", **QUICK, optimizer="adamw")
  alone = fat5_jax.load(model.export(tmp_path / "weights", to="fat5"))
  assert bits(alone.parameters) == bits(run.model.parameters)


def test_a_run_shows_its_metrics_and_curves(trained):
  run, _ = trained
  frame = run.metrics
  assert list(frame.columns) == ["step", "dataset", "metric", "value"]
  assert "train" in set(frame.dataset)
  assert run.results == {"exact_match": 0.0, "same_length": 1.0}
  assert run.step == 2 and not run.stopped
  assert run._repr_png_().startswith(b"\x89PNG")
  assert "exact_match 0" in repr(run)


GIN = """
from __gin__ import dynamic_registration
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks

include 'runs/finetune.gin'
include 'models/from_checkpoint.gin'

MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.Files()
  inputs = 'say {text}'
  targets = '{answer}'
  vocabulary = %VOCABULARY
sources.Files.splits = {'train': 'rows.jsonl', 'validation': 'rows.jsonl'}
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}
DROPOUT_RATE = 0.1
"""
CLASSES = """
from __gin__ import dynamic_registration
import fat5_jax.data.head_tasks as head_tasks
import fat5_jax.data.sources as sources

include 'recipes/classify.gin'

MIXTURE_OR_TASK_NAME = @head_tasks.classification()
head_tasks.classification:
  source = @sources.Files()
  inputs = ('{text}', 'is {answer}')
  label = 'label'
  label_names = ('even', 'odd')
  vocabulary = %VOCABULARY
sources.Files.splits = {'train': 'rows.jsonl', 'validation': 'rows.jsonl'}
TASK_FEATURE_LENGTHS = {'inputs': 32}
"""


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_gin_and_python_train_the_same_bits(
  kind, theirs, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with open("rows.jsonl", "w") as file:
    for i, row in enumerate(ROWS):
      file.write(json.dumps(row | {"label": ("even", "odd")[i % 2]}) + "\n")
  with open("run.gin", "w") as file:
    file.write(GIN if kind == "text" else CLASSES)
  flags = {
    "INITIAL_CHECKPOINT_PATH": theirs[0],
    "MODEL_DIR": "by_gin",
    "BATCH_SIZE": 4,
    "TRAIN_STEPS_RELATIVE": 3,
    "RANDOM_SEED": 7,
    "ATTENTION": "reference",
    # Its evaluation is compiled twice: one of the two kinds shows it.
    "EVAL_SPLIT": "validation" if kind == "classes" else None,
  }
  gin.clear_config()
  flags = [f"--gin.{name}={value}" for name, value in flags.items()]
  assert cli.main("train", ["--gin_file=run.gin", *flags]) == 0
  gin.clear_config()

  model = fat5_jax.load(theirs[0], attention="reference")
  columns = {"inputs": "say {text}", "targets": "answer"}
  lengths = {"max_input_tokens": 16, "max_target_tokens": 8}
  if kind == "classes":
    model = model.with_head("sequence_classification", labels=["even", "odd"])
    columns = {"inputs": ["text", "is {answer}"], "targets": "label"}
    lengths = {"max_input_tokens": 32}
  model.fine_tune(
    "rows.jsonl",
    **columns,
    **lengths,
    validation="rows.jsonl" if kind == "classes" else None,
    steps=3,
    batch_size=4,
    seed=7,
    run_folder="by_python",
  )
  by_gin = fat5_jax.load("by_gin")
  assert bits(model.parameters) == bits(by_gin.parameters)
  rows = lambda name: [
    line
    for line in open(f"{name}/metrics.csv").read().splitlines()
    if "timing" not in line
  ]
  assert rows("by_python") == rows("by_gin")


def test_a_run_that_ctrl_c_stops_is_saved_and_the_same_call_goes_on(
  theirs, tmp_path
):
  folder = tmp_path / "run"

  def interrupt():
    while not (folder / "checkpoint_0").exists():
      time.sleep(0.05)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)

  def tune(steps):
    labels = [row["answer"] for row in ROWS]
    model = load(theirs).with_head("sequence_classification", labels)
    return model.fine_tune(
      ROWS, "text", "answer", steps=steps, dropout=0.0, run_folder=folder
    )

  threading.Thread(target=interrupt, daemon=True).start()
  run = tune(100_000)
  assert run.stopped and 0 < run.step < 100_000
  assert run.model.path == str(folder / f"checkpoint_{run.step}")
  again = tune(run.step + 2)
  assert not again.stopped and again.step == run.step + 2


def test_what_is_frozen_stays_and_lora_trains_alone(theirs, tmp_path):
  model = load(theirs).with_lora(rank=2).freeze("^decoder/")
  base = bits(load(theirs).parameters)
  run = model.fine_tune(
    ROWS, "text", "answer", **QUICK, run_folder=tmp_path / "run"
  )
  after = bits(model.parameters)
  assert {name: after[name] for name in base} == base
  moved = [n for n in after if n[-1] == "lora_b" and any(after[n])]
  assert moved and all(name[0] == "encoder" for name in moved)
  # The adapter beside its base is the model again.
  adapter = model.export(tmp_path / "adapter", to="peft")
  again = fat5_jax.load(adapter, dtype="float32")
  assert bits(again.parameters) == after
  assert run.model.config.lora.rank == 2


OWN = """
import flax.linen as nn


class MyHead(nn.Module):
  width: int = 4

  @nn.compact
  def __call__(self, x, *, enable_dropout):
    return nn.gelu(nn.Dense(self.width)(x))


def found(targets, predictions):
  return {"found": float(len(predictions))}
"""


def test_a_head_and_a_metric_of_ones_own_are_trained_and_loaded_again(
  theirs, tmp_path, monkeypatch
):
  (tmp_path / "my_heads.py").write_text(OWN)
  monkeypatch.syspath_prepend(str(tmp_path))
  import my_heads

  labels = ["even", "odd"]
  rows = [r | {"label": labels[i % 2]} for i, r in enumerate(ROWS)]
  model = load(theirs).with_head(
    "sequence_classification", labels=labels, module=my_heads.MyHead(width=6)
  )
  run = model.fine_tune(
    rows,
    "text",
    "label",
    validation=rows,
    metrics=[my_heads.found],
    steps=2,
    run_folder=tmp_path / "run",
  )
  assert run.results == {"found": 12.0}
  with pytest.raises(UserError, match="head_module=my_heads:MyHead"):
    fat5_jax.load(tmp_path / "run")
  program = (
    "import json, sys, fat5_jax\n"
    "model = fat5_jax.load('run', head_module='my_heads:MyHead')\n"
    "print(json.dumps(model.classify(['number 1'])))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == model.classify(["number 1"])
  by_class = fat5_jax.load(tmp_path / "run", head_module=my_heads.MyHead)
  assert bits(by_class.parameters) == bits(model.parameters)
  with pytest.raises(UserError, match="a module of your own"):
    model.export(tmp_path / "out")


# ---- Mistakes ----------------------------------------------------------------

TUNE = {"inputs": "text", "targets": "answer", "steps": 1}
CASES = {
  "one text": (lambda m: m.generate("a"), "texts is one text"),
  "no texts": (lambda m: m.generate(3), "texts is a int"),
  "a number": (lambda m: m.generate(["a", 3]), r"texts\[1\] is 3"),
  "surrogate": (lambda m: m.generate(["\ud800"]), r"texts\[0\]: half a"),
  "blank": (lambda m: m.generate(["a", " "]), r"texts\[1\]: .*is empty"),
  "a pair": (lambda m: m.generate([("a", "b")]), r"texts\[0\] is 2 texts"),
  "beams": (lambda m: m.generate(["a"], num_beams=0), "num_beams"),
  "sampling": (lambda m: m.generate(["a"], top_p=2.0), "top_p"),
  "new tokens": (lambda m: m.generate(["a"], max_new_tokens=4), "max_tokens"),
  "unknown": (lambda m: m.generate(["a"], num_beam=4), "'num_beams'"),
  "batch": (lambda m: m.generate(["a"], batch_size=0), "batch_size = 0"),
  "lengths": (lambda m: m.score(["a"], ["b", "c"]), "1 inputs and 2 targets"),
  "target": (lambda m: m.score(["a"], [None]), r"targets\[0\] is None"),
  "no head": (lambda m: m.classify(["a"]), "with_head"),
  "no tags": (lambda m: m.tag([["a"]]), "with_head"),
  "no spans": (lambda m: m.answer(["a"], ["b"]), "with_head"),
  "kind": (lambda m: m.with_head("classifier"), "A head is one of"),
  "labels": (lambda m: m.with_head("token_classification"), "needs labels"),
  "one label": (lambda m: m.with_head("enct5", "a"), "must be a list"),
  "twice": (lambda m: m.with_head("enct5", ["a", "a"]), "twice"),
  "field": (lambda m: m.with_head("embedding", width=3), "width"),
  "rank": (lambda m: m.with_lora(0), "rank=0"),
  "target name": (lambda m: m.with_lora(targets=["wq"]), "wq"),
  "pattern": (lambda m: m.freeze("^nothing"), "matches no parameter"),
  "all": (lambda m: m.freeze("."), "nothing to train"),
  "to": (lambda m: m.export("x", to="onnx"), "It is one of"),
  "fresh": (lambda m: m.with_lora().export("x"), "fine_tune it first"),
  "no rows": (lambda m: m.fine_tune([], **TUNE), "rows is empty"),
  "None": (lambda m: m.fine_tune(None, **TUNE), "rows is None"),
  "rows": (lambda m: m.fine_tune(iter(ROWS), **TUNE), r"list\(rows\)"),
  "columns": (
    lambda m: m.fine_tune({"text": ["a"], "answer": ["b"]}, **TUNE),
    "list of dictionaries",
  ),
  "a row": (lambda m: m.fine_tune([("a", "b")], **TUNE), "row 1: .*tuple"),
  "no file": (lambda m: m.fine_tune("no.jsonl", **TUNE), "no such data file"),
  "column": (
    lambda m: m.fine_tune(ROWS, **TUNE | {"inputs": "texte"}),
    "row 1: no column 'texte'. Did you mean 'text'",
  ),
  "no inputs": (lambda m: m.fine_tune(ROWS, steps=1), "Columns: text, answer"),
  "no steps": (
    lambda m: m.fine_tune(ROWS, "text", "answer"),
    "one of steps and epochs",
  ),
  "epochs": (
    lambda m: m.fine_tune(ROWS, "text", "answer", epochs=-1),
    "epochs = -1",
  ),
  "metric": (
    lambda m: m.fine_tune(ROWS, **TUNE, metrics=["f2"]),
    "unknown metric 'f2'",
  ),
  "metrics": (lambda m: m.fine_tune(ROWS, **TUNE, metrics="rouge"), "a list"),
  "optimizer": (
    lambda m: m.fine_tune(ROWS, **TUNE, optimizer="sgd"),
    "optimizer = 'sgd'",
  ),
  "argument": (lambda m: m.fine_tune(ROWS, **TUNE, eval_step=3), "eval_steps"),
  "large batch": (
    lambda m: m.fine_tune(ROWS, **TUNE, batch_size=50),
    "batch_size to 12 or less",
  ),
  "rate": (
    lambda m: m.fine_tune(ROWS, **TUNE, learning_rate="fast"),
    "learning_rate = 'fast'",
  ),
  "dropout": (lambda m: m.fine_tune(ROWS, **TUNE, dropout=2), "dropout_rate=2"),
  "unknown label": (
    lambda m: m.with_head("sequence_classification", ["a", "b"]).fine_tune(
      ROWS, **TUNE
    ),
    "row 3: label '2' is neither one of a, b",
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_told_in_pythons_words(case, model):
  call, message = CASES[case]
  with pytest.raises(UserError, match=message) as caught:
    call(model)
  assert not re.search("--gin|gin file|MODEL_DIR|BATCH", str(caught.value))


@pytest.fixture(scope="module")
def model(theirs):
  return load(theirs)


def test_what_cannot_be_loaded_is_told(theirs, tmp_path):
  for given, options, message in (
    (tmp_path / "no", {}, "no such checkpoint"),
    (tmp_path, {}, "neither a Hugging Face folder"),
    (3, {}, "path is a int"),
    (theirs[0], {"dtype": "float16"}, "float16"),
    (theirs[0], {"mesh": {"rows": 2}}, "rows"),
    (theirs[0], {"vocabulary": tmp_path / "no.model"}, "no such data file"),
    (theirs[0], {"head_module": "a:B"}, "no head module"),
  ):
    with pytest.raises(UserError, match=message):
      fat5_jax.load(given, **options)
  hf_models.make("t5_1_0", tmp_path / "bare")
  model = fat5_jax.load(tmp_path / "bare")
  with pytest.raises(UserError, match="vocabulary='spiece.model'"):
    model.generate(["a"])


def test_a_model_that_is_gone_leaves_no_parameters(theirs):
  import gc
  import weakref

  model = load(theirs)
  model.score(["a"], ["b"])
  leaf = weakref.ref(model.parameters["token_embedder"]["embedding"])
  del model
  gc.collect()
  assert leaf() is None


def test_jax_is_where_the_model_lies(model):
  leaf = model.parameters["token_embedder"]["embedding"]
  assert isinstance(leaf, jax.Array) and model.config.vocab_size == 384
