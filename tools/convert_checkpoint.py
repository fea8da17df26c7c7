"""Converts a checkpoint of one library to another's.

  python tools/convert_checkpoint.py SOURCE DEST \\
    [--to fat5|hf|flash_t5|enct5|peft] [--encoder_only]

SOURCE is found by looking: a folder of Hugging Face (T5, mT5, umT5, their
heads, T5EncoderModel), FAT5, EncT5 or PEFT, a T5X checkpoint, a Mesh TensorFlow
one, a run folder (MODEL_DIR, its latest checkpoint) or one checkpoint_<step>.
DEST is written whole or not at all; then both are read again, compared tensor
by tensor, and run on a few tokens. Tensors go one at a time: memory holds the
largest and a shard of the output, not the model.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import resource
import sys
import time

_FORMATS = ("fat5", "hf", "flash_t5", "enct5", "peft")


def main() -> int:
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
  flags = parser.parse_args()
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

  from fat5_jax.errors import UserError

  begin = time.monotonic()
  try:
    convert(flags)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.monotonic() - begin:.0f} s, peak memory {peak:.2f} GiB")
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0


def convert(flags) -> None:
  """See the module's docstring."""
  from fat5_jax import weights
  from fat5_jax.convert import enct5, flash_t5, formats, hf, lora, peft
  from fat5_jax.errors import UserError
  from fat5_jax.models.config import HeadConfig

  source = weights.find(flags.source)
  source = dataclasses.replace(
    source,
    overrides=tuple(_overrides(flags.set)),
    base=flags.base or source.base,
  )
  to = flags.to or ("hf" if source.kind == "fat5" else "fat5")
  dest = os.path.abspath(os.path.expanduser(flags.dest))
  if os.path.exists(dest) and os.path.samefile(source.run_dir, dest):
    raise UserError(f"{dest}: source and destination are the same folder")
  config, leaves = weights.open_params(source, flags.encoder_only)
  if flags.encoder_only and config.is_language_model:
    config = config.with_head(HeadConfig("embedding"))
  print(
    f"{source.path}: {formats.NAMES[source.kind]}, {_describe(config)},"
    f" {sum(_count(x) for x in leaves.values()):,} parameters, vocabulary"
    f" {config.vocab_size}, {next(iter(leaves.values())).dtype}"
  )
  if flags.optimizer and (
    to != "fat5" or source.kind not in ("t5x", "mesh_tf")
  ):
    raise UserError("--optimizer is for T5X and Mesh TensorFlow, --to fat5")
  if to == "fat5":
    _to_fat5(source, config, leaves, dest, flags.optimizer)
  elif to == "peft":
    peft.to_peft(config, leaves, dest, _base_of(source))
    print(f"{dest}: written as {formats.NAMES[to]}; its base is not in it")
    _verify_adapter(config, leaves, dest)
    return
  else:
    write = {
      "hf": hf.to_pretrained,
      "flash_t5": flash_t5.to_folder,
      "enct5": enct5.to_folder,
    }[to]
    if config.lora is not None:
      print("LoRA is merged into the kernels")
      config, leaves = lora.merged(config, leaves)
    write(config, leaves, dest, flags.tokenizer or _tokenizer(source))
  again_config, again = weights.open_params(weights.find(dest))
  _verify(config, leaves, again_config, again, f"{dest}: written as {to};")


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


def _count(leaf) -> int:
  size = 1
  for n in leaf.shape:
    size *= n
  return size


def _describe(config) -> str:
  text = (
    f"{config.model_type}, {config.num_encoder_layers}"
    f"+{config.num_decoder_layers} layers"
  )
  if config.head is not None:
    text += f", head {config.head.kind}"
    if config.head.kind not in ("embedding", "question_answering"):
      text += f" ({config.head.num_labels} labels)"
  if config.lora is not None:
    text += (
      f", LoRA rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    )
  return text


def _to_fat5(source, config, leaves, dest, with_optimizer) -> None:
  from fat5_jax import checkpoints, weights
  from fat5_jax.errors import UserError

  if checkpoints.steps(dest):
    raise UserError(f"{dest}: holds checkpoints already")
  vocabulary = None
  if source.kind == "fat5" or _has_tokenizer(source.run_dir):
    vocabulary = _vocabulary(source)
  step, opt_state = 0, None
  if with_optimizer:
    step, opt_state = weights.adafactor_state(source, config)
  weights.write_params(dest, config, leaves, vocabulary, step, opt_state)


def _base_of(source) -> str:
  """Where the run that trained an adapter started, from its config.gin."""
  import re

  path = os.path.join(source.run_dir, "config.gin")
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      found = re.search(
        r"INITIAL_CHECKPOINT_PATH(?:/macro\.value)? = \\?\s*'([^']+)'",
        file.read(),
      )
    if found:
      # A folder is found again from anywhere; a name stays one.
      path = os.path.abspath(os.path.expanduser(found[1]))
      return path if os.path.isdir(path) else found[1]
  return ""


def _has_tokenizer(folder: str) -> bool:
  from fat5_jax.convert import tokenizers

  return any(os.path.exists(os.path.join(folder, f)) for f in tokenizers.FILES)


def _vocabulary(source):
  from fat5_jax.data import vocabularies

  try:
    return vocabularies.of_checkpoint(source.path)
  except ValueError as e:
    print(f"note: no vocabulary taken along: {e}")
    return None


def _tokenizer(source):
  """What the export's tokenizer is written from, or None."""
  if source.kind == "fat5":
    return _vocabulary(source)
  return source.run_dir if _has_tokenizer(source.run_dir) else None


def _verify(config, leaves, again_config, again, what: str) -> None:
  """Compares every tensor, then logits, one layer in memory at a time."""
  import numpy as np

  from fat5_jax.errors import UserError

  if leaves.keys() != again.keys():
    raise UserError(f"{what} it does not hold the same parameters")
  for path, leaf in leaves.items():
    a, b = leaf.read(), again[path].read()
    if a.dtype != b.dtype or a.tobytes() != b.tobytes():
      raise UserError(f"{what} {'/'.join(path)} is not the same")
  found = _outputs(again_config, again)
  difference = float(np.abs(_outputs(config, leaves) - found).max())
  print(
    f"{what} {len(again)} tensors equal bit for bit, largest difference in"
    f" logits {difference:g}"
  )
  if difference != 0:
    raise UserError("the result does not compute what the source does")


def _verify_adapter(config, leaves, dest) -> None:
  from fat5_jax.convert import peft

  base = {k: x for k, x in leaves.items() if k[-1][:5] != "lora_"}
  again_config, again = peft.from_peft(dest, config.replace(lora=None), base)
  _verify(config, leaves, again_config, again, "adapter and base together:")


def _outputs(config, leaves):
  """What the model says of a few random tokens, in float32."""
  import jax
  import numpy as np

  from fat5_jax.convert import table
  from fat5_jax.models import factory

  rng = np.random.default_rng(0)
  x, y = rng.integers(2, config.vocab_size, (2, 2, 16)).astype(np.int32)
  model = factory.create(
    config.replace(
      dtype="float32", attention_implementation="reference", scan_layers=False
    )
  )
  inputs = (x, y) if config.is_language_model else (x,)
  # Op by op, not compiled: a parameter is read when its layer runs.
  with jax.default_device(jax.devices("cpu")[0]):
    return np.asarray(model.apply({"params": table.LazyTree(leaves)}, *inputs))


if __name__ == "__main__":
  raise SystemExit(main())
