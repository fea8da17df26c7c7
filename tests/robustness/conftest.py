"""One zygote a worker, and where cases come from."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from zygote import Zygote


@pytest.fixture(scope="session")
def zygote():
  with Zygote() as zygote:
    yield zygote


@pytest.fixture(scope="session")
def seed() -> int:
  """Of all generators: FAT5_JAX_SEED draws other cases."""
  return int(os.environ.get("FAT5_JAX_SEED", "0"))
