"""What plan says, against what happens and against what the compilers know."""

import json
import os
import subprocess
import sys
import textwrap
import types

from conftest import ROOT
import jax
import jax.numpy as jnp
import pytest

from fat5_jax import optimizers
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.gin_config import cli
from fat5_jax.models import factory
from fat5_jax.models.config import T5Config
from fat5_jax.planning import chips, cost, rehearse, schedule, search, tell
from fat5_jax.training import flops
from fat5_jax.training.program import Program

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
  assert flops.product_flops(jax.make_jaxpr(layers)(*shapes)) == forward
  both = jax.make_jaxpr(jax.grad(layers, argnums=(0, 1)))(*shapes)
  assert flops.product_flops(both) == 3 * forward
  again = jax.grad(jax.checkpoint(layers), argnums=(0, 1))
  assert flops.product_flops(jax.make_jaxpr(again)(*shapes)) == 4 * forward


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


BESIDE = """HloModule step, is_scheduled=true

%start (p: f32[1,1024]) -> (f32[1,1024], f32[4,1024]) {
  %p = f32[1,1024]{1,0} parameter(0)
  %all.1 = f32[4,1024]{1,0} all-gather(%p), channel_id=7,\
 replica_groups=[2,4]<=[8]
  ROOT %go = (f32[1,1024]{1,0}, f32[4,1024]{1,0}) custom-call(%all.1),\
 custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: f32[1,1024], a: f32[512,512]) -> f32[512,512] {
  %q = f32[1,1024]{1,0} parameter(0)
  %a = f32[512,512]{1,0:S(1)} parameter(1)
  %all.2 = f32[4,1024]{1,0} all-gather(%q), channel_id=7,\
 replica_groups=[2,4]<=[8]
  ROOT %c = f32[512,512]{1,0:S(1)} convolution(%a, %a), dim_labels=bf_io->bf
}

%done (r: f32[1,1024]) -> f32[4,1024] {
  %r = f32[1,1024]{1,0} parameter(0)
  %all.3 = f32[4,1024]{1,0} all-gather(%r), channel_id=7,\
 replica_groups=[2,4]<=[8]
  ROOT %end = f32[4,1024]{1,0} custom-call(%all.3),\
 custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[1,1024], w: f32[512,512]) -> f32[4,1024] {
  %x = f32[1,1024]{1,0:S(1)} parameter(0)
  %w = f32[512,512]{1,0:S(1)} parameter(1)
  %s = (f32[1,1024]{1,0:S(1)}, f32[4,1024]{1,0:S(1)}) fusion(%x), calls=%start
  %f = f32[512,512]{1,0:S(1)} fusion(%x, %w), calls=%async_collective_fusion.1
  ROOT %d = f32[4,1024]{1,0:S(1)} fusion(%x), calls=%done
}
"""


def test_a_collective_beside_products_counts_once_and_hides_behind_them():
  found, row = cost.traffic(BESIDE), 4 * 1024
  assert found.collectives == {"all-gather": (1, 4 * row)}
  network = lambda group, size: size / row
  long = schedule.follow(BESIDE, 10.0, 1e30, network)
  assert (long.seconds, long.waiting) == pytest.approx((10.0, 0.0))
  short = schedule.follow(BESIDE, 1.0, 1e30, network)
  assert (short.seconds, short.waiting) == pytest.approx((3.0, 2.0))
  # What is not started ahead is waited for.
  alone = schedule.follow(TEXT, 0.0, 1e30, lambda group, size: size / row)
  assert alone.waiting == alone.seconds == 10 * 3 + 2 * 10 * 7 / 8


WITHIN = """HloModule step, is_scheduled=true

%inner (s: f32[10,1024], n: s32[]) -> f32[1,1024] {
  %s = f32[10,1024]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %ds = f32[1,1024]{1,0} dynamic-slice(%s, %n)
}

%outer (t: f32[10,1024], m: s32[]) -> f32[1,1024] {
  %t = f32[10,1024]{1,0} parameter(0)
  %m = s32[] parameter(1)
  %row = f32[1,1024]{1,0} fusion(%t, %m), kind=kLoop, calls=%inner
  ROOT %twice = f32[1,1024]{1,0} add(%row, %row)
}

ENTRY %main (x: f32[10,1024], i: s32[]) -> f32[1,1024] {
  %x = f32[10,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %r = f32[1,1024]{1,0} fusion(%x, %i), kind=kOutput, calls=%outer
}
"""


def test_a_slice_that_a_fusion_within_a_fusion_takes_is_all_that_is_read():
  assert cost.traffic(WITHIN).memory == 2 * 4 * 1024 + 4


# ---- The command -------------------------------------------------------------


def test_plan_on_cpu_and_the_fastest_lines_give_what_they_promise(tmp_path):
  """No data, checkpoint or MODEL_DIR is needed, and none is made."""
  small = SMALL + "SCAN_LAYERS = True\n"
  for side in ("encoder", "decoder"):
    small += f"config.T5Config.num_{side}_layers = 1\n"
  mesh = "--gin.MESH={'fsdp': 2, 'model': 2}"
  done = plan(
    tmp_path,
    "--topology=cpu:4",
    mesh,
    "--fastest=1",
    "--json=p.json",
    gin=small,
  )
  assert done.returncode == 0, done.stderr
  assert "cpu:4, 4 devices, fsdp 2 x model 2" in done.stderr
  assert "fits" in done.stderr and "decoding a batch" in done.stderr
  assert "fastest by roofline first" in done.stderr and " now" in done.stderr
  (found,) = json.loads((tmp_path / "p.json").read_text())
  # 490,368 parameters in float32, nearly all split four ways.
  assert 490368 <= found["memory"]["parameters"] < 1.02 * 490368
  assert found["collectives"]["all-gather"][0] > 10
  assert sorted(os.listdir(tmp_path)) == ["p.json", "run.gin"]
  # What it says of a setting holds for a gin file with that setting's lines.
  now, *others = sorted(found["fastest"], key=lambda c: len(c["lines"]))
  assert now["lines"] == [] and now["mesh"] == "fsdp 2 x model 2"
  assert [c["seconds_by_roofline"] / c["tokens"] for c in found["fastest"]] == (
    sorted(c["seconds_by_roofline"] / c["tokens"] for c in found["fastest"])
  )
  (other,) = [c for c in others if not c["changes_training"]]
  gin = "\n".join([small, "MESH = {'fsdp': 2, 'model': 2}", *other["lines"]])
  flags = ("--topology=cpu:4", "--no_decode", "--json=q.json")
  done = plan(tmp_path, *flags, gin=gin)
  assert done.returncode == 0, done.stderr
  (again,) = json.loads((tmp_path / "q.json").read_text())
  for key in ("mesh", "memory", "collectives", "seconds_by_roofline"):
    assert again[key] == other[key], key


RUN = Program(
  factory.create(
    T5Config(vocab_size=64, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64)
  ),
  Partitioner(mesh={"fsdp": 8}, num_partitions=None),
  optimizers.adafactor(0.01),
)
SHAPES = {
  name: ((16, 32), jnp.int32)
  for name in ("encoder_input_tokens", "decoder_input_tokens")
  + ("decoder_target_tokens", "decoder_loss_weights")
}


@pytest.fixture
def compiler(monkeypatch):
  """A made-up compiler: what it says of (mesh, policy, rows), and was asked."""
  devices = [types.SimpleNamespace(process_index=0)] * 8
  monkeypatch.setattr(chips, "devices", lambda topology: devices)
  monkeypatch.setattr(search, "step_flops", lambda *_: 1e12)
  asked = []

  def compile(program, shapes, topology, flops, decode):
    partitioner = program.partitioner
    rows, _ = rehearse.sizes_of(shapes)
    asked.append((partitioner.describe(), rows))
    model = partitioner.sizes["model"]
    return rehearse.Report(
      *(topology, 8, partitioner.describe()),
      # The fastest does not fit.
      fits=model != 4,
      capacity=2**34,
      memory=rehearse.Memory(needed=2**30 if model != 4 else 2**35),
      compile_seconds=1.0,
      batch_size=rows,
      remat_policy=program.model.config.remat_policy,
      step_flops=1e12,
      useful_flops=1e12,
      seconds_compute=0.01 * rows / 16,
      seconds_network={1: 0.08, 2: 0.04, 4: 0.02}.get(model, 0.1),
      tokens=rows * 64,
    )

  monkeypatch.setattr(search, "rehearse", compile)
  now = compile(RUN.replace(partitioner=_on(devices)), SHAPES, "v5e:2x4", 0, 0)
  asked.clear()
  return types.SimpleNamespace(now=now, asked=asked)


def _on(devices):
  return Partitioner(mesh={"fsdp": 8}, devices=devices)


def test_each_stage_of_a_curriculum_is_compiled_and_told(tmp_path):
  """What it needs is what a run of that stage alone would."""

  def needed(*flags):
    done = plan(tmp_path, "--topology=cpu:2", "--no_decode", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "plan.json").read_text())[0], done.stderr

  # 16 rows of 32 + 16 tokens; an odd row would not divide over two devices.
  lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}"
  found, said = needed(lengths, "--gin.CURRICULUM={5: {'inputs': 7}}")
  (stage,) = found["stages"]
  assert (stage["until_step"], stage["batch_size"]) == (5, 32)
  assert "memory until step 5" in said and "32 x 7/16: fits" in said
  alone, _ = needed(
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 7, 'targets': 16}",
    "--gin.BATCH_SIZE=32",
  )
  assert stage["needed"] == alone["memory"]["needed"]
  assert stage["needed"] != found["memory"]["needed"]


def test_the_fastest_fits_keeps_the_batch_and_stands_beside_the_run(compiler):
  found = search.fastest(RUN, SHAPES, compiler.now, 40)
  times = [c.seconds_a_token for c in found if c.report.fits]
  assert times == sorted(times)
  assert [c.report.mesh for c in found if not c.lines] == ["fsdp 8"]
  assert {c.report.fits for c in found[: len(times)]} == {True}
  best = search.best_of(found)
  assert "model 2" in best.report.mesh and best.report.batch_size == 16
  # A larger batch is tried with the best, and said to be another training.
  assert {c.report.batch_size for c in found} == {16, 32, 64}
  for c in found:
    assert c.changes_training == (c.report.batch_size != 16)
    assert c.changes_training == any("BATCH_SIZE" in x for x in c.lines)
  assert len({c.lines for c in found}) == len(found)


def test_few_are_compiled_and_the_best_is_told_as_gin_lines(compiler, capsys):
  found = search.fastest(RUN, SHAPES, compiler.now, 3)
  assert len([rows for _, rows in compiler.asked if rows == 16]) == 3
  tell.ranked(found)
  text = capsys.readouterr().err
  best = search.best_of(found)
  for line in best.lines:
    assert f"  {line}\n" in text
  tell.ranked([c for c in found if not c.lines])
  assert "nothing that was compiled is faster" in capsys.readouterr().err


def test_lines_of_a_mesh_put_other_ways_of_saying_one_aside(compiler):
  run = RUN.replace(partitioner=Partitioner(num_partitions=2))
  found = search.fastest(run, SHAPES, compiler.now, 2)
  for c in found:
    if any("MESH" in line for line in c.lines):
      assert c.lines[0] == "NUM_PARTITIONS = None"


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


@pytest.mark.parametrize(
  "flags,message",
  [
    (["--topology=cpu:2", "--fastest=0"], "--fastest=0: at least 1 setting"),
    (["--topology=all", "--fastest"], "--fastest searches one topology"),
  ],
)
def test_what_cannot_be_searched_is_one_line(flags, message, capsys):
  assert cli.main("plan", ["--gin_file=recipes/quickstart.gin", *flags]) == 1
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 1


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
  memory = rehearse.refused(message, arguments=10 * 2**30)
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
      pytest.param(topology, marks=pytest.mark.thorough)
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
