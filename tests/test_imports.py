"""The house rules that a machine can check."""

import ast
import os
import subprocess
import sys

from conftest import ROOT
import pytest

GROUND = {
  f"fat5_jax.{name}"
  for name in (
    *("console", "errors", "fetched", "hub", "interrupts", "macros"),
    *("staging", "storage", "trees"),
  )
}
# What each room may import besides the standard library, itself and the ground,
# from the lowest to the highest. No room is named above the line that it has.
ALLOWED = {
  "pallas_kernels": {"jax", "numpy"},
  "fat5_jax/models": {"flax", "jax", "numpy", "pallas_kernels"},
  "fat5_jax/objectives": {"jax", "fat5_jax.models"},
  "fat5_jax/convert": {
    *("ml_dtypes", "msgpack", "numpy", "safetensors", "tensorstore"),
    # mesh_tf.py, when it reads a checkpoint.
    "tensorflow",
    # fast_tokenizer.py, when it writes one.
    *("sentencepiece", "tokenizers"),
    "fat5_jax.models.config",
  },
  "fat5_jax/data": {
    *("numpy", "seqio", "tensorflow", "tensorflow_datasets", "datasets"),
    *("pyarrow", "sklearn", "scipy", "sacrebleu", "rouge_score"),
    *("absl", "array_record", "cloudpickle", "grain", "msgpack"),
    "sentencepiece",
    "tokenizers",
    "fat5_jax.convert.plain_files",
    "fat5_jax.convert.sentencepiece_file",
    "fat5_jax.models.config",
  },
  "fat5_jax/distributed": {"jax", "numpy", "fat5_jax", "fat5_jax.models"},
  "fat5_jax/optimizers": {"jax", "optax", "fat5_jax.distributed"},
  "fat5_jax/checkpoints": {
    *("jax", "numpy", "orbax", "seqio", "tensorstore", "xxhash"),
    *("fat5_jax.convert", "fat5_jax.distributed", "fat5_jax.models"),
    "fat5_jax.optimizers",
    # Where a vocabulary is asked for.
    "fat5_jax.data.vocabularies",
  },
  "fat5_jax/loggers": {
    *("clu", "jax", "matplotlib", "numpy", "tensorflow"),
    # trackers.py, where a run asks for them.
    *("mlflow", "trackio", "wandb"),
    *("fat5_jax.checkpoints", "fat5_jax.convert.plain_files"),
  },
  "fat5_jax/inference": {
    *("fat5_jax", "jax", "numpy", "seqio", "tensorflow_datasets"),
    *("fat5_jax.checkpoints", "fat5_jax.data", "fat5_jax.distributed"),
    *("fat5_jax.models", "fat5_jax.objectives"),
  },
  "fat5_jax/evaluation": {
    *("jax", "numpy", "seqio", "tensorflow", "tensorflow_datasets"),
    *("fat5_jax.checkpoints", "fat5_jax.data", "fat5_jax.distributed"),
    *("fat5_jax.inference", "fat5_jax.loggers", "fat5_jax.models"),
  },
  "fat5_jax/training": {
    *("flax", "jax", "numpy", "optax", "seqio"),
    *("fat5_jax.checkpoints", "fat5_jax.data", "fat5_jax.distributed"),
    *("fat5_jax.evaluation", "fat5_jax.loggers", "fat5_jax.models"),
    *("fat5_jax.objectives", "fat5_jax.inference.decoding"),
    "fat5_jax.optimizers",
  },
  "fat5_jax/planning": {
    *("jax", "numpy", "fat5_jax.convert.plain_files"),
    *("fat5_jax.distributed", "fat5_jax.inference.decoding"),
    *("fat5_jax.models", "fat5_jax.training"),
  },
  # The top: all but gin, and of the commands train() alone.
  "fat5_jax/api": {
    *("flax", "jax", "numpy", "optax", "pandas", "seqio"),
    *("tensorflow_datasets", "fat5_jax.train"),
    *("fat5_jax.checkpoints", "fat5_jax.data", "fat5_jax.distributed"),
    *("fat5_jax.inference", "fat5_jax.loggers", "fat5_jax.models"),
    *("fat5_jax.optimizers", "fat5_jax.training"),
  },
}
COMMANDS = {f"fat5_jax.{name}" for name in ("train", "eval", "infer", "plan")}


def imports(path):
  with open(path, encoding="utf-8") as file:
    tree = ast.parse(file.read())
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      if node.module.split(".")[0] == "fat5_jax":
        # What is imported from a package may be a module of it.
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
      else:
        yield node.module


def python_files(folder):
  for parent, _, names in os.walk(os.path.join(ROOT, folder)):
    # What lies there is copied into exports, and no module of ours.
    if os.path.basename(parent) != "shipped":
      yield from (os.path.join(parent, n) for n in names if n.endswith(".py"))


def is_of(name, modules):
  """Whether a name is one of some modules, or lies in it."""
  return any(name == m or name.startswith(f"{m}.") for m in modules)


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_room_imports_only_what_it_may(folder):
  own = {folder.replace("/", ".")}
  ground = set() if folder == "pallas_kernels" else GROUND
  # Names of the package alone are its version.
  deep = {name for name in ALLOWED[folder] if name != "fat5_jax"}
  for path in python_files(folder):
    for name in imports(path):
      if name.split(".")[0] in sys.stdlib_module_names:
        continue
      may = name == "fat5_jax" and name in ALLOWED[folder]
      assert may or is_of(name, own | ground | deep), f"{path} imports {name}"


def test_rooms_stand_on_each_other_without_a_circle():
  rooms = [folder.replace("/", ".") for folder in ALLOWED]
  for i, folder in enumerate(ALLOWED):
    for above in rooms[i + 1 :]:
      named = ALLOWED[folder] - {"fat5_jax"}
      assert not is_of(above, named), f"{folder} imports {above}"


def test_every_folder_is_a_room():
  rooms = {"fat5_jax", "fat5_jax/gin_config", *ALLOWED}
  for path in python_files("fat5_jax"):
    folder = os.path.relpath(os.path.dirname(path), ROOT)
    assert any(
      folder == room or folder.startswith(f"{room}/") for room in rooms
    ), path
    assert folder != "fat5_jax" or is_of(
      f"fat5_jax.{os.path.basename(path)[:-3]}",
      {*GROUND, *COMMANDS, "fat5_jax.__init__"},
    ), f"{path}: of which room is it?"


def test_nobody_imports_a_command_but_the_doors():
  for path in python_files("fat5_jax"):
    if "gin_config" not in path:
      # Python's door trains by train's function.
      may = {"fat5_jax.train"} if "/api/" in path else set()
      for name in imports(path):
        assert not is_of(name, COMMANDS - may), f"{path} imports {name}"


def test_only_one_room_imports_gin_and_nothing_imports_torch():
  for folder in ("fat5_jax", "pallas_kernels"):
    for path in python_files(folder):
      roots = {name.split(".")[0] for name in imports(path)}
      assert "torch" not in roots, path
      assert "gin" not in roots or "/gin_config/" in path, path


def test_the_gin_folder_is_no_package():
  assert not os.path.exists(os.path.join(ROOT, "gin", "__init__.py"))


def test_the_step_and_the_converter_run_without_seqio_tensorflow_and_gin():
  program = (
    "import sys\n"
    "for name in ('seqio', 'tensorflow', 'gin', 'clu', 'torch'):\n"
    "  sys.modules[name] = None\n"
    "import fat5_jax.training.steps, fat5_jax.inference.decoding\n"
    "import fat5_jax.optimizers, fat5_jax.convert.hf, fat5_jax.models.t5\n"
    "import fat5_jax.training.program, fat5_jax.distributed.hosts\n"
    "import fat5_jax.checkpoints.checkpointer, fat5_jax.planning.search\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("command", ["train", "eval", "infer", "plan"])
def test_help_needs_no_heavy_import(command):
  program = (
    "import runpy, sys\n"
    "for name in ('jax', 'tensorflow', 'seqio', 'gin', 'flax', 'rich'):\n"
    "  sys.modules[name] = None\n"
    f"sys.argv = ['x', '--help']\n"
    f"runpy.run_module('fat5_jax.{command}', run_name='__main__')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0 and "--gin_file" in done.stdout, done.stderr
