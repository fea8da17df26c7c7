"""Packaging of fat5_jax; tool settings are in pyproject.toml."""

import os
import re

from setuptools import find_packages, setup

_HERE = os.path.dirname(os.path.abspath(__file__))


def _read(*path):
  with open(os.path.join(_HERE, *path), encoding="utf-8") as file:
    return file.read()


setup(
  name="fat5_jax",
  version=re.search(r'__version__ = "(.*)"', _read("fat5_jax", "__init__.py"))[
    1
  ],
  description="Fine-tune and pre-train T5-family models in JAX",
  long_description=_read("README.md"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The gin files lie at the top of the repository and inside the wheel.
  packages=[
    *find_packages(include=["fat5_jax*", "pallas_kernels*"]),
    "fat5_jax.gin",
  ],
  package_dir={"fat5_jax.gin": "gin"},
  package_data={
    "fat5_jax.gin": ["**/*.gin"],
    "pallas_kernels": ["**/README.md"],
    # A file for torch, copied into exports; not a module of this package.
    "fat5_jax.convert": ["shipped/*.py"],
    "fat5_jax.gin_config.t5x": ["files/**/*.gin"],
    "fat5_jax.evaluation": ["report.html"],
  },
  install_requires=[
    "absl-py",
    "cloudpickle",
    "array_record>=0.7",
    "clu>=0.0.12",
    "datasets>=3.0",
    "flax>=0.12",
    "fsspec",
    "gin-config>=0.5.0",
    "grain>=0.2.15",
    "huggingface_hub>=1.0",
    "jax>=0.10.2,<0.13",
    "matplotlib>=3.8",
    "ml_dtypes>=0.5",
    "msgpack>=1.0",
    "numpy",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.33",
    "pyarrow",
    "rich>=13",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "safetensors>=0.5",
    "scikit-learn>=1.4",
    "scipy",
    "sentencepiece>=0.2",
    "seqio>=0.0.20",
    # clu writes TensorBoard events through it and does not ask for it.
    "tensorboard",
    "tensorflow>=2.18",
    "tensorflow-datasets>=4.9",
    "tensorstore>=0.1.71",
    "transformers>=4.57",
    "xxhash>=3",
  ],
  extras_require={
    # MODEL_DIR, checkpoints and data at gs:// and s3://.
    "gcs": ["gcsfs>=2025.3"],
    "s3": ["s3fs>=2025.3"],
    "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "dev": [
      # Object stores on this machine, for tests.
      "gcp-storage-emulator>=2026.7",
      "gcsfs>=2025.3",
      "moto[server]>=5.2",
      "s3fs>=2025.3",
      "peft>=0.17",
      "pre-commit",
      # pytest-xdist 3.8 does not group tests, without a word, from 9.2 on.
      "pytest>=8,<9.2",
      "pytest-timeout",
      "pytest-xdist",
      "ruff==0.14.5",
      # Reads exported embeddings in tests.
      "sentence-transformers==6.2.0",
      # An oracle in tests; this very version has a CPU build that is
      # found without an index of its own.
      "torch==2.13.0",
      "transformers>=5.23,<6",
    ],
  },
)
