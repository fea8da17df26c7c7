"""Fine-tune and pre-train T5-family models in JAX.

From Python: `fat5_jax.load("folder")` gives a model that predicts, is
fine-tuned and exported; see fat5_jax/api. Commands: `python -m fat5_jax.train`.
"""

__version__ = "0.1.0"

# What Python users want, imported when it is asked for: jax, TensorFlow and
# seqio take seconds.
_LAZY = {
  "load": "fat5_jax.api",
  "Model": "fat5_jax.api",
  "FineTuned": "fat5_jax.api",
  "UserError": "fat5_jax.errors",
}


def __getattr__(name):
  if name not in _LAZY:
    raise AttributeError(f"module 'fat5_jax' has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__():
  return sorted([*globals(), *_LAZY])
