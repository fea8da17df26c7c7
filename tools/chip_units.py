"""What on_chip.py does on a chip, unit by unit, and in which order.

`plan` says what there is to do on a machine; the functions do it, in workers of
chip_runner.py. A function returns what its row says beside its key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

from tools.chip_runner import Phase, Skip, Unit

LENGTHS = (4096, 512, 16384, 32768)
TOKENS = 16384
HEADS, HEAD_DIM = 12, 64
# Of T5 1.1: rows of 512 and 128 tokens, and how many.
TRAINING = {"base": 32, "large": 16}
INPUTS, TARGETS = 512, 128
LONG = dict(inputs=16384, targets=512, batch=1)
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
SUITE_WORKERS = 12
# A program that becomes the one named by its arguments.
DIE_WITH_PARENT = (
  "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9);"
  " os.execvp(sys.argv[1], sys.argv[1:])"
)


# --- in a worker -------------------------------------------------------------


def start() -> None:
  """Finds the device, so that no unit's time holds that."""
  import jax

  jax.devices()


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def probe() -> dict:
  """The machine, and what can be compared on it."""
  import attention_suite as suite
  import jax

  from tools import attention_sides, tune_attention

  platform = jax.default_backend()
  kernels = tune_attention.tunable()
  cases = suite.T5_SCORES | _long_cases() | suite.CASES
  sides = attention_sides.sides(platform)
  return {
    "platform": platform,
    "chip": jax.devices()[0].device_kind,
    "kernels": kernels,
    "cases": list(cases),
    "sides": {name: side.framework for name, side in sides.items()},
    "knobs": {
      f"{name} {dim}": list(tune_attention.knobs(name, dim))
      for name in kernels or ["chunked"]
      for dim in (64, 128)
    },
    "python": sys.version.split()[0],
    "cores": os.cpu_count(),
    "versions": {
      name: _version(name)
      for name in (
        *("jax", "jaxlib", "numpy", "flax", "optax", "triton", "tokamax"),
        *("torch", "transformers"),
      )
    },
  }


def _long_cases():
  """Several blocks of any implementation at the sizes it is used with."""
  import attention_suite as suite

  size = dict(queries=2048, keys=2048, scores=10_000)
  return {
    "2048 packed, scores to 10,000": suite.Case(**size, segments="packed"),
    "2048 causal, scores to 10,000": suite.Case(**size, causal=True),
  }


def _judged(found, case) -> dict:
  """Error over what naive attention or rounding errs, result by result."""
  import attention_suite as suite

  errors = suite.errors(found, case)
  row = {"ratios": {name: round(e.ratio, 3) for name, e in errors.items()}}
  try:
    if len(found) == len(suite.NAMES):
      suite.check_results(found, case)
    else:
      assert all(e.ratio <= 2 for e in errors.values()), "more than twice"
  except AssertionError as error:
    row |= {"status": "wrong", "reason": str(error).splitlines()[:3]}
  return row


def launch(implementation: str, part: str) -> dict:
  """The smallest call that has several blocks: does it run, is it right?"""
  import attention_suite as suite
  import jax
  import jax.numpy as jnp
  import numpy as np

  segments = "packed" if "packed" in part else None
  case = suite.Case(300, 300, segments=segments, scores=100)
  if part != "forward":
    return _judged(suite.run(implementation, case), case)
  (*qkv, position), _, _ = suite.make_inputs(case)
  attend = jax.jit(suite.kernel_attention(case, implementation))
  qkv = [jnp.asarray(x, case.dtype) for x in qkv]
  o = attend(*qkv, jnp.asarray(position), None, None, 0)
  return _judged([np.asarray(o, np.float64)], case)


def sanitize(tool: str, implementation: str) -> dict:
  """A launch under compute-sanitizer, every buffer an allocation of its own."""
  program = shutil.which(
    "compute-sanitizer",
    path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]),
  )
  if program is None:
    raise Skip("there is no compute-sanitizer on this machine")
  unit = dict(do="launch", arguments=dict(implementation=implementation))
  unit["arguments"]["part"] = "packed gradients"
  with tempfile.TemporaryDirectory() as folder:
    log = os.path.join(folder, "log")
    done = subprocess.run(
      # jax's threads forbid a preexec_fn here; the wish survives exec.
      [sys.executable, "-c", DIE_WITH_PARENT]
      + [program, "--tool", tool, "--error-exitcode", "86", "--log-file", log]
      + [sys.executable, os.path.abspath(__file__), json.dumps(unit)],
      env=os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
      capture_output=True,
      text=True,
    )
    lines = []
    if os.path.exists(log):
      with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in file]
  row = {"sanitizer": lines[:12] + lines[12:][-3:]}
  if done.returncode == 86:
    return row | {"status": "wrong", "reason": lines[-1:]}
  if done.returncode:
    end = (done.stderr or done.stdout).splitlines()[-3:]
    return row | {"status": "failed", "reason": end}
  return row | json.loads(done.stdout.splitlines()[-1])


def suite_case(implementation: str, case: str) -> dict:
  """A case of tests/attention_suite.py, in this chip's own blocks."""
  import attention_suite as suite

  cases = suite.T5_SCORES | _long_cases() | suite.CASES
  taken = suite.supported(implementation, cases[case])
  if taken is None:
    # It must say so, not compute something else.
    suite.run(implementation, cases[case])
    return {"status": "wrong", "reason": ["it should have refused this case"]}
  return _judged(suite.run(implementation, taken), taken)


def bench(side: str, rounds: int, **shape) -> dict:
  import jax

  from tools import bench_attention

  try:
    shape = bench_attention.Shape(**shape)
    return bench_attention.run_side(side, shape, rounds=rounds)
  finally:
    jax.clear_caches()
    gc.collect()


def train(size: str, side: str, **sizes) -> dict:
  for name in ("flax", "optax", *["torch", "transformers"] * ("torch" in side)):
    if importlib.util.find_spec(name) is None:
      raise Skip(f"no {name}")
  from tools import bench_train

  return bench_train.train_rate(size, side, **sizes)


def tune(implementation: str, label: str, rounds: int, **shape) -> dict:
  from tools import tune_attention

  shape = tune_attention.Shape(**shape)
  return tune_attention.run_knob(implementation, label, shape, rounds)


FUNCTIONS: dict[str, Callable] = {
  f.__name__: f
  for f in (probe, launch, sanitize, suite_case, bench, train, tune)
}


# --- the order ---------------------------------------------------------------


def environment(smoke: bool) -> dict[str, str]:
  """Of every worker."""
  values = {
    # Several processes share the chip.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
  }
  if smoke:
    # It compiles much and computes little.
    flags = ["--xla_backend_optimization_level=0"]
    if (_version("jaxlib") or "").startswith("0.10."):
      flags.append("--xla_cpu_use_fusion_emitters=false")
      flags.append("--xla_cpu_enable_concurrency_optimized_scheduler=false")
    values |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    values["XLA_FLAGS"] = " ".join(flags)
  return values


def plan(machine: dict, smoke: bool) -> list[Phase]:
  """What there is to do on a machine that `probe` described."""
  kernels = machine["kernels"] or ["chunked"]
  common = environment(smoke)
  dumps = common | {
    "MOSAIC_GPU_DUMP_TO": "{dumps}",
    "XLA_FLAGS": f"{common.get('XLA_FLAGS', '')} --xla_dump_to={{dumps}}",
  }
  if machine["platform"] == "gpu":
    # Of the programs that XLA makes with Triton, the PTX too.
    dumps["XLA_FLAGS"] += " --xla_dump_emitter_re=.*"
  cache = os.path.join(tempfile.gettempdir(), f"fat5_jax_chip_{os.getuid()}")
  return [
    Phase(
      "launch",
      list(_launches(kernels)),
      # One may hang; nothing here is timed.
      workers=max(1, min(3, machine["cores"] // 4)),
      fresh=True,
      environment=dumps,
    ),
    Phase(
      "sanitizer",
      list(_sanitized(SANITIZER_TOOLS[:1], kernels)),
      environment=common,
    ),
    Phase(
      "suite",
      list(_cases(kernels, machine["cases"], smoke)),
      workers=max(1, min(SUITE_WORKERS, machine["cores"] * 3 // 4)),
      # Its oracle is numpy, and there are several.
      environment=common
      | {"JAX_COMPILATION_CACHE_DIR": cache, "OPENBLAS_NUM_THREADS": "2"},
    ),
    Phase(
      "bench",
      list(_benches(machine["sides"], kernels[0], smoke)),
      environment=common,
    ),
    Phase(
      "train",
      list(_trainings(machine["platform"] == "gpu", smoke)),
      fresh=not smoke,
      environment=common,
    ),
    Phase(
      "tune",
      list(_tunings(machine["knobs"], kernels[0], smoke)),
      environment=common,
    ),
    Phase(
      "races",
      list(_sanitized(SANITIZER_TOOLS[1:], kernels)),
      environment=common,
    ),
  ]


def _launches(kernels) -> Iterator[Unit]:
  for part in ("forward", "gradients", "packed gradients"):
    for name in kernels:
      arguments = dict(implementation=name, part=part)
      yield Unit(f"launch, {name}, {part}", "launch", arguments, limit=60)


def _sanitized(tools, kernels) -> Iterator[Unit]:
  for tool in tools:
    for name in kernels:
      arguments = dict(tool=tool, implementation=name)
      # What jax itself launches is watched too.
      yield Unit(f"{tool}, {name}", "sanitize", arguments, limit=240, needs=40)


def _cases(kernels, names, smoke) -> Iterator[Unit]:
  if smoke:
    names = ["scores to 10,000", "one query, one key", "fully masked rows"]
  for name in names:
    for implementation in dict.fromkeys([*kernels, "chunked"]):
      arguments = dict(implementation=implementation, case=name)
      yield Unit(f"suite, {implementation}, {name}", "suite_case", arguments)


def _benches(sides: dict[str, str], kernel: str, smoke) -> Iterator[Unit]:
  """A length after the other, ours first, the frameworks apart.

  Beside 4,096, what the chip would not choose is left out.
  """
  size = dict(heads=2, dim=64) if smoke else dict(heads=HEADS, dim=HEAD_DIM)
  ours = [name for name in sides if name.startswith("ours")]
  peers = {
    framework: [n for n in sides if n not in ours and sides[n] == framework]
    for framework in ("jax", "torch")
  }
  aside = {"jax.nn xla + bias", "jax pallas gpu, no bias"}
  aside.update(n for n in ours if not n.startswith(f"ours, {kernel}"))
  lengths = (128, 64) if smoke else LENGTHS
  for length in lengths:
    for names in (ours, *peers.values()):
      for segments in (False, True):
        for name in names:
          if name in aside and length != lengths[0]:
            continue
          batch = 1 if smoke else max(1, TOKENS // length)
          shape = dict(batch=batch, length=length, segments=segments, **size)
          packed = "packed" if segments else "whole"
          yield Unit(
            f"bench, {length} {packed}, {name}",
            "bench",
            dict(side=name, rounds=1 if smoke else 3, **shape),
            needs=25,
            # Neither's allocator gives back what the other could use.
            pool=sides[name],
          )


def _trainings(torch: bool, smoke) -> Iterator[Unit]:
  """Ours and torch's likely best of both sizes, then everything else."""
  sizes = dict(inputs=INPUTS, targets=TARGETS, rounds=3)
  sides = [
    # A loop over 48 layers compiles for minutes.
    *[("base", "ours"), ("base", "torch compile + sdpa")],
    *[("large", "ours, scanned"), ("large", "torch compile + sdpa")],
    *[("base", "torch compile + flex_attention"), ("base", "ours, scanned")],
    *[("large", "torch compile + flex_attention"), ("large", "ours")],
    *[("base", "torch compile + eager"), ("base", "torch eager + sdpa")],
    *[("large", "torch compile + eager")],
  ]
  if smoke:
    torch, sides = True, [("tiny", "ours"), ("tiny", "torch eager + sdpa")]
    sizes = dict(inputs=32, targets=16, rounds=1)
  found = [
    (f"{size}, {side}", dict(batch=TRAINING.get(size, 2), **sizes), size, side)
    for size, side in sides
  ]
  if not smoke:
    # Long documents, before what torch does in other ways.
    found[2:2] = [
      (f"base, {LONG['inputs']:,} tokens, {side}", sizes | LONG, "base", side)
      for side in ("ours, scanned", "torch compile + sdpa")
    ]
  for key, numbers, size, side in found:
    if "torch" not in side or torch:
      arguments = dict(size=size, side=side, **numbers)
      yield Unit(f"train, {key}", "train", arguments, limit=300, needs=60)


def _tunings(knobs: dict, kernel: str, smoke) -> Iterator[Unit]:
  """Those of the kernel that the chip prefers, by head dimension."""
  for dim in (64,) if smoke else (64, 128):
    shape = dict(batch=4, length=4096, heads=HEADS, dim=dim)
    if smoke:
      shape |= dict(batch=1, length=300, heads=2)
    for label in knobs[f"{kernel} {dim}"]:
      arguments = dict(implementation=kernel, label=label, **shape)
      arguments["rounds"] = 1 if smoke else 5
      yield Unit(f"tune, {kernel} {dim}, {label}", "tune", arguments)


if __name__ == "__main__":
  asked = json.loads(sys.argv[1])
  print(json.dumps(FUNCTIONS[asked["do"]](**asked["arguments"])))
