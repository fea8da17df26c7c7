"""Arrays under shard_map: over which mesh axes they vary."""

from __future__ import annotations

import jax


def vary_together(operands, like=()):
  """Lets all arrays of a pytree vary over the union of their mesh axes.

  Inside `jax.shard_map` a table that every shard shares meets queries that
  differ; the transpose of this sums its gradient over the shards. Elsewhere it
  does nothing.

  Args:
    operands: pytree of arrays.
    like: more arrays whose axes count.
  """
  axes = lambda x: jax.typeof(x).manual_axis_type.varying
  union = set().union(*map(axes, jax.tree.leaves((operands, like))))

  def vary(x):
    missing = tuple(sorted(union - axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(vary, operands)
