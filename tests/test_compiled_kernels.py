"""The kernels compile for chips that are not here, within their budgets.

`tools/static_kernel_report.py --quick` compiles them with the chips' own
compilers; the budgets are those of pallas_kernels/flash_attention/README.md.
"""

import json
import os
import subprocess

from conftest import ROOT
import pytest

pytestmark = pytest.mark.chips

# Bundles a 512 x 512 x 64 tile on v5e: (forward, backward).
V5E_BUDGET = {"forward": 1250, "backward": 2450}
# Instructions a 64 x 128 tile on sm_90a: (near, far).
H100_BUDGET = (540, 460)


def other_jax() -> dict[str, str]:
  """The environment without flags that another version may not know."""
  return os.environ | {"XLA_FLAGS": ""}


def gpu_python() -> str:
  """The Python of the environment that compiles for GPUs; `make gpu-env`."""
  folder = os.environ.get(
    "FAT5_JAX_GPU_ENV", os.path.join(ROOT, ".venv", "gpu")
  )
  python = os.path.join(folder, "bin", "python")
  reason = os.path.join(folder, "missing")
  if os.path.exists(reason):
    with open(reason, encoding="utf-8") as file:
      pytest.skip(f"no environment that compiles for GPUs: {file.read()}")
  if not os.path.exists(python):
    pytest.skip(f"no environment that compiles for GPUs in {folder}")
  return python


def compiled(tmp_path, python, *arguments) -> list[dict]:
  path = tmp_path / "report.json"
  tool = os.path.join(ROOT, "tools", "static_kernel_report.py")
  result = subprocess.run(
    [python, tool, *arguments, "--quick", "--json", str(path)],
    env=other_jax(),
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  reports = json.loads(path.read_text())
  for report in reports:
    if "skipped" in report:
      pytest.skip(f"no compiler for {report['target']}: {report['skipped']}")
  return reports


# What None takes, by head dimension and dtype; TPUs have one kernel for all.
TAKES = dict.fromkeys(("a100", "a10", "l4", "b200"), {}) | {
  "h100": {(64, "bfloat16"): "mosaic_gpu", (128, "bfloat16"): "mosaic_gpu"}
}


@pytest.mark.thorough
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7x", *TAKES])
def test_what_none_takes_compiles(chip, request, tmp_path):
  """Up to 1M packed tokens a TPU; every head dimension and dtype a GPU."""
  gpu = chip in TAKES
  python = gpu_python() if gpu else request.getfixturevalue("tpu_python")
  path = tmp_path / "matrix.json"
  tool = os.path.join(ROOT, "tools", "compile_matrix.py")
  result = subprocess.run(
    [python, tool, chip, "--quick", "--json", str(path)],
    env=other_jax(),
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  rows = json.loads(path.read_text())
  assert len(rows) == (6 if gpu else 3)
  for row in rows:
    expected = "mosaic_tpu"
    if gpu:
      expected = TAKES[chip].get((row["dim"], row["dtype"]), "triton")
    assert row["compiles"] and row["implementation"] == expected, row
    # Why it is not the chip's best is said.
    assert bool(row["reasons"]) == (chip == "h100" and expected == "triton")


def assert_memory_is_linear(report):
  # What the compiler needs beside arguments and results, which grow linearly.
  assert [row["length"] for row in report["memory"]] == [4096, 8192, 16384]
  for row in report["memory"]:
    assert row["temporary_bytes"] <= 1.1 * row["other_bytes"], report["target"]


@pytest.mark.thorough
def test_compiles_for_every_tpu_in_linear_memory(tpu_python, tmp_path):
  # v5e is below.
  chips = ("v4", "v5p", "v6e", "v7x")
  for report in compiled(tmp_path, tpu_python, *chips, "--memory-only"):
    assert_memory_is_linear(report)


def test_v5e_keeps_its_budget_of_bundles_in_linear_memory(tpu_python, tmp_path):
  [report] = compiled(tmp_path, tpu_python, "v5e")
  tiles = {row["part"]: row["tiles"] for row in report["kernels"]}
  for part, budget in V5E_BUDGET.items():
    # Near and far tiles: with the bias and, backward, its gradient.
    assert len(tiles[part]) == 2 and max(tiles[part]) <= budget, tiles
  assert_memory_is_linear(report)


@pytest.mark.parametrize(
  "chip", ["h100", pytest.param("a100", marks=pytest.mark.thorough)]
)
def test_compiles_for_gpu_without_spills(chip, tmp_path):
  [report] = compiled(tmp_path, gpu_python(), chip)
  rows = {
    (row["kernel"].split(",")[0], row["part"]): row for row in report["kernels"]
  }
  parts = {"forward", "dq", "dkv", "dbias"}
  assert {part for name, part in rows if name == "triton"} == parts
  for name, row in rows.items():
    assert row["spills"] == 0, name
    # C7508, C7510: wgmma one by one, or without the registers asked for.
    assert not row["warnings"], name
  assert_memory_is_linear(report)
  if chip == "h100":
    assert {part for name, part in rows if name == "mosaic_gpu"} == parts
    near, far = rows["mosaic_gpu", "forward"]["tiles"]
    assert near <= H100_BUDGET[0] and far <= H100_BUDGET[1]


WITHOUT_ITS_REGISTERS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry f() {
  setmaxnreg.inc.sync.aligned.u32 240;
  ret;
}
"""


def test_the_report_sees_what_ptxas_warns_of(tmp_path):
  path = tmp_path / "f.ptx"
  path.write_text(WITHOUT_ITS_REGISTERS)
  program = "import sys, static_kernel_report as report\n"
  program += "print(report.sass(sys.argv[1], 'sm_90a'))"
  result = subprocess.run(
    [gpu_python(), "-c", program, str(path)],
    env=other_jax() | {"PYTHONPATH": os.path.join(ROOT, "tools")},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert "C7508" in result.stdout


ON_TWO = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from fat5_jax.planning import chips
from pallas_kernels import RelativeBuckets, flash_attention

chips.prepare_environment([])
mesh = jax.sharding.Mesh(chips.devices(f"{sys.argv[1]}:2"), ("data",))
rows, shared = P("data"), P()

def attend(q, k, v, table, ids):
  return flash_attention(
    q, k, v, position=RelativeBuckets(table, bidirectional=True),
    q_segment_ids=ids, kv_segment_ids=ids, implementation=sys.argv[2],
  )

def array(spec, dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

split = jax.shard_map(
  attend, mesh=mesh, in_specs=(rows, rows, rows, shared, rows), out_specs=rows
)
loss = lambda *x: jnp.sum(split(*x).astype(jnp.float32))
jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(
  *[array(rows, jnp.bfloat16, 4, 256, 2, 64)] * 3,
  array(shared, jnp.float32, 2, 32),
  array(rows, jnp.int32, 4, 256),
).compile()
"""


@pytest.mark.parametrize(
  "chip,implementation",
  [
    ("h100", "mosaic_gpu"),
    ("h100", "triton"),
    pytest.param("a100", "triton", marks=pytest.mark.thorough),
  ],
)
def test_compiles_split_over_two_gpus(chip, implementation):
  result = subprocess.run(
    [gpu_python(), "-c", ON_TWO, chip, implementation],
    env=other_jax() | {"PYTHONPATH": ROOT},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr


POSITIONS = """
import json, sys
import jax, jax.numpy as jnp
from fat5_jax.planning import chips
from pallas_kernels import Alibi, AtPositions, Fire, flash_attention, rotate
from tools.static_kernel_report import compile_for

chips.prepare_environment([])
target, kernels = sys.argv[1], sys.argv[2].split(",")
heads, width = 12, 32
shapes = [(width,), (width,), (heads, width), (heads,), (), ()]

def alibi(implementation, mode, causal):
  def attend(q, k, v, slopes, ids, *_):
    hides = jnp.isinf(Alibi.of(heads, mode).slopes_H2)
    return flash_attention(
      q, k, v, position=Alibi(jnp.where(hides, jnp.inf, slopes)), causal=causal,
      q_segment_ids=ids, kv_segment_ids=ids, implementation=implementation,
    )
  return attend

def fire(q, k, v, slopes, ids, *network):
  places = jnp.arange(q.shape[1])[None] + ids * 0
  return flash_attention(
    q, k, v, position=AtPositions(Fire(*network), places, places),
    q_segment_ids=ids, kv_segment_ids=ids, implementation="chunked",
  )

def rope(q, k, v, slopes, ids, *_):
  places = jnp.arange(q.shape[1])[None]
  q, k = (rotate(x, places, dims=64) for x in (q, k))
  return flash_attention(
    q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation=kernels[0]
  )

def memory(attend):
  loss = lambda *x: jnp.sum(attend(*x).astype(jnp.float32) ** 2)
  x = ((2, 8192, heads, 64), jnp.bfloat16)
  return compile_for(
    target, jax.grad(loss, argnums=(0, 1, 2, 3, *range(5, 11))), x, x, x,
    ((heads, 2), jnp.float32), ((2, 8192), jnp.int32),
    *[(shape, jnp.float32) for shape in shapes],
  ).memory_analysis().temp_size_in_bytes

cases = {"fire": fire, "rope": rope} | {
  f"{name}, {mode}, {causal}": alibi(name, mode, causal)
  for name in kernels
  for mode in ("symmetric", "asymmetric")
  for causal in (False, True)
}
print(json.dumps({name: memory(attend) for name, attend in cases.items()}))
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
  "chip,kernels", [("v5e", "mosaic_tpu"), ("h100", "mosaic_gpu,triton")]
)
def test_every_position_encoding_compiles_in_linear_memory(
  chip, kernels, request
):
  gpu = chip in TAKES
  python = gpu_python() if gpu else request.getfixturevalue("tpu_python")
  path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
  result = subprocess.run(
    [python, "-c", POSITIONS, chip, kernels],
    env=other_jax() | {"PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])
  assert len(found) == 2 + 4 * len(kernels.split(","))
  # Scores of all pairs would be 6 GiB.
  assert max(found.values()) < 2**29, found


SHORT = """
import json, sys
import jax.numpy as jnp
from fat5_jax.planning import chips
from pallas_kernels import flash_attention
from tools.static_kernel_report import compile_for

chips.prepare_environment([])
target, sizes = sys.argv[1], (8, 4096, 12, 64)
ids = ((sizes[0], sizes[1]), jnp.int32)
keys = (sizes, jnp.bfloat16)
shares = {}
for queries in (1, 2, 16, 100):
  for masked in (False, True):
    def attend(q, k, v, ids):
      q_ids = jnp.ones(q.shape[:2], jnp.int32)
      return flash_attention(
        q, k, v, q_segment_ids=q_ids if masked else None,
        kv_segment_ids=ids if masked else None,
      )
    q = ((sizes[0], queries, *sizes[2:]), jnp.bfloat16)
    memory = compile_for(target, attend, q, keys, keys, ids).memory_analysis()
    of_keys = 2 * 2 * sizes[0] * sizes[1] * sizes[2] * sizes[3]
    shares[f"{queries}, {masked}"] = memory.temp_size_in_bytes / of_keys
print(json.dumps(shares))
"""


@pytest.mark.parametrize(
  "chip", ["h100", pytest.param("l4", marks=pytest.mark.thorough)]
)
def test_a_few_queries_need_no_copy_of_keys_and_values(chip):
  result = subprocess.run(
    [gpu_python(), "-c", SHORT, chip],
    env=other_jax() | {"PYTHONPATH": ROOT},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  shares = json.loads(result.stdout.splitlines()[-1])
  assert max(shares.values()) < 0.1, shares


@pytest.mark.parametrize(
  "worker", [pytest.param(0, marks=pytest.mark.thorough), 1]
)
def test_mosaic_gpu_meets_the_suite_in_its_interpreter(worker):
  """Half of the suite each: the interpreter runs one thread at a time."""
  environment = os.environ | {
    # A warpgroup is a thread of XLA's, and they wait for each other.
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "FAT5_JAX_HALF": str(worker),
  }
  result = subprocess.run(
    [gpu_python(), "-m", "pytest", "-p", "no:cacheprovider"]
    + ["-k", "mosaic_gpu", os.path.join(ROOT, "tests/test_flash_attention.py")],
    env=environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout
  assert "[100%]" in result.stdout and "s" not in result.stdout.split()[0]
