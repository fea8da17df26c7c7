"""Rows of SuperGLUE in its official layout, and what T5 makes of them.

The rows are made up, or printed in the papers of the data sets. The texts, by
task and split, are what TFDS 4.9.10 (super_glue 1.0.2) and t5 0.9.4
(t5.data.preprocessors) made of the files that `write` writes.
"""

import json
import os

_PATH = os.path.join(os.path.dirname(__file__), "golden", "super_glue.json")
with open(_PATH, encoding="utf-8") as _file:
  _GOLDEN = json.load(_file)
# By folder of the official layout.
ROWS = _GOLDEN["rows"]
# "task/split" to rows of inputs and targets.
TEXTS = _GOLDEN["texts"]


def write(folder):
  """The files of all tasks in a folder: the same rows in every split."""
  for name, rows in ROWS.items():
    (folder / name).mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for file in ("train.jsonl", "val.jsonl"):
      (folder / name / file).write_text(lines)
    blind = "".join(json.dumps(_unanswered(row)) + "\n" for row in rows)
    (folder / name / "test.jsonl").write_text(blind)
  (folder / "DPR").mkdir()
  for file in ("train.c.txt", "test.c.txt"):
    (folder / "DPR" / file).write_text(_GOLDEN["dpr"])
  return str(folder)


def _unanswered(value):
  """A row as test sets have it."""
  if isinstance(value, dict):
    hidden = {"answers"} if "query" in value else {"label"}
    return {k: _unanswered(v) for k, v in value.items() if k not in hidden}
  return [_unanswered(v) for v in value] if isinstance(value, list) else value
