"""Converts a checkpoint: Hugging Face to fat5_jax, or back.

  python tools/convert_checkpoint.py SOURCE DEST [--to hf|fat5]

SOURCE is a Hugging Face folder, a run folder (MODEL_DIR, its latest checkpoint)
or one checkpoint_<step>; what it is, is found by looking. DEST is written whole
or not at all. The result is read again and its logits compared.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source")
  parser.add_argument("dest")
  parser.add_argument(
    "--to", choices=("hf", "fat5"), help="default: the other of the two"
  )
  parser.add_argument(
    "--tokenizer",
    help="folder with tokenizer files, or a SentencePiece model, for the"
    " export (default: the source's own)",
  )
  flags = parser.parse_args()
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

  from fat5_jax.errors import UserError

  try:
    convert(flags.source, flags.dest, flags.to, flags.tokenizer)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0


def convert(source_path, dest, to=None, tokenizer=None) -> None:
  """See the module's docstring."""
  import jax

  from fat5_jax import checkpoints
  from fat5_jax.convert import hf
  from fat5_jax.errors import UserError

  source = checkpoints.find(source_path)
  to = to or ("fat5" if source.kind == "hf" else "hf")
  config, params = checkpoints.load_params(source)
  size = sum(x.size for x in jax.tree.leaves(params))
  print(
    f"{source.path}: {source.kind}, {config.model_type},"
    f" {config.num_encoder_layers}+{config.num_decoder_layers} layers,"
    f" {size:,} parameters, vocabulary {config.vocab_size}"
  )
  if os.path.exists(dest) and os.path.samefile(source.run_dir, dest):
    raise UserError(f"{dest}: source and destination are the same folder")
  if to == "hf":
    hf.to_pretrained(config, params, dest, tokenizer or _tokenizer(source))
  else:
    if checkpoints.steps(dest):
      raise UserError(f"{dest}: holds checkpoints already")
    vocabulary = None
    if source.kind == "fat5" or _has_tokenizer(source.path):
      vocabulary = _vocabulary(source)
    checkpoints.write_params(dest, config, params, vocabulary)
  again_config, again = checkpoints.load_params(checkpoints.find(dest))
  difference = _largest_logit_difference(config, params, again_config, again)
  print(f"{dest}: written as {to}; largest difference in logits {difference:g}")
  if difference != 0:
    raise UserError(f"{dest} does not compute what {source.path} does")


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
  if source.kind == "hf":
    return source.path if _has_tokenizer(source.path) else None
  return _vocabulary(source)


def _largest_logit_difference(config_a, params_a, config_b, params_b) -> float:
  """Between two checkpoints, on a few random tokens, in float32."""
  import jax
  import numpy as np

  from fat5_jax.models.t5 import Transformer

  rng = np.random.default_rng(0)
  x, y = rng.integers(2, config_a.vocab_size, (2, 2, 16)).astype(np.int32)

  def logits(config, params):
    model = Transformer(config.replace(dtype="float32", dropout_rate=0.0))
    return jax.jit(lambda p: model.apply({"params": p}, x, y))(params)

  difference = logits(config_a, params_a) - logits(config_b, params_b)
  return float(np.abs(difference).max())


if __name__ == "__main__":
  raise SystemExit(main())
