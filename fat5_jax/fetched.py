"""Copies, on this machine, of files and folders at an address.

What libraries read only from a disk, or read more than once, is copied to a
cache first: data files, vocabularies, checkpoints of other libraries. Nothing
is fetched that is not an address. A copy is known by what its store says of the
content, so what changed there is fetched anew, and what did not never again.
`hf://` is the Hugging Face hub; see hub.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile

from fat5_jax import console, hub, storage
from fat5_jax.errors import UserError

# Copies made in this process: where they are, and of what.
_ADDRESSES: dict[str, str] = {}


def cache_folder() -> str:
  """Where copies lie; FAT5_JAX_CACHE says where else."""
  usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  found = os.environ.get("FAT5_JAX_CACHE") or os.path.join(usual, "fat5_jax")
  return os.path.abspath(os.path.expanduser(found))


def local(path: str) -> str:
  """A path of this machine's for what lies at any path.

  A path is itself; of an address it is a copy.

  Raises:
    UserError: if nothing is there, or it cannot be reached.
  """
  if not storage.is_remote(path):
    return path
  address = storage.absolute(path)
  return _noted(address, _copy(address))


def matching(pattern: str) -> list[str]:
  """Copies of the files that a pattern of addresses matches, sorted.

  Raises:
    UserError: if it matches none.
  """
  if storage.scheme(pattern) == "hf":
    return [_noted(a, path) for a, path in hub.matching(pattern).items()]
  if not re.search(r"[*?[]", pattern):
    return [local(pattern)]
  found = storage.matching(pattern)
  if not found:
    raise UserError(f"{pattern}: no such data file")
  return [local(address) for address in found]


def address_of(path: str) -> str:
  """Where a copy came from; any other path is itself, from the root."""
  path = here = os.path.abspath(path)
  while here not in _ADDRESSES:
    above = os.path.dirname(here)
    if above == here:
      return path
    here = above
  return _ADDRESSES[here] + path[len(here) :]


def pinned(path: str) -> str:
  """What will always be the same: of `hf://` with the commit that was read."""
  path = storage.absolute(path)
  return hub.pinned(path) if hub.is_there(path) else path


def _noted(address: str, path: str) -> str:
  _ADDRESSES[path] = address
  return path


@functools.cache
def _copy(address: str) -> str:
  """Once in a process: what is there then is what it works with."""
  if hub.is_there(address):
    return hub.snapshot(address)
  try:
    states = storage.states(address)
  except FileNotFoundError:
    states = {}
  if not states:
    raise UserError(f"{address}: nothing is there")
  states = {n: state for n, state in states.items() if not _is_unread(n)}
  known = json.dumps([address, sorted(states.items())]).encode()
  folder = os.path.join(
    cache_folder(), "copies", hashlib.sha256(known).hexdigest()[:24]
  )
  path = os.path.join(folder, address.rsplit("/", 1)[-1])
  if os.path.exists(path):
    return path
  console.say(f"copying {address} to {folder}")
  try:
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=os.path.dirname(folder), prefix=".writing-"
    ) as scratch:
      whole = os.path.join(scratch, "new")
      for name in states:
        _fetch(
          f"{address}/{name}" if name else address,
          os.path.join(whole, os.path.basename(path), name).rstrip("/"),
        )
      try:
        os.rename(whole, folder)
      except OSError:
        # Another process of this machine's was first.
        if not os.path.exists(path):
          raise
  except OSError as e:
    raise UserError(
      f"{folder}: cannot be written: {e.strerror or e}. FAT5_JAX_CACHE names"
      " another folder for copies"
    ) from None
  return path


def _is_unread(name: str) -> bool:
  """Whether it is a step of another run's, say, or what is not finished."""
  return any(part.startswith(".writing") for part in name.split("/"))


def _fetch(address: str, path: str) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, "wb") as file:
    file.writelines(storage.pieces(address))
    file.flush()
    os.fsync(file.fileno())
