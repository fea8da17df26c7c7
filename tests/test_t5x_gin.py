# ruff: noqa: F811 (fixtures are imported)
"""T5X's gin files run unmodified: what they say is done, told or refused."""

import csv
import glob
import json
import os

import numpy as np
import pytest
from t5x_user import (  # noqa: F401
  FINETUNE,
  OURS,
  SIZES,
  TINY,
  clean_gin,
  folder,
  refused,
  translated,
)

from fat5_jax.convert import orbax_files
from fat5_jax.gin_config import t5x
from fat5_jax.gin_config.t5x import ours
from fat5_jax.inference import decoding
import gin

# What gin calls or builds for `train`.
TRAIN = ours.FUNCTIONS["train"]


def parameters(model_dir):
  (path,) = glob.glob(f"{model_dir}/checkpoint_3/params")
  leaves = orbax_files.read_item(path)
  return {"/".join(k): np.asarray(leaf.read()) for k, leaf in leaves.items()}


# ---- A file of a user's own --------------------------------------------------


def test_a_t5x_file_and_ours_train_to_the_same_bits(folder, zygote):
  (folder / "ours.gin").write_text(OURS)
  for name, model_dir in (("mine", "t5x"), ("ours", "ours")):
    done = zygote.run(
      "train",
      [
        f"--gin_file={name}.gin",
        "--gin.DATA_DIR=data",
        f"--gin.MODEL_DIR={model_dir}",
      ],
      str(folder),
      seconds=300,
    )
    assert done.status == 0, done.stderr
  found, wanted = parameters("t5x"), parameters("ours")
  assert found.keys() == wanted.keys() and len(found) > 20
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name], name)
  rows = {}
  for model_dir in ("t5x", "ours"):
    with open(f"{model_dir}/metrics.csv") as file:
      rows[model_dir] = [
        row for row in csv.DictReader(file) if "timing" not in row["metric"]
      ]
  assert rows["t5x"] == rows["ours"]


def test_the_run_is_evaluated_and_predicted_by_t5x_files(folder, zygote):
  def run(command, *arguments):
    done = zygote.run(command, list(arguments), str(folder), seconds=300)
    assert done.status == 0, done.stderr
    return done.stdout + done.stderr

  run(
    "train", "--gin_file=mine.gin", "--gin.DATA_DIR=data", "--gin.MODEL_DIR=r"
  )
  model = [
    "--gin_file=t5x/examples/t5/byt5/small.gin",
    "--gin.MIXTURE_OR_TASK_NAME=wmt_t2t_ende_v003",
    "--gin.CHECKPOINT_PATH=r/checkpoint_3",
    "--gin.DATA_DIR=data",
    "--gin.DROPOUT_RATE=0.0",
    *TINY,
  ]
  run(
    "eval",
    *model,
    "--gin_file=t5x/configs/runs/eval.gin",
    "--gin.EVAL_OUTPUT_DIR=scores",
    "--gin.utils.DatasetConfig.split='validation'",
  )
  task = "wmt_t2t_ende_v003"
  with open(f"scores/inference_eval/{task}-metrics.jsonl") as file:
    scores = json.loads(file.readlines()[-1])
  # The same split, the same step: what training has measured itself.
  with open(f"r/inference_eval/{task}-metrics.jsonl") as file:
    assert json.loads(file.readlines()[-1]) == scores
  told = run(
    "infer",
    *model,
    "--gin_file=t5x/configs/runs/infer.gin",
    "--gin.INFER_OUTPUT_DIR=out",
    '--gin.TASK_FEATURE_LENGTHS={"inputs": 64, "targets": 48}',
  )
  with open(f"out/{task}-predict.jsonl-00000-of-00001") as file:
    rows = [json.loads(line) for line in file]
  assert len(rows) == 5 and all("prediction" in row for row in rows)
  assert "parameters stay float32" in told


def test_a_checkpoint_of_t5x_brings_its_step_and_its_model(folder, zygote):
  from test_formats import T5X

  from fat5_jax.models.config import T5Config

  config = T5Config(vocab_size=384, mlp_activations=("gelu", "linear"), **SIZES)
  theirs = T5X(config, scan=False, step=1_000_000)
  theirs.train()
  theirs.write(folder / "checkpoint_1000001")
  flags_of_both = ["--gin.DATA_DIR=data", "--tfds_data_dir=gs://x"]
  done = zygote.run(
    "train",
    [
      "--gin_file=mine.gin",
      "--gin.MODEL_DIR=r",
      "--gin.INITIAL_CHECKPOINT_PATH=checkpoint_1000001",
      "--gin.TRAIN_STEPS=1_000_003",
      *flags_of_both,
    ],
    str(folder),
    seconds=300,
  )
  assert done.status == 0, done.stderr
  told = done.stdout + done.stderr
  assert "checkpoint_1000001, step 1000001" in told
  assert "fresh optimizer" not in told
  assert os.path.isdir("r/checkpoint_1000003")
  # T5X's checkpoint brings no vocabulary: T5X's file has it.
  done = zygote.run(
    "infer",
    [
      "--gin_file=t5x/examples/t5/byt5/small.gin",
      "--gin_file=t5x/configs/runs/infer.gin",
      "--gin.MIXTURE_OR_TASK_NAME=wmt_t2t_ende_v003",
      "--gin.CHECKPOINT_PATH=checkpoint_1000001",
      "--gin.INFER_OUTPUT_DIR=out",
      "--gin.DROPOUT_RATE=0.0",
      '--gin.TASK_FEATURE_LENGTHS={"inputs": 64, "targets": 8}',
      *TINY,
      *flags_of_both,
    ],
    str(folder),
    seconds=300,
  )
  assert done.status == 0, done.stderr


# ---- What the operative configuration says -----------------------------------


def test_the_configuration_says_what_t5x_files_say(folder):
  flags_of_a_user = ["DATA_DIR = 'data'", "MODEL_DIR = 'r'"]
  translated(["mine.gin"], flags_of_a_user)
  said = lambda name: gin.query_parameter(name)
  # runs/finetune.gin of T5X, where ours has other values.
  assert said("checkpoints.SaveCheckpointConfig.period") == 5000
  assert said("checkpoints.SaveCheckpointConfig.keep") is None
  assert said("infer_eval/pipeline.DatasetConfig.task_feature_lengths") is None
  assert said("infer_eval/pipeline.DatasetConfig.pack") is False
  assert said("train_eval/pipeline.DatasetConfig.pack") is True
  assert said("train_eval/pipeline.DatasetConfig.seed") == 42
  # None is the run's own seed.
  assert said("train/pipeline.DatasetConfig.seed") is None
  assert said("config.T5Config.dtype") == "bfloat16"
  assert said("optimizers.create_learning_rate_scheduler.factors") == "constant"
  # Macros keep their names, so a run folder tells them.
  text = gin.config_str()
  for line in (
    "LOSS_NORMALIZING_FACTOR = 233472",
    f"train_script.{TRAIN}.loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR",
    f"train_script.{TRAIN}.total_steps = %TRAIN_STEPS",
    "train/pipeline.DatasetConfig.batch_size = %BATCH_SIZE",
  ):
    assert line in text


def test_what_t5x_leaves_open_is_t5xs_default(folder):
  (folder / "model.gin").write_text(
    """from __gin__ import dynamic_registration
import seqio
from t5x import models
from t5x import adafactor
from t5x.examples.t5 import network
MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = @network.Transformer()
  input_vocabulary = @seqio.ByteVocabulary()
  output_vocabulary = @seqio.ByteVocabulary()
  optimizer_def = @adafactor.Adafactor()
network.Transformer.config = @network.T5Config()
network.T5Config.vocab_size = 384
"""
  )
  translated(
    ["model.gin", "t5x/configs/runs/pretrain.gin"],
    [
      "MODEL_DIR = 'r'",
      "MIXTURE_OR_TASK_NAME = 'spoken_values'",
      "TASK_FEATURE_LENGTHS = {'inputs': 8, 'targets': 8}",
      "TRAIN_STEPS = 1",
    ],
  )
  said = lambda name: gin.query_parameter(name)
  assert said(f"{TRAIN}.z_loss") == 0.0  # Ours: 0.0001.
  assert said(f"{TRAIN}.loss_normalizing_factor") is None
  assert said("T5Config.dtype") == "float32"  # Ours: bfloat16.
  assert said("T5Config.dropout_rate") == 0.1  # Ours: 0.
  assert said("T5Config.mlp_activations") == ("relu",)
  assert said(f"{TRAIN}.infer_eval_dataset_cfg") is None
  assert said("create_learning_rate_scheduler.warmup_steps") == 10000


@pytest.mark.parametrize(
  "flag, parameter, value",
  [
    ("BATCH_SIZE = 8", "train/pipeline.DatasetConfig.batch_size", 8),
    ("train/utils.DatasetConfig.batch_size = 8", None, 8),
    ("train/DatasetConfig.batch_size = 8", None, 8),
    ("train/t5x.utils.DatasetConfig.batch_size = 8", None, 8),
    ("train_script.train.eval_period = 7", f"{TRAIN}.eval_period", 7),
    ("train.eval_period = 7", f"{TRAIN}.eval_period", 7),
    ("trainer.Trainer.num_microbatches = 2", f"{TRAIN}.num_microbatches", 2),
    ("trainer.Trainer.num_microbatches = 0", f"{TRAIN}.num_microbatches", None),
    ("TRAIN_STEPS_RELATIVE = 5", f"{TRAIN}.total_steps", None),
    ("RANDOM_SEED = 7", f"{TRAIN}.random_seed", 7),
    ("RANDOM_SEED = None", f"{TRAIN}.random_seed", 42),
    ("LABEL_SMOOTHING = 0.1", f"{TRAIN}.label_smoothing", 0.1),
    ("adafactor.Adafactor.beta1 = 0.9", "optimizers.adafactor.beta1", 0.9),
    (
      "models.EncoderDecoderModel.z_loss = 0.5",
      f"{TRAIN}.z_loss",
      0.5,
    ),
    ("EVAL_SPLIT = 'test'", "infer_eval/DatasetConfig.split", "test"),
    ("network.T5Config.emb_dim = 24", "T5Config.emb_dim", 24),
    (
      "partitioning.PjitPartitioner.num_partitions = 2",
      "Partitioner.num_partitions",
      2,
    ),
    (
      "partitioning.PjitPartitioner.model_parallel_submesh = (2, 1, 1, 2)",
      "Partitioner.num_partitions",
      None,
    ),
    (
      "partitioning.standard_logical_axis_rules.parameter_partitioning_dims"
      " = 2",
      "Partitioner.mesh",
      {"fsdp": -1},
    ),
    ("MESH = {'fsdp': 2}", "Partitioner.mesh", {"fsdp": 2}),
    ("utils.RestoreCheckpointConfig.path = ['r']", None, "r"),
    ("utils.CheckpointConfig.restore = None", None, None),
    ("utils.CheckpointConfig.save = None", None, 1),
    ("utils.SaveCheckpointConfig.keep = 2", None, 2),
  ],
)
def test_a_flag_in_any_form_counts_as_in_t5x(folder, flag, parameter, value):
  translated(
    ["mine.gin"], ["DATA_DIR = 'data'", "MODEL_DIR = 'r'", flag], paths=[]
  )
  parameter = (
    parameter
    or {
      "batch_size": "train/pipeline.DatasetConfig.batch_size",
      "path": "RestoreCheckpointConfig.path",
      "restore": "RestoreCheckpointConfig.path",
      "save": "SaveCheckpointConfig.keep",
      "keep": "SaveCheckpointConfig.keep",
    }[flag.split(" =")[0].rpartition(".")[2]]
  )
  found = gin.query_parameter(parameter)
  if isinstance(found, gin.config.ConfigurableReference):
    found = gin.query_parameter(f"{found.config_key[0]}/macro.value")
  assert found == value, gin.config_str()


def test_a_binding_that_changes_nothing_in_t5x_is_told(folder):
  _, notes = translated(
    ["mine.gin"],
    [
      "MODEL_DIR = 'r'",
      "DATA_DIR = 'data'",
      "utils.DatasetConfig.batch_size = 8",
    ],
  )
  assert any(
    "--gin.utils.DatasetConfig.batch_size: changes nothing" in n for n in notes
  )


# ---- What is refused ---------------------------------------------------------


@pytest.mark.parametrize(
  "flag, told",
  [
    ("train/utils.DatasetConfig.batch_siz = 8", "'batch_size'"),
    ("utils.DatasetCnfig.batch_size = 8", "'t5x.utils.DatasetConfig'"),
    ("network.T5Config.emb_dm = 8", "'emb_dim'"),
    ("foo.bar = 1", "foo is unknown: no import brings it"),
    ("foo/BATCH_SIZE = 1", "A macro has no scope"),
    ("DROPOUT = 0.1", "Did you mean 'DROPOUT_RATE'?"),
    ("batch_size = 1", "Did you mean 'BATCH_SIZE'?"),
    ("BATCH_SIZE = 'x'", "--gin.BATCH_SIZE = 'x'"),
    ("BATCH_SIZE = %NOPE", "nothing sets NOPE"),
    ("train.eval_period = 'a'", "must be of type int"),
    ("MODEL = @network.Transformer()", "EncoderDecoderModel"),
    ("utils.SaveCheckpointConfig.dtype = 'bfloat16'", "'float32'"),
    ("utils.SaveCheckpointConfig.checkpoint_steps = [5]", "set period"),
    ("utils.RestoreCheckpointConfig.path = ['a', 'b']", "give one path"),
    ("utils.RestoreCheckpointConfig.mode = 'all'", "one checkpoint"),
    ("utils.RestoreCheckpointConfig.strict = False", "REINITIALIZE"),
    ("utils.RestoreCheckpointConfig.fallback_to_scratch = True", "REINIT"),
    (
      "utils.RestoreCheckpointConfig.assignment_map = [('a', 'b')]",
      "convert_checkpoint",
    ),
    ("EVALUATOR_NUM_EXAMPLES = 5", "--gin.EVALUATOR_NUM_EXAMPLES: "),
    ("seqio.Evaluator.num_examples = 5", "make a split of that many rows"),
    (
      "train_script.train.actions"
      " = {'TRAIN': [@trainer.EarlyStoppingAction()]}",
      "KEEP_BEST",
    ),
    (
      "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 0",
      "1 or more",
    ),
    ("decoding.beam_search.alpha = 'long'", "a number"),
    ("decoding.beam_search.max_decode_len = 9", "length of the targets"),
    (
      "partitioning.PjitPartitioner.ici_mesh_shape = (1, 2, 4)",
      "set MESH and DCN_MESH",
    ),
    (
      "seqio.Evaluator.logger_cls = [@models.EncoderDecoderModel]",
      "always written",
    ),
  ],
)
def test_what_cannot_be_honoured_is_refused(folder, flag, told):
  assert told in refused(
    ["mine.gin"], ["DATA_DIR = 'data'", "MODEL_DIR = 'r'", flag]
  )


METHOD = "models.EncoderDecoderModel.predict_batch_with_aux"
SAMPLE = "models.EncoderDecoderModel.decode_fn = @decoding.temperature_sample"
T5X_BEAM = {"beam_rule": "t5x", "length_penalty": 0.6}


@pytest.mark.parametrize(
  "flags,ours",
  [
    # T5X's default is a beam of 1 with a length penalty, not greedy.
    ([], T5X_BEAM),
    ([f"{METHOD}.num_decodes = 4"], T5X_BEAM | {"num_beams": 4}),
    (
      [
        f"{METHOD}.num_decodes = 4",
        f"{METHOD}.return_all_decodes = True",
        "decoding.beam_search.alpha = 1.0",
      ],
      {"beam_rule": "t5x", "num_beams": 4, "num_return_sequences": 4},
    ),
    # T5X's own topk is 1.
    ([SAMPLE], {}),
    (
      [
        SAMPLE,
        "decoding.temperature_sample.topk = 0",
        "decoding.temperature_sample.temperature = 0.0",
      ],
      {},
    ),
    (
      [SAMPLE, "decoding.temperature_sample.topk = 40"],
      {"do_sample": True, "temperature": 1.0, "top_k": 40},
    ),
    (
      [
        SAMPLE,
        "decoding.temperature_sample.topk = 0",
        "decoding.temperature_sample.topp = 0.9",
        "decoding.temperature_sample.temperature = 0.7",
        f"{METHOD}.num_decodes = 3",
        f"{METHOD}.return_all_decodes = True",
      ],
      {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "num_return_sequences": 3,
      },
    ),
  ],
)
def test_t5x_s_search_is_ours(folder, flags, ours):
  given = ["DATA_DIR = 'data'", "MODEL_DIR = 'r'", *flags]
  translated(["mine.gin"], given)
  built = gin.get_configurable("fat5_jax.inference.decoding.Decoding")()
  assert built == decoding.Decoding(**ours)
  bound = gin.query_parameter("Run.decoding")
  assert "Decoding" in str(bound)


@pytest.mark.parametrize(
  "flags,told",
  [
    (["decoding.temperature_sample.topp = 0.9"], "topk is 1 where it is left"),
    (
      [
        "decoding.temperature_sample.topk = 5",
        "decoding.temperature_sample.topp = 0.9",
      ],
      "one of them must be 0",
    ),
    (
      ["decoding.temperature_sample.topk = 5", f"{METHOD}.num_decodes = 3"],
      "return_all_decodes",
    ),
  ],
)
def test_a_sampling_that_t5x_has_not_is_refused(folder, flags, told):
  given = ["DATA_DIR = 'data'", "MODEL_DIR = 'r'", SAMPLE, *flags]
  assert told in refused(["mine.gin"], given)


def test_a_refusal_names_file_and_line(folder):
  lines = FINETUNE.splitlines()
  lines.insert(14, "network.T5Config.emb_dims = 4")
  (folder / "mine.gin").write_text("\n".join(lines))
  told = refused(["mine.gin"], ["MODEL_DIR = 'r'"])
  assert told.startswith(f"{folder}/mine.gin, line 15: ") and "emb_dim" in told


@pytest.mark.parametrize(
  "text, told",
  [
    ("from t5x.examples.decoder_only import network", "encoder-decoders here"),
    ("from t5x import export_lib", "convert_checkpoint.py"),
    ("import mesh_tensorflow.transformer.dataset", "Mesh TensorFlow"),
    (
      "from t5x import models\nMODEL = @models.DecoderOnlyModel()",
      "encoder-decoders here",
    ),
    (
      "from t5x import trainer\nX = @trainer.MyTrainer",
      "t5x.trainer.MyTrainer is unknown here",
    ),
    ("import my_own_tasks_of_t5x", "import my_own_tasks_of_t5x: No module"),
    (
      "include 't5x/configs/runs/finetun.gin'",
      "'t5x/configs/runs/finetune.gin",
    ),
    ("include 'gs://mine/a.gin'", "copy it here"),
    ("import __main__ as train_script\nBATCH_SIZE == 3", "is no gin"),
    (
      "from t5x import utils\nutils.DatasetConfig:\n",
      "is no gin (Expected indentation",
    ),
    ("import t5x.utils\nBATCH_SIZE = {[1]: 2}", "a key of a table"),
    ("import optax\noptax.adamw.learning_rat = 1", "'learning_rate'"),
    ("import optax\noptax.adam_w.b1 = 1", "optax has no adam_w"),
    ("import seqio\nseqio.ByteVocabulary.ids = 1", "no parameter 'ids'"),
  ],
)
def test_a_file_that_asks_for_what_is_not_here(folder, text, told):
  (folder / "other.gin").write_text(text + "\n")
  found = refused(["mine.gin", "other.gin"], ["MODEL_DIR = 'r'"])
  assert told in found and "other.gin" in found


def test_the_command_must_be_the_files(folder):
  assert "python -m fat5_jax.train" in refused(["mine.gin"], command="eval")
  assert "add a run file" in refused(["t5x/examples/t5/t5_1_1/base.gin"])
  model = "t5x/examples/t5/t5_1_1/base.gin"
  assert "take run file and model file of one" in refused(
    [model, "runs/finetune.gin"]
  )
  run = "t5x/configs/runs/finetune.gin"
  assert "nothing sets MODEL" in refused([run])
  assert "@t5x.models.EncoderDecoderModel" in refused(
    ["models/t5_1_1/small.gin", run], ["VOCAB_FILE = 'x'"]
  )


# ---- Files of both -----------------------------------------------------------


def test_t5x_files_take_a_task_and_an_optimizer_of_ours(folder, zygote):
  (folder / "task.gin").write_text(
    """from __gin__ import dynamic_registration
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks
import optax
from t5x import optimizers
MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.ParallelFiles()
  inputs = '{en}'
  targets = '{de}'
  vocabulary = %VOCABULARY
sources.ParallelFiles.splits = {
    'train': {'en': 'data/train.en', 'de': 'data/train.de'},
    'validation': {'en': 'data/val.en', 'de': 'data/val.de'}}
OPTIMIZER = @optimizers.chain()
optimizers.chain.transformations = [@optax.clip(), @optax.adamw()]
optax.clip.max_delta = 1.0
optax.adamw.learning_rate = @optax.warmup_cosine_decay_schedule()
optax.warmup_cosine_decay_schedule:
  init_value = 0.0
  peak_value = 0.01
  warmup_steps = 1
  decay_steps = %TRAIN_STEPS
"""
  )
  _, notes = translated(["mine.gin", "task.gin"], ["MODEL_DIR = 'r'"])
  assert any("has a learning rate of its own" in note for note in notes)
  runs = {}
  for model_dir, given in (("r", []), ("r2", ["optax.adamw.weight_decay=0.5"])):
    done = zygote.run(
      "train",
      [
        "--gin_file=mine.gin",
        "--gin_file=task.gin",
        f"--gin.MODEL_DIR={model_dir}",
        *(f"--gin.{binding}" for binding in given),
      ],
      str(folder),
      seconds=300,
    )
    assert done.status == 0, done.stderr
    runs[model_dir] = parameters(model_dir)
  # optax's own parameters count.
  assert any((runs["r"][name] != runs["r2"][name]).any() for name in runs["r"])


def test_a_module_of_ones_own_registers_tasks(folder, monkeypatch):
  (folder / "my_t5x_tasks.py").write_text(
    """import seqio
import tensorflow as tf
def rows(split, shuffle_files=False, seed=None):
  return tf.data.Dataset.from_tensor_slices(
    {"inputs": ["a b", "c d"] * 8, "targets": ["b", "d"] * 8})
_VOCABULARY = seqio.ByteVocabulary()
seqio.TaskRegistry.add(
  "my_t5x_task",
  source=seqio.FunctionDataSource(rows, splits=["train", "validation"]),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={k: seqio.Feature(_VOCABULARY, add_eos=True)
                   for k in ("inputs", "targets")},
  metric_fns=[])
"""
  )
  monkeypatch.syspath_prepend(str(folder))
  given = ["MODEL_DIR = 'r'", "MIXTURE_OR_TASK_NAME = 'my_t5x_task'"]
  given += ["train/DatasetConfig.pack = False"]
  # As T5X has it now, and as it had it.
  text = FINETUNE.replace(
    "import seqio\n", "import seqio\nimport my_t5x_tasks\n"
  )
  (folder / "imports.gin").write_text(text)
  for file, more in (
    ("imports.gin", []),
    ("mine.gin", ["MIXTURE_OR_TASK_MODULE = 'my_t5x_tasks'"]),
  ):
    gin.clear_config()
    translated([file], given + more)
    config = gin.get_configurable("pipeline.DatasetConfig")
    with gin.config_scope("train"):
      assert config().task().name == "my_t5x_task"
  # A module that needs T5X itself is told from one that is not there.
  (folder / "needs_t5x.py").write_text("import t5x.utils\n")
  (folder / "needs.gin").write_text("import needs_t5x\n" + FINETUNE)
  told = refused(["needs.gin"], given)
  assert "needs.gin, line 1" in told and "T5X and t5 are not here" in told


def test_other_files_are_left_to_others(folder):
  (folder / "ours.gin").write_text(OURS)
  _, nothing = t5x.take_flags("train", [])
  for files in (["ours.gin"], ["nowhere.gin"], []):
    assert t5x.in_our_words("train", files, [], [], nothing) is None
