"""What plan says, against what happens and against what the compilers know."""

import json
import os
import subprocess
import sys
import textwrap

from conftest import ROOT
import jax
import jax.numpy as jnp
import pytest

from fat5_jax import chips, cost
from fat5_jax import plan as planning
from fat5_jax.errors import UserError

SMALL = textwrap.dedent("""
  from __gin__ import dynamic_registration
  import fat5_jax.models.config as config
  include 'recipes/quickstart.gin'
  BATCH_SIZE = 16
""")


def plan(folder, *flags, gin=SMALL):
  path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
  (folder / "run.gin").write_text(gin)
  return subprocess.run(
    [sys.executable, "-m", "fat5_jax.plan", "--gin_file=run.gin", *flags],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": path, "COLUMNS": "120"},
    capture_output=True,
    text=True,
    timeout=1500,
  )


# ---- Counting ----------------------------------------------------------------


def test_products_in_loops_count_as_often_as_they_run():
  def layers(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0].sum()

  shapes = (jnp.zeros((4, 8)), jnp.zeros((5, 8, 8)))
  forward = 2 * 4 * 8 * 8 * 5
  assert cost.product_flops(jax.make_jaxpr(layers)(*shapes)) == forward
  both = jax.make_jaxpr(jax.grad(layers, argnums=(0, 1)))(*shapes)
  assert cost.product_flops(both) == 3 * forward
  again = jax.grad(jax.checkpoint(layers), argnums=(0, 1))
  assert cost.product_flops(jax.make_jaxpr(again)(*shapes)) == 4 * forward


TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slice (p.0: f32[10,1024], p.1: s32[]) -> f32[1,1024] {
  %p.0 = f32[10,1024]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %ds = f32[1,1024]{1,0} dynamic-slice(%p.0, %p.1)
}

%body (t: (s32[], f32[10,1024])) -> (s32[], f32[10,1024]) {
  %t = (s32[], f32[10,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %w = f32[10,1024]{1,0} get-tuple-element(%t), index=1
  %one = f32[1,1024]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice
  %all = f32[4,1024]{1,0} all-gather(%one), replica_groups=[2,4]<=[8]
  ROOT %next = (s32[], f32[10,1024]{1,0}) tuple(%i, %w)
}

%until (c: (s32[], f32[10,1024])) -> pred[] {
  %c = (s32[], f32[10,1024]{1,0}) parameter(0)
  %n = s32[] constant(10)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x: f32[10,1024]) -> f32[10,1024] {
  %x = f32[10,1024]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[10,1024]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[10,1024]{1,0}) while(%start), condition=%until, body=%body
  %y = f32[10,1024]{1,0} get-tuple-element(%loop), index=1
  ROOT %r = f32[10,1024]{1,0} all-reduce(%y), replica_groups={{0,1,2,3,4,5,6,7}}
}
"""


def test_traffic_of_a_loop_counts_as_often_as_it_runs():
  found = cost.traffic(TEXT)
  row, whole = 4 * 1024, 10 * 4 * 1024
  assert found.collectives == {
    "all-gather": (10, 10 * 4 * row),
    "all-reduce": (1, whole),
  }
  assert found.seconds == {4: 10 * 4 * row * 3 / 4, 8: 2 * whole * 7 / 8}
  # A slice is read and written (and its index read), not all ten rows.
  loop = 10 * (2 * row + 4 + row + 4 * row)
  assert found.memory == loop + 2 * whole


AHEAD = """HloModule step, is_scheduled=true

%sparse (p: f32[1,1024]) -> f32[4,1024] {
  %p = f32[1,1024]{1,0} parameter(0)
  ROOT %all = f32[4,1024]{1,0} all-gather(%p),\
 replica_groups=mesh['x'=4,'y'=2] {'x'}
}

%view (v: f32[10,1024]) -> f32[10,1024] {
  %v = f32[10,1024]{1,0:T(8)} parameter(0)
  ROOT %same = f32[10,1024]{1,0:T(4)} copy(%v)
}

%slice (s: f32[10,1024], n: s32[]) -> f32[1,1024] {
  %s = f32[10,1024]{1,0:T(8)} parameter(0)
  %n = s32[] parameter(1)
  %seen = f32[10,1024]{1,0:T(4)} fusion(%s), kind=kLoop,\
 output_to_operand_aliasing={{}: (0, {})}, calls=%view
  ROOT %ds = f32[1,1024]{1,0} dynamic-slice(%seen, %n)
}

ENTRY %main (x: f32[10,1024], i: s32[]) -> f32[4,1024] {
  %x = f32[10,1024]{1,0:T(8)} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%slice
  %start = ((f32[10,1024]{1,0:T(8)}), f32[2,1024]{1,0:S(1)}, s32[]{:S(2)}) \
slice-start(%x), slice={[0:2], [0:1024]}
  %done = f32[2,1024]{1,0:S(1)} slice-done(%start)
  %go = ((f32[1,1024]{1,0}), f32[4,1024]{1,0}) \
call-start(%one), to_apply=%sparse
  ROOT %r = f32[4,1024]{1,0} call-done(%go)
}
"""


def test_traffic_that_is_started_ahead_counts_what_it_moves():
  """A slice fetched onto the chip, a collective on the TPU's sparse cores."""
  found, row = cost.traffic(AHEAD), 4 * 1024
  assert found.collectives == {"all-gather": (1, 4 * row)}
  assert found.seconds == {4: 4 * row * 3 / 4}
  fetched, gathered = 2 * row + 4, row + 4 * row
  assert found.memory == (2 * row + 4) + fetched + gathered


# ---- The command -------------------------------------------------------------


def test_plan_on_cpu_tells_memory_collectives_and_decoding(tmp_path):
  """No data, checkpoint or MODEL_DIR is needed, and none is made."""
  mesh = "--gin.MESH={'fsdp': 2, 'model': 2}"
  done = plan(tmp_path, "--topology=cpu:4", mesh, "--json=p.json")
  assert done.returncode == 0, done.stderr
  assert "cpu:4, 4 devices, fsdp 2 x model 2" in done.stderr
  assert "fits" in done.stderr and "decoding a batch" in done.stderr
  (found,) = json.loads((tmp_path / "p.json").read_text())
  # 884,224 parameters in float32, nearly all split four ways.
  assert 884224 <= found["memory"]["parameters"] < 1.02 * 884224
  assert found["collectives"]["all-gather"][0] > 10
  assert sorted(os.listdir(tmp_path)) == ["p.json", "run.gin"]


@pytest.mark.parametrize(
  "topology,message",
  [
    ("v9:4x4", "no chip 'v9'. There are: v4:2x2x1, v5e:2x4"),
    ("v5:2x2", "Did you mean 'v5"),
    ("v5e:16", "write the size as in v5e:2x4"),
    ("h100:2x4", "write the size as in h100:8"),
  ],
)
def test_an_unknown_topology_lists_those_there_are(topology, message):
  with pytest.raises(UserError, match=message):
    chips.chip_of(topology)


def test_a_mistake_is_one_clear_error_before_anything_is_compiled(tmp_path):
  done = plan(tmp_path, "--topology=cpu:3")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "BATCH_SIZE = 16 does not divide over 3" in done.stderr
  assert "no --topology given" in plan(tmp_path).stderr


def test_a_compiler_that_is_missing_is_named_with_its_install_line(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  for topology, extra in (("v5e:2x2", "jax[tpu]"), ("h100:8", "jax[cuda13]")):
    line = rf"pip install '{extra}=={jax.__version__}'".replace("[", r"\[")
    with pytest.raises(UserError, match=line) as error:
      chips.devices(topology)
    assert str(error.value).count(topology) == 1


@pytest.mark.parametrize(
  "message,needed",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
      " for HLO temporaries (25.06G) exceeds available HBM (15.75G).",
      35.06,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.06G"
      " of 15.75G hbm. Exceeded hbm capacity by 9.31G.",
      25.06,
    ),
    ("RESOURCE_EXHAUSTED: no more", 0),
  ],
)
def test_both_ways_in_which_a_compiler_tells_what_is_missing(message, needed):
  memory = planning._refused(message, arguments=10 * 2**30)
  assert memory.needed == pytest.approx(needed * 2**30)


@pytest.mark.slow
def test_the_memory_that_plan_foretells_is_what_a_run_takes(tmp_path):
  """Within 10 %: the growth of the process over its first steps."""
  done = subprocess.run(
    [sys.executable, os.path.join(ROOT, "tools", "bench_plan.py")],
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert 0.9 < found["measured"] / found["planned"] < 1.1, found


@pytest.mark.chips
@pytest.mark.parametrize(
  "topology",
  [
    "v5e:1x1",
    *(
      pytest.param(topology, marks=pytest.mark.every_chip)
      for topology in (
        *("v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"),
      )
    ),
  ],
)
def test_plan_compiles_for_every_tpu(tmp_path, tpu_python, topology):
  flags = (f"--topology={topology}", "--no_decode", "--json=p.json")
  done = plan(tmp_path, *flags)
  assert done.returncode == 0, done.stderr
  (found,) = json.loads((tmp_path / "p.json").read_text())
  assert found["fits"] and found["memory"]["program"] > 0


@pytest.mark.chips
def test_what_does_not_fit_is_told_with_lines_that_do(tmp_path, tpu_python):
  """A model of 2.9B on four v5e: parameters alone, whole, take 11 GiB."""
  gin = textwrap.dedent("""
    from __gin__ import dynamic_registration
    include 'runs/finetune.gin'
    include 'models/t5_1_1/xl.gin'
    MIXTURE_OR_TASK_NAME = 'glue_mnli_v002'
    TASK_FEATURE_LENGTHS = {'inputs': 128, 'targets': 16}
    TRAIN_STEPS = 10
    BATCH_SIZE = 16
    SCAN_LAYERS = True
    ATTENTION = 'chunked'
  """)
  done = plan(tmp_path, "--topology=v5e:2x2", "--no_decode", gin=gin)
  assert "DOES NOT FIT" in done.stderr, done.stderr
  assert "MESH = {'fsdp': 4}" in done.stderr
