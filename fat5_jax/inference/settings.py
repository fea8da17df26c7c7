"""What infer is asked to do, checked before it begins."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

import jax

from fat5_jax import fetched, macros
from fat5_jax.data import files
from fat5_jax.errors import UserError

MOST_TOKENS = macros.MOST_PREDICTED


def check(input: str | None, **settings: Any) -> None:
  """Raises UserError for a setting of another type or out of range.

  Args:
    input: a file of rows, "-", or None.
    **settings: infer's others, under the names of macros in lower case.
  """
  for name, value in {"input": input, **settings}.items():
    macros.check(name.upper(), value, name.upper())
  if input not in (None, "-"):
    files.check_file(fetched.local(input))


@contextlib.contextmanager
def memory() -> Iterator[None]:
  """Tells what to do where memory does not suffice."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise UserError(
      "not enough memory: set a smaller INFER_BATCH_SIZE, MAX_INPUT_LENGTH or"
      " MAX_OUTPUT_LENGTH"
    ) from None
