"""Fresh parameters, and their shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fat5_jax.models import layer_stack


def init_params(model, seed: int) -> Any:
  """Fresh float32 parameters; jit it to make them on the devices.

  Drawn by a scan over the layers whether or not the model has one: the same
  parameters in either layout, and a program that does not grow with the depth.
  XLA would fuse all draws of one shape into one kernel, and compile that for
  many minutes on a GPU.
  """
  config = model.config
  tokens = jnp.zeros((1, 8), jnp.int32)
  inputs = [tokens, tokens] if config.is_language_model else [tokens]
  scanned = model.clone(config=config.replace(scan_layers=True))
  params = scanned.init(jax.random.key(seed), *inputs)["params"]
  return params if config.scan_layers else layer_stack.unstack(params)


def abstract_params(model: Any) -> Any:
  """Shapes of a model's parameters."""
  return jax.eval_shape(lambda: init_params(model, 0))
