"""Converts a checkpoint of one library to another's.

  python tools/convert_checkpoint.py SOURCE DEST \\
    [--to fat5|hf|flash_t5|enct5|peft] [--encoder_only]

SOURCE is found by looking: a folder of Hugging Face (T5, mT5, umT5, their
heads, T5EncoderModel), FAT5, EncT5 or PEFT, a T5X checkpoint, a Mesh TensorFlow
one, a run folder (MODEL_DIR, its latest checkpoint) or one checkpoint_<step>.
The result is written to a folder beside DEST, read again by fat5_jax and
compared there, tensor by tensor and on a few tokens, and only then takes DEST's
place: what fails or is stopped leaves DEST as it was. Where torch is installed,
the transformers that is there loads it too and says what it answers. Tensors go
one at a time: memory holds the largest and a shard of the output, not the
model.
"""

from __future__ import annotations

import argparse
import ast
import os
import resource
import sys
import time

_FORMATS = ("fat5", "hf", "flash_t5", "enct5", "peft")


def main() -> int:
  from fat5_jax import interrupts

  with interrupts.watched("convert_checkpoint"):
    return _main(interrupts)


def _main(interrupts) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source")
  parser.add_argument("dest")
  parser.add_argument(
    "--to",
    choices=_FORMATS,
    help="default: fat5, and hf for a fat5_jax run",
  )
  parser.add_argument(
    "--encoder_only",
    action="store_true",
    help="leave the decoder out, unread: T5EncoderModel, half the bytes",
  )
  parser.add_argument(
    "--tokenizer",
    help="folder with tokenizer files, or a SentencePiece model, for the"
    " export (default: the source's own)",
  )
  parser.add_argument(
    "--base",
    help="the model that a PEFT adapter belongs to (default: what it names)",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="FIELD=VALUE",
    help="a field of T5Config that a T5X or Mesh TensorFlow checkpoint does not"
    " tell, e.g. \"mlp_activations=('silu', 'linear')\"",
  )
  parser.add_argument(
    "--optimizer",
    action="store_true",
    help="take step and Adafactor's slots of a T5X or Mesh TensorFlow"
    " checkpoint along (--to fat5)",
  )
  parser.add_argument(
    "--no_transformers",
    action="store_true",
    help="do not load the export in transformers, though torch is installed",
  )
  flags = parser.parse_args()
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

  from fat5_jax.errors import UserError

  begin = time.monotonic()
  try:
    _export(flags)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.monotonic() - begin:.0f} s, peak memory {peak:.2f} GiB")
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except (OSError, MemoryError) as e:
    # A full disk, a folder that may not be written, a model too large.
    if isinstance(e, OSError) and e.errno is None:
      raise
    reason = str(e)[:300] or "not enough memory"
    print(f"error: {reason}; the destination is as it was", file=sys.stderr)
    return 1
  except BaseException:
    status = interrupts.ending("; the destination is as it was")
    if status is None:
      raise
    return status
  return 0


def _export(flags) -> None:
  from fat5_jax import interrupts
  from fat5_jax.checkpoints import export

  interrupts.loaded()
  how = export.Export(
    to=flags.to,
    encoder_only=flags.encoder_only,
    tokenizer=flags.tokenizer,
    base=flags.base,
    overrides=tuple(_overrides(flags.set)),
    optimizer=flags.optimizer,
    check_transformers=not flags.no_transformers,
  )
  export.export(flags.source, flags.dest, how)


def _overrides(settings):
  from fat5_jax.errors import UserError

  for setting in settings:
    field, separator, value = setting.partition("=")
    if not separator:
      raise UserError(f"--set {setting}: write FIELD=VALUE")
    try:
      yield field.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
      yield field.strip(), value.strip()


if __name__ == "__main__":
  raise SystemExit(main())
