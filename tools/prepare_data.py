"""Prepares the data of a run ahead of time: tokens, on disk, read by number.

    python tools/prepare_data.py --gin_file=my.gin --gin.DATA_DIR=...

takes the flags of fat5_jax.train, and writes what it would write before its
first step into CACHE_DIR (FAT5_JAX_CACHE, ~/.cache/fat5_jax). What is there
already is left as it is.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from fat5_jax.gin_config import cli

if __name__ == "__main__":
  raise SystemExit(cli.main("train", [*sys.argv[1:], "--prepare_data"]))
