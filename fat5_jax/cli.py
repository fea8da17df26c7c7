"""Flags, and errors for people; gin files are read by gin_files.py."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import logging
import os
import re
import signal
import sys
import traceback

from fat5_jax import interrupts
from fat5_jax.errors import UserError
from fat5_jax.gin_config import t5x

_COMMANDS = {
  # Command: module, function, the run file that fills what the user's files
  # leave open. train has none: pretrain or finetune is the user's choice.
  "train": ("fat5_jax.train", "train", None),
  "eval": ("fat5_jax.eval", "evaluate", "runs/eval.gin"),
  "infer": ("fat5_jax.infer", "infer", "runs/infer.gin"),
  # What train would run is what is planned.
  "plan": ("fat5_jax.train", "train", None),
}
# What the compiled step does not depend on; plan does without.
NOT_PLANNED = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "VOCAB_FILE")
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


def _parser(command: str) -> argparse.ArgumentParser:
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


def _split_gin_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
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


@contextlib.contextmanager
def _quiet_stderr():
  """Drops what native code writes while TensorFlow loads (no flag does)."""
  saved = os.dup(2)
  sink = os.open(os.devnull, os.O_WRONLY)
  os.dup2(sink, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(sink)


def _run(command: str, arguments: list[str]) -> None:
  rest, bindings = _split_gin_flags(arguments)
  rest, t5x_flags = t5x.take_flags(command, rest)
  flags = _parser(command).parse_args(rest)
  module_name, function_name, run_file = _COMMANDS[command]
  files = [*([run_file] if run_file else []), *flags.gin_file]
  if not files:
    raise UserError(
      "no --gin_file given. To start: --gin_file=recipes/quickstart.gin"
      " --gin.MODEL_DIR=/tmp/quickstart"
    )
  if command == "plan":
    from fat5_jax.planning import chips

    if not flags.topology:
      raise UserError("no --topology given. For example: --topology=v5e:16x16")
    if flags.fastest is not None and flags.fastest < 1:
      raise UserError(
        f"--fastest={flags.fastest}: at least 1 setting, or leave the number"
        " out"
      )
    if flags.fastest and "all" in flags.topology:
      raise UserError(
        "--fastest searches one topology at a time: name it, such as"
        " --topology=v5e:16x16"
      )
    chips.prepare_environment([t for t in flags.topology if t != "all"])
  # Quiet by default: TensorFlow and absl speak to their own developers.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  logging.getLogger("fat5_jax").setLevel(logging.INFO)
  # orbax logs there, with a traceback, what its caller is told anyway.
  for name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  with _quiet_stderr():
    import tensorflow  # noqa: F401

  from fat5_jax import gin_files
  import gin

  module = importlib.import_module(module_name)
  search_paths = [p for p in flags.gin_search_paths.split(",") if p]
  bindings = [*flags.gin_bindings, *bindings]
  files, bindings = t5x.in_our_words(
    command, flags.gin_file, bindings, search_paths, t5x_flags
  ) or (files, bindings)
  gin_files.parse(
    files,
    bindings,
    search_paths,
    function_name,
    may_be_unset=NOT_PLANNED if command == "plan" else (),
  )
  interrupts.loaded()
  if command != "plan":
    _meet_other_hosts(flags)
  plain_function = getattr(module, function_name)
  function = gin.get_configurable(plain_function)
  options = _options(command, flags)
  if "config_text" in inspect.signature(plain_function).parameters:
    options["config_text"] = gin.config_str
  try:
    function(**options)
  except (RuntimeError, TypeError, ValueError) as e:
    # Only gin's own complaints are the user's; others keep their traceback.
    cause = gin_files.explain_call(e, function_name)
    if cause is None:
      raise
    raise UserError(cause) from None


def _options(command: str, flags: argparse.Namespace) -> dict[str, object]:
  if command != "plan":
    return {"dry_run": flags.dry_run}
  from fat5_jax import plan

  return {
    "plan": functools.partial(
      plan.report,
      topologies=flags.topology,
      output=flags.json,
      decode=not flags.no_decode,
      seek=not flags.keep,
      fastest=flags.fastest,
    )
  }


def _meet_other_hosts(flags: argparse.Namespace) -> None:
  from fat5_jax import console, hosts

  place = hosts.find_place(
    flags.coordinator_address, flags.process_count, flags.process_index
  )
  hosts.start(place, flags.initialization_timeout)
  if hosts.everyone.index:
    console.only_errors()


def main(command: str, arguments: list[str] | None = None) -> int:
  """Runs a command; the process's exit status.

  0 is success, or SIGTERM and a saved stop; 1 a mistake of the user's, told in
  one message; 130 Ctrl-C, saved or not; 143 SIGTERM before there was anything
  to save.
  """
  with interrupts.watched(f"fat5_jax.{command}"):
    return _answer(command, arguments)


def _answer(command: str, arguments: list[str] | None) -> int:
  """Runs a command, and tells what a person wants to know of its end."""
  try:
    _run(command, sys.argv[1:] if arguments is None else arguments)
  except BrokenPipeError:
    # Standard output was closed by `| head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except BaseException as e:
    status = interrupts.ending()
    if status is not None:
      if (hosts := sys.modules.get("fat5_jax.hosts")) is not None:
        hosts.everyone.leave("stopped by a person")
      if arguments is None:
        _end_now(status)
      return status
    message = _user_message(e)
    _leave_other_hosts(message, e)
    if message is None:
      raise
    print(f"error: {message}", file=sys.stderr)
    if arguments is None:
      # A row that TensorFlow still reads ahead needs Python, and Python's end
      # would wait for it.
      _end_now()
    return 1
  _leave_other_hosts()
  # SIGTERM asks for no more than a saved stop.
  is_cut = interrupts.received() == signal.SIGINT
  return interrupts.status(signal.SIGINT) if is_cut else 0


def _end_now(status: int = 1) -> None:
  with contextlib.suppress(OSError):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def _user_message(error: BaseException) -> str | None:
  """What to tell a user of a mistake of his; None for a fault of ours."""
  if isinstance(error, UserError):
    return _without_gin_trail(str(error))
  if isinstance(error, ValueError):
    return _user_value_error(error)
  if isinstance(error, MemoryError):
    return "not enough memory: a smaller BATCH_SIZE, or NUM_MICROBATCHES"
  if isinstance(error, RecursionError):
    frames = traceback.extract_tb(error.__traceback__)
    if sum("gin_wrapper" in frame.name for frame in frames) > 20:
      return "what a gin reference builds needs itself: they go in a circle"
  # pallas_kernels says what a chip or jax cannot do; others are bugs.
  message = _without_gin_trail(str(error))
  if isinstance(error, NotImplementedError) and message.startswith(
    "attention implementation"
  ):
    return f"{message} (macro ATTENTION)"
  return None


def _leave_other_hosts(
  message: str | None = None, error: BaseException | None = None
) -> None:
  """Says goodbye to the other hosts, if any; with an error they stop too.

  Then this process ends here and now: leaving in the usual way, jax would wait
  for hosts that wait for this one.
  """
  hosts = sys.modules.get("fat5_jax.hosts")
  if hosts is None or hosts.everyone.count == 1:
    return
  if error is None:
    hosts.everyone.leave()
    return
  if message is None:
    # A collective fails when a host dies; which one, the roll call says.
    hosts.everyone.wait_for_news()
    traceback.print_exception(error)
  else:
    print(f"error: host {hosts.everyone.index}: {message}", file=sys.stderr)
  hosts.everyone.leave((message or repr(error)).splitlines()[0])
  _end_now()


def _without_gin_trail(message: str) -> str:
  """The message without the calls that gin appends as it passes it on."""
  return message.split("\n  In call to configurable")[0]


def _user_value_error(error: ValueError) -> str | None:
  """The message of a T5Config that refused its values, else None.

  gin appends "In call to configurable ..." to what it passes through.
  """
  text = str(error)
  for name in (
    "T5Config",
    "HeadConfig",
    "LoRAConfig",
    "head_config",
    "create",
    "create_learning_rate_scheduler",
    "DatasetConfig",
  ):
    if f"In call to configurable '{name}'" in text:
      return f"{name}: {_without_gin_trail(text)}"
  return None
