"""LoRA's matrices merged into the kernels."""

from __future__ import annotations

import numpy as np

from fat5_jax.convert.table import Leaf, Leaves
from fat5_jax.models.config import T5Config


def merged(config: T5Config, leaves: Leaves) -> tuple[T5Config, Leaves]:
  """The model without LoRA that computes the same.

  `kernel + alpha / rank * A @ B`, in float32, in the kernel's dtype.
  """
  if config.lora is None:
    return config, leaves
  scale = np.float32(config.lora.scale)

  def read(kernel, a, b):
    update = a.read().astype(np.float32) @ b.read().astype(np.float32)
    base = kernel.read()
    return (base.astype(np.float32) + scale * update).astype(base.dtype)

  found = {}
  for path, leaf in leaves.items():
    if path[-1] in ("lora_a", "lora_b"):
      continue
    a, b = ((*path[:-1], name) for name in ("lora_a", "lora_b"))
    if path[-1] == "kernel" and a in leaves:
      parts = (leaf, leaves[a], leaves[b])
      leaf = Leaf(leaf.shape, leaf.dtype, lambda p=parts: read(*p))
    found[path] = leaf
  return config.replace(lora=None), found
