"""The converter command: there and back, weights and tokenizer."""

import gc
import importlib.util
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT
import exports
import hf_models
import jax
import numpy as np
import pytest

from fat5_jax.checkpoints import export, export_checks, writer
from fat5_jax.convert import hf
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, LoRAConfig

TOOL = os.path.join(ROOT, "tools", "convert_checkpoint.py")


def run(*arguments):
  return subprocess.run(
    [sys.executable, TOOL, *map(str, arguments)],
    env=os.environ | {"PYTHONPATH": ROOT},
    capture_output=True,
    text=True,
  )


@pytest.fixture
def tool():
  spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def convert(tool, monkeypatch, *arguments, flags=("--no_transformers",)):
  arguments = [TOOL, *map(str, arguments), *flags]
  monkeypatch.setattr(sys, "argv", arguments)
  return tool.main()


def test_there_and_back_with_the_tokenizer(
  shared_data, tool, monkeypatch, capsys, tmp_path
):
  import transformers
  from transformers import AutoTokenizer

  spiece = os.path.join(shared_data, "vocab_t5", "spiece.model")
  hf_models.make("t5_1_1", tmp_path / "theirs")
  config, params = hf.from_pretrained(tmp_path / "theirs")
  hf.to_pretrained(config, params, tmp_path / "hf", tokenizer=spiece)

  arguments = (tmp_path / "hf", tmp_path / "run")
  status = convert(tool, monkeypatch, *arguments, flags=())
  said = capsys.readouterr()
  assert status == 0, said.err
  assert "read again by fat5_jax: " in said.out
  assert "transformers" not in said.out
  done = run(tmp_path / "run", tmp_path / "again", "--to", "hf")
  assert done.returncode == 0, done.stderr
  assert "tensors equal bit for bit" in done.stdout
  assert f"loaded by transformers {transformers.__version__}" in done.stdout
  for file in (tmp_path / "again").iterdir():
    assert file.stat().st_mode & 0o444 == 0o444, f"{file} is one user's alone"

  _, found = hf.from_pretrained(tmp_path / "again")
  assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
  tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
  assert tokenizer("hello world <extra_id_0>").input_ids == [
    21820,
    296,
    32099,
    1,
  ]


def test_a_folder_of_something_else_is_said_to_be_so(
  tool, monkeypatch, capsys, tmp_path
):
  assert convert(tool, monkeypatch, tmp_path, tmp_path / "out") == 1
  assert "neither a Hugging Face folder" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "fat5"])
def test_a_destination_in_use_is_left_alone(to, tool, monkeypatch, tmp_path):
  hf_models.make("t5_1_0", tmp_path / "hf")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes.txt").write_text("mine")
  if to == "fat5":
    (tmp_path / "out" / "checkpoint_5").mkdir()
  arguments = (tmp_path / "hf", tmp_path / "out", "--to", to)
  assert convert(tool, monkeypatch, *arguments) == 1
  assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def source_for(to, folder):
  """A run that can be written in a format."""
  if to == "flash_t5" or to == "fat5":
    hf_models.make("t5_1_1", folder)
    return
  head = HeadConfig("enct5") if to == "enct5" else None
  config, leaves = exports.large_leaves(
    exports.T5.with_head(head).replace(
      lora=LoRAConfig() if to == "peft" else None
    )
  )
  writer.write_params(str(folder), config, leaves)


@pytest.mark.parametrize(
  "failure", [UserError("it is another"), KeyboardInterrupt(), OSError("disk")]
)
@pytest.mark.parametrize("to", ["hf", "flash_t5", "enct5", "peft", "fat5"])
def test_a_conversion_that_fails_its_check_leaves_nothing(
  to, failure, tool, monkeypatch, tmp_path
):
  source_for(to, tmp_path / "source")
  seen = []

  def fail(config, leaves, folder, to):
    seen.append(sorted(os.listdir(folder)))
    raise failure

  monkeypatch.setattr(export_checks, "compared", fail)
  arguments = (tmp_path / "source", tmp_path / "out", "--to", to)
  if isinstance(failure, OSError):
    with pytest.raises(OSError, match="disk"):
      convert(tool, monkeypatch, *arguments)
  else:
    assert convert(tool, monkeypatch, *arguments) != 0
  assert len(seen) == 1 and seen[0], "it was written before it was checked"
  assert os.listdir(tmp_path) == ["source"]


def test_a_conversion_that_fails_leaves_the_earlier_export(
  tool, monkeypatch, tmp_path
):
  hf_models.make("t5_1_1", tmp_path / "source")
  hf_models.make("t5_1_0", tmp_path / "out")
  before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
  monkeypatch.setattr(export_checks, "_outputs", lambda *_: np.random.rand(3))
  arguments = (tmp_path / "source", tmp_path / "out", "--to", "hf")
  assert convert(tool, monkeypatch, *arguments) == 1
  after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
  assert after == before
  monkeypatch.undo()
  assert convert(tool, monkeypatch, *arguments) == 0
  assert "README.md" in os.listdir(tmp_path / "out")


def test_a_signal_amid_garbage_collection_ends_a_conversion(
  tool, monkeypatch, tmp_path
):
  """An exception in such a callback is swallowed, whoever raised it."""
  went_on = []

  def callback(phase, info):
    if phase == "start":
      gc.callbacks.remove(callback)
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.01)

  def convert_slowly(*arguments):
    gc.callbacks.append(callback)
    gc.collect()
    for _ in range(100):
      time.sleep(0.02)
    went_on.append(True)

  monkeypatch.setattr(export, "export", convert_slowly)
  assert convert(tool, monkeypatch, tmp_path / "a", tmp_path / "b") == 143
  assert not went_on


@pytest.mark.parametrize("answer", ["crash", "other numbers"])
def test_an_export_that_transformers_answers_otherwise_is_not_kept(
  answer, tool, monkeypatch, tmp_path
):
  hf_models.make("t5_1_1", tmp_path / "source")
  program = "raise ValueError('odd')"
  if answer == "other numbers":
    program = "print('[\"5.24.0\", [[[1e6]]]]')"
  monkeypatch.setattr(export_checks, "_LOADS", program)
  monkeypatch.setattr(
    sys,
    "argv",
    [TOOL, str(tmp_path / "source"), str(tmp_path / "out"), "--to", "hf"],
  )
  assert tool.main() == 1
  assert os.listdir(tmp_path) == ["source"]


def test_a_tied_model_that_is_not_scaled_is_converted(
  tool, monkeypatch, tmp_path
):
  config, leaves = exports.large_leaves(
    exports.T5.replace(logits_via_embedding=True, scale_decoder_outputs=False)
  )
  writer.write_params(str(tmp_path / "run"), config, leaves)
  arguments = (tmp_path / "run", tmp_path / "out", "--to", "hf")
  assert convert(tool, monkeypatch, *arguments) == 0
  assert hf.read_config(tmp_path / "out").logits_via_embedding
