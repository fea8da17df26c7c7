"""Every recipe builds, and every head trains, predicts and exports from gin."""

import json
import os
import types

from conftest import ROOT
import hf_models
import numpy as np
import pytest
import seqio
import super_glue_rows

from fat5_jax.checkpoints import load, reference
from fat5_jax.convert import hf, table
from fat5_jax.gin_config import cli, parse
import gin

# Recipe -> the devices that it is for, and where its plan is.
PODS = {
  "xxl_v5e.gin": (256, ["xxl_v5e"]),
  "xxl_v5p.gin": (64, ["xxl_v5p"]),
  "mt5_xl_v6e.gin": (64, ["mt5_xl_v6e"]),
  "base_8k.gin": (8, ["base_8k_v5e"]),
  "base_32k.gin": (8, ["base_32k_v5e", "base_32k_h100"]),
  "base_128k.gin": (8, ["base_128k_v5e"]),
}
# Those that a test below trains with all of their parameters.
TRAINED = {"classify.gin", "tag.gin", "answer.gin", "embed.gin"}
RECIPES = sorted(
  {*os.listdir(os.path.join(ROOT, "gin", "recipes"))} - {*PODS} - TRAINED
)
SMALL = (
  "--gin.BATCH_SIZE=4",
  "--gin.DTYPE=float32",
  "--gin.TRAIN_STEPS_RELATIVE=4",
  "--gin.EVAL_PERIOD=2",
  "--gin.EVAL_STEPS=2",
  "--gin.STATS_PERIOD=2",
  # Compiles in half the time.
  "--gin.ATTENTION=reference",
)

# One worker: its fixtures are made once.
pytestmark = pytest.mark.xdist_group("recipes")
WORDS = "red green blue round square big small far near old".split()


@pytest.fixture(scope="module")
def user(tmp_path_factory):
  """What a user has: a byte-level T5 in HF's format, and files of data."""
  folder = tmp_path_factory.mktemp("user")
  sizes = dict(vocab_size=384, num_layers=1, num_decoder_layers=2)
  hf_models.make("t5_1_1", folder / "theirs", **sizes)
  config, leaves = hf.open_model(folder / "theirs")
  hf.to_pretrained(config, leaves, folder / "t5", seqio.ByteVocabulary(125))

  rng = np.random.default_rng(0)
  sentences = [" ".join(rng.choice(WORDS, 4)) for _ in range(24)]
  glue = folder / "glue" / "SST-2"
  glue.mkdir(parents=True)
  lines = [f"{s}\t{i % 2}\n" for i, s in enumerate(sentences)]
  for file in ("train", "dev"):
    (glue / f"{file}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
  (glue / "test.tsv").write_text(
    "index\tsentence\n"
    + "".join(f"{i}\t{s}\n" for i, s in enumerate(sentences))
  )
  (folder / "text").mkdir()
  for file in ("train", "validation"):
    (folder / "text" / f"{file}.txt").write_text("\n".join(sentences))
  (folder / "super_glue").mkdir()
  super_glue_rows.write(folder / "super_glue")
  sts = folder / "glue" / "STS-B"
  sts.mkdir()
  for file in ("train", "dev"):
    (sts / f"{file}.tsv").write_text(
      "sentence1\tsentence2\tscore\n"
      + "".join(f"{s}\t{s[::-1]}\t{i % 6}\n" for i, s in enumerate(sentences))
    )
  (folder / "tags.conll").write_text(
    "\n\n".join(
      "\n".join(
        f"{w}\t{'B-COLOR' if w in WORDS[:3] else 'O'}" for w in s.split()
      )
      # One is longer than the others' batches are wide.
      for s in [*sentences, " ".join(sentences[:5])]
    )
  )
  (folder / "qa.jsonl").write_text(
    "".join(
      json.dumps(
        {
          "id": f"q{i}",
          "question": "which comes first?",
          "context": s * 3,
          "answers": {"text": [s.split()[0]], "answer_start": [0]},
        }
      )
      + "\n"
      for i, s in enumerate(sentences)
    )
  )
  (folder / "pairs.tsv").write_text(
    "first\tsecond\n" + "".join(f"{s}\t{s.upper()}\n" for s in sentences)
  )
  (folder / "lines.txt").write_text("red\nblue round\n")
  return folder


GLUE = ("--gin.DATA_DIR=glue",)
FILES = lambda name: (
  f"--gin.TRAIN_FILES={name}",
  f"--gin.VALIDATION_FILES={name}",
)
NEEDS = {
  "span_corruption.gin": (
    "--gin_file=models/from_checkpoint.gin",
    "--gin.DATA_DIR=text",
  ),
  "answer.gin": (
    *FILES("qa.jsonl"),
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 48}",
  ),
  "embed.gin": FILES("pairs.tsv"),
  "fat5_from_scratch.gin": (
    "--gin.TRAIN_FILES={'text/train.txt': 2.0}",
    "--gin.VALIDATION_FILES=text/validation.txt",
    "--gin.config.T5Config.vocab_size=32128",
  ),
  "lm_head.gin": (*GLUE, "--gin.HEAD_WIDTHS=(24, 32)"),
  "super_glue.gin": ("--gin.DATA_DIR=super_glue",),
  "tag.gin": FILES("tags.conll"),
  "quickstart.gin": (),
}


def run(user, monkeypatch, capfd, command, *flags):
  """Runs a command in this process, as the user types it; what it prints."""
  monkeypatch.chdir(user)
  gin.clear_config()
  status = cli.main(command, list(flags))
  captured = capfd.readouterr()
  gin.clear_config()
  assert status == 0, captured.err
  return captured


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_builds(recipe, user, monkeypatch, capfd, shared_vocabulary):
  flags = [f"--gin_file=recipes/{recipe}", *NEEDS.get(recipe, GLUE)]
  if recipe in ("glue_cpu.gin", "tiny_cpu.gin", "fat5_from_scratch.gin"):
    flags.append(f"--gin.VOCAB_FILE={shared_vocabulary}")
  elif recipe != "quickstart.gin":
    flags.append("--gin.INITIAL_CHECKPOINT_PATH=t5")
  if recipe == "tiny_cpu.gin":
    flags[0] = "--gin_file=recipes/classify.gin"
    flags.insert(1, "--gin_file=recipes/tiny_cpu.gin")
  text = run(
    user,
    monkeypatch,
    capfd,
    "train",
    *flags,
    "--gin.MODEL_DIR=out",
    "--gin.BATCH_SIZE=4",
    "--dry_run",
  ).err
  assert "dry run: nothing was trained" in text
  assert not (user / "out").exists()
  frozen = int(text.split("frozen: ")[1].split()[0].replace(",", ""))
  assert (frozen > 0) == (recipe in ("lora.gin", "lm_head.gin"))


@pytest.mark.parametrize("recipe", PODS)
def test_a_recipe_for_a_pod_divides_over_it_and_its_plan_fits(recipe):
  from fat5_jax.distributed.sharding import Partitioner

  count, plans = PODS[recipe]
  parse.parse([f"recipes/{recipe}"], [], [], "Run", cli.NOT_PLANNED)
  partitioner = gin.get_configurable("sharding.Partitioner")(
    devices=[types.SimpleNamespace(process_index=0)] * count
  )
  with gin.config_scope("train"):
    data = gin.get_configurable("pipeline.DatasetConfig")()
  config = gin.get_configurable("config.T5Config")()
  gin.clear_config()
  assert isinstance(partitioner, Partitioner)
  partitioner.check(config, data.batch_size, data.task_feature_lengths)
  for name in plans:
    path = os.path.join(ROOT, "docs", "plans", f"{name}.json")
    with open(path, encoding="utf-8") as file:
      (found,) = json.load(file)
    assert found["fits"] and found["decode"]["fits"]


@pytest.fixture(scope="module")
def shared_vocabulary(user):
  """A SentencePiece model of the tests' own."""
  import sentencepiece

  prefix = str(user / "spiece")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([" ".join(WORDS)] * 50),
    model_prefix=prefix,
    vocab_size=40,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return f"{prefix}.model"


def train(user, monkeypatch, capfd, recipe, name, *flags):
  return run(
    user,
    monkeypatch,
    capfd,
    "train",
    f"--gin_file=recipes/{recipe}",
    "--gin.INITIAL_CHECKPOINT_PATH=t5",
    f"--gin.MODEL_DIR={name}",
    *SMALL,
    *NEEDS.get(recipe, GLUE),
    *flags,
  ).err


def frozen_parameters(user, name):
  """How many the run's model-info.txt tells."""
  text = (user / name / "model-info.txt").read_text()
  return int(text.split("frozen: ")[1].split()[0].replace(",", ""))


def metrics_of(user, name, task):
  path = user / name / "inference_eval" / f"{task}-metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_classify(user, monkeypatch, capfd):
  text = train(user, monkeypatch, capfd, "classify.gin", "cls")
  assert "initialised: classifier/bias" in text
  assert frozen_parameters(user, "cls") == 0
  found = metrics_of(user, "cls", "glue_sst2_classes")
  assert [row["step"] for row in found] == [2, 4]
  assert 0 <= found[0]["accuracy"] <= 100
  config = reference.read_config(reference.find(str(user / "cls")))
  assert config.head.label_names == ("negative", "positive")
  assert config.num_decoder_layers == 0
  # The run folder alone evaluates, and predicts lines and GLUE's test set.
  run(
    user,
    monkeypatch,
    capfd,
    "eval",
    "--gin_file=recipes/classify.gin",
    "--gin.MODEL_DIR=cls",
    *GLUE,
  )
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.MODEL_DIR=cls",
    "--gin.INPUT=lines.txt",
  ).out
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["inputs"] for row in rows] == ["red", "blue round"]
  assert all(row["prediction"] in ("negative", "positive") for row in rows)
  run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin_file=recipes/classify.gin",
    "--gin_file=runs/infer_task.gin",
    "--gin.MODEL_DIR=cls",
    "--gin.INFER_SPLIT=test",
    "--gin.OUTPUT=SST-2.tsv",
    "--gin.OUTPUT_FORMAT=glue",
    *GLUE,
  )
  lines = (user / "SST-2.tsv").read_text().splitlines()
  assert lines[0] == "index\tprediction" and len(lines) == 25
  assert all(line.split("\t")[1] in "01" for line in lines[1:])
  # A part of it keeps its numbers.
  (user / "part.tsv").write_text("index\tsentence\n17\tred\n3\tround\n")
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.MODEL_DIR=cls",
    "--gin.INPUT=part.tsv",
    "--gin.OUTPUT_FORMAT=glue",
  ).out
  assert [x.split("\t")[0] for x in out.splitlines()] == ["index", "17", "3"]

  # A classifier of its own kind goes on from it, its head anew where asked.
  shapes = table.read_all(
    reference.open_params(reference.find(str(user / "cls")))[1]
  )
  again = load.load_params(
    str(user / "cls"),
    config,
    shapes,
    reinitialize=r"^classifier/",
    initialise=lambda names: dict.fromkeys(names, 0),
  )
  assert again[2] == ["classifier/bias", "classifier/kernel"]


def test_a_checkpoint_without_the_head_is_no_classifier(user):
  from fat5_jax.errors import UserError
  from fat5_jax.inference.loading import load_model
  from fat5_jax.models import factory
  from fat5_jax.models.config import HeadConfig

  config = reference.model_config(str(user / "t5"))
  model = factory.create(config, HeadConfig("token_classification"))
  with pytest.raises(UserError, match="has no classifier/bias"):
    load_model(str(user / "t5"), model)


def test_regression(user, monkeypatch, capfd):
  train(
    user,
    monkeypatch,
    capfd,
    "classify.gin",
    "sts",
    "--gin.MIXTURE_OR_TASK_NAME=glue_stsb_classes",
  )
  assert "pearson_corrcoef" in metrics_of(user, "sts", "glue_stsb_classes")[0]
  # A file with pairs has a second column.
  (user / "rows.tsv").write_text("inputs\tsecond\nred\tround\n")
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.MODEL_DIR=sts",
    "--gin.INPUT=rows.tsv",
  ).out
  (row,) = map(json.loads, out.splitlines())
  assert row["inputs"] == "red </s> round"
  assert isinstance(row["prediction"], float)


def test_enct5_by_its_prompt_alone(user, monkeypatch, capfd):
  text = train(
    user,
    monkeypatch,
    capfd,
    "enct5.gin",
    "enct5",
    r"--gin.TRAINABLE=^(prompt_embedder|classifier)/",
  )
  assert "of them training" in text
  _, before = reference.open_params(reference.find(str(user / "t5")))
  config, after = reference.open_params(reference.find(str(user / "enct5")))
  assert config.num_decoder_layers == 1
  for path, leaf in after.items():
    if path in before:
      assert np.array_equal(leaf.read(), before[path].read()), path
  info = (user / "enct5" / "model-info.txt").read_text()
  assert info.count("frozen") > 20 and frozen_parameters(user, "enct5") > 0


def test_tag(user, monkeypatch, capfd):
  train(user, monkeypatch, capfd, "tag.gin", "tags")
  assert frozen_parameters(user, "tags") == 0
  assert "entity_f1" in metrics_of(user, "tags", "tagging")[0]
  (user / "words.txt").write_text("a red house\nold\n")
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.MODEL_DIR=tags",
    "--gin.INPUT=words.txt",
    "--gin.OUTPUT_FORMAT=conll",
  ).out
  words = [line.split("\t")[0] for line in out.splitlines()]
  assert words == ["a", "red", "house", "", "old", ""]
  assert all(
    line.split("\t")[1] in ("O", "B-COLOR") for line in out.splitlines() if line
  )


def test_answer(user, monkeypatch, capfd):
  train(user, monkeypatch, capfd, "answer.gin", "qa")
  assert frozen_parameters(user, "qa") == 0
  assert set(metrics_of(user, "qa", "spans")[0]) == {"step", "em", "f1"}
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.MODEL_DIR=qa",
    "--gin.INPUT=qa.jsonl",
    "--gin.MAX_INPUT_LENGTH=48",
    "--gin.OUTPUT_FORMAT=squad",
  ).out
  answers = json.loads(out)
  assert sorted(answers) == sorted(f"q{i}" for i in range(24))
  contexts = {
    row["id"]: row["context"]
    for row in map(json.loads, (user / "qa.jsonl").read_text().splitlines())
  }
  assert all(text in contexts[name] for name, text in answers.items())


def test_embed(user, monkeypatch, capfd):
  text = train(user, monkeypatch, capfd, "embed.gin", "embed")
  assert "training_eval/pairs" in text
  assert frozen_parameters(user, "embed") == 0
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.MODEL_DIR=embed",
    "--gin.INPUT=lines.txt",
  ).out
  vectors = [json.loads(line)["embedding"] for line in out.splitlines()]
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_lora_trains_resumes_and_is_exported(user, monkeypatch, capfd):
  text = train(
    user, monkeypatch, capfd, "lora.gin", "lora", "--gin.EVAL_PERIOD=0"
  )
  assert "lora_a" in text
  again = train(
    user,
    monkeypatch,
    capfd,
    "lora.gin",
    "lora",
    "--gin.TRAIN_STEPS_RELATIVE=6",
    "--gin.EVAL_PERIOD=0",
  )
  assert "going on from step 4" in again
  from fat5_jax.convert import formats, peft

  config, leaves = reference.open_params(reference.find(str(user / "lora")))
  _, base = reference.open_params(reference.find(str(user / "t5")))
  for path, leaf in base.items():
    assert np.array_equal(leaf.read(), leaves[path].read()), path
  assert any(
    np.abs(leaf.read()).max() > 0
    for path, leaf in leaves.items()
    if path[-1] == "lora_b"
  )
  peft.to_peft(config, leaves, user / "adapter", str(user / "t5"))
  found_config, found = formats.open_model("peft", str(user / "adapter"))
  assert found_config.lora == config.lora
  assert all(
    np.array_equal(found[path].read(), leaves[path].read()) for path in leaves
  )
  # The adapter predicts as it is.
  out = run(
    user,
    monkeypatch,
    capfd,
    "infer",
    "--gin.CHECKPOINT_PATH=adapter",
    "--gin.MODEL_DIR=lora",
    "--gin.INPUT=lines.txt",
    "--gin.MAX_OUTPUT_LENGTH=4",
  ).out
  assert len(out.splitlines()) == 2
