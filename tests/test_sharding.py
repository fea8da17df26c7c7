"""The table of parameters, and what eight devices make of it."""

import subprocess
import sys

from conftest import ROOT, with_devices
import jax
import pytest

from fat5_jax.distributed import rules
from fat5_jax.errors import UserError
from fat5_jax.models import factory
from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config
from fat5_jax.models.initial import abstract_params

SMALL = T5Config(vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=16)
FAMILIES = {
  "t5_1_0": SMALL.replace(logits_via_embedding=True),
  "t5_1_1": SMALL.replace(mlp_activations=("gelu", "linear")),
  "umt5": SMALL.replace(relative_attention_per_layer=True),
  "alibi": SMALL.replace(position_encoding="alibi"),
  "rope": SMALL.replace(position_encoding="rope"),
  "fire": SMALL.replace(position_encoding="fire"),
  "fire a layer": SMALL.replace(
    position_encoding="fire",
    relative_attention_per_layer=True,
    scan_layers=True,
  ),
  "scanned": SMALL.replace(scan_layers=True, relative_attention_per_layer=True),
  "lora": SMALL.replace(
    mlp_activations=("gelu", "linear"),
    lora=LoRAConfig(
      targets=("query", "key", "value", "out", "wi_0", "wi_1", "wo")
      + ("logits_dense",)
    ),
  ),
  "lora of one wi": SMALL.replace(lora=LoRAConfig(targets=("wi",))),
  "language model head": SMALL.with_head(
    HeadConfig("language_model", widths=(8, 16))
  ),
  "classifier": SMALL.with_head(HeadConfig("sequence_classification")),
  "both stacks": SMALL.with_head(
    HeadConfig("sequence_classification", body="encoder_decoder")
  ),
  "tagger": SMALL.with_head(HeadConfig("token_classification")),
  "answerer": SMALL.with_head(HeadConfig("question_answering")),
  "embedder": SMALL.with_head(HeadConfig("embedding")),
  "enct5": SMALL.with_head(HeadConfig("enct5")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_matches_one_row_with_its_shape(family):
  params = abstract_params(factory.create(FAMILIES[family]))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [key.key for key in path]
    axes = rules.logical_axes("/".join(keys))
    if axes is not None:
      assert len(axes) + ("layers" in keys) == leaf.ndim, keys


def test_a_parameter_of_no_row_is_an_error():
  with pytest.raises(UserError, match="'encoder/gate' matches 0 rows"):
    rules.logical_axes("encoder/gate")


def test_every_axis_of_the_table_has_a_rule():
  standard = dict(rules.standard_logical_axis_rules())
  for _, axes in rules.PARAMETER_AXES:
    assert set(axes or ()) <= set(standard)


def run_on_eight_devices(*options):
  # One that hangs is named, with what every thread of it does.
  hangs = ["-v", "--timeout=240", "--timeout-method=thread"]
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "tests/on_eight_devices.py"]
    + [*hangs, *options],
    cwd=ROOT,
    env=with_devices(8),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_what_holds_on_eight_devices():
  """tests/on_eight_devices.py, whose claims are its tests."""
  run_on_eight_devices("-m", "not slow")


@pytest.mark.thorough
@pytest.mark.slow
def test_what_holds_on_eight_devices_for_every_mesh_and_head():
  run_on_eight_devices("-m", "slow")
