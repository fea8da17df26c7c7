"""Whether a value that gin binds is what a function's annotation asks for."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable
import inspect
import math
import types
import typing
from typing import Any

from fat5_jax.macros import REFERENCE


def problem(function: Callable, parameter: str, value: Any) -> str | None:
  """What a parameter must be and the value is not, in words; or None.

  A reference is of the type that it builds, which is known when it is built. A
  parameter without an annotation, or with one that cannot be read, takes all.
  """
  try:
    where = function.__init__ if inspect.isclass(function) else function
    hint = typing.get_type_hints(where).get(parameter, Any)
    words = inspect.signature(function).parameters[parameter].annotation
  except (NameError, TypeError, ValueError, KeyError, AttributeError):
    return None
  if _fits(value, hint):
    return None
  return words if isinstance(words, str) else inspect.formatannotation(words)


def _fits(value: Any, hint: Any) -> bool:
  if value is REFERENCE or hint is Any:
    return True
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, part) for part in inner)
  if origin is typing.Literal:
    return any(value == x and type(value) is type(x) for x in inner)
  if origin in (typing.Annotated, typing.Final):
    return _fits(value, inner[0])
  if hint is None or hint is type(None):
    return value is None
  plain = origin or hint
  if not isinstance(plain, type):
    return True  # A variable of types, a string: not to be judged here.
  if plain is collections.abc.Callable:
    return callable(value)
  if plain is bool:
    return isinstance(value, bool)
  if plain is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if plain is float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
  if plain in (str, bytes, object):
    return isinstance(value, plain)
  if issubclass(plain, collections.abc.Mapping):
    keys, values = inner or (Any, Any)
    return isinstance(value, collections.abc.Mapping) and all(
      _fits(k, keys) and _fits(v, values) for k, v in value.items()
    )
  if plain in _LISTS:
    return isinstance(value, (list, tuple)) and _fit_all(value, plain, inner)
  return not _is_literal(value)


_LISTS = {
  *(list, tuple, set, frozenset, collections.abc.Sequence),
  *(collections.abc.Iterable, collections.abc.Collection),
}


def _fit_all(values, plain: type, inner: tuple) -> bool:
  if not inner:
    return True
  if plain is tuple and inner[-1] is not Ellipsis:
    return len(values) == len(inner) and all(map(_fits, values, inner))
  return all(_fits(value, inner[0]) for value in values)


def _is_literal(value: Any) -> bool:
  """Whether gin read it as it stands: no instance of a class of anyone's."""
  return value is None or isinstance(
    value, (bool, int, float, complex, str, bytes, list, tuple, dict, set)
  )
