"""Runs a notebook from top to bottom, and keeps what it shows.

    python tools/notebook.py docs/notebooks/mrpc.ipynb [--check]

Every code cell runs in this process, in a folder of its own, as in a kernel:
what it prints and the value of its last line become its outputs. `--check`
writes nothing. No Jupyter is needed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def run(notebook: dict[str, Any]) -> dict[str, Any]:
  """The notebook (nbformat 4) with the outputs of this run.

  Raises:
    Exception: what a cell raises.
  """
  scope: dict[str, Any] = {"__name__": "__main__"}
  cells, count = [], 0
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      count += 1
      outputs = _outputs("".join(cell["source"]), scope, count)
      cell = cell | {"execution_count": count, "outputs": outputs}
    cells.append(cell)
  return notebook | {"cells": cells}


def _outputs(source: str, scope: dict[str, Any], count: int) -> list[dict]:
  tree = ast.parse(source, f"<cell {count}>")
  last = None
  if tree.body and isinstance(tree.body[-1], ast.Expr):
    last = ast.Expression(tree.body.pop().value)
  printed, value = io.StringIO(), None
  with contextlib.redirect_stdout(printed):
    exec(compile(tree, f"<cell {count}>", "exec"), scope)
    if last is not None:
      value = eval(compile(last, f"<cell {count}>", "eval"), scope)
  found = []
  if printed.getvalue():
    lines = printed.getvalue().splitlines(keepends=True)
    found.append({"output_type": "stream", "name": "stdout", "text": lines})
  if value is not None:
    found.append(
      {
        "output_type": "execute_result",
        "execution_count": count,
        "metadata": {},
        "data": _shown(value),
      }
    )
  return found


def _shown(value: Any) -> dict[str, Any]:
  """A value as a notebook shows it."""
  data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
  if hasattr(value, "_repr_html_"):
    data["text/html"] = value._repr_html_().splitlines(keepends=True)
  if hasattr(value, "_repr_png_"):
    data["image/png"] = base64.b64encode(value._repr_png_()).decode()
  return data


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("notebook")
  parser.add_argument("--check", action="store_true", help="write nothing")
  flags = parser.parse_args()
  path = os.path.abspath(flags.notebook)
  with open(path, encoding="utf-8") as file:
    notebook = json.load(file)
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    notebook = run(notebook)
    os.chdir(ROOT)
  if not flags.check:
    with open(path, "w", encoding="utf-8") as file:
      json.dump(notebook, file, indent=1, ensure_ascii=False)
      file.write("\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
