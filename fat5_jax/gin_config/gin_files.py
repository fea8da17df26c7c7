"""The gin files of a run: found, read, checked, and gin's errors in words.

With cli.py the only module that imports gin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import importlib
import inspect
import io
import os
import re
import tokenize
from typing import NamedTuple

from fat5_jax import macros
from fat5_jax.errors import UserError, nearest
from fat5_jax.gin_config import annotations
import gin
from gin import config as gin_config
from gin import config_parser

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
_MACRO_SET = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=", re.MULTILINE)
_MACRO_USED = re.compile(r"%([A-Z][A-Z0-9_]*)")
_REFERENCE = re.compile(r"@[\w./]+|%[A-Za-z_]\w*")
# Where a name without a dot may belong to, if it is a parameter's.
_BOUND = {
  "fat5_jax.training.run": ("Run",),
  "fat5_jax.data.pipeline": ("DatasetConfig",),
  "fat5_jax.data.tasks": ("text_to_text",),
  "fat5_jax.data.head_tasks": ("classification", "tagging", "spans"),
  "fat5_jax.data.sources": ("Files", "HuggingFace", "Tfds"),
  "fat5_jax.optimizers": (
    "adafactor",
    "adamw",
    "create_learning_rate_scheduler",
  ),
  "fat5_jax.models.config": ("T5Config", "HeadConfig", "LoRAConfig"),
}


class _Parsed(NamedTuple):
  """What a gin text says: `sets` and `uses` are macros, with their lines.

  `binds` are a function's name, its parameter, and the macro it is bound to.
  """

  sets: list[tuple[str, int]]
  uses: set[str]
  includes: list[tuple[str, int]]
  binds: list[tuple[str, str, str]]


class _Use(str):
  """A macro's name where it is a parameter's value."""


class _Names(config_parser.ParserDelegate):
  """Keeps the names of macros; references are gin's own business."""

  def __init__(self):
    self.macros: set[str] = set()

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return None

  def macro(self, macro_name):
    self.macros.add(macro_name)
    return _Use(macro_name)


def _read(text: str, where: str) -> _Parsed:
  """Parses a gin text by gin's own grammar.

  Raises:
    UserError: naming file and line, for what is no gin.
  """
  names = _Names()
  parsed = _Parsed([], names.macros, [], [])
  try:
    for statement in config_parser.ConfigParser(io.StringIO(text), names):
      if isinstance(statement, config_parser.IncludeStatement):
        parsed.includes.append(
          (statement.filename, statement.location.line_num)
        )
      elif isinstance(statement, config_parser.BindingStatement):
        scope, name, argument, value, location = statement
        if not argument:
          full = f"{scope}/{name}" if scope else name
          parsed.sets.append((full, location.line_num))
        elif name in ("gin.macro", "macro"):
          # The long form of the same.
          parsed.sets.append((scope, location.line_num))
        elif isinstance(value, _Use):
          function = name.split(".")[-1]
          parsed.binds.append((function, argument, str(value)))
  except (RecursionError, MemoryError):
    raise UserError(f"{where}: brackets are nested too deep") from None
  except (SyntaxError, tokenize.TokenError) as e:
    line = _line_of(e)
    shown = (text.splitlines() or [""])[min(line, text.count("\n") + 1) - 1]
    place = f"{where}, line {line}: " if where else ""
    reason = str(e.args[0]).strip().splitlines()[0].rstrip(".")
    if reason.startswith("malformed node"):
      reason = "not expected here"
    raise UserError(
      f"{place}{shown.strip()!r} is no gin ({reason}). Is a quote or a bracket"
      " missing, here or above?"
    ) from None
  return parsed


def _line_of(error: Exception) -> int:
  """The line that a parser's error names."""
  where = error.args[1] if len(error.args) > 1 else ()
  # gin's and SyntaxError's begin with the file, TokenError's with the line.
  numbers = [part for part in where if isinstance(part, int)]
  return numbers[0] if numbers else 1


class _GinFiles:
  """The gin files of a run: found, and their includes followed.

  `texts` are what gin shall read: each file's, by path, its includes by path
  too, since gin would look for a name in the same folders for every file.
  """

  def __init__(self, search_paths: list[str]):
    self._search_paths = search_paths
    self.parsed: dict[str, _Parsed] = {}
    self.texts: dict[str, str] = {}

  def _find(self, name: str, includer: str, asked_by: str) -> str:
    """What lies beside the file that asks is found before any other."""
    beside = os.path.dirname(includer)
    for folder in [beside, "", *self._search_paths]:
      path = os.path.abspath(os.path.join(folder, name))
      # recipes/lora.gin includes lora.gin.
      if os.path.isfile(path) and path != includer:
        return path
    known = [os.path.relpath(path, root) for root, path in _shipped()]
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
    self.parsed[path] = _read(text, path)
    folder = os.path.dirname(path)
    if folder not in self._search_paths:
      self._search_paths.append(folder)
    # As the parser counts them: a text may hold other separators of lines.
    lines = text.split("\n")
    for included, n in self.parsed[path].includes:
      lines[n - 1] = f"include {self.add(included, path, n)!r}"
    self.texts[path] = "\n".join(lines)
    return path


def _shipped() -> Iterator[tuple[str, str]]:
  """(root, path) of every gin file that comes with fat5_jax."""
  for root in GIN_ROOTS:
    for folder, _, names in os.walk(root):
      yield from ((root, os.path.join(folder, name)) for name in names)


def _is_shipped(path: str) -> bool:
  return any(path.startswith(root + os.sep) for root in GIN_ROOTS)


def _check_macros(files: _GinFiles, bindings: list[str]) -> None:
  """Raises for a name without a dot that nothing uses.

  gin itself accepts any: a misspelt --gin.TRAIN_STEP=10, or --gin.batch_size=8,
  would do nothing. A file may set macros of another command's files; the
  command line may not.
  """
  given = [_read(binding, "") for binding in bindings]
  known: set[str] = set()
  users: dict[str, str] = {}
  for root, path in _shipped():
    with open(path, encoding="utf-8") as file:
      text = re.sub(r"#.*", "", file.read())
    used = _MACRO_USED.findall(text)
    known |= {*_MACRO_SET.findall(text), *used}
    users |= dict.fromkeys(used, os.path.relpath(path, root))
  used_here = set().union(
    *(parsed.uses for parsed in (*files.parsed.values(), *given))
  )
  known |= used_here
  for path, parsed in files.parsed.items():
    for name, line in parsed.sets:
      if name not in known:
        raise UserError(
          f"{path}, line {line}: unknown gin name {name!r}: no file uses it."
          f"{_suggest(name, known)}"
        )
  for parsed in given:
    for name, _ in parsed.sets:
      if name not in known:
        raise UserError(
          f"--gin.{name}: unknown gin name {name!r}: no file uses it."
          f"{_suggest(name, known)}"
        )
      if name not in used_here:
        hint = f"; {users[name]} does" if name in users else ""
        raise UserError(f"no gin file of this run uses {name}{hint}")


def _suggest(name: str, macros: Iterable[str]) -> str:
  """What a person may have meant by a name that is no macro."""
  scope, _, bare = name.rpartition("/")
  if scope:
    return (
      f" A macro has no scope; what it is used for has: see where {bare} is"
      f" bound, as in --gin.{scope}/pipeline.DatasetConfig.batch_size=8"
    )
  by_folded = {macro.casefold(): macro for macro in macros}
  if name.casefold() in by_folded:
    return f" Did you mean {by_folded[name.casefold()]!r}?"
  owners = [
    f"{module.rpartition('.')[2]}.{function}.{name}"
    for module, functions in _BOUND.items()
    for function in functions
    if name in _parameters(getattr(importlib.import_module(module), function))
  ]
  if owners:
    return f" A parameter is set with its owner: {' or '.join(owners)}"
  return nearest(name, macros) or nearest(name.upper(), macros)


def _parameters(function) -> list[str]:
  return list(inspect.signature(function).parameters)


@contextlib.contextmanager
def _reading(texts: dict[str, str]):
  """gin reads these files, by their paths, and no others.

  Its own readers would also look for `models/t5.gin` in a Python package
  `models`, and take any folder of that name where the command is run for one.
  """
  # gin has no public way to take a reader away.
  readers = gin_config._FILE_READERS
  gin_config._FILE_READERS = [
    (lambda path: io.StringIO(texts[path]), texts.__contains__)
  ]
  try:
    yield
  finally:
    gin_config._FILE_READERS = readers


def parse(
  files: list[str],
  bindings: list[str],
  search_paths: list[str],
  function: str,
  may_be_unset: Sequence[str] = (),
) -> None:
  """Parses everything that `function` shall be called with.

  Args:
    files: gin files; later ones win.
    bindings: gin statements, after all files.
    search_paths: more folders for gin files.
    function: that of the command.
    may_be_unset: macros that the command does without.

  Raises:
    UserError: for a file that is not there or no gin, a name that nothing
      uses, and a macro that must be set.
  """
  found = _GinFiles([*GIN_ROOTS, os.path.abspath(os.curdir), *search_paths])
  paths = [found.add(name) for name in files]
  _check_macros(found, bindings)
  try:
    with _reading(found.texts):
      gin.parse_config_files_and_bindings(
        paths, bindings, skip_unknown=False, finalize_config=False
      )
  except UserError:
    raise
  except ImportError as e:
    raise UserError(_explain_import(e)) from None
  except (
    *(ValueError, TypeError, SyntaxError),
    *(RuntimeError, OSError, AttributeError, NameError),
  ) as e:
    raise UserError(_explain(str(e))) from None
  _check_required(function, may_be_unset)
  _check_values(found, bindings)


def _check_values(files: _GinFiles, bindings: list[str]) -> None:
  """Raises for a value that a macro, or what is bound to it, may not have.

  A name that the user's files alone use is theirs.
  """
  shipped = [
    parsed for path, parsed in files.parsed.items() if _is_shipped(path)
  ]
  used = set().union(*(parsed.uses for parsed in shipped))
  others = set().union(*(parsed.uses for parsed in files.parsed.values()))
  known = {*macros.MACROS} - (others - used)
  bound: dict[tuple[str, str], list[str]] = {}
  for parsed in shipped:
    for function, parameter, name in parsed.binds:
      bound.setdefault((function, parameter), []).append(name)
  for (scope, selector), values in list(gin_config._CONFIG.items()):
    if selector == "gin.macro":
      value = _value(values.get("value"), [scope])
      if scope in known and value is not gin.REQUIRED:
        macros.check(scope, value, _origin(scope, files, bindings))
      continue
    function = selector.split(".")[-1]
    for parameter, bound_to in values.items():
      names = [
        n
        for n in bound.get((function, parameter), [])
        if n in macros.MACROS and not macros.MACROS[n].kind.is_built
      ]
      value = _value(bound_to, [])
      # A macro that is None may be one that the command does not come to use.
      if value is gin.REQUIRED or (value is None and bound_to is not None):
        continue
      where = f"{function}.{parameter}"
      _check_annotation(selector, parameter, value, where)
      # A parameter may be None where its macro may not: the annotation knows.
      holds = lambda n, v=value: macros.MACROS[n].kind.holds(v)
      if names and value is not None and not any(map(holds, names)):
        macros.check(names[0], value, where)


def _check_annotation(selector: str, parameter: str, value, where: str) -> None:
  function = gin_config._REGISTRY.get_match(selector).wrapped
  words = annotations.problem(function, parameter, value)
  if words is not None:
    raise UserError(f"{where} = {value!r:.200} must be of type {words}")


def _value(value: object, seen: list[str]) -> object:
  """A binding's value, macros followed; macros.REFERENCE for what is built.

  Raises:
    UserError: for macros that refer to each other.
  """
  if isinstance(value, dict):
    return {k: _value(v, seen) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_value(v, seen) for v in value]
  if not isinstance(value, gin_config.ConfigurableReference):
    return value
  scope, selector = value.config_key
  if "REQUIRED" in value.scoped_selector:
    return gin.REQUIRED
  if selector != "gin.macro":
    # `@name` without brackets is the function itself.
    return macros.REFERENCE if value.evaluate else value.configurable.wrapped
  if scope in seen:
    circle = " -> ".join([*seen[seen.index(scope) :], scope])
    raise UserError(f"macros refer to each other: {circle}")
  values = gin_config._CONFIG.get((scope, "gin.macro"), {})
  if "value" not in values and seen:
    raise UserError(f"{seen[-1]} = %{scope}: nothing sets {scope}")
  return _value(values.get("value", gin.REQUIRED), [*seen, scope])


def _origin(name: str, files: _GinFiles, bindings: list[str]) -> str:
  """Where a macro got its value: a flag, or the last file that sets it."""
  if any(n == name for text in bindings for n, _ in _read(text, "").sets):
    return f"--gin.{name}"
  lines = [
    f"{path}, line {line}: {name}"
    for path, parsed in files.parsed.items()
    for n, line in parsed.sets
    if n == name and not _is_shipped(path)
  ]
  return lines[-1] if lines else name


def _explain_import(error: ImportError) -> str:
  reason = " ".join(str(error).split())
  match = re.search(r"No module named '(\w+)", reason)
  package = match[1] if match else ""
  if package in ("t5x", "t5"):
    return (
      f"gin: {reason}. This is a gin file of T5X, whose modules are not here:"
      " fat5_jax's own files have its macros. Begin yours with include"
      " 'runs/finetune.gin' and a model file (include 'models/t5_1_1/base.gin',"
      " or 'models/from_checkpoint.gin') and set the macros after them"
    )
  return f"gin: {reason}"


def _check_required(function: str, may_be_unset: Sequence[str]) -> None:
  """Raises for macros at %gin.REQUIRED that a command's function comes to use.

  Those that may be unset become a text that says so.

  Bindings of other commands in the same files do not count.
  """
  config = gin_config._CONFIG  # gin has no public view of its bindings.
  todo, seen, missing = [f"@{function}"], set(), []
  while todo:
    reference = todo.pop()
    if reference in seen:
      continue
    seen.add(reference)
    *scopes, name = reference[1:].split("/")
    # A scoped reference takes unscoped bindings too, where it has none itself.
    bindings: dict[str, object] = {}
    is_macro = reference[0] == "%"
    for (scope, selector), values in config.items():
      if is_macro:
        found = selector == "gin.macro" and scope == name
      else:
        found = scope in ("", *scopes) and f".{selector}".endswith(f".{name}")
      if found:
        bindings = bindings | values if scope else values | bindings
    text = repr(list(bindings.values()))
    if is_macro and "REQUIRED" in text:
      missing.append(name)
    todo += _REFERENCE.findall(text)
  for name in set(missing) & set(may_be_unset):
    missing.remove(name)
    gin.bind_parameter(f"{name}/gin.macro.value", f"({name} is not set)")
  if missing:
    flags = " ".join(f"--gin.{name}=..." for name in sorted(missing))
    raise UserError(
      f"{', '.join(sorted(missing))} must be set: in a gin file, or with"
      f" {flags}"
    )


def _explain(message: str) -> str:
  """gin's message with the nearest known name added."""
  match = re.search(
    r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
  )
  if match:
    return message.strip() + _nearest_parameter(*match.groups())
  match = re.search(r"[Nn]o configurable matching '([\w./]+)'", message)
  if match:
    return message.strip() + nearest(match[1], _configurables())
  return message.strip()


def _configurables() -> list[str]:
  names = []
  for name, _ in gin_config._REGISTRY.items():
    parts = name.split(".")
    names += [".".join(parts[-n:]) for n in (1, 2)]
  return names


def _nearest_parameter(configurable: str, parameter: str) -> str:
  try:
    function = gin_config._REGISTRY.get_match(configurable).wrapped
    names = _parameters(function)
  except (KeyError, AttributeError, ValueError, TypeError):
    return ""
  return nearest(parameter, names) + f" It has: {', '.join(names)}"


def explain_call(error: Exception, function: str) -> str | None:
  """A short text for an error that gin raised while building arguments."""
  text = str(error)
  match = re.search(
    r"Required bindings for `([\w.]+)` not provided in config: (\[.*?\])", text
  )
  if match:
    return (
      f"the gin files leave {match[1]} without {match[2]}: include a run file"
      " (runs/finetune.gin, runs/pretrain.gin) and a model file"
    )
  match = re.search(
    rf"{function}(?:\.__init__)?\(\) missing \d+ required keyword-only"
    r" arguments?: (.*)",
    text,
  )
  if match:
    return (
      f"the gin files leave {function} without {match[1].splitlines()[0]}:"
      " include a run file (runs/finetune.gin, runs/pretrain.gin)"
    )
  return None
