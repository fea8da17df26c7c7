"""What gin files bind, held against what there is: names, types, ranges."""

from __future__ import annotations

from collections.abc import Sequence
import os
import re

from fat5_jax import macros
from fat5_jax.errors import UserError
from fat5_jax.gin_config import annotations, private
from fat5_jax.gin_config.explain import suggest
from fat5_jax.gin_config.files import GinFiles, is_shipped, shipped
from fat5_jax.gin_config.grammar import read
import gin

_MACRO_SET = re.compile(r"^([A-Z][A-Z0-9_]*)\s*=", re.MULTILINE)
_MACRO_USED = re.compile(r"%([A-Z][A-Z0-9_]*)")
_REFERENCE = re.compile(r"@[\w./]+|%[A-Za-z_]\w*")


def check_macros(files: GinFiles, bindings: list[str]) -> None:
  """Raises for a name without a dot that nothing uses.

  gin itself accepts any: a misspelt --gin.TRAIN_STEP=10, or --gin.batch_size=8,
  would do nothing. A file may set macros of another command's files; the
  command line may not.
  """
  given = [read(binding, "") for binding in bindings]
  known: set[str] = set()
  users: dict[str, str] = {}
  for root, path in shipped():
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
          f"{suggest(name, known)}"
        )
  for parsed in given:
    for name, _ in parsed.sets:
      if name not in known:
        raise UserError(
          f"--gin.{name}: unknown gin name {name!r}: no file uses it."
          f"{suggest(name, known)}"
        )
      if name not in used_here:
        hint = f"; {users[name]} does" if name in users else ""
        raise UserError(f"no gin file of this run uses {name}{hint}")


def check_values(files: GinFiles, bindings: list[str]) -> None:
  """Raises for a value that a macro, or what is bound to it, may not have.

  A name that the user's files alone use is theirs.
  """
  shipped = [
    parsed for path, parsed in files.parsed.items() if is_shipped(path)
  ]
  used = set().union(*(parsed.uses for parsed in shipped))
  others = set().union(*(parsed.uses for parsed in files.parsed.values()))
  known = {*macros.MACROS} - (others - used)
  bound: dict[tuple[str, str], list[str]] = {}
  for parsed in shipped:
    for function, parameter, name in parsed.binds:
      bound.setdefault((function, parameter), []).append(name)
  for (scope, selector), values in private.bindings().items():
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
  function = private.function_of(selector)
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
  if not isinstance(value, private.Reference):
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
  values = private.bindings().get((scope, "gin.macro"), {})
  if "value" not in values and seen:
    raise UserError(f"{seen[-1]} = %{scope}: nothing sets {scope}")
  return _value(values.get("value", gin.REQUIRED), [*seen, scope])


def _origin(name: str, files: GinFiles, bindings: list[str]) -> str:
  """Where a macro got its value: a flag, or the last file that sets it."""
  if any(n == name for text in bindings for n, _ in read(text, "").sets):
    return f"--gin.{name}"
  lines = [
    f"{path}, line {line}: {name}"
    for path, parsed in files.parsed.items()
    for n, line in parsed.sets
    if n == name and not is_shipped(path)
  ]
  return lines[-1] if lines else name


def check_required(function: str, may_be_unset: Sequence[str]) -> None:
  """Raises for macros at %gin.REQUIRED that a command's function comes to use.

  Those that may be unset become a text that says so.

  Bindings of other commands in the same files do not count.
  """
  config = private.bindings()
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
