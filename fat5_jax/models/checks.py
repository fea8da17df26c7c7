"""What a field of a config may be; each raises ValueError, naming the field."""

from __future__ import annotations

import numbers
from typing import Any

# Of float32, about.
_LARGEST = 3e38
# Counts go into int32 arithmetic.
MOST = 2**31 - 1


def told(field: str, value: Any) -> str:
  """`field=value`, short."""
  text = repr(value)
  return f"{field}={text if len(text) <= 80 else text[:77] + '...'}"


def check_choice(where: Any, field: str, choices: tuple[Any, ...]) -> None:
  value = getattr(where, field)
  if value not in choices:
    raise ValueError(
      f"{told(field, value)} is not one of {', '.join(map(str, choices))}"
    )


def check_ints(where: Any, fields: tuple[str, ...], least: int) -> None:
  for field in fields:
    value = getattr(where, field)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      raise ValueError(f"{told(field, value)} is no integer")
    if value < least:
      raise ValueError(f"{field}={value} must be at least {least}")
    if value > MOST:
      raise ValueError(f"{field} must be at most {MOST}")


def check_real(where: Any, field: str) -> None:
  value = getattr(where, field)
  if (
    isinstance(value, bool)
    or not isinstance(value, numbers.Real)
    or not -_LARGEST < value < _LARGEST
  ):
    raise ValueError(f"{told(field, value)} is no finite number")


def check_rate(where: Any, field: str) -> None:
  check_real(where, field)
  if not 0.0 <= getattr(where, field) < 1.0:
    raise ValueError(f"{field}={getattr(where, field)} is not in [0, 1)")


def check_flag(where: Any, field: str, unset: bool = False) -> None:
  value = getattr(where, field)
  if not isinstance(value, bool) and not (unset and value is None):
    raise ValueError(f"{told(field, value)} is neither True nor False")


def as_tuple(where: Any, field: str, kind: type) -> None:
  """Makes a tuple of a list, of one kind of thing."""
  value = getattr(where, field)
  if not isinstance(value, (list, tuple)) or not all(
    isinstance(x, kind) and not isinstance(x, bool) for x in value
  ):
    what = "texts" if kind is str else "integers"
    raise ValueError(f"{told(field, value)} is no list of {what}")
  object.__setattr__(where, field, tuple(value))
