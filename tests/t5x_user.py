"""A user of T5X's: his gin file, his folder, and what comes of them."""

import os
import sys

from conftest import ROOT
import pytest

from fat5_jax.errors import UserError
from fat5_jax.gin_config import parse
from fat5_jax.gin_config.t5x import ours, reading
from fat5_jax.gin_config.t5x import translate as translate_lib
import gin

sys.path.append(os.path.join(ROOT, "tests", "robustness"))

# As a user of T5X writes his own, with T5X's names, and T5X not there.
FINETUNE = """from __gin__ import dynamic_registration

import __main__ as train_script
import seqio
from t5.data import mixtures
from t5x import models
from t5x import partitioning
from t5x import utils
from t5x.examples.t5 import network

include "t5x/examples/t5/byt5/small.gin"
include "t5x/configs/runs/finetune.gin"

MIXTURE_OR_TASK_NAME = "wmt_t2t_ende_v003"
TASK_FEATURE_LENGTHS = {"inputs": 64, "targets": 48}
TRAIN_STEPS = 3
DROPOUT_RATE = 0.0
INITIAL_CHECKPOINT_PATH = []  # From scratch.
LOSS_NORMALIZING_FACTOR = 233472
USE_CACHED_TASKS = False
BATCH_SIZE = 4
EVAL_STEPS = 2

# A size for a test, by T5X's names.
network.T5Config:
  emb_dim = 16
  num_heads = 2
  num_encoder_layers = 1
  num_decoder_layers = 1
  head_dim = 8
  mlp_dim = 32
"""
# The same in our words.
OURS = """from __gin__ import dynamic_registration
import fat5_jax.models.config as config
import seqio

include 'models/byt5/small.gin'
include 'runs/finetune.gin'

MIXTURE_OR_TASK_NAME = 'wmt_t2t_ende_v003'
TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 48}
TRAIN_STEPS = 3
DROPOUT_RATE = 0.0
INITIAL_CHECKPOINT_PATH = None
LOSS_NORMALIZING_FACTOR = 233472
BATCH_SIZE = 4
EVAL_STEPS = 2
CHECKPOINT_PERIOD = 5000
KEEP = None
# T5X's byT5 has no sentinels.
seqio.ByteVocabulary.extra_ids = 0
# T5X's search, where a file names none.
BEAM_RULE = 't5x'
LENGTH_PENALTY = 0.6
config.T5Config:
  emb_dim = 16
  num_heads = 2
  num_encoder_layers = 1
  num_decoder_layers = 1
  head_dim = 8
  mlp_dim = 32
"""
SIZES = {
  "emb_dim": 16,
  "num_heads": 2,
  "num_encoder_layers": 1,
  "num_decoder_layers": 1,
  "head_dim": 8,
  "mlp_dim": 32,
}
TINY = [f"--gin.network.T5Config.{name}={n}" for name, n in SIZES.items()]


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A user's folder: his file, and rows of a translation."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.gin").write_text(FINETUNE)
  (tmp_path / "data").mkdir()
  words = "a boat goes over the lake and a bird goes over it".split()
  for split, count in (("train", 40), ("val", 6), ("test", 5)):
    lines = [" ".join(words[i % 5 :][: 3 + i % 4]) for i in range(count)]
    text = "\n".join(lines) + "\n"
    (tmp_path / "data" / f"{split}.en").write_text(text)
    (tmp_path / "data" / f"{split}.de").write_text(text.upper())
  return tmp_path


def translated(files, bindings=(), command="train", paths=()):
  """(what gin reads, notes) of T5X's files; gin has parsed it."""
  found = reading.Files(list(paths))
  for name in files:
    found.add(name)
  found.add_flags(list(bindings))
  run = translate_lib.Translation(command, found)
  text = run.text()
  parse.parse([], [text], [], ours.FUNCTIONS[command])
  return text, run.notes


def refused(files, bindings=(), command="train", paths=()):
  with pytest.raises(UserError) as e:
    translated(files, bindings, command, paths)
  (line,) = str(e.value).splitlines()
  return line
