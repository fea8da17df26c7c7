"""What a gin text says, by gin's own grammar, before gin acts on it."""

from __future__ import annotations

import io
import tokenize
from typing import NamedTuple

from fat5_jax.errors import UserError
from gin import config_parser


class Parsed(NamedTuple):
  """What a gin text says: `sets` and `uses` are macros, with their lines.

  `binds` are a function's name, its parameter, and the macro it is bound to.
  """

  sets: list[tuple[str, int]]
  uses: set[str]
  includes: list[tuple[str, int]]
  binds: list[tuple[str, str, str]]


class _Use(str):
  """A macro's name where it is a parameter's value."""


class _Names(config_parser.ParserDelegate):
  """Keeps the names of macros; references are gin's own business."""

  def __init__(self):
    self.macros: set[str] = set()

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return None

  def macro(self, macro_name):
    self.macros.add(macro_name)
    return _Use(macro_name)


def read(text: str, where: str) -> Parsed:
  """Parses a gin text by gin's own grammar.

  Raises:
    UserError: naming file and line, for what is no gin.
  """
  names = _Names()
  parsed = Parsed([], names.macros, [], [])
  try:
    for statement in config_parser.ConfigParser(io.StringIO(text), names):
      if isinstance(statement, config_parser.IncludeStatement):
        parsed.includes.append(
          (statement.filename, statement.location.line_num)
        )
      elif isinstance(statement, config_parser.BindingStatement):
        scope, name, argument, value, location = statement
        if not argument:
          full = f"{scope}/{name}" if scope else name
          parsed.sets.append((full, location.line_num))
        elif name in ("gin.macro", "macro"):
          # The long form of the same.
          parsed.sets.append((scope, location.line_num))
        elif isinstance(value, _Use):
          function = name.split(".")[-1]
          parsed.binds.append((function, argument, str(value)))
  except (RecursionError, MemoryError):
    raise UserError(f"{where}: brackets are nested too deep") from None
  except TypeError:
    # gin's parser trips over it.
    raise UserError(
      f"{where or text.strip()}: a key of a table is a list or a table"
    ) from None
  except (SyntaxError, tokenize.TokenError) as e:
    line = _line_of(e)
    lines = text.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1]
    place = f"{where}, line {line}: " if where else ""
    reason = str(e.args[0]).strip().splitlines()[0].rstrip(".")
    if reason.startswith("malformed node"):
      reason = "not expected here"
    raise UserError(
      f"{place}{shown.strip()!r} is no gin ({reason}). Is a quote or a bracket"
      " missing, here or above?"
    ) from None
  return parsed


def _line_of(error: Exception) -> int:
  """The line that a parser's error names."""
  where = error.args[1] if len(error.args) > 1 else ()
  # gin's and SyntaxError's begin with the file, TokenError's with the line.
  numbers = [part for part in where if isinstance(part, int)]
  return numbers[0] if numbers else 1
