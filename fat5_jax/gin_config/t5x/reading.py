"""T5X's gin files: found, read, and their names in full.

gin takes statements in the order of the files, an included one where its name
stands; so does this, and notes of every statement where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import io
import os
import re
from typing import Any, NamedTuple

from fat5_jax.errors import UserError, nearest
from fat5_jax.gin_config.t5x import ours, shipped
from fat5_jax.gin_config.t5x.rows import Macro, Reference
from fat5_jax.gin_config.t5x.table import NAMES, REFUSED_MODULES, TABLE
from gin import config_parser

# The first parts of the names that are T5X's; all others are someone's own.
T5X_ROOTS = ("t5x", "t5", "__main__", "mesh_tensorflow", "flaxformer")
CONFIGURABLES = (*TABLE, *NAMES)
_T5X_SIGN = re.compile(
  r"^\s*(?:(?:import|from)\s+(?:t5x|t5|__main__|mesh_tensorflow)\b"
  r"|include\s+['\"]t5x/)",
  re.MULTILINE,
)


class Binding(NamedTuple):
  """`scope/name.parameter = value`; a macro has no parameter.

  `name` is in full, `where` the place for people.
  """

  scope: str
  name: str
  parameter: str
  value: Any
  where: str


class _Delegate(config_parser.ParserDelegate):
  """References as they stand; their names get full later."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    scope, _, name = scoped_configurable_name.rpartition("/")
    return Reference(scope, name, evaluate)

  def macro(self, macro_name):
    return Macro(macro_name)


def walk(value: Any) -> Iterator[Reference | Macro]:
  """All references and macros in a value."""
  if isinstance(value, (Reference, Macro)):
    yield value
  elif isinstance(value, dict):
    for pair in value.items():
      yield from walk(pair)
  elif isinstance(value, (list, tuple)):
    for part in value:
      yield from walk(part)


def replace(value: Any, change: Any) -> Any:
  """A value with `change` made of every reference and macro in it."""
  if isinstance(value, (Reference, Macro)):
    return change(value)
  if isinstance(value, dict):
    return {replace(k, change): replace(v, change) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(replace(part, change) for part in value)
  return value


def is_t5x_name(name: str) -> bool:
  return name.split(".")[0] in T5X_ROOTS


def refused_module(name: str) -> str | None:
  """What there is instead of a module, or None."""
  for module, instead in REFUSED_MODULES.items():
    if f"{name}.".startswith(f"{module}."):
      return instead
  return None


class Files:
  """The files of a run in gin's order, as one list of bindings.

  Attributes:
    bindings: all, later ones win.
    modules: what is imported that is not T5X's, with the place.
    has_t5x: whether one of them is T5X's.
    folders: where the files lie.
  """

  def __init__(self, search_paths: Sequence[str]):
    self._search_paths = list(search_paths)
    self._aliases: dict[str, str] = {}
    self.bindings: list[Binding] = []
    self.modules: dict[str, str] = {}
    self.has_t5x = False
    self.folders: list[str] = []
    self._open: list[str] = []

  def _find(self, name: str, asked_by: str) -> tuple[str, str]:
    """(path, text): the user's file, else ours of the same meaning."""
    beside = os.path.dirname(self._open[-1]) if self._open else ""
    # Theirs first: a name of ours, runs/finetune.gin, may be theirs too.
    for folder in [beside, "", *self._search_paths, *ours.GIN_ROOTS]:
      path = os.path.abspath(os.path.join(folder, name))
      if os.path.isfile(path) and path not in self._open[-1:]:
        return path, ours.read_text(path, asked_by)
    found = shipped.find(name)
    if found is not None:
      return found
    if name.startswith(("gs://", "http")):
      raise UserError(
        f"{asked_by}gin file {name!r} is not on this machine: copy it here"
      )
    looked = filter(None, [beside, os.curdir, *self._search_paths])
    if name.startswith("t5x/"):
      self.has_t5x = True
    raise UserError(
      f"{asked_by}gin file {name!r} not found."
      f"{nearest(name, shipped.names())} Looked in:"
      f" {', '.join(dict.fromkeys(looked))}; --gin_search_paths names the"
      " folder in which your T5X files' names begin"
    )

  def add(self, name: str, asked_by: str = "") -> None:
    """Reads a file and all that it includes."""
    path, text = self._find(name, asked_by)
    if path in self._open:
      raise UserError(f"{asked_by}{path} includes this file")
    self.has_t5x |= bool(_T5X_SIGN.search(text)) or path.startswith("t5x/")
    self._open.append(path)
    folder = os.path.dirname(path)
    if folder not in self.folders:
      self.folders.append(folder)
    self._read(text, path)
    self._open.pop()

  def _read(self, text: str, path: str) -> None:
    ours.check_gin(text, path)
    own: dict[str, str] = {}
    parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
    for statement in parser:
      where = path
      if hasattr(statement, "location"):
        where = f"{path}, line {statement.location.line_num}"
      if isinstance(statement, config_parser.IncludeStatement):
        self.add(statement.filename, f"{where}: ")
      elif isinstance(statement, config_parser.ImportStatement):
        self._import(statement, own, where)
      elif isinstance(statement, config_parser.BindingStatement):
        self._bind(statement, own, where)

  def _import(self, statement, own: dict[str, str], where: str) -> None:
    if statement.module.startswith("__gin__"):
      return
    instead = refused_module(statement.module)
    if instead is not None:
      raise UserError(f"{where}: {statement.module} is not here: {instead}")
    if statement.alias or statement.is_from:
      own[statement.bound_name()] = statement.module
    else:
      root = statement.module.split(".")[0]
      own[root] = root
    self._aliases |= own
    if not is_t5x_name(statement.module):
      self.modules.setdefault(statement.module, where)

  def add_flags(self, texts: Sequence[str]) -> None:
    """Reads bindings of the command line, after all files."""
    for text in texts:
      ours.check_gin(text, "")
      parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
      for statement in parser:
        if not isinstance(statement, config_parser.BindingStatement):
          raise UserError(f"--gin_bindings: {text!r} binds nothing")
        scope, name, parameter, _, _ = statement
        key = f"{scope}/{name}" if scope else name
        key += f".{parameter}" if parameter else ""
        self._bind(statement, {}, f"--gin.{key}")

  def _bind(self, statement, own: dict[str, str], where: str) -> None:
    scope, name, parameter, value, _ = statement
    value = replace(value, lambda part: self._in_full(part, own, where))
    if parameter and name in ("macro", "gin.macro"):
      name, scope, parameter = scope, "", ""
    elif parameter:
      name = self._full_name(name, own, where)
    elif scope:
      raise UserError(
        f"{where}: {scope}/{name} names no parameter. A macro has no scope"
      )
    self.bindings.append(Binding(scope, name, parameter, value, where))

  def _in_full(self, part, own, where):
    if isinstance(part, Macro):
      return part
    return part._replace(name=self._full_name(part.name, own, where))

  def _full_name(self, name: str, own: dict[str, str], where: str) -> str:
    """A configurable's full name: by the file's imports, those of all, or as
    the end of the name of one that T5X has."""
    head, _, rest = name.partition(".")
    if head in own and rest:
      return _checked(f"{own[head]}.{rest}", where)
    if head in T5X_ROOTS:
      return _checked(name, where)
    # Without an import, gin takes the end of a name that some file brought; of
    # two networks, the one that was imported.
    known = [full for full in CONFIGURABLES if f".{full}".endswith(f".{name}")]
    imported = {*self._aliases.values()}
    named = [full for full in known if full.rpartition(".")[0] in imported]
    if len(named) == 1:
      return named[0]
    if head in self._aliases and rest:
      return _checked(f"{self._aliases[head]}.{rest}", where)
    if len(known) == 1:
      return known[0]
    for module, alias in ours.ALIASES.items():
      if head == alias and rest:
        return f"{module}.{rest}"
    if known:
      raise UserError(
        f"{where}: {name} may be {' or '.join(known)}: write it in full"
      )
    short = [".".join(full.split(".")[-2:]) for full in CONFIGURABLES]
    raise UserError(
      f"{where}: {name} is unknown: no import brings it."
      f"{nearest(name, short) or nearest(name, CONFIGURABLES)}"
    )


def _checked(full: str, where: str) -> str:
  """The name, if it is one of T5X's that are known, or not T5X's."""
  if not is_t5x_name(full) or full in CONFIGURABLES:
    return full
  if full.startswith("t5x.optimizers."):
    # T5X's are optax's, wrapped.
    import optax

    name = full.rpartition(".")[2]
    if full.count(".") == 2 and hasattr(optax, name):
      return f"optax.{name}"
  instead = refused_module(full)
  if instead is not None:
    raise UserError(f"{where}: {full} is not here: {instead}")
  beside = [n for n in CONFIGURABLES if n.split(".")[0] == full.split(".")[0]]
  raise UserError(
    f"{where}: T5X's {full} is unknown here.{nearest(full, beside)} What of"
    " T5X's is known: python -m fat5_jax.gin_config.t5x.table"
  )
