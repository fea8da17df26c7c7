"""Files at an address, `gs://bucket/run` or `s3://bucket/run`, as on a disk.

A path without `://` is the system's own: nothing here touches it but the few
functions that say so, and fsspec is not imported for it. An object store has
no folders, no rename and no append. An object is written whole or not at all,
so what must be whole together gets a last object that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import functools
import logging
import os
import random
import re
import time
from typing import Any, TypeVar

from fat5_jax import console
from fat5_jax.errors import UserError

T = TypeVar("T")

# What one read asks for.
PIECE = 2**24
# How long what may pass is tried again: a network, a server that is busy. One
# try of Google's library alone takes half a minute.
PATIENCE_SECONDS = 60.0
# Calls at a time, where there are many.
_THREADS = 16

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)$", re.DOTALL)
# Of the libraries that speak to object stores.
_LIBRARIES = (
  *("adlfs", "aiobotocore", "aiohttp", "asyncio", "azure", "botocore"),
  *("fsspec", "gcsfs", "google", "httpx", "requests", "s3fs", "urllib3"),
)
_NO_ACCESS = re.compile(
  r"\b40[13]\b|credential|denied|forbidden|unauthori[sz]ed|permission"
  r"|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken",
  re.IGNORECASE,
)
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
_LOGIN = {
  "gs": "`gcloud auth application-default login`, a service account's key in"
  " GOOGLE_APPLICATION_CREDENTIALS, or a machine that has an account",
  "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a machine"
  " that has a role",
}


class StorageError(UserError):
  """A store does not answer, or not this person: nothing is said of a file."""


def is_remote(path: Any) -> bool:
  """Whether it is an address, and no path of this machine's."""
  return isinstance(path, str) and bool(_ADDRESS.match(path))


def absolute(path: str) -> str:
  """A path from the root, `~` resolved; an address without a last slash."""
  if is_remote(path):
    return path.rstrip("/")
  return os.path.abspath(os.path.expanduser(path))


def scheme(address: str) -> str:
  return _ADDRESS.match(address)[1].lower()


@functools.cache
def _file_system(kind: str):
  """fsspec's for a kind of address.

  Raises:
    UserError: for a kind that is not known, or whose library is not installed.
  """
  import fsspec

  # Notes for their own developers.
  for name in ("gcsfs", "google.auth"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    # What other processes write is seen: nothing listed is kept.
    return fsspec.filesystem(kind, use_listings_cache=False)
  except ImportError as e:
    extra = _EXTRAS.get(kind)
    how = f"pip install 'fat5_jax[{extra}]'" if extra else str(e)
    raise UserError(
      f"{kind}:// needs a library that is not installed: {how}"
    ) from None
  except ValueError:
    raise UserError(
      f"{kind}:// is no kind of address that is known here; gs:// and s3:// are"
    ) from None


def _asked(address: str, call: Callable[..., T], *arguments: Any) -> T:
  """What a call on (file system, address) returns, tried again a few times.

  Raises:
    FileNotFoundError, FileExistsError: as the call does.
    StorageError: for anything else that a server, or the network, says.
  """
  fs = _file_system(scheme(address))
  begin, pause = time.monotonic(), 1.0
  while True:
    try:
      return call(fs, address, *arguments)
    except (FileNotFoundError, FileExistsError):
      raise
    except Exception as e:
      own = type(e).__module__.split(".")[0]
      if not isinstance(e, OSError) and own not in _LIBRARIES:
        raise
      text = " ".join(str(e).split())[:300] or type(e).__name__
      said = text.replace(_inside(address), "")
      if isinstance(e, PermissionError) or _NO_ACCESS.search(said):
        raise StorageError(_no_access(address, text)) from None
      tried = time.monotonic() - begin
      if tried > PATIENCE_SECONDS:
        raise StorageError(
          f"{address}: not reached for {tried:.0f} s: {text}. See whether the"
          " network and the address are right, and start again: what is saved"
          " is whole"
        ) from None
      tell_trying(f"{scheme(address)}://")
      time.sleep(pause * random.uniform(0.5, 1))
      pause = min(2 * pause, 16)


@functools.cache
def tell_trying(where: str) -> None:
  """Says, once of a place, why nothing happens."""
  console.say(
    f"{where} does not answer; it is tried for {PATIENCE_SECONDS:.0f} s"
  )


def _no_access(address: str, text: str) -> str:
  how = _LOGIN.get(scheme(address), "the credentials of that service")
  return f"{address}: no access: {text}. Needed: {how}"


# ---- Any path ----------------------------------------------------------------


def exists(path: str) -> bool:
  """Whether there is a file, or a folder with something in it."""
  if not is_remote(path):
    return os.path.exists(path)
  return _kind(path) is not None


def is_file(path: str) -> bool:
  if not is_remote(path):
    return os.path.isfile(path)
  return _kind(path) == "file"


def is_folder(path: str) -> bool:
  if not is_remote(path):
    return os.path.isdir(path)
  return _kind(path) == "directory"


def _kind(address: str) -> str | None:
  """ "file" or "directory"; None where there is nothing.

  fsspec's own questions answer no, too, where a store does not answer.
  """
  try:
    return _asked(address, lambda fs, p: fs.info(p))["type"]
  except FileNotFoundError:
    return None


def names(folder: str) -> list[str]:
  """Of what lies in a folder; none where there is no such folder, or bucket."""
  if not is_remote(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []
  try:
    found = _asked(folder, lambda fs, p: fs.ls(p, detail=False))
  except FileNotFoundError:
    return []
  here = _inside(folder)
  paths = (path.rstrip("/") for path in found)
  # A store may list a folder in itself, where someone made an object of it.
  return sorted(
    path.rsplit("/", 1)[-1] for path in paths if path != here.rstrip("/")
  )


def pieces(path: str, size: int = PIECE) -> Iterator[bytes]:
  """The bytes of a file, a piece at a time."""
  if not is_remote(path):
    with open(path, "rb") as file:
      while piece := file.read(size):
        yield piece
    return
  length = size_of(path)
  for begin in range(0, length, size):
    end = min(begin + size, length)
    piece = _asked(
      path, lambda fs, p, b=begin, e=end: fs.cat_file(p, start=b, end=e)
    )
    if len(piece) != end - begin:
      raise UserError(f"{path}: changed while it was read")
    yield piece


def size_of(path: str) -> int:
  """Bytes of a file."""
  if not is_remote(path):
    return os.path.getsize(path)
  return int(_asked(path, lambda fs, p: fs.info(p))["size"])


def read(path: str) -> bytes:
  """All of a file; FileNotFoundError where there is none."""
  if not is_remote(path):
    with open(path, "rb") as file:
      return file.read()
  return _asked(path, lambda fs, p: fs.cat_file(p))


# ---- Addresses ---------------------------------------------------------------


def _inside(address: str) -> str:
  """What fsspec calls it: without its kind."""
  return _file_system(scheme(address))._strip_protocol(address)


def write(address: str, data: bytes) -> None:
  """Writes an object whole, over what was there."""
  _asked(address, lambda fs, p: fs.pipe_file(p, data))


def create(address: str, data: bytes) -> bool:
  """Writes an object that is not there yet; whether it was so.

  Google's and Amazon's stores decide between two who try at once. One that
  does not know such writes only says what was there shortly before.
  """
  try:
    if exists(address):
      return False
    _asked(address, lambda fs, p: fs.pipe_file(p, data, mode="create"))
    return True
  except FileExistsError:
    return False


def files(folder: str) -> dict[str, int]:
  """Names of all files below a folder, `/` between their parts, and bytes."""
  try:
    found = _asked(folder, lambda fs, p: fs.find(p, detail=True))
  except FileNotFoundError:
    return {}
  here = _inside(folder).rstrip("/") + "/"
  return {
    path.removeprefix(here): int(entry["size"])
    for path, entry in found.items()
    if path.startswith(here) and not path.endswith("/")
  }


def states(address: str) -> dict[str, str]:
  """What tells one content from another, of a file (by "") or of all below."""

  def of(fs, path):
    entry = fs.info(path)
    if entry["type"] == "file":
      return {"": _state(entry)}
    here = fs._strip_protocol(path).rstrip("/") + "/"
    return {
      name.removeprefix(here): _state(found)
      for name, found in fs.find(path, detail=True).items()
      if name.startswith(here) and not name.endswith("/")
    }

  return _asked(address, of)


def _state(entry: dict[str, Any]) -> str:
  known = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "created")
  return str([(key, str(entry[key])) for key in known if entry.get(key)])


def matching(pattern: str) -> list[str]:
  """The addresses of the files that a pattern matches, sorted."""
  kind = pattern.split("://", 1)[0]
  found = _asked(pattern, lambda fs, p: fs.glob(p))
  return sorted(f"{kind}://{path}" for path in found)


def remove(address: str) -> None:
  """Removes an object, if it is there."""
  with contextlib.suppress(FileNotFoundError):
    _asked(address, lambda fs, p: fs.rm_file(p))


def remove_all(folder: str, but: str | None = None) -> None:
  """Removes all objects below a folder, in no order.

  Args:
    folder: its address.
    but: a folder in it that stays.
  """
  paths = [
    f"{folder}/{name}"
    for name in files(folder)
    if but is None or not name.startswith(f"{but}/")
  ]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    list(threads.map(remove, paths))


def copy(source: str, target: str) -> None:
  """Copies an object within a store, which moves no bytes here."""
  _asked(source, lambda fs, p: fs.cp_file(p, target))


def upload(path: str, address: str) -> None:
  """A file of this machine's, whole or not at all."""
  _asked(address, lambda fs, p: fs.put_file(path, p))


def kvstore(folder: str) -> dict[str, Any]:
  """Where a folder lies, in tensorstore's words.

  Raises:
    UserError: for a kind of address that tensorstore does not read.
  """
  if not is_remote(folder):
    # As parts: in an address, `?` and `%` of a path would mean something.
    return {"driver": "file", "path": os.path.abspath(folder) + "/"}
  kind = scheme(folder)
  bucket, _, path = _ADDRESS.match(folder)[2].partition("/")
  path = path.strip("/")
  store: dict[str, Any] = {"bucket": bucket, "path": f"{path}/" * bool(path)}
  if kind in ("gs", "gcs"):
    # The libraries of Python know an emulator by the first, tensorstore by
    # the second.
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
      os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    return {"driver": "gcs", **store}
  if kind != "s3":
    raise UserError(
      f"{folder}: arrays are read and written on a disk, gs:// and s3://"
    )
  if "AWS_ACCESS_KEY_ID" in os.environ:
    # Where they are: in search of others Amazon's library prints errors.
    store["aws_credentials"] = {"type": "environment"}
  region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION"))
  if endpoint := (
    os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
  ):
    store |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
  return {"driver": "s3", **store}


@functools.cache
def tensorstore_context():
  """Limits of tensorstore's own retries: half a minute, not half an hour."""
  import tensorstore

  retries = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}
  return tensorstore.Context(
    {"gcs_request_retries": retries, "s3_request_retries": retries}
  )
