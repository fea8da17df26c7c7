"""What a row of the table of T5X's bindings says; see table.py."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple


class Reference(NamedTuple):
  """`@scope/name` or `@scope/name()`; `name` in full, as T5X has it."""

  scope: str
  name: str
  is_call: bool


class Macro(NamedTuple):
  """`%NAME`."""

  name: str


REQUIRED = Macro("gin.REQUIRED")

Check = Callable[[Any], bool]
_anything = lambda value: True


@dataclasses.dataclass(frozen=True)
class Row:
  """What a parameter of T5X's is here.

  Attributes:
    about: its meaning here, or why there is nothing to do.
    to: our parameter, `module.function.parameter`; by command where it is
      another in each; "" where nothing is bound.
    holds: the values that are honoured; all others are refused.
    instead: what a person may do about a value that is refused.
    ours: our value from T5X's.
    tells: a line for people about a value that is taken otherwise than in T5X,
      or None.
    makes: the configurables that its references may name; () is any value.
    default: T5X's, where a file leaves it open and ours is another; REQUIRED
      stands for none.
  """

  about: str
  to: str | dict[str, str] = ""
  holds: Check = _anything
  instead: str = ""
  ours: Callable[[Any], Any] = lambda value: value
  tells: Callable[[Any], str | None] = lambda value: None
  makes: tuple[str, ...] = ()
  default: Any = REQUIRED

  @property
  def kind(self) -> str:
    """In a word, for people."""
    if self.holds is nothing:
      return "refused"
    if self.holds is not _anything and not self.makes:
      return "honoured where it can be, else refused"
    return "honoured" if self.to or self.makes else "neutral, said"

  @property
  def is_neutral(self) -> bool:
    return self.kind.startswith("neutral")


def nothing(value: Any) -> bool:
  """No value is honoured."""
  return False


def same(to: str | dict[str, str], about: str = "the same", **more) -> Row:
  """Ours has the same meaning."""
  return Row(about, to, **more)


def neutral(about: str) -> Row:
  """There is nothing to do for it here, whatever its value."""
  return Row(about)


def only(*values: Any, about: str, instead: str, to: str = "", **more) -> Row:
  """These values are honoured."""
  # 0 is no False, nor 1 True; a list may stand for a tuple.
  plain = lambda v: tuple(v) if isinstance(v, list) else v
  alike = lambda v, w: plain(v) == w and isinstance(v, bool) == isinstance(
    w, bool
  )
  holds = lambda v: any(alike(v, w) for w in values)
  return Row(about, to, holds, instead, **more)


def refused(instead: str, about: str = "not here") -> Row:
  return Row(about, holds=nothing, instead=instead)


def built(
  *makes: str,
  to: str | dict[str, str] = "",
  about: str = "the same",
  or_none: bool = False,
  **more,
) -> Row:
  """A reference to one of these configurables, or None where it may be."""
  holds = lambda v: (
    or_none if v is None else isinstance(v, Reference) and v.name in makes
  )
  more.setdefault(
    "instead", f"it may be @{' or @'.join(makes)}" + " or None" * or_none
  )
  return Row(about, to, holds, makes=makes, **more)
