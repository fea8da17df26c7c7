"""A command from its flags to its exit status, and errors for people."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import logging
import os
import signal
import sys
import traceback

from fat5_jax import interrupts
from fat5_jax.errors import UserError
from fat5_jax.gin_config import flags as flags_lib
from fat5_jax.gin_config import t5x

# Command: what gin builds, the function it is handed to (both of the module of
# that name), and the run file that fills what the user's files leave open.
# train has none: pretrain or finetune is the user's choice.
_COMMANDS = {
  "train": ("Run", "train", None),
  "eval": ("Evaluation", "evaluate", "runs/eval.gin"),
  "infer": ("Inference", "infer", "runs/infer.gin"),
  # What train would run is what is planned.
  "plan": ("Run", "plan", None),
}
# What the compiled step does not depend on; plan does without.
NOT_PLANNED = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "VOCAB_FILE")
# Neither do the examples.
_NOT_PREPARED = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH")


def _run(command: str, arguments: list[str]) -> None:
  rest, bindings = flags_lib.split_gin_flags(arguments)
  rest, t5x_flags = t5x.take_flags(command, rest)
  flags = flags_lib.parser(command).parse_args(rest)
  built, function_name, run_file = _COMMANDS[command]
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
  from fat5_jax import console

  with console.without_native_lines():
    import tensorflow  # noqa: F401

  from fat5_jax.gin_config import parse

  module = importlib.import_module(f"fat5_jax.{command}")
  search_paths = [p for p in flags.gin_search_paths.split(",") if p]
  bindings = [*flags.gin_bindings, *bindings]
  files, bindings = t5x.in_our_words(
    command, flags.gin_file, bindings, search_paths, t5x_flags
  ) or (files, bindings)
  parse.parse(
    files,
    bindings,
    search_paths,
    built,
    may_be_unset=NOT_PLANNED
    if command == "plan"
    else _NOT_PREPARED
    if command == "train" and flags.prepare_data
    else (),
  )
  interrupts.loaded()
  if command != "plan":
    _meet_other_hosts(flags)
  run = _build(getattr(module, built))
  if command == "plan":
    module.plan(run, _plan_request(module, flags))
  elif flags.dry_run:
    module.dry_run(run)
  elif command == "train" and flags.prepare_data:
    module.prepare_data(run)
  else:
    getattr(module, function_name)(run)


def _build(kind: type):
  """What gin's bindings say of a command's object.

  Raises:
    UserError: for what gin complains of.
  """
  from fat5_jax.gin_config import explain
  import gin

  options = {}
  if "config_text" in inspect.signature(kind).parameters:
    options["config_text"] = gin.config_str
  try:
    return gin.get_configurable(kind)(**options)
  except (RuntimeError, TypeError, ValueError) as e:
    # Only gin's own complaints are the user's; others keep their traceback.
    cause = explain.explain_call(e, kind.__name__)
    if cause is None:
      raise
    raise UserError(cause) from None


def _plan_request(module, flags: argparse.Namespace):
  return module.Request(
    topologies=flags.topology,
    output=flags.json or "plan.json",
    decode=not flags.no_decode,
    seek=not flags.keep,
    fastest=flags.fastest,
  )


def _meet_other_hosts(flags: argparse.Namespace) -> None:
  from fat5_jax import console
  from fat5_jax.distributed import hosts

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
      if (hosts := sys.modules.get("fat5_jax.distributed.hosts")) is not None:
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
  hosts = sys.modules.get("fat5_jax.distributed.hosts")
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
