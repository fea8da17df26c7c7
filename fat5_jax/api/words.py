"""Errors of the house in the words of Python: arguments instead of macros."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import logging
import re

from fat5_jax import interrupts
from fat5_jax.errors import UserError

# What a message calls it, and what a caller in Python does.
_ARGUMENTS = {
  "TASK_FEATURE_LENGTHS": "max_input_tokens and max_target_tokens",
  "EVAL_FEATURE_LENGTHS": "max_input_tokens and max_target_tokens",
  "MAX_INPUT_LENGTH": "max_input_tokens",
  "MAX_OUTPUT_LENGTH": "max_tokens",
  "INFER_BATCH_SIZE": "batch_size",
  "BATCH_SIZE": "batch_size",
  "INITIAL_CHECKPOINT_PATH": "the folder that was loaded",
  "MODEL_DIR": "run_folder",
  "TRAIN_STEPS_RELATIVE": "steps",
  "TRAIN_STEPS": "steps",
  "HEAD_MODULE": "head_module",
  "TRAINABLE": "with_lora's pattern",
  "FROZEN": "freeze's pattern",
  "LORA_TARGETS": "with_lora's targets",
  "RANDOM_SEED": "seed",
  "LEARNING_RATE": "learning_rate",
  "NUM_MICROBATCHES": "num_microbatches",
  "LABEL_SMOOTHING": "label_smoothing",
  "LOSS_NORMALIZING_FACTOR": "loss_normalizing_factor",
  "Z_LOSS": "z_loss",
  "PACK": "pack",
  "MESH": "mesh",
  "CHECKPOINT_PERIOD": "checkpoint_period",
  "KEEP": "keep",
  "INFER_VOCABULARY": "load's vocabulary",
  "USE_TEMPLATE": "use_template",
  "INPUT": "rows",
}
# Ways out that a caller in Python has another of.
_PHRASES = (
  ("than the gin file asks for", "than fine_tune asks for"),
  (
    "Export it with tools/convert_checkpoint.py and start from the weights"
    " alone",
    "To start from the weights alone, load what"
    " model.export(folder, to='fat5') writes",
  ),
)
_NAME = re.compile(rf"(?:--gin\.)?\b({'|'.join(_ARGUMENTS)})\b")


def in_python(message: str) -> str:
  """The message with arguments' names in the place of macros'."""
  for before, now in _PHRASES:
    message = message.replace(before, now)
  return _NAME.sub(lambda match: _ARGUMENTS[match[1]], message)


@contextlib.contextmanager
def of_python() -> Iterator[None]:
  """Makes what a caller did wrong a UserError in Python's words."""
  try:
    yield
  except UserError as e:
    # The cause stays: a program may look at it.
    raise type(e)(in_python(str(e))) from None
  except interrupts.Stopped:
    # A second Ctrl-C.
    raise KeyboardInterrupt from None


@contextlib.contextmanager
def as_user_error() -> Iterator[None]:
  """A config's or a module's ValueError: it refuses what a caller gave."""
  try:
    yield
  except UserError:
    raise
  except (ValueError, TypeError) as e:
    text = str(e)
    for made, by in (("HeadConfig", "with_head"), ("LoRAConfig", "with_lora")):
      text = text.replace(f"{made}.__init__()", by)
    raise UserError(text) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps to themselves the libraries that log to their own developers."""
  names = ("absl", "asyncio", "concurrent.futures")
  before = {name: logging.getLogger(name).level for name in names}
  for name in names:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    for name, level in before.items():
      logging.getLogger(name).setLevel(level)
