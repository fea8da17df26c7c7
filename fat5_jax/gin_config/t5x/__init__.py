"""T5X's own gin files, unmodified: what they say, in our names.

Nothing else in fat5_jax knows this folder but the command line, which calls
`take_flags` and `in_our_words`. table.py has every binding of T5X's.
"""

from __future__ import annotations

from collections.abc import Sequence

from fat5_jax.errors import UserError
from fat5_jax.gin_config.t5x.flags import Flags, to_seqio
from fat5_jax.gin_config.t5x.flags import take as take_flags

__all__ = ["Flags", "in_our_words", "take_flags"]


def in_our_words(
  command: str,
  files: Sequence[str],
  bindings: Sequence[str],
  search_paths: Sequence[str],
  flags: Flags,
) -> tuple[list[str], list[str]] | None:
  """(gin files, bindings) that say what T5X's files say; None for others.

  Args:
    command: train, eval, infer or plan.
    files: those of the command line.
    bindings: of the command line, after all files.
    search_paths: more folders for gin files.
    flags: T5X's on the command line.

  Raises:
    UserError: for what cannot be honoured: which file, which line, what to do.
  """
  from fat5_jax import console
  from fat5_jax.gin_config.t5x import reading, translate

  to_seqio(flags)
  for note in flags.notes:
    console.say(f"T5X: {note}")
  found = reading.Files(search_paths)
  try:
    for name in files:
      found.add(name)
    if not found.has_t5x:
      return None
    found.add_flags(bindings)
  except UserError:
    # Others are told of by who reads them.
    if not found.has_t5x:
      return None
    raise
  translation = translate.Translation(command, found)
  text = translation.text()
  for note in translation.notes:
    console.say(f"T5X: {note}")
  if translation.neutral:
    console.say(
      f"T5X: nothing to do here for {', '.join(translation.neutral)}"
      " (why: python -m fat5_jax.gin_config.t5x.table)"
    )
  return [], [text]
