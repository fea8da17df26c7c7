"""A run folder goes on with the run that it holds, and says what changed."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from fat5_jax import console, fetched, storage
from fat5_jax.checkpoints import run_record
from fat5_jax.data import records
from fat5_jax.errors import UserError


def check_same_task(
  model_dir: str, record: dict[str, Any], own_head: dict[str, Any] | None
) -> None:
  """Raises UserError if the folder holds a run on other data, or another head.

  What its labels mean, its metrics and its curves are those of one task.
  """
  found = run_record.read_or_none(model_dir) or {}
  before = found.get("task")
  if before is None:
    return
  lines = records.difference(before, json.loads(json.dumps(record)))
  if found.get("own_head") != own_head:
    lines.append(f"  - head module {found.get('own_head')}")
    lines.append(f"  + head module {own_head}")
  if lines:
    raise UserError(
      f"MODEL_DIR {model_dir} holds a run on other data (- there, + asked"
      " for):\n"
      + "\n".join(lines)
      + "\nUse another --gin.MODEL_DIR=..., and this one as"
      " INITIAL_CHECKPOINT_PATH to go on from its weights"
    )


def base_of(
  model_dir: str, initial_path: str | None, own_step: int | None
) -> str | None:
  """The checkpoint that a run started from, as recorded then."""
  if own_step is not None:
    return (run_record.read_or_none(model_dir) or {}).get("base")
  return initial_path and fetched.pinned(initial_path)


# Lines of a configuration: MACRO = value, or scope/module.name.parameter.
_SETTING = re.compile(r"^([\w./]+) = (.*)$", re.MULTILINE)


def _short(value: str | None) -> str:
  value = value or "unset"
  return value if len(value) <= 60 else f"{value[:57]}..."


def _settings(config_text: str) -> dict[str, str]:
  """Names and values; gin wraps long ones over several indented lines."""
  text = re.sub(r"\\?\n[ \t]+", " ", config_text)
  return {k: " ".join(v.split()) for k, v in _SETTING.findall(text)}


def tell_changes(model_dir: str, config_text: str) -> None:
  """Says in a line what differs from the settings that the run had."""
  path = os.path.join(model_dir, "config.gin")
  if not storage.exists(path):
    return
  before = _settings(storage.read(path).decode(errors="replace"))
  now = _settings(config_text)
  changed = [
    f"{key} {_short(before.get(key))} -> {_short(now.get(key))}"
    for key in sorted({*before, *now})
    if before.get(key) != now.get(key) and key != "MODEL_DIR"
  ]
  if changed:
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    console.say(f"changed since: {', '.join(changed[:8])}{more}")
