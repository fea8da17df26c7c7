"""The steps that a run folder holds: whole, damaged, unfinished."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import itertools
import json
import os
import re
import shutil

from fat5_jax import console, storage
from fat5_jax.checkpoints import bucket, integrity
from fat5_jax.convert import plain_files
from fat5_jax.errors import UserError

STEP_FOLDER = re.compile(r"checkpoint_(\d+)$")
_UNFINISHED = re.compile(r"checkpoint_\d+\.orbax-checkpoint-tmp")
DAMAGED = "damaged"
# Of a run that follows a metric; also what it may be named by.
BEST = "best.json"


def steps(model_dir: str) -> list[int]:
  """The steps of the complete checkpoints in a run folder, ascending."""
  matches = map(STEP_FOLDER.match, storage.names(model_dir))
  found = sorted(int(match[1]) for match in matches if match)
  if storage.is_remote(model_dir):
    folder_of = lambda step: f"{model_dir}/checkpoint_{step}"
    found = [n for n in found if integrity.has_checksums(folder_of(n))]
  return found


def latest_whole(
  model_dir: str, items: Sequence[str] = integrity.ITEMS
) -> tuple[int | None, list[int]]:
  """(the latest step that is whole, the later ones that are damaged).

  Says so, where a step is passed over.

  Args:
    model_dir: the run folder.
    items: what will be read of it.

  Raises:
    UserError: if there are checkpoints, and all are damaged.
  """
  damaged: dict[int, str] = {}
  found = steps(model_dir)
  folder_of = lambda step: os.path.join(model_dir, f"checkpoint_{step}")
  summed = [n for n in found if integrity.has_checksums(folder_of(n))]
  for step in reversed(found):
    reason = integrity.problem(folder_of(step), items)
    if (
      reason is None and step not in summed and step > min(summed, default=step)
    ):
      # One of an older fat5_jax comes before those that have them.
      reason = f"{integrity.NAME} is missing"
    if reason is None:
      for bad, why in damaged.items():
        _warn_once(
          f"warning: {folder_of(bad)} is damaged ({why}): passed over for step"
          f" {step}, the last whole one"
        )
      return step, list(damaged)
    damaged[step] = reason
  if damaged:
    listed = "\n".join(
      f"  checkpoint_{step}: {reason}" for step, reason in damaged.items()
    )
    raise UserError(
      f"{model_dir}: every checkpoint is damaged:\n{listed}\nTrain from another"
      " (INITIAL_CHECKPOINT_PATH, in another MODEL_DIR), predict with another"
      " (CHECKPOINT_PATH)"
    )
  return None, []


@functools.lru_cache
def _warn_once(text: str) -> None:
  """A command looks for the latest more than once."""
  console.say(text)


def put_aside(model_dir: str, step: int) -> None:
  """Takes a damaged checkpoint's name, so that the step can be saved anew."""
  path = os.path.join(model_dir, f"checkpoint_{step}")
  free = (f"{path}.{DAMAGED}{n or ''}" for n in itertools.count())
  target = next(name for name in free if not storage.exists(name))
  if storage.is_remote(path):
    bucket.put_aside(path, target)
  else:
    os.rename(path, target)


def remove_unfinished(model_dir: str) -> None:
  """What a process that was killed had begun to write, or to remove."""
  if storage.is_remote(model_dir):
    for name in storage.names(model_dir):
      folder = f"{model_dir}/{name}"
      if STEP_FOLDER.match(name) and bucket.is_unfinished(folder):
        bucket.remove(folder)
    return
  for entry in list(os.scandir(model_dir)):
    if entry.name.startswith(plain_files.SCRATCH) or _UNFINISHED.match(
      entry.name
    ):
      if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
      else:
        os.unlink(entry.path)


def best(model_dir: str) -> tuple[str, int, float] | None:
  """(metric, step, value) that a run found best (training/best.py), if any."""
  path = os.path.join(model_dir, BEST)
  if not storage.exists(path):
    return None
  try:
    found = json.loads(storage.read(path))
    return str(found["metric"]), int(found["step"]), float(found["value"])
  except (ValueError, KeyError, TypeError):
    raise UserError(f"{path} does not tell metric, step and value") from None


def drop_old(
  model_dir: str, keep: int | None, best_step: int | None = None
) -> None:
  """Removes what is beyond `keep`, but for the best; a name is gone before its
  files are."""
  for step in steps(model_dir)[:-keep] if keep else []:
    if step == best_step:
      continue
    folder = os.path.join(model_dir, f"checkpoint_{step}")
    if storage.is_remote(folder):
      bucket.remove(folder)
      continue
    leaving = os.path.join(model_dir, f"{plain_files.SCRATCH}checkpoint_{step}")
    os.rename(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)
