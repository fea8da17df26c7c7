"""Shared by all tests: a CPU, strict shapes, and paths to optional data."""

import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"
# Two workers share two cores; torch's threads would spin for a third.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Tests compile much and compute little.
  flags = ["--xla_backend_optimization_level=0"]
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older emitters and scheduler compile in two thirds of the time. An
    # XLA that no longer knows a flag aborts.
    flags += [
      "--xla_cpu_use_fusion_emitters=false",
      "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # A program is compiled once for all workers, and the processes they start.
  _PROGRAMS = tempfile.TemporaryDirectory(prefix="fat5_jax_programs_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

with contextlib.suppress(ImportError):
  # torch's CUDA build brings it; loaded after TensorFlow it ends the process.
  import triton._C.libtriton  # noqa: F401

import pytest

# Prepared data of tests is for this process, and those that it starts, alone.
_CACHE = tempfile.TemporaryDirectory(prefix="fat5_jax_cache_")
os.environ["FAT5_JAX_CACHE"] = _CACHE.name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
  """Tests of a group share fixtures: apart, each worker makes its own."""
  if config.getoption("loadgroup", False):
    for item in items:
      if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
        raise pytest.UsageError("pytest-xdist does not group with this pytest")


def pytest_collection_finish():
  # What all modules imported will not be looked through for garbage.
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="session")
def _emulators():
  """Started once in a process: the libraries remember where they were."""
  import buckets

  with buckets.emulator("gs") as gs, buckets.emulator("s3") as s3:
    yield {"gs": gs, "s3": s3}


@pytest.fixture(scope="module")
def bucket_ports(_emulators):
  """{"gs": port, "s3": port} of emulators, which every library is led to."""
  import buckets

  with pytest.MonkeyPatch.context() as patch:
    for kind, port in _emulators.items():
      for name, value in buckets.environment(kind, port).items():
        patch.setenv(name, value)
    yield _emulators


_kept = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
  """Frees compiled programs before a worker holds gigabytes of them."""
  global _kept
  if _resident() > max(1400, _kept + 200):
    sys.modules["jax"].clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _kept = _resident()


def _resident() -> int:
  """MiB of this process; 0 where the system does not tell."""
  if not os.path.exists("/proc/self/statm"):
    return 0
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def with_devices(count: int) -> dict[str, str]:
  """The environment of a process that sees so many devices."""
  flags = [
    os.environ.get("XLA_FLAGS", ""),
    f"--xla_force_host_platform_device_count={count}",
    # XLA gives up where a device's thread gets no core for 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
  ]
  return os.environ | {
    "XLA_FLAGS": " ".join(flags),
    "PYTHONPATH": ROOT,
  }


@pytest.fixture(scope="session")
def shared_data() -> str:
  """The folder of real data beside the checkout; skips where there is none."""
  for path in (
    os.environ.get("FAT5_JAX_DATA", ""),
    os.path.join(ROOT, "..", "shared", "data"),
  ):
    if path and os.path.isdir(path):
      return os.path.abspath(path)
  pytest.skip("no real data: set FAT5_JAX_DATA or check out ../shared/data")


@pytest.fixture
def tpu_python(monkeypatch):
  """This Python, with libtpu, which compiles for TPUs, on its path."""
  folder = os.path.join(ROOT, ".venv", "libtpu")
  if os.path.isdir(folder):
    monkeypatch.setenv("PYTHONPATH", folder)
  elif importlib.util.find_spec("libtpu") is None:
    pytest.skip(f"no libtpu, which compiles for TPUs, in {folder}")
  return sys.executable


@pytest.fixture(scope="session")
def zygote():
  """Runs commands of fat5_jax, a child each (tests/robustness/zygote.py)."""
  from zygote import Zygote

  with Zygote() as zygote:
    yield zygote


@pytest.fixture(scope="session")
def seed() -> int:
  """Of all generators in tests/robustness: FAT5_JAX_SEED draws other cases."""
  return int(os.environ.get("FAT5_JAX_SEED", "0"))
