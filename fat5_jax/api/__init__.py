"""Python's door: `fat5_jax.load(folder)` gives a Model.

It builds the objects that gin builds (Run, DatasetConfig, tasks, optimizers,
Predictor) and hands them to the functions that the commands call.
"""

import os

# Read when TensorFlow loads: it speaks to its own developers.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from fat5_jax.api.fine_tuned import FineTuned
from fat5_jax.api.loading import load
from fat5_jax.api.model import Model

__all__ = ["FineTuned", "Model", "load"]
