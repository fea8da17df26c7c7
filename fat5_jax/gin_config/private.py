"""What is used of gin beyond its public names; a test fails when it changes.

gin has no public view of its bindings and its registry, and no way to take one
of its file readers away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import io

from gin import config as _config

Reference = _config.ConfigurableReference


def bindings() -> dict[tuple[str, str], Mapping[str, object]]:
  """{(scope, selector): {parameter: value}}; a macro is one of `gin.macro`."""
  return dict(_config._CONFIG)


def function_of(selector: str) -> Callable:
  """What a selector names, without gin's wrapper.

  Raises:
    KeyError, ValueError, AttributeError: where it names nothing, or several.
  """
  return _config._REGISTRY.get_match(selector).wrapped


def selectors() -> list[str]:
  """All that gin knows by name."""
  return [name for name, _ in _config._REGISTRY.items()]


@contextlib.contextmanager
def reading(texts: Mapping[str, str]) -> Iterator[None]:
  """gin reads these files, by their paths, and no others.

  Its own readers would also look for `models/t5.gin` in a Python package
  `models`, and take any folder of that name where the command is run for one.
  """
  readers = _config._FILE_READERS
  _config._FILE_READERS = [
    (lambda path: io.StringIO(texts[path]), texts.__contains__)
  ]
  try:
    yield
  finally:
    _config._FILE_READERS = readers
