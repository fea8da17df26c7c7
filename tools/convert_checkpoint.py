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
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
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
  # As Ctrl-C: what is half written goes away.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    convert(flags)
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


def convert(flags) -> None:
  """See the module's docstring."""
  from fat5_jax import interrupts
  from fat5_jax.checkpoints import history, reference
  from fat5_jax.convert import folders, formats, lora, table
  from fat5_jax.errors import UserError
  from fat5_jax.models.config import HeadConfig

  interrupts.loaded()
  source = reference.find(flags.source)
  source = dataclasses.replace(
    source,
    overrides=tuple(_overrides(flags.set)),
    base=flags.base or source.base,
  )
  to = flags.to or ("hf" if source.kind == "fat5" else "fat5")
  dest = os.path.abspath(os.path.expanduser(flags.dest))
  if os.path.exists(dest) and os.path.samefile(source.run_dir, dest):
    raise UserError(f"{dest}: source and destination are the same folder")
  inside = os.path.realpath(source.path) + os.sep
  if inside.startswith(os.path.realpath(dest) + os.sep):
    raise UserError(
      f"{dest}: the source is inside of it, and would be replaced with it;"
      " choose another destination"
    )
  own_head = reference.own_head_record(source)
  if own_head is not None:
    raise UserError(
      f"{source.run_dir}: its head is a module of your own"
      f" ({own_head['module']}), which no other library has and whose logits"
      " cannot be checked here. It stays a run of fat5_jax"
    )
  config, leaves = reference.open_params(source, flags.encoder_only)
  leaves = table.finite(leaves, source.path)
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
  if to == "fat5" and os.path.isdir(dest) and history.steps(dest):
    raise UserError(f"{dest}: holds checkpoints already")
  if config.lora is not None and to not in ("fat5", "peft"):
    print("LoRA is merged into the kernels")
    config, leaves = lora.merged(config, leaves)
  marks = {"marks": ()} if to == "fat5" else {}
  with folders.whole_folder(dest, **marks) as target:
    _write(source, config, leaves, target, to, flags)
    said = [_compared(config, leaves, target, to)]
    if to in ("hf", "enct5") and not flags.no_transformers:
      said.append(_in_transformers(config, leaves, target))
  print(f"{dest}: written as {formats.NAMES.get(to, to)}")
  for line in filter(None, said):
    print(line)


def _write(source, config, leaves, dest, to, flags) -> None:
  from fat5_jax.convert import (
    enct5,
    flash_t5,
    hf,
    model_card,
    peft,
    tokenizers,
  )

  if to == "fat5":
    _to_fat5(source, config, leaves, dest, flags.optimizer)
    return
  facts = {}
  if source.kind == "fat5":
    facts = model_card.facts_of_run(source.run_dir)
  tokenizer = flags.tokenizer or _tokenizer(source, config)
  if to == "peft":
    peft.to_peft(config, leaves, dest, _base_of(source), facts)
    if tokenizer is not None:
      tokenizers.write(tokenizer, dest)
    return
  write = {
    "hf": hf.to_pretrained,
    "flash_t5": flash_t5.to_folder,
    "enct5": enct5.to_folder,
  }[to]
  write(config, leaves, dest, tokenizer, facts=facts)


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
  from fat5_jax.checkpoints import optimizer_state, writer

  vocabulary = None
  if source.kind == "fat5" or _has_tokenizer(source.run_dir):
    vocabulary = _vocabulary(source, config)
  step, opt_state = 0, None
  if with_optimizer:
    step, opt_state = optimizer_state.adafactor_state(source, config)
  writer.write_params(dest, config, leaves, vocabulary, step, opt_state)


def _base_of(source) -> str:
  """Where the run that trained an adapter started, from its config.gin."""
  import re

  from fat5_jax.convert import plain_files

  path = os.path.join(source.run_dir, "config.gin")
  if os.path.exists(path):
    found = re.search(
      r"INITIAL_CHECKPOINT_PATH(?:/macro\.value)? = \\?\s*'([^']+)'",
      plain_files.read_text(path),
    )
    if found:
      # A folder is found again from anywhere; a name stays one.
      path = os.path.abspath(os.path.expanduser(found[1]))
      return path if os.path.isdir(path) else found[1]
  return ""


def _has_tokenizer(folder: str) -> bool:
  from fat5_jax.convert import tokenizers

  return any(os.path.lexists(os.path.join(folder, f)) for f in tokenizers.FILES)


def _vocabulary(source, config):
  from fat5_jax.checkpoints import vocabulary_of
  from fat5_jax.data import vocabularies

  try:
    found = vocabulary_of(source.path)
  except vocabularies.OtherTokenizerError as e:
    print(f"note: no vocabulary taken along: {e}")
    return None
  if found.vocab_size > config.vocab_size:
    # infer and train refuse the ids that have no row.
    print(
      f"note: the tokenizer has {found.vocab_size} tokens, and the model's"
      f" embedding {config.vocab_size} rows; is it the model's?"
    )
  return found


def _tokenizer(source, config):
  """What the export's tokenizer is written from, or None."""
  if source.kind == "fat5":
    return _vocabulary(source, config)
  return source.run_dir if _has_tokenizer(source.run_dir) else None


def _compared(config, leaves, folder, to) -> str:
  """Compares every tensor, then logits, one layer in memory at a time; what was
  compared, in words.

  Raises:
    UserError: if anything differs.
  """
  import numpy as np

  from fat5_jax.checkpoints import reference
  from fat5_jax.convert import peft
  from fat5_jax.errors import UserError

  what = "read again by fat5_jax"
  if to == "peft":
    what = "adapter and base read together by fat5_jax"
    base = {k: x for k, x in leaves.items() if k[-1][:5] != "lora_"}
    again_config, again = peft.from_peft(
      folder, config.replace(lora=None), base
    )
  else:
    again_config, again = reference.open_params(reference.find(folder))
  if leaves.keys() != again.keys():
    raise UserError(f"{what}: it does not hold the same parameters")
  for path, leaf in leaves.items():
    a, b = leaf.read(), again[path].read()
    if a.dtype != b.dtype or a.tobytes() != b.tobytes():
      raise UserError(f"{what}: {'/'.join(path)} is not the same")
  expected = _outputs(config, leaves)
  if not np.isfinite(expected).all():
    raise UserError(
      "the model computes NaN or infinity of plain tokens: its tensors are"
      " damaged, or its configuration is another model's"
    )
  difference = np.abs(expected - _outputs(again_config, again))
  if difference.max() != 0:
    raise UserError(f"{what}: it does not compute what the source does")
  return (
    f"{what}: {len(again)} tensors equal bit for bit, its outputs for 2 x 16"
    " random tokens equal"
  )


def _tokens(config):
  """Inputs and targets, two rows of 16, each ended once."""
  import numpy as np

  rng = np.random.default_rng(0)
  least = min(2, config.vocab_size - 1)
  x, y = rng.integers(least, config.vocab_size, (2, 2, 16)).astype(np.int32)
  x[:, -1] = config.eos_token_id
  return x, y


def _outputs(config, leaves):
  """What the model says of a few random tokens, in float32."""
  import jax
  import numpy as np

  from fat5_jax.convert import table
  from fat5_jax.models import factory

  x, y = _tokens(config)
  model = factory.create(
    config.replace(
      dtype="float32", attention_implementation="reference", scan_layers=False
    )
  )
  inputs = (x, y) if config.is_language_model else (x,)
  # Op by op, not compiled: a parameter is read when its layer runs.
  with jax.default_device(jax.devices("cpu")[0]):
    return np.asarray(model.apply({"params": table.LazyTree(leaves)}, *inputs))


# A larger model is not loaded a second time, in another library.
_LOADED_BYTES = 4 * 2**30
# Run by another process, so that this one never has torch.
_LOADS = """
import json, sys
try:
  import torch, transformers
except ImportError:
  print(json.dumps(None))
  raise SystemExit
transformers.logging.set_verbosity_error()
want = json.loads(sys.argv[1])
name = "dtype" if transformers.__version__[0] > "4" else "torch_dtype"
model = getattr(transformers, want["class"]).from_pretrained(
  want["folder"], trust_remote_code=want["code"], **{name: torch.float32})
inputs = {k: torch.tensor(v) for k, v in want["inputs"].items()}
with torch.no_grad():
  out = model(**inputs)
if "start_logits" in out:
  found = torch.stack([out.start_logits, out.end_logits], -1)
else:
  found = out["logits"] if "logits" in out else out["last_hidden_state"]
print(json.dumps([transformers.__version__, found.tolist()]))
"""


def _in_transformers(config, leaves, folder) -> str:
  """What the installed transformers makes of an export; "" without torch.

  Raises:
    UserError: if it does not load it, or answers otherwise.
  """
  import numpy as np

  from fat5_jax.convert import hf_heads
  from fat5_jax.errors import UserError

  if sum(4 * _count(leaf) for leaf in leaves.values()) > _LOADED_BYTES:
    return "not loaded in transformers: it would take more than 4 GiB"
  x, y = _tokens(config)
  inputs = {"input_ids": x.tolist()}
  inputs["attention_mask"] = (x != config.pad_token_id).astype(int).tolist()
  class_name, is_code = hf_heads.loaded_by(config)
  if config.is_language_model:
    inputs["decoder_input_ids"] = y.tolist()
  want = {
    "folder": folder,
    "class": class_name,
    "code": is_code,
    "inputs": inputs,
  }
  # It runs the code of the folder that was written just now, and no other.
  with tempfile.TemporaryDirectory() as cache:
    own = {"HF_HUB_OFFLINE": "1", "USE_TF": "0", "HF_MODULES_CACHE": cache}
    done = subprocess.run(
      [sys.executable, "-c", _LOADS, json.dumps(want)],
      env=os.environ | own,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise UserError(
      f"transformers does not load the export: {done.stderr[-800:]}\n"
      "--no_transformers leaves this check out"
    )
  answer = json.loads(done.stdout.splitlines()[-1])
  if answer is None:
    return ""
  version, found = answer
  found, expected = np.array(found), _outputs(config, leaves)
  if config.head is not None and config.head.kind == "embedding":
    # The encoder alone: pooled, and of length one, as ours.
    found = _pooled(found, config.head.pooled)
  if (
    config.model_type == "umt5"
    and config.head is None
    and not config.scales_decoder_outputs
    and [5] <= [int(n) for n in version.split(".")[:2]] < [5, 24]
  ):
    return (
      f"loaded by transformers {version}, which divides umT5's output by"
      " sqrt(d_model) whatever config.json says: not compared"
    )
  error, size = np.abs(found - expected).max(), np.abs(expected).max()
  text = (
    f"loaded by transformers {version} ({class_name}): largest difference"
    f" {error:.1e} from ours for 2 x 16 random tokens, where ours reach"
    f" {size:.3g}"
  )
  if not error <= 1e-3 * size:
    raise UserError(text)
  return text


def _pooled(x_BLM, how):
  import numpy as np

  x_BM = {"mean": x_BLM.mean(1), "first": x_BLM[:, 0], "eos": x_BLM[:, -1]}[how]
  return x_BM / np.linalg.norm(x_BM, axis=-1, keepdims=True)


if __name__ == "__main__":
  raise SystemExit(main())
