"""Operations of matrix products: of a jaxpr, and of a model's training step.

XLA's own cost analysis counts the body of a loop once, and a scan over layers
is a loop; here a loop counts as often as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from fat5_jax.training import steps
from fat5_jax.training.program import Program


def product_flops(jaxpr: Any) -> float:
  """Floating-point operations of the matrix products of a jaxpr.

  A multiplication and an addition are two. Loops of unknown length count once,
  of a conditional the dearest branch.
  """
  total = 0.0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      width = math.prod(left[axis] for axis in contracted)
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * width
      continue
    inner = [product_flops(j) for j in _inner_jaxprs(eqn.params)]
    if name == "scan":
      total += eqn.params["length"] * sum(inner)
    elif name == "cond":
      total += max(inner, default=0.0)
    else:
      total += sum(inner)
  return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (ClosedJaxpr, Jaxpr)):
        yield item


def model_flops(program: Program, batch: Mapping[str, Any]) -> float:
  """Operations of one training step, over all devices, as MFU counts them.

  Three times the forward pass's products, whatever is computed again and
  whichever parameters are frozen (PaLM, arXiv:2204.02311, appendix B).
  Attention counts dense.

  Args:
    program: what is trained.
    batch: arrays, or their shapes.
  """
  model = program.model
  config = model.config.replace(attention_implementation="reference")
  forward = steps.make_eval_step(
    model.clone(config=config),
    z_loss=program.z_loss,
    label_smoothing=program.label_smoothing,
    loss_normalizing_factor=program.loss_normalizing_factor,
  )
  shapes = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree
  )
  params = shapes(program.abstract_state.params)
  return 3 * product_flops(jax.make_jaxpr(forward)(params, shapes(dict(batch))))
