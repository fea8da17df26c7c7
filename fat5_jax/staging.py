"""What programs write on a disk, put to an address when it is whole.

A bucket takes no appending: a log is written here and goes there again, all of
it, now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
import tempfile
import time

from fat5_jax import storage

# Between two pushes of what only grows.
EVERY_SECONDS = 30.0


class Mirror:
  """A folder of this machine's for one of a bucket's.

  Attributes:
    path: where to write: the folder itself, where that is on a disk.
  """

  def __init__(self, folder: str):
    self.path = self._folder = folder
    self._scratch = None
    if storage.is_remote(folder):
      self._scratch = tempfile.TemporaryDirectory(
        prefix="fat5_jax_", ignore_cleanup_errors=True
      )
      self.path = self._scratch.name
    self._pushed: dict[str, tuple[int, int]] = {}
    self._last = time.monotonic()

  def pull(self, wanted: Callable[[str], bool]) -> None:
    """Copies here what lies there under names that are wanted."""
    if self._scratch is None:
      return
    for name in filter(wanted, storage.files(self._folder)):
      path = os.path.join(self.path, name)
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, "wb") as file:
        file.writelines(storage.pieces(f"{self._folder}/{name}"))
      self._pushed[name] = _state(path)

  def push(self) -> None:
    """Copies there what changed here, each file whole.

    Raises:
      StorageError: if the bucket does not take it.
    """
    if self._scratch is None:
      return
    for name in _files(self.path):
      path = os.path.join(self.path, name)
      state = _state(path)
      if self._pushed.get(name) != state:
        storage.upload(path, f"{self._folder}/{name}")
        self._pushed[name] = state
    self._last = time.monotonic()

  def push_if_due(self) -> None:
    if time.monotonic() - self._last > EVERY_SECONDS:
      self.push()

  def close(self) -> None:
    if self._scratch is not None:
      self._scratch.cleanup()


def upload_folder(path: str, address: str, last: Sequence[str]) -> None:
  """Puts a folder's files to an address, in the place of what lies there.

  Args:
    path: of the folder.
    address: where to.
    last: names of files by which a reader knows the folder, in their order;
      while one that it needs is missing there is no such folder.
  """
  new, before = _files(path), storage.files(address)
  marks = [name for name in last if name in new]
  for name in reversed(list(last)):
    if name in before:
      storage.remove(f"{address}/{name}")
  for name in {*before} - {*new}:
    storage.remove(f"{address}/{name}")
  for name in [*sorted({*new} - {*marks}), *marks]:
    storage.upload(os.path.join(path, name), f"{address}/{name}")


def _files(folder: str) -> list[str]:
  return [
    os.path.relpath(os.path.join(here, name), folder).replace(os.sep, "/")
    for here, _, names in os.walk(folder)
    for name in sorted(names)
  ]


def _state(path: str) -> tuple[int, int]:
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns
