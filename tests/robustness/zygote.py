"""Runs many commands fast: imports once, then a child a case.

A zygote is a process that has imported fat5_jax, and has touched no device. For
each case it forks a child, which runs a command of fat5_jax, or a function, in
a folder of its own, as a user would, and ends. What a child does (crash, hang,
fill memory) ends with it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback

ROOT = os.path.dirname(
  os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
)
# What a command may need; imported before the first fork.
MODULES = (
  "tensorflow",
  "fat5_jax.gin_config.cli",
  "fat5_jax.train",
  "fat5_jax.eval",
  "fat5_jax.infer",
  "fat5_jax.gin_config.parse",
  "tools.convert_checkpoint",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of a case.

  Attributes:
    status: exit status; minus the signal that ended it; None where it hung.
    stdout, stderr: all of it.
    seconds: of the child.
    mib: most memory of the child beyond what it was born with, as seen every
      hundredth of a second.
  """

  status: int | None
  stdout: str
  stderr: str
  seconds: float
  mib: float

  def problem(self, most_lines: int = 12) -> str | None:
    """What is no answer to a user's mistake, or None.

    An answer is status 1 and, at the end of stderr, `error: ` with what is
    wrong, in a few lines.
    """
    return self.crash() or self._no_answer(most_lines)

  def crash(self) -> str | None:
    """A hang, a signal, a traceback: what no case may come to."""
    if self.status is None:
      return f"hangs ({self.seconds:.0f} s)"
    if self.status < 0:
      return f"ended by signal {-self.status}"
    for text in (self.stderr, self.stdout):
      if "Traceback (most recent call last)" in text:
        return "traceback: " + text.strip().splitlines()[-1][:300]
    return None

  def _no_answer(self, most_lines: int) -> str | None:
    if self.status == 0:
      return "accepted: " + self.stdout.strip()[-200:]
    lines = self.stderr.strip().splitlines()
    errors = [n for n, line in enumerate(lines) if re.search("error: ", line)]
    if not errors:
      return f"status {self.status} without an error: {self.stderr[-200:]!r}"
    if len(lines) - errors[-1] > most_lines:
      return f"an error of {len(lines) - errors[-1]} lines"
    return None


class Zygote:
  """The parent's end. `with Zygote() as zygote: zygote.run(...)`."""

  def __init__(self):
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "TF_CPP_MIN_LOG_LEVEL": "3",
      "HF_HUB_OFFLINE": "1",
      "PYTHONPATH": ROOT,
    }
    self._process = subprocess.Popen(
      [sys.executable, os.path.abspath(__file__)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environment,
      text=True,
      start_new_session=True,
    )
    assert self._process.stdout.readline() == "ready\n"

  def run(
    self, call: str, arguments, cwd: str, seconds: float = 20, stdin: str = ""
  ) -> Outcome:
    """Runs a case.

    Args:
      call: "train", "eval", "infer" or "convert", a command with its
        arguments; or "module:function", called with them.
      arguments: strings, or what JSON takes for a function.
      cwd: the folder it runs in.
      seconds: until it counts as hanging.
      stdin: what it reads.
    """
    case = dict(call=call, arguments=arguments, cwd=cwd, stdin=stdin)
    print(
      json.dumps(case | {"seconds": seconds}),
      file=self._process.stdin,
      flush=True,
    )
    return Outcome(**json.loads(self._process.stdout.readline()))

  def __enter__(self) -> Zygote:
    return self

  def __exit__(self, *_) -> None:
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()


# --- the zygote's side -------------------------------------------------------


def _child(case: dict) -> int:
  """Runs the case in this process; its exit status."""
  call, arguments = case["call"], case["arguments"]
  if ":" in call:
    from fat5_jax.errors import UserError

    module, _, function = call.partition(":")
    try:
      getattr(importlib.import_module(module), function)(*arguments)
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
    return 0
  if call == "convert":
    from tools import convert_checkpoint

    sys.argv = ["tools/convert_checkpoint.py", *arguments]
    return convert_checkpoint.main() or 0
  from fat5_jax.gin_config import cli

  sys.argv = [f"python -m fat5_jax.{call}", *arguments]
  return cli.main(call)


def _fork(case: dict, files: list) -> int:
  """Starts a child; its process id."""
  pid = os.fork()
  if pid:
    return pid
  os.setsid()
  for number, file in enumerate(files):
    os.dup2(file.fileno(), number)
  os.chdir(case["cwd"])
  # As `python -m` has it: a user's own module lies in the folder of the call.
  sys.path.insert(0, os.getcwd())
  # No core files, and no more of disk than a test should take.
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
  status = 1
  try:
    status = _child(case)
  except SystemExit as end:
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
    status = (
      end.code if isinstance(end.code, int) else int(end.code is not None)
    )
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _memory(pid: int) -> int:
  """KiB of a process that no file is behind; 0 where it is gone."""
  try:
    with open(f"/proc/{pid}/status") as file:
      for line in file:
        if line.startswith("RssAnon:"):
          return int(line.split()[1])
  except (FileNotFoundError, ProcessLookupError):
    pass
  return 0


def _wait(pid: int, seconds: float) -> tuple[int | None, float]:
  """(exit status or None, MiB it took) of a child, which then is gone.

  It is born with the zygote's memory, so no count of the system's at its end
  tells what it took itself: it is looked at again and again.
  """
  ends, born, most = time.monotonic() + seconds, _memory(pid), 0
  pidfd = os.pidfd_open(pid)
  try:
    ended = False
    while not ended and time.monotonic() < ends:
      ended = bool(select.select([pidfd], [], [], 0.01)[0])
      most = max(most, _memory(pid))
  finally:
    os.close(pidfd)
  # What the child itself has started goes too.
  try:
    os.killpg(pid, signal.SIGKILL)
  except ProcessLookupError:
    os.kill(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  code = os.waitstatus_to_exitcode(status) if ended else None
  return code, max(0, most - born) / 1024


def _warm() -> None:
  """Reads gin files once, which imports what they name."""
  from fat5_jax.gin_config import parse
  import gin

  flags = ["MODEL_DIR = 'x'"]
  parse.parse(["recipes/quickstart.gin"], flags, [], "Run")
  gin.clear_config()
  parse.parse(["runs/infer.gin"], flags, [], "Inference")
  gin.clear_config()


def _serve() -> None:
  import tempfile

  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for name in MODULES:
    importlib.import_module(name)
  _warm()
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    case = json.loads(line)
    with (
      tempfile.TemporaryFile() as stdin,
      tempfile.TemporaryFile() as stdout,
      tempfile.TemporaryFile() as stderr,
    ):
      stdin.write(case["stdin"].encode(errors="surrogateescape"))
      stdin.seek(0)
      begin = time.monotonic()
      pid = _fork(case, [stdin, stdout, stderr])
      status, mib = _wait(pid, case["seconds"])
      seconds = time.monotonic() - begin
      outcome = dict(status=status, seconds=seconds, mib=mib)
      for name, file in (("stdout", stdout), ("stderr", stderr)):
        file.seek(0)
        outcome[name] = file.read().decode(errors="replace")
    print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
  _serve()
