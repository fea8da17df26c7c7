"""The converter command: there and back, weights and tokenizer."""

import os
import subprocess
import sys

from conftest import ROOT
import hf_models
import jax
import numpy as np
import pytest

from fat5_jax.convert import hf

TOOL = os.path.join(ROOT, "tools", "convert_checkpoint.py")


def run(*arguments):
  return subprocess.run(
    [sys.executable, TOOL, *map(str, arguments)],
    env=os.environ | {"PYTHONPATH": ROOT},
    capture_output=True,
    text=True,
  )


def test_there_and_back_with_the_tokenizer(shared_data, tmp_path):
  from transformers import AutoTokenizer

  spiece = os.path.join(shared_data, "vocab_t5", "spiece.model")
  hf_models.make("t5_1_1", tmp_path / "theirs")
  config, params = hf.from_pretrained(tmp_path / "theirs")
  hf.to_pretrained(config, params, tmp_path / "hf", tokenizer=spiece)

  done = run(tmp_path / "hf", tmp_path / "run")
  assert done.returncode == 0, done.stderr
  assert "largest difference in logits 0" in done.stdout
  done = run(tmp_path / "run", tmp_path / "again", "--to", "hf")
  assert done.returncode == 0, done.stderr

  _, found = hf.from_pretrained(tmp_path / "again")
  assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
  assert tokenizer("hello world <extra_id_0>").input_ids == [
    21820,
    296,
    32099,
    1,
  ]


def test_a_folder_of_something_else_is_said_to_be_so(tmp_path):
  done = run(tmp_path, tmp_path / "out")
  assert done.returncode == 1
  assert "neither a Hugging Face folder" in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "fat5"])
def test_a_destination_in_use_is_left_alone(to, tmp_path):
  hf_models.make("t5_1_0", tmp_path / "hf")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes.txt").write_text("mine")
  if to == "fat5":
    (tmp_path / "out" / "checkpoint_5").mkdir()
  done = run(tmp_path / "hf", tmp_path / "out", "--to", to)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
