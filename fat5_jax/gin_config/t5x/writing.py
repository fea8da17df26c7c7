"""A translation as a gin text: imports, macros, bindings in our names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import importlib
import inspect
from typing import Any

from fat5_jax.errors import UserError, nearest
from fat5_jax.gin_config.t5x import ours as our_names
from fat5_jax.gin_config.t5x.model_rows import OURS
from fat5_jax.gin_config.t5x.reading import is_t5x_name, replace
from fat5_jax.gin_config.t5x.rows import REQUIRED, Macro, Reference


def show(value: Any) -> str:
  """A value in gin's syntax."""
  if isinstance(value, Macro):
    return f"%{value.name}"
  if isinstance(value, Reference):
    scope = f"{value.scope}/" if value.scope else ""
    return f"@{scope}{value.name}" + "()" * value.is_call
  if isinstance(value, dict):
    pairs = (f"{show(k)}: {show(v)}" for k, v in value.items())
    return "{" + ", ".join(pairs) + "}"
  if isinstance(value, list):
    return f"[{', '.join(map(show, value))}]"
  if isinstance(value, tuple):
    return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
  return repr(value)


def type_problem(target: str, value: Any) -> str | None:
  """The type that a parameter of ours wants and the value has not, or None."""
  function, _, parameter = target.rpartition(".")
  module, _, name = function.rpartition(".")
  made = getattr(importlib.import_module(module), name)
  return our_names.type_problem(made, parameter, value)


def text(
  ours: Iterable[tuple[str, str, Any, str]],
  macros: Mapping[str, Any],
  modules: Mapping[str, str],
) -> str:
  """The text.

  Args:
    ours: (scope, parameter in full, value, place for people), in gin's order.
    macros: values by name; those that are used are written.
    modules: to be imported, with the place that asks for them.
  """
  imports: dict[str, str] = {}
  used: dict[str, Any] = {}

  def name_of(full: str) -> str:
    module = _module_of(full, modules)
    alias = our_names.ALIASES.get(module, "")
    imports[module] = alias
    return full.replace(module, alias, 1) if alias else full

  def in_ours(part: Reference | Macro, where: str):
    if isinstance(part, Reference):
      full = OURS.get(part.name, part.name)
      if is_t5x_name(full):
        raise UserError(f"{where}: @{full} has no place here: leave it out")
      return part._replace(name=name_of(full))
    if part != REQUIRED and part.name not in used:
      if part.name not in macros:
        raise UserError(
          f"{where}: nothing sets {part.name}: --gin.{part.name}=... does"
        )
      # Its place, before those that it uses.
      used[part.name] = None
      used[part.name] = translated(macros[part.name], where)
    return part

  def translated(value: Any, where: str) -> Any:
    return replace(value, lambda part: in_ours(part, where))

  lines = []
  for scope, target, value, where in ours:
    key = f"{scope}/" if scope else ""
    lines.append(f"{key}{name_of(target)} = {show(translated(value, where))}")
  for module, where in modules.items():
    _import(module, where)
    imports.setdefault(module, our_names.ALIASES.get(module, ""))
  head = ["from __gin__ import dynamic_registration"]
  head += [
    f"import {module}" + f" as {alias}" * bool(alias)
    for module, alias in sorted(imports.items())
  ]
  head += [f"{name} = {show(value)}" for name, value in used.items()]
  return "\n".join([*head, *lines]) + "\n"


def check_name(target: str, imported: Mapping[str, str], where: str) -> None:
  """Raises UserError unless a parameter that is not T5X's is one."""
  function, _, parameter = target.rpartition(".")
  module = _module_of(target, imported)
  if not _is_module(module):
    return  # Told where it is imported.
  made = importlib.import_module(module)
  for name in function.removeprefix(module).strip(".").split("."):
    if not hasattr(made, name):
      raise UserError(
        f"{where}: {function} is unknown: {module} has no {name}."
        f"{nearest(name, dir(made))}"
      )
    made = getattr(made, name)
  try:
    known = inspect.signature(made).parameters
  except (TypeError, ValueError):
    return
  takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
  if parameter not in known and not takes_all:
    raise UserError(
      f"{where}: {function} has no parameter {parameter!r}."
      f"{nearest(parameter, known)} It has: {', '.join(known)}"
    )


def _module_of(full: str, imported: Mapping[str, str]) -> str:
  """The module of a parameter: the longest that is imported, or may be."""
  parts = full.split(".")
  names = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
  for name in names:
    if name in our_names.ALIASES or name in imported:
      return name
  for name in names:
    if _is_module(name):
      return name
  return names[-1]


def _is_module(name: str) -> bool:
  try:
    importlib.import_module(name)
  except ImportError:
    return False
  return True


def _import(module: str, where: str) -> None:
  """Imports what a file asks for, which registers its tasks."""
  try:
    importlib.import_module(module)
  except ImportError as e:
    parent, _, name = module.rpartition(".")
    try:
      # `from package import name` may be of what is no module.
      if parent and hasattr(importlib.import_module(parent), name):
        return
    except ImportError:
      pass
    hint = ""
    if str(getattr(e, "name", "")).split(".")[0] in ("t5x", "t5"):
      hint = (
        ". T5X and t5 are not here; SeqIO is, and the tasks of the T5 paper are"
        " known by their names"
      )
    raise UserError(f"{where}: import {module}: {e}{hint}") from None
