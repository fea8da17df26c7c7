"""The flags of the commands; `--gin.NAME=VALUE` among them."""

from __future__ import annotations

import argparse
import re

from fat5_jax.errors import UserError

_HELP = {
  "train": (
    "Train a model. Needs a gin file, for example:\n\n"
    "  python -m fat5_jax.train --gin_file=recipes/quickstart.gin \\\n"
    "    --gin.MODEL_DIR=/tmp/quickstart"
  ),
  "eval": (
    "Score a checkpoint on a task, with the gin file it was trained by:\n\n"
    "  python -m fat5_jax.eval --gin_file=recipes/quickstart.gin \\\n"
    "    --gin.MODEL_DIR=/tmp/quickstart"
  ),
  "infer": (
    "Predict lines of text (from INPUT, or standard input) or a task:\n\n"
    "  python -m fat5_jax.infer --gin.MODEL_DIR=/tmp/quickstart \\\n"
    "    --gin.INPUT=lines.txt --gin.OUTPUT=predictions.jsonl"
  ),
  "plan": (
    "Compile a training run for chips that are not here: memory, operations,\n"
    "communication, time by roofline, what would make it fit, what faster:\n\n"
    "  python -m fat5_jax.plan --gin_file=recipes/xxl_v5e.gin \\\n"
    "    --topology=v5e:16x16"
  ),
}


def parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"python -m fat5_jax.{command}",
    description=_HELP[command],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=(
      "--gin.NAME=VALUE  sets one macro or parameter, after all files;\n"
      "                  plain text needs no quotes:"
      " --gin.MODEL_DIR=/tmp/run"
    ),
    allow_abbrev=False,
  )
  parser.add_argument(
    "--gin_file",
    action="append",
    default=[],
    metavar="FILE",
    help="gin file, repeatable, later ones win; looked for in the shipped"
    " gin folder, here, and in --gin_search_paths (what it includes: beside it"
    " first)",
  )
  parser.add_argument(
    "--gin_bindings",
    action="append",
    default=[],
    metavar="'NAME = VALUE'",
    help="one binding in gin's syntax, repeatable",
  )
  parser.add_argument(
    "--gin_search_paths",
    default="",
    metavar="DIR,DIR",
    help="more folders for gin files, comma-separated",
  )
  if command == "plan":
    parser.add_argument(
      "--topology",
      action="append",
      default=[],
      metavar="CHIP:SIZE",
      help="what to compile for, repeatable: v5e:16x16, v4:4x4x4, v5p:4x4x4,"
      " v6e:8x8, tpu7x:2x2x1, h100:8, h200:8, a100:8, cpu:4, or all",
    )
    parser.add_argument(
      "--json", metavar="FILE", help="where all figures go (plan.json)"
    )
    parser.add_argument(
      "--no_decode", action="store_true", help="compile the training step alone"
    )
    parser.add_argument(
      "--fastest",
      nargs="?",
      const=8,
      type=int,
      metavar="N",
      help="compile N (8) other meshes, remat policies and microbatches, those"
      " first that a cheap estimate finds fast, and rank them by roofline; the"
      " best with a larger BATCH_SIZE too",
    )
    parser.add_argument(
      "--keep",
      action="store_true",
      help="seek no change that fits where the run does not",
    )
    return parser
  several = parser.add_argument_group(
    "many hosts",
    "found by themselves on Cloud TPU, SLURM and Open MPI; else give all three",
  )
  several.add_argument(
    "--coordinator_address",
    metavar="HOST:PORT",
    help="of process 0; the port after it must be open too",
  )
  several.add_argument("--process_count", type=int, metavar="N")
  several.add_argument("--process_index", type=int, metavar="I")
  several.add_argument(
    "--initialization_timeout",
    type=float,
    default=300,
    metavar="SECONDS",
    help="how long to wait for the other hosts (300)",
  )
  parser.add_argument(
    "--dry_run",
    action="store_true",
    help="build everything, print parameters, configuration and a batch, stop",
  )
  if command == "train":
    parser.add_argument(
      "--prepare_data",
      action="store_true",
      help="prepare the data for runs to come, stop",
    )
  return parser


def _quote_plain_text(value: str) -> str:
  """A value in gin's syntax: plain text is quoted, literals stay."""
  import ast

  text = value.strip()
  if text[:1] in "@%'\"":
    return value
  try:
    # References may stand inside a literal: (@a(), %B).
    ast.literal_eval(re.sub(r"[@%][\w./]+(\(\))?", "0", text))
    return value
  except (ValueError, SyntaxError):
    return repr(value)


def split_gin_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
  """(other arguments, bindings from --gin.NAME=VALUE)."""
  rest, bindings = [], []
  for argument in arguments:
    match = re.match(r"--gin\.([^=]+)=(.*)$", argument, re.DOTALL)
    if match:
      bindings.append(f"{match[1]} = {_quote_plain_text(match[2])}")
    elif argument.startswith("--gin."):
      raise UserError(f"{argument}: write {argument}=VALUE")
    else:
      rest.append(argument)
  return rest, bindings
