"""What a run measures of itself: a profile of given steps, norms, MFU."""

import csv
import glob
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import assert_equal_bit_for_bit, final_state, write_tiny

from fat5_jax import optimizers, trees
from fat5_jax.distributed import chips
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.gin_config import cli
from fat5_jax.models import factory
from fat5_jax.models.config import T5Config
from fat5_jax.training import flops, machine
from fat5_jax.training.program import Program

PLAIN = (
  "--gin_file=tiny.gin",
  "--gin.EVAL_SPLIT=None",
  "--gin.STATS_PERIOD=1",
  "--gin.CHECKPOINT_PERIOD=1",
  "--gin.KEEP=None",
  "--gin.TRAIN_STEPS=6",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two runs of the same: `plain`, and `seen`, profiled from step 3 to 4."""
  folder = write_tiny(tmp_path_factory.mktemp("runs"))
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    for name, flags in (
      ("plain", ()),
      ("seen", ("--gin.PROFILE_STEPS=(3, 4)",)),
    ):
      assert not cli.main("train", [*PLAIN, f"--gin.MODEL_DIR={name}", *flags])
  return folder


def metrics_of(folder, name):
  with open(folder / name / "metrics.csv") as file:
    return {
      (int(row["step"]), row["metric"]): float(row["value"])
      for row in csv.DictReader(file)
    }


def step_numbers(path):
  """Of the steps that are annotated in a profile."""
  found = []
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if event.name == "train" and "step_num" in stats:
          found.append(int(stats["step_num"]))
  return sorted(found)


def test_a_profile_has_the_steps_that_were_asked_for_and_no_others(folder):
  (path,) = glob.glob(
    str(folder / "seen/profile/**/*.xplane.pb"), recursive=True
  )
  assert step_numbers(path) == [3, 4]
  assert not (folder / "plain/profile").exists()


def test_a_profile_holds_what_the_device_did(folder):
  (path,) = glob.glob(
    str(folder / "seen/profile/**/*.xplane.pb"), recursive=True
  )
  names = {
    event.name
    for plane in jax.profiler.ProfileData.from_file(path).planes
    for line in plane.lines
    for event in line.events
  }
  assert any(name.startswith("dot") for name in names)


def test_a_profiled_run_computes_the_same_bits(folder):
  for step in (4, 6):
    assert_equal_bit_for_bit(
      final_state(folder / "plain", step), final_state(folder / "seen", step)
    )
  plain, seen = metrics_of(folder, "plain"), metrics_of(folder, "seen")
  same = lambda found: {
    k: v for k, v in found.items() if not k[1].startswith("timing/")
  }
  assert same(plain) == same(seen)


def wide(params):
  return {
    trees.name_of(path): np.asarray(x, np.float64)
    for path, x in trees.flatten(params).items()
  }


def test_norms_are_those_of_saved_parameters(folder):
  """optax's global norm, of checkpoints a step apart."""
  found = metrics_of(folder, "plain")
  for step in range(1, 7):
    before, _ = final_state(folder / "plain", step - 1)
    after, _ = final_state(folder / "plain", step)
    before, after = wide(before), wide(after)
    moved = {name: after[name] - before[name] for name in after}
    for name, tree in (("weight_norm", after), ("update_norm", moved)):
      wanted = float(np.sqrt(sum(np.sum(x**2) for x in tree.values())))
      assert wanted == pytest.approx(float(optax.tree.norm(tree)), rel=1e-5)
      assert found[step, name] == pytest.approx(wanted, rel=1e-4)


def test_norms_are_of_what_trains(monkeypatch, folder):
  monkeypatch.chdir(folder)
  flags = ("--gin.MODEL_DIR=part", "--gin.TRAINABLE=^decoder/")
  assert not cli.main("train", [*PLAIN, *flags, "--gin.TRAIN_STEPS=2"])
  params, _ = final_state(folder / "part", 2)
  params = wide(params)
  part = {k: v for k, v in params.items() if k.startswith("decoder/")}
  assert 0 < len(part) < len(params)
  assert metrics_of(folder, "part")[2, "weight_norm"] == pytest.approx(
    float(optax.tree.norm(part)), rel=1e-4
  )


def test_a_row_tells_memory_once_the_time_to_compile_and_no_mfu_of_a_cpu(
  folder,
):
  found = metrics_of(folder, "plain")
  names = {name for _, name in found}
  assert "timing/mfu" not in names and "timing/peak_device_gib" not in names
  assert 0.1 < found[6, "timing/peak_process_gib"] < 200
  assert [s for s, name in found if name == "timing/compile_seconds"] == [1]
  # The first row's rate is that of a step, not of a compilation.
  assert (
    found[1, "timing/steps_per_second"]
    > 0.5 / (found[1, "timing/compile_seconds"])
  )


@pytest.mark.parametrize(
  "steps,message",
  [
    ("(5, 3)", "two steps, (first, last)"),
    ("7", "two steps, (first, last)"),
    ("(0, 3)", "two steps, (first, last)"),
    ("(7, 8)", "the run ends at step 6"),
  ],
)
def test_steps_that_cannot_be_profiled_are_told(
  steps, message, folder, monkeypatch, capfd
):
  monkeypatch.chdir(folder)
  flags = ("--gin.MODEL_DIR=wrong", f"--gin.PROFILE_STEPS={steps}")
  assert cli.main("train", [*PLAIN, *flags]) == 1
  assert message in capfd.readouterr().err


def test_steps_that_are_done_are_told(folder, monkeypatch, capfd):
  monkeypatch.chdir(folder)
  flags = ("--gin.MODEL_DIR=plain", "--gin.PROFILE_STEPS=(3, 4)")
  assert cli.main("train", [*PLAIN, *flags]) == 0
  assert "are done already, at step 6" in capfd.readouterr().err


def test_model_flops_are_three_forward_passes_by_hand():
  """Of T5 1.1: counted with pencil, two operations a multiply-add."""
  batch, inputs, targets = 64, 16, 8
  config = T5Config(
    vocab_size=64,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=3,
    mlp_dim=48,
    mlp_activations=("gelu", "linear"),
    remat_policy="full",
  )
  width, inner, mlp = 32, 4 * 8, 48
  project = lambda tokens: 2 * tokens * width * inner
  attend = lambda queries, keys: 2 * (2 * batch * queries * keys * inner)
  feed = lambda tokens: 3 * 2 * tokens * width * mlp
  x, y = batch * inputs, batch * targets
  encoder = 4 * project(x) + attend(inputs, inputs) + feed(x)
  decoder = 4 * project(y) + attend(targets, targets) + feed(y)
  decoder += 2 * project(y) + 2 * project(x) + attend(targets, inputs)
  logits = 2 * y * width * 64
  one = Partitioner(devices=jax.devices()[:1])
  program = Program(factory.create(config), one, optimizers.adamw(1e-3))
  shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
  found = flops.model_flops(
    program,
    {
      "encoder_input_tokens": shape(batch, inputs),
      "decoder_input_tokens": shape(batch, targets),
      "decoder_target_tokens": shape(batch, targets),
      "decoder_loss_weights": shape(batch, targets),
    },
  )
  # The look-up of relative positions, which does not grow with the batch, is a
  # product too.
  wanted = 3 * (2 * encoder + 3 * decoder + logits)
  assert wanted < found < 1.01 * wanted


def test_mfu_is_a_part_of_the_peak_of_a_known_chip(monkeypatch):
  assert chips.of_kind("NVIDIA H100 80GB HBM3").flops == 989e12
  assert chips.of_kind("TPU v5 lite").flops == 197e12
  assert chips.of_kind("TPU v5p").flops == chips.of_kind("TPU v5").flops
  for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090"):
    assert chips.of_kind(kind) is None
  device = types.SimpleNamespace(device_kind="TPU v5 lite")
  mesh = types.SimpleNamespace(devices=np.array([[device] * 4]))
  partitioner = types.SimpleNamespace(device_mesh=mesh)
  found = machine.Machine(types.SimpleNamespace(partitioner=partitioner))
  assert found.use(197e12, seconds=2.0) == {"mfu": 1 / 8}


def test_a_device_tells_its_own_peak(monkeypatch):
  stats = lambda peak: lambda: {"peak_bytes_in_use": peak * 2**30}
  devices = [types.SimpleNamespace(memory_stats=stats(p)) for p in (3, 5)]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert machine.peak_memory() == {"peak_device_gib": 5.0}
