"""One writer of a run folder: a lock that ends with its process.

The system's lock (flock) on MODEL_DIR/.lock is freed whatever ends a process,
but on some shared file systems other hosts do not see it. So the holder also
signs the file every few seconds; a host that finds another's signature waits to
see whether it changes. Clocks are not compared.

In a bucket the signature is all there is: an object that is made if it is not
there. What a killed process left is known by its number on this machine, or by
a signature that does not change; who takes it looks a moment later whether it
is still his, and so does every signing.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time

from fat5_jax import console, storage
from fat5_jax.errors import UserError

NAME = ".lock"
SIGN_SECONDS = 5.0
# As long as a holder may take to be seen: a signature, and what a file system
# of several hosts keeps back.
PATIENCE_SECONDS = 30.0
# In which two who took the same object at once are both seen.
_SETTLE_SECONDS = 2.0
# Of this process, for whoever asks.
_SINCE = datetime.datetime.now().isoformat(" ", timespec="seconds")


@contextlib.contextmanager
def held(model_dir: str):
  """While it lasts no other process trains in the folder.

  Raises:
    UserError: if one does, naming it.
  """
  path = os.path.join(model_dir, NAME)
  if storage.is_remote(path):
    with _held_in_bucket(model_dir, path):
      yield
    return
  try:
    file = open(path, "a+", encoding="utf-8")
  except OSError as e:
    raise UserError(f"{path} cannot be written: {e.strerror}") from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      if e.errno in (errno.EAGAIN, errno.EACCES):
        raise UserError(_refusal(model_dir, _read(path))) from None
      # A file system without locks: the signature alone must do.
    holder = _read(path)
    if holder.get("host") not in (None, socket.gethostname()):
      _wait_for(model_dir, path, holder)
    _sign(file)
    ended = threading.Event()
    signer = threading.Thread(
      target=_keep_signing, args=(file, ended), daemon=True
    )
    signer.start()
    try:
      yield
    finally:
      ended.set()
      signer.join()
      with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)


@contextlib.contextmanager
def _held_in_bucket(model_dir: str, path: str):
  own = _holder() | {"run": secrets.token_hex(8), "boot": _boot()}
  if not storage.create(path, _text(own)):
    holder = _read(path)
    if not _is_dead_here(holder):
      _wait_for(model_dir, path, holder)
    storage.write(path, _text(own))
    time.sleep(_SETTLE_SECONDS)
    now = _read(path)
    if now.get("run") != own["run"]:
      raise UserError(_refusal(model_dir, now))
  ended = threading.Event()
  signer = threading.Thread(
    target=_keep_signing_in_bucket,
    args=(model_dir, path, own, ended),
    daemon=True,
  )
  signer.start()
  try:
    yield
  finally:
    ended.set()
    signer.join()
    with contextlib.suppress(UserError):
      storage.remove(path)


def _keep_signing_in_bucket(model_dir, path, own, ended) -> None:
  while not ended.wait(SIGN_SECONDS):
    # The network may be away: saving says so.
    with contextlib.suppress(UserError):
      now = _read(path)
      if now.get("run", own["run"]) != own["run"]:
        print(
          f"error: {_refusal(model_dir, now)} It took this one for dead. This"
          " process stops; the last checkpoint is whole",
          file=sys.stderr,
          flush=True,
        )
        os._exit(1)
      storage.write(path, _text(own | {"sign": secrets.token_hex(4)}))


def _boot() -> str:
  """Of this machine since it started; "" where the system does not tell."""
  with contextlib.suppress(OSError):
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
      return file.read().strip()
  return ""


def _is_dead_here(holder: dict) -> bool:
  """Whether it was a process of this machine's, and is none any more."""
  if (holder.get("host"), holder.get("boot")) != (
    socket.gethostname(),
    _boot(),
  ):
    return False
  try:
    os.kill(int(holder["process"]), 0)
  except ProcessLookupError:
    return True
  except (OSError, KeyError, TypeError, ValueError):
    pass
  return False


def _holder() -> dict:
  words = " ".join(getattr(sys, "orig_argv", sys.argv))[:500]
  return {
    "host": socket.gethostname(),
    "process": os.getpid(),
    "since": _SINCE,
    "command": words,
    "sign": secrets.token_hex(4),
  }


def _text(holder: dict) -> bytes:
  return (json.dumps(holder) + "\n").encode()


def _sign(file) -> None:
  text = _text(_holder())
  # The disk may be full, or away: saving says so.
  with contextlib.suppress(OSError):
    os.pwrite(file.fileno(), text, 0)
    os.ftruncate(file.fileno(), len(text))


def _keep_signing(file, ended: threading.Event) -> None:
  while not ended.wait(SIGN_SECONDS):
    _sign(file)


def _read(path: str) -> dict:
  try:
    found = json.loads(storage.read(path) or b"{}")
    return found if isinstance(found, dict) else {}
  except storage.StorageError:
    raise
  except (OSError, ValueError):
    return {}


def _wait_for(model_dir: str, path: str, holder: dict) -> None:
  """Until the signature of another host is surely a dead one's."""
  console.say(
    f"MODEL_DIR was held by {_name(holder)}: looking for"
    f" {PATIENCE_SECONDS:.0f} s whether it still lives"
  )
  ends = time.monotonic() + PATIENCE_SECONDS
  while time.monotonic() < ends:
    time.sleep(min(1.0, PATIENCE_SECONDS / 5))
    now = _read(path)
    if now.get("sign") != holder.get("sign") and now:
      raise UserError(_refusal(model_dir, now))


def _name(holder: dict) -> str:
  if not holder:
    return "another process"
  return (
    f"process {holder.get('process')} on {holder.get('host')}, since"
    f" {holder.get('since')}"
  )


def _refusal(model_dir: str, holder: dict) -> str:
  return (
    f"MODEL_DIR {model_dir} is in use by {_name(holder)}"
    f" ({holder.get('command', 'unknown command')}). Wait until it ends, stop"
    " it, or choose another --gin.MODEL_DIR=..."
  )
