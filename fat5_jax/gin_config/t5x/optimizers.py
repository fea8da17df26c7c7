"""T5X's optimizers.chain, as optax has it."""

from __future__ import annotations

from collections.abc import Sequence

import optax


def chain(
  transformations: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformation:
  """One transformation after the other; gin binds no positional arguments.

  Args:
    transformations: optax's, each with a learning rate of its own.
  """
  return optax.chain(*transformations)
