"""The notebooks of docs/ run from top to bottom, and show what they showed."""

import json
import os
import subprocess
import sys

from conftest import ROOT
import pytest

FOLDER = os.path.join(ROOT, "docs", "notebooks")
NAMES = ("heads", "mrpc")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, request):
  environment = os.environ | {"STEPS": "3", "MODEL": ""}
  if name == "mrpc":
    data = request.getfixturevalue("shared_data")
    environment["DATA"] = os.path.join(data, "glue", "MRPC")
  tool = os.path.join(ROOT, "tools", "notebook.py")
  path = os.path.join(FOLDER, f"{name}.ipynb")
  done = subprocess.run(
    [sys.executable, tool, path, "--check"],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_it_was_run_as_it_stands(name):
  """By tools/notebook.py, which numbers the cells."""
  with open(os.path.join(FOLDER, f"{name}.ipynb"), encoding="utf-8") as file:
    cells = json.load(file)["cells"]
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  numbers = [cell["execution_count"] for cell in code]
  assert numbers == list(range(1, len(code) + 1))
  assert code[-1]["outputs"]
