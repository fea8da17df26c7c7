"""The house rules that a machine can check."""

import ast
import os
import subprocess
import sys

from conftest import ROOT
import pytest

# What each part may import besides the standard library and itself.
ALLOWED = {
  "pallas_kernels": {"jax", "numpy", "pallas_kernels"},
  "fat5_jax/models": {
    "flax",
    "jax",
    "numpy",
    "pallas_kernels",
    "fat5_jax.models",
  },
  "fat5_jax/convert": {
    "ml_dtypes",
    "msgpack",
    "numpy",
    "safetensors",
    "tensorstore",
    # mesh_tf.py, when it reads a checkpoint.
    "tensorflow",
    "fat5_jax.convert",
    "fat5_jax.errors",
    "fat5_jax.models.config",
  },
  "fat5_jax/planning": {
    "jax",
    "numpy",
    "fat5_jax.console",
    "fat5_jax.errors",
    "fat5_jax.planning",
    "fat5_jax.program",
    "fat5_jax.sharding",
    "fat5_jax.steps",
    "fat5_jax.trainable",
  },
  "fat5_jax/data": {
    "numpy",
    "seqio",
    "tensorflow",
    "tensorflow_datasets",
    "datasets",
    "pyarrow",
    "sklearn",
    "scipy",
    "sacrebleu",
    "rouge_score",
    "sentencepiece",
    "tokenizers",
    "jax",
    "fat5_jax.data",
    "fat5_jax.errors",
    "fat5_jax.checkpoints",
    "fat5_jax.convert.plain_files",
    "fat5_jax.convert.sentencepiece_file",
    "fat5_jax.macros",
    "fat5_jax.run_record",
    "fat5_jax.weights",
    "fat5_jax.models.config",
  },
}


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


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_part_imports_only_what_it_may(folder):
  for path in python_files(folder):
    for name in imports(path):
      if name.split(".")[0] in sys.stdlib_module_names:
        continue
      assert any(
        name == a or name.startswith(f"{a}.") for a in ALLOWED[folder]
      ), f"{path} imports {name}"


def test_only_two_modules_import_gin_and_nothing_imports_torch():
  for folder in ("fat5_jax", "pallas_kernels"):
    for path in python_files(folder):
      roots = {name.split(".")[0] for name in imports(path)}
      assert "torch" not in roots, path
      is_door = path.endswith(("cli.py", "gin_files.py"))
      is_door |= os.path.join("fat5_jax", "gin_config") in path
      assert "gin" not in roots or is_door, path


def test_the_gin_folder_is_no_package():
  assert not os.path.exists(os.path.join(ROOT, "gin", "__init__.py"))


def test_the_step_and_the_converter_run_without_seqio_tensorflow_and_gin():
  program = (
    "import sys\n"
    "for name in ('seqio', 'tensorflow', 'gin', 'clu', 'torch'):\n"
    "  sys.modules[name] = None\n"
    "import fat5_jax.steps, fat5_jax.decoding, fat5_jax.models.t5\n"
    "import fat5_jax.optimizers, fat5_jax.convert.hf, fat5_jax.checkpoints\n"
    "import fat5_jax.program, fat5_jax.hosts, fat5_jax.planning.search\n"
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
