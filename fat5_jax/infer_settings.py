"""What infer is asked to do, checked before it begins."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

import jax

from fat5_jax.data import files
from fat5_jax.errors import UserError

# Beyond these, memory would be asked for that no machine has.
_LARGEST_BATCH = 1 << 16
MOST_TOKENS = 1 << 17


def check(
  checkpoint_path: Any,
  input: Any,
  output: Any,
  output_format: Any,
  batch_size: Any,
  max_input_length: Any,
  max_output_length: Any,
  use_template: Any,
) -> None:
  """Raises UserError for a setting of another type or out of range."""

  def must(name, value, fits, what):
    if not fits:
      raise UserError(f"{name} = {files.shown(value)} must be {what}")

  def check_number(name, value, least, most):
    whole = isinstance(value, int) and not isinstance(value, bool)
    must(
      name,
      value,
      whole and least <= value <= most,
      f"a whole number from {least} to {most:,}",
    )

  path = "a path; a number is quoted: \"'12'\""
  is_path = lambda value: isinstance(value, str) and value != ""
  must("CHECKPOINT_PATH", checkpoint_path, is_path(checkpoint_path), path)
  must("INPUT", input, input is None or is_path(input), path)
  must("OUTPUT", output, is_path(output), path)
  must(
    "OUTPUT_FORMAT",
    output_format,
    output_format is None or isinstance(output_format, str),
    "the name of a format",
  )
  check_number("INFER_BATCH_SIZE", batch_size, 1, _LARGEST_BATCH)
  # One is the end of the sequence.
  if max_input_length is not None:
    check_number("MAX_INPUT_LENGTH", max_input_length, 2, MOST_TOKENS)
  check_number("MAX_OUTPUT_LENGTH", max_output_length, 1, MOST_TOKENS)
  must(
    "USE_TEMPLATE",
    use_template,
    isinstance(use_template, bool),
    "True or False",
  )
  if input not in (None, "-"):
    files.check_file(input)


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
