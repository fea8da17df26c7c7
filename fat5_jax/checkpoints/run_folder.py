"""A run folder (MODEL_DIR): made, written to, the same one for all hosts."""

from __future__ import annotations

import os
import secrets
import tempfile

import jax

from fat5_jax import storage
from fat5_jax.convert import plain_files
from fat5_jax.distributed import hosts
from fat5_jax.errors import UserError


def write_atomically(path: str, text: str) -> None:
  """Writes a file so that a reader, or a crash, sees all of it or nothing.

  Host 0 writes it; the others see it in the folder that they share.
  """
  if jax.process_index():
    return
  plain_files.replace_with(path, text.encode())


def prepare_model_dir(model_dir: str) -> str:
  """Makes the folder, and sure that it can be written; its absolute path.

  Raises:
    UserError: if it cannot, or is neither a folder of a file system nor one of
      a bucket.
  """
  if storage.is_remote(model_dir):
    return _prepare_bucket(storage.absolute(model_dir))
  model_dir = os.path.abspath(os.path.expanduser(model_dir))
  if "\\" in model_dir:
    raise UserError(
      f"MODEL_DIR {model_dir} holds a backslash, which tensorstore takes for a"
      " slash: choose another with --gin.MODEL_DIR=..."
    )
  try:
    os.makedirs(model_dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=model_dir):
      pass
  except OSError as e:
    raise UserError(
      f"MODEL_DIR {model_dir} cannot be written: {e.strerror}. Choose another"
      " with --gin.MODEL_DIR=..."
    ) from None
  return model_dir


def _prepare_bucket(model_dir: str) -> str:
  storage.kvstore(model_dir)  # Of a kind that holds arrays too.
  probe = f"{model_dir}/{plain_files.SCRATCH}{secrets.token_hex(8)}"
  try:
    storage.write(probe, b"")
  except FileNotFoundError:
    raise UserError(
      f"MODEL_DIR {model_dir}: there is no such bucket; make it first, or"
      " choose another with --gin.MODEL_DIR=..."
    ) from None
  storage.remove(probe)
  return model_dir


def check_shared(model_dir: str) -> None:
  """Raises UserError, naming them, for hosts that see another folder."""
  if hosts.everyone.count == 1:
    return
  path = os.path.join(model_dir, ".hosts")
  write_atomically(path, secrets.token_hex(8))
  hosts.everyone.agree("MODEL_DIR's path", model_dir)
  try:
    seen = plain_files.read_text(path)
  except storage.StorageError:
    raise
  except UserError:
    seen = "no file of host 0's: it is another folder"
  hosts.everyone.agree("what lies in MODEL_DIR, which all must share", seen)
