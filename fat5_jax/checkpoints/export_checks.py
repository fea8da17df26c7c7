"""An export, looked at before it takes its place: here, and by transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np

from fat5_jax import console
from fat5_jax.checkpoints import reference
from fat5_jax.convert import hf_heads, peft, table
from fat5_jax.errors import UserError
from fat5_jax.models import factory


def count(leaf) -> int:
  size = 1
  for n in leaf.shape:
    size *= n
  return size


def compared(config, leaves, folder, to) -> str:
  """Compares every tensor, then logits, one layer in memory at a time; what was
  compared, in words.

  Raises:
    UserError: if anything differs.
  """
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
  total = sum(leaf.nbytes for leaf in leaves.values()) / 2**20
  with console.Count("comparing", "MiB", total) as progress:
    for path, leaf in leaves.items():
      a, b = leaf.read(), again[path].read()
      if a.dtype != b.dtype or a.tobytes() != b.tobytes():
        raise UserError(f"{what}: {'/'.join(path)} is not the same")
      progress.add(a.nbytes / 2**20)
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
  rng = np.random.default_rng(0)
  least = min(2, config.vocab_size - 1)
  x, y = rng.integers(least, config.vocab_size, (2, 2, 16)).astype(np.int32)
  x[:, -1] = config.eos_token_id
  return x, y


def _outputs(config, leaves):
  """What the model says of a few random tokens, in float32."""
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


def in_transformers(config, leaves, folder) -> str:
  """What the installed transformers makes of an export; "" without torch.

  Raises:
    UserError: if it does not load it, or answers otherwise.
  """
  if sum(4 * count(leaf) for leaf in leaves.values()) > _LOADED_BYTES:
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
      [sys.executable, "-P", "-c", _LOADS, json.dumps(want)],
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
  x_BM = {"mean": x_BLM.mean(1), "first": x_BLM[:, 0], "eos": x_BLM[:, -1]}[how]
  return x_BM / np.linalg.norm(x_BM, axis=-1, keepdims=True)
