"""Gin files and flags to gin's bindings, checked."""

from __future__ import annotations

from collections.abc import Sequence
import os

from fat5_jax.errors import UserError
from fat5_jax.gin_config import checks, explain, private
from fat5_jax.gin_config.files import GIN_ROOTS, GinFiles
import gin


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
  found = GinFiles([*GIN_ROOTS, os.path.abspath(os.curdir), *search_paths])
  paths = [found.add(name) for name in files]
  checks.check_macros(found, bindings)
  try:
    with private.reading(found.texts):
      gin.parse_config_files_and_bindings(
        paths, bindings, skip_unknown=False, finalize_config=False
      )
  except UserError:
    raise
  except ImportError as e:
    raise UserError(explain.explain_import(e)) from None
  except (
    *(ValueError, TypeError, SyntaxError),
    *(RuntimeError, OSError, AttributeError, NameError),
  ) as e:
    raise UserError(explain.explain(str(e))) from None
  checks.check_required(function, may_be_unset)
  checks.check_values(found, bindings)
