"""The one exception that the commands print without a traceback."""


class UserError(ValueError):
  """A mistake in the user's input: what is wrong, where, and what to do."""


def nearest(name: str, known) -> str:
  """ " Did you mean ...?" for the closest of the known names, or nothing."""
  import difflib

  close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
  return f" Did you mean {close[0]!r}?" if close else ""
