"""What a piece of somebody's code or vocabulary does, as JSON.

A store of prepared examples is used again where these are equal. What cannot be
told is Unknown, and then nothing is used again.

Code is followed as far as it is somebody's own: the functions and classes that
it refers to, what it takes of modules, the values of globals. Of what is
installed, and of Python itself, the version and the file are told. What code
asks of the world as it runs (the environment, a path that it makes up) is not
in it: prepare.py looks at the first examples for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import hashlib
import importlib.metadata
import inspect
import os
import sys
import sysconfig
import types
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax.data import files

# Of objects within objects; code refers to code in longer chains.
_DEPTH = 100
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Of a vocabulary, what is read from its file when it is wanted.
_LAZY = ("_sentencepiece_model_file", "_model")
_PLAIN = (type(None), bool, int, float)
# Of a class, what every class has.
_OF_ANY_CLASS = {
  *("__dict__", "__weakref__", "__module__", "__doc__", "__qualname__"),
  *("__abstractmethods__", "_abc_impl", "__firstlineno__"),
  *("__static_attributes__", "__annotations__", "__annotate_func__"),
}


class Unknown(Exception):
  """An object that does not show what it is."""


def of(value: Any) -> Any:
  """Plain data, equal for what does the same; also in another process.

  Raises:
    Unknown: for what is made of neither plain data nor code, an open file say.
  """
  try:
    return _Walk().of(value, ())
  except RecursionError:
    raise Unknown("objects within objects") from None


class _Walk:
  """One description; code that it has met is described once."""

  def __init__(self):
    self._met: dict[int, int] = {}
    # While it is described nothing may take the place of what is gone.
    self._kept: list[Any] = []

  def of(self, value: Any, above: tuple[int, ...]) -> Any:
    if type(value) in _PLAIN:
      return value
    if type(value) is str:
      # Of a file, what is in it.
      return ["file", _hash_of(value)] if os.path.isfile(value) else value
    if type(value) is bytes:
      return ["bytes", hashlib.sha256(value).hexdigest()[:16]]
    if isinstance(value, tf.Tensor):
      try:
        value = value.numpy()
      except (AttributeError, tf.errors.OpError):
        raise Unknown("a tensor that is no value") from None
    if isinstance(value, np.ndarray) and value.dtype != object:
      content = hashlib.sha256(np.ascontiguousarray(value).tobytes())
      return ["array", str(value.dtype), value.shape, content.hexdigest()[:16]]
    if isinstance(value, (np.generic, np.dtype, tf.DType, tf.TypeSpec)):
      return repr(value)
    if id(value) in above:
      return "above"
    if len(above) > _DEPTH:
      raise Unknown("objects within objects")
    self._kept.append(value)
    within = lambda item: self.of(item, (*above, id(value)))
    if isinstance(value, _CODE):
      if id(value) in self._met:
        return ["met", self._met[id(value)]]
      self._met[id(value)] = len(self._met)
      return _code(value, within)
    if isinstance(value, np.ndarray):
      return ["array", value.shape, within(value.tolist())]
    if isinstance(value, seqio.SentencePieceVocabulary):
      content = hashlib.sha256(value.sp_model).hexdigest()[:16]
      kept = {k: v for k, v in vars(value).items() if k not in _LAZY}
      return [within(type(value)), content, within(kept)]
    found = _items(value, within)
    if found is not None:
      if type(value) in (dict, list, tuple, set, frozenset):
        return found
      # A kind of one's own may have more to it.
      return [within(type(value)), found, within(getattr(value, "__dict__", 0))]
    if isinstance(value, _CACHED):
      return ["cached", within(value.__wrapped__)]
    if isinstance(value, functools.partial):
      return [within(value.func), within(value.args), within(value.keywords)]
    if isinstance(value, types.MethodType):
      return [within(value.__func__), within(value.__self__)]
    if isinstance(value, types.CodeType):
      return _compiled(value, within)
    if isinstance(value, types.BuiltinFunctionType):
      owner = value.__self__
      if owner is None or isinstance(owner, types.ModuleType):
        return [value.__module__, value.__name__]
      return [value.__name__, within(owner)]
    if isinstance(value, (staticmethod, classmethod)):
      return [type(value).__name__, within(value.__func__)]
    if isinstance(value, property):
      return ["property", *map(within, (value.fget, value.fset, value.fdel))]
    return _object(value, within)


_CODE = (types.FunctionType, types.ModuleType, type)
_CACHED = type(functools.lru_cache(lambda: None))


def _items(value: Any, within: Callable[[Any], Any]) -> Any:
  """What a container holds; None for what is none."""
  if isinstance(value, Mapping):
    # In its order, which steps may go by; keys 1 and "1" are two.
    return {"map": [[within(k), within(v)] for k, v in value.items()]}
  if isinstance(value, (list, tuple)):
    return [within(item) for item in value]
  if isinstance(value, (set, frozenset)):
    return sorted((within(item) for item in value), key=repr)
  return None


def _object(value: Any, within: Callable[[Any], Any]) -> Any:
  """Its class, and its state as pickle would take it."""
  state = getattr(value, "__dict__", None)
  is_python = type(value).__reduce_ex__ is object.__reduce_ex__ and (
    type(value).__reduce__ is object.__reduce__
  )
  if state is not None and is_python and type(value).__base__ is object:
    return [within(type(value)), within(state)]
  try:
    reduced = value.__reduce_ex__(2)
  except Exception as e:
    # An object of Python's alone that pickle refuses for one of its parts.
    if state is not None and is_python:
      return [within(type(value)), within(state)]
    raise Unknown(type(value).__qualname__) from e
  if isinstance(reduced, str):
    return [within(type(value)), reduced]
  # A class of iterators is none itself.
  is_iterator = lambda p: hasattr(p, "__next__") and not isinstance(p, type)
  parts = [list(p) if is_iterator(p) else p for p in reduced]
  return [within(type(value)), *map(within, parts)]


def _code(value: Any, within: Callable[[Any], Any]) -> Any:
  """A function, a class or a module."""
  path = _path_of(value)
  if isinstance(value, types.ModuleType):
    return _module(value, within, None)
  name = f"{value.__module__}:{value.__qualname__}"
  if path is not None and _is_installed(path):
    found = [name, _hash_of(path), _version_of(value.__module__)]
    return found + ([] if isinstance(value, type) else _bound(value, within))
  if path is None and _is_builtin(value):
    return name
  found = [name, None if path is None else _hash_of(path)]
  if isinstance(value, type):
    own = {k: v for k, v in vars(value).items() if k not in _OF_ANY_CLASS}
    bases = [base for base in value.__bases__ if base is not object]
    return [*found, within(bases), _leniently(own, within, path is not None)]
  found += [within(value.__code__), *_bound(value, within)]
  names = _names(value.__code__)
  return [*found, _globals(value.__globals__, names, within, path is not None)]


def _bound(value: types.FunctionType, within) -> list[Any]:
  """What a function holds: defaults, and the values of its closure."""
  found = [within(value.__defaults__), within(value.__kwdefaults__)]
  for cell in value.__closure__ or ():
    try:
      found.append(within(cell.cell_contents))
    except ValueError:
      found.append("empty")
  return found


def _module(
  module: types.ModuleType,
  within: Callable[[Any], Any],
  names: list[str] | None,
) -> list[Any]:
  """A module: of one's own, its file and the values of these names in it (None:
  of all)."""
  path, name = _path_of(module), module.__name__
  if path is None or _is_installed(path):
    return ["module", name, _version_of(name)]
  if names is None:
    names = sorted(n for n in vars(module) if not n.startswith("__"))
  found = _globals(vars(module), names, within, True)
  return ["module", name, _hash_of(path), found]


def _globals(
  values: Mapping[str, Any],
  names: list[str],
  within: Callable[[Any], Any],
  is_lenient: bool,
) -> dict[str, Any]:
  """What code refers to by these names; of a module, what it takes of that."""

  def described(value):
    if isinstance(value, types.ModuleType):
      # `helper.f` is two names.
      rest = [n for n in names if values.get(n) is not value]
      return _module(value, within, rest)
    return within(value)

  found = {name: values[name] for name in names if name in values}
  return _leniently(found, described, is_lenient)


def _leniently(values, within, is_lenient: bool) -> dict[str, Any]:
  """Each as it is; a logger, say, beside code of a file is only its kind."""
  found = {}
  for name, value in values.items():
    try:
      found[name] = within(value)
    except Unknown:
      if not is_lenient:
        raise
      found[name] = ["unknown", type(value).__qualname__]
  return found


def _compiled(code: types.CodeType, within: Callable[[Any], Any]) -> Any:
  return [
    code.co_code.hex(),
    [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
    [code.co_flags, code.co_names, code.co_varnames],
    [code.co_freevars, code.co_cellvars],
    within(code.co_consts),
  ]


def _names(code: types.CodeType) -> list[str]:
  """What a function refers to, the functions within it too."""
  found = set(code.co_names)
  for inner in code.co_consts:
    if isinstance(inner, types.CodeType):
      found.update(_names(inner))
  return sorted(found)


def _is_builtin(value: Any) -> bool:
  module = value.__module__
  return module == "builtins" or (
    module != "__main__" and module in sys.stdlib_module_names
  )


@functools.cache
def _installed_roots() -> tuple[str, ...]:
  paths = sysconfig.get_paths()
  roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib")}
  roots |= {paths["platlib"], os.path.dirname(os.__file__), _OURS}
  return tuple(os.path.realpath(root) + os.sep for root in roots)


def _is_installed(path: str) -> bool:
  path = os.path.realpath(path)
  # Another environment's packages may be seen too (a .pth file).
  is_package = {"site-packages", "dist-packages"} & {*path.split(os.sep)}
  return bool(is_package) or path.startswith(_installed_roots())


@functools.cache
def _version_of(module: str) -> str | None:
  """Of the package that a module is in."""
  top = module.partition(".")[0]
  if top == "fat5_jax":
    return None  # The files that make examples are told apart (prepare.py).
  try:
    return importlib.metadata.version(top)
  except importlib.metadata.PackageNotFoundError:
    found = getattr(sys.modules.get(top), "__version__", None)
    return found if isinstance(found, str) else None


def _path_of(value: Any) -> str | None:
  """The file that a function, class or module stands in; None without."""
  try:
    path = inspect.getsourcefile(value)
  except (TypeError, OSError):
    return None
  return path if path and os.path.isfile(path) else None


def _hash_of(path: str) -> str:
  return files.file_record(path)["sha256"]
