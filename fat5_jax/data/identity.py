"""What a piece of somebody's code or vocabulary does, as JSON.

A store of prepared examples is used again where these are equal. What cannot be
told is Unknown, and then nothing is used again.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import hashlib
import inspect
import os
import types
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from fat5_jax.data import files

# Of objects within objects.
_DEPTH = 12


class Unknown(Exception):
  """An object that does not show what it is."""


def of(value: Any) -> Any:
  """Plain data, equal for what does the same; also in another process.

  Raises:
    Unknown: for what is made of neither plain data nor code, an open file say.
  """
  return _of(value, ())


def _of(value: Any, above: tuple[int, ...]) -> Any:
  if value is None or isinstance(value, (bool, int, float)):
    return value
  if isinstance(value, str):
    # Of a file, what is in it.
    return ["file", _hash_of(value)] if os.path.isfile(value) else value
  if isinstance(value, bytes):
    return ["bytes", hashlib.sha256(value).hexdigest()[:16]]
  if isinstance(value, np.ndarray) and value.dtype != object:
    content = hashlib.sha256(np.ascontiguousarray(value).tobytes())
    return ["array", str(value.dtype), value.shape, content.hexdigest()[:16]]
  if isinstance(value, (np.generic, np.dtype, tf.DType, tf.TypeSpec)):
    return repr(value)
  if id(value) in above or len(above) > _DEPTH:
    return "above"
  within = lambda item: _of(item, (*above, id(value)))
  if isinstance(value, seqio.SentencePieceVocabulary):
    content = hashlib.sha256(value.sp_model).hexdigest()[:16]
    kept = {k: v for k, v in vars(value).items() if k not in _LAZY}
    return [_name(type(value)), content, within(kept)]
  if isinstance(value, Mapping):
    return {str(k): within(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [within(item) for item in value]
  if isinstance(value, (set, frozenset)):
    return sorted((within(item) for item in value), key=repr)
  if isinstance(value, functools.partial):
    return [within(value.func), within(value.args), within(value.keywords)]
  if isinstance(value, types.MethodType):
    return [within(value.__func__), within(value.__self__)]
  if isinstance(value, types.CodeType):
    return [value.co_code.hex(), value.co_names, within(value.co_consts)]
  if isinstance(value, types.FunctionType):
    return _function(value, within)
  if isinstance(value, type):
    return [_name(value), _source_file(value)]
  if isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
    return value.__name__
  if not hasattr(value, "__dict__"):
    raise Unknown(type(value).__qualname__)
  return [within(type(value)), within(vars(value))]


# Of a vocabulary, what is read from its file when it is wanted.
_LAZY = ("_sentencepiece_model_file", "_model")


def _function(value: types.FunctionType, within) -> list[Any]:
  found = [_name(value), within(value.__code__)]
  found += [within(value.__defaults__), within(value.__kwdefaults__)]
  for cell in value.__closure__ or ():
    try:
      found.append(within(cell.cell_contents))
    except ValueError:
      found.append("empty")
  file = _source_file(value)
  if file is None:
    # Of a notebook, say: what it calls lies in no file either.
    for name in _names(value.__code__):
      if name in value.__globals__:
        found.append([name, within(value.__globals__[name])])
  return [*found, file]


def _names(code: types.CodeType) -> list[str]:
  """What a function refers to, the functions within it too."""
  found = set(code.co_names)
  for inner in code.co_consts:
    if isinstance(inner, types.CodeType):
      found.update(_names(inner))
  return sorted(found)


def _name(value: Any) -> str:
  return f"{value.__module__}:{value.__qualname__}"


def _source_file(value: Any) -> str | None:
  """A hash of the file that a function or a class stands in; None without."""
  try:
    path = inspect.getsourcefile(value)
  except (TypeError, OSError):
    return None
  return _hash_of(path) if path and os.path.isfile(path) else None


def _hash_of(path: str) -> str:
  return files.file_record(path)["sha256"]
