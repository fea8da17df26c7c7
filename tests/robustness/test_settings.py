"""Every wrong word in a setting is answered in a line, before anything runs."""

import os
import random

import pytest
import settings
from zygote import ROOT

RECIPE = "recipes/quickstart.gin"


def run(zygote, folder, case, command="train"):
  """The outcome of a case beside a recipe, with --dry_run."""
  path = folder / "user.gin"
  path.write_text(case.text)
  files = [f"--gin_file={RECIPE}"] if command == "train" else []
  flags = [*files, f"--gin_file={path}", "--dry_run", *case.flags]
  if "MODEL_DIR" not in case.text:
    flags.append(f"--gin.MODEL_DIR={folder / 'run'}")
  return zygote.run(command, flags, str(folder), seconds=40)


def report(found):
  assert not found, f"{len(found)} cases:\n" + "\n".join(found)


def test_a_wrong_value_of_a_macro_is_refused(zygote, seed, tmp_path):
  found = []
  for case in settings.macros(random.Random(seed)):
    if problem := run(zygote, tmp_path, case).problem(most_lines=6):
      found.append(f"{case.text}: {problem}")
  report(found)
  assert not (tmp_path / "run").exists()


def test_a_wrong_setting_of_infer_is_refused(zygote, tmp_path):
  found = []
  for name, value in settings.OF_INFER:
    case = settings.Case(f"{name} = {value}")
    outcome = run(zygote, tmp_path, case, "infer")
    problem = outcome.problem(most_lines=6)
    # Not for the folder, which is not there: the value comes first.
    if not problem and name not in outcome.stderr:
      problem = outcome.stderr[-200:]
    if problem:
      found.append(f"{case.text}: {problem}")
  report(found)


def test_a_line_that_makes_no_sense_is_refused(zygote, tmp_path):
  found = []
  for case in settings.lines():
    outcome = run(zygote, tmp_path, case)
    problem = outcome.problem(most_lines=8)
    if problem and outcome.status == 2 and "usage:" in outcome.stderr:
      problem = None  # argparse's own answer.
    if problem:
      found.append(f"{case.text or case.flags}: {problem}")
  report(found)


def test_a_file_that_is_no_gin_is_refused(zygote, tmp_path):
  found = []
  for name in settings.write_odd_files(str(tmp_path)):
    outcome = zygote.run("train", [f"--gin_file={name}"], str(tmp_path))
    if problem := outcome.problem(most_lines=8):
      found.append(f"{name}: {problem}")
  report(found)


@pytest.mark.parametrize("part", range(2))
def test_no_change_of_a_file_crashes(zygote, seed, tmp_path, part):
  """What it comes to may be right: a changed comment, another size."""
  with open(os.path.join(ROOT, "gin", RECIPE), encoding="utf-8") as file:
    text = file.read()
  found = []
  rng = random.Random(2 * seed + part)
  for n, data in enumerate(settings.mutations(rng, text, 40)):
    (tmp_path / "user.gin").write_bytes(data)
    flags = ["--gin_file=user.gin", "--gin.MODEL_DIR=run", "--dry_run"]
    outcome = zygote.run("train", flags, str(tmp_path), seconds=60)
    problem = outcome.crash()
    if problem is None and outcome.status == 1:
      problem = outcome.problem()
    if problem:
      (tmp_path / f"bad_{n}.gin").write_bytes(data)
      found.append(f"{tmp_path}/bad_{n}.gin: {problem}")
  report(found)
