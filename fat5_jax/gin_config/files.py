"""The gin files of a run: found, and their includes followed."""

from __future__ import annotations

from collections.abc import Iterator
import os

from fat5_jax.errors import UserError, nearest
from fat5_jax.gin_config.grammar import Parsed, read

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# In a checkout the gin folder lies beside the package, in a wheel inside it.
GIN_ROOTS = [
  folder
  for folder in (
    os.path.join(os.path.dirname(_PACKAGE), "gin"),
    os.path.join(_PACKAGE, "gin"),
  )
  if os.path.isdir(os.path.join(folder, "runs"))
]


class GinFiles:
  """The gin files of a run: found, and their includes followed.

  `texts` are what gin shall read: each file's, by path, its includes by path
  too, since gin would look for a name in the same folders for every file.
  """

  def __init__(self, search_paths: list[str]):
    self._search_paths = search_paths
    self.parsed: dict[str, Parsed] = {}
    self.texts: dict[str, str] = {}

  def _find(self, name: str, includer: str, asked_by: str) -> str:
    """What lies beside the file that asks is found before any other."""
    beside = os.path.dirname(includer)
    for folder in [beside, "", *self._search_paths]:
      path = os.path.abspath(os.path.join(folder, name))
      # recipes/lora.gin includes lora.gin.
      if os.path.isfile(path) and path != includer:
        return path
    known = [os.path.relpath(path, root) for root, path in shipped()]
    raise UserError(
      f"{asked_by}gin file {name!r} not found.{nearest(name, known)} Looked"
      f" in: {', '.join(filter(None, [beside, *self._search_paths]))}"
    )

  def add(self, name: str, includer: str = "", line: int = 0) -> str:
    """Reads a file and all that it includes; its path."""
    asked_by = f"{includer}, line {line}: " if includer else ""
    path = self._find(name, includer, asked_by)
    if path in self.texts:
      return path
    if path in self.parsed:
      raise UserError(f"{asked_by}{path} includes this file")
    text = read_text(path, asked_by)
    self.parsed[path] = read(text, path)
    folder = os.path.dirname(path)
    if folder not in self._search_paths:
      self._search_paths.append(folder)
    # As the parser counts them: a text may hold other separators of lines.
    lines = text.split("\n")
    for included, n in self.parsed[path].includes:
      lines[n - 1] = f"include {self.add(included, path, n)!r}"
    self.texts[path] = "\n".join(lines)
    return path


def read_text(path: str, asked_by: str) -> str:
  """What a gin file holds; `asked_by` begins an error.

  Raises:
    UserError: if it cannot be read, or is no text.
  """
  try:
    with open(path, encoding="utf-8") as file:
      text = file.read()
  except OSError as e:
    raise UserError(f"{asked_by}{path}: {e.strerror}") from None
  except UnicodeDecodeError:
    raise UserError(f"{asked_by}{path} is no text in UTF-8") from None
  if "\0" in text:
    raise UserError(f"{asked_by}{path} is no text: it holds zero bytes")
  if text.startswith("\ufeff"):
    raise UserError(
      f"{path} begins with a byte-order mark: save it as UTF-8 without one"
    )
  return text


def shipped() -> Iterator[tuple[str, str]]:
  """(root, path) of every gin file that comes with fat5_jax."""
  for root in GIN_ROOTS:
    for folder, _, names in os.walk(root):
      yield from ((root, os.path.join(folder, name)) for name in names)


def is_shipped(path: str) -> bool:
  return any(path.startswith(root + os.sep) for root in GIN_ROOTS)
