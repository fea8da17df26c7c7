"""Tiny models of every head and family, exported, for test_exports.py."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fat5_jax import trees
from fat5_jax.convert import enct5, flash_t5, hf, table
from fat5_jax.models import factory
from fat5_jax.models.config import HeadConfig, T5Config

HERE = os.path.dirname(os.path.abspath(__file__))
ORACLE = os.path.join(sys.prefix, "oracle-4.37")
# ByT5's tokenizer, which needs no file.
VOCABULARY = 384
T5 = T5Config(
  vocab_size=VOCABULARY,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  num_encoder_layers=2,
  num_decoder_layers=2,
  mlp_dim=24,
  dtype="float32",
  attention_implementation="reference",
)
GATED = ("gelu", "linear")
FAMILIES = {
  "T5 1.0 (ReLU, tied)": T5.replace(logits_via_embedding=True),
  "T5 1.1": T5.replace(mlp_activations=GATED),
  "mT5": T5.replace(mlp_activations=GATED, model_type="mt5"),
  "umT5": T5.replace(
    mlp_activations=GATED,
    model_type="umt5",
    relative_attention_per_layer=True,
  ),
}
NAMES = ('a "quoted" one', "é, with: commas", "# 'third' | 日本語", "no")
MULTI = "multi_label_classification"
_SEQUENCE = dict(kind="sequence_classification", num_labels=3)
_BOTH = dict(body="encoder_decoder")
# What it is called in the table: the head, and how it is written.
HEADS = {
  "language model": (None, "hf"),
  "language model, hidden layers": (
    HeadConfig("language_model", widths=(12, 16), activation="silu"),
    "hf",
  ),
  "sequence, HF's (both stacks)": (
    HeadConfig(**_SEQUENCE, **_BOTH, label_names=NAMES[:3]),
    "hf",
  ),
  "sequence, both stacks, mean": (
    HeadConfig(**_SEQUENCE, **_BOTH, pooling="mean"),
    "hf",
  ),
  "sequence, dense + tanh": (
    HeadConfig(**_SEQUENCE, label_names=NAMES[:3], dropout_rate=0.1),
    "hf",
  ),
  "sequence, linear": (
    HeadConfig(**_SEQUENCE, widths=(), label_names=NAMES[:3]),
    "hf",
  ),
  "sequence, linear, mean, multi-label": (
    HeadConfig(
      "sequence_classification",
      num_labels=4,
      widths=(),
      pooling="mean",
      problem_type=MULTI,
      label_names=NAMES,
    ),
    "hf",
  ),
  "sequence, linear, first": (
    HeadConfig(**_SEQUENCE, widths=(), pooling="first"),
    "hf",
  ),
  "sequence, regression, mean": (
    HeadConfig(
      "sequence_classification",
      num_labels=1,
      problem_type="regression",
      pooling="mean",
    ),
    "hf",
  ),
  "sequence, two layers, first, multi-label": (
    HeadConfig(
      **_SEQUENCE,
      widths=(12, 8),
      activation="gelu",
      pooling="first",
      problem_type=MULTI,
    ),
    "hf",
  ),
  "tokens, linear": (
    HeadConfig("token_classification", num_labels=4, label_names=NAMES),
    "hf",
  ),
  "tokens, hidden layer": (
    HeadConfig(
      "token_classification", num_labels=5, widths=(12,), activation="relu"
    ),
    "hf",
  ),
  "spans, linear": (HeadConfig("question_answering"), "hf"),
  "spans, hidden layer": (
    HeadConfig("question_answering", widths=(12,), activation="gelu_exact"),
    "hf",
  ),
  "spans, HF's (both stacks)": (
    HeadConfig("question_answering", **_BOTH),
    "hf",
  ),
  "spans, both stacks, hidden layer": (
    HeadConfig("question_answering", **_BOTH, widths=(12,)),
    "hf",
  ),
  "embedding, mean": (HeadConfig("embedding"), "hf"),
  "embedding, first": (HeadConfig("embedding", pooling="first"), "hf"),
  "embedding, eos": (HeadConfig("embedding", pooling="eos"), "hf"),
  "EncT5": (HeadConfig("enct5", num_labels=3, label_names=NAMES[:3]), "hf"),
  "EncT5, multi-label, hidden layer": (
    HeadConfig("enct5", num_labels=4, problem_type=MULTI, widths=(12,)),
    "hf",
  ),
  "EncT5, --to enct5": (HeadConfig("enct5", num_labels=3), "enct5"),
  "EncT5, multi-label, --to enct5": (
    HeadConfig("enct5", num_labels=4, problem_type=MULTI, decoder_layers=2),
    "enct5",
  ),
  "sequence, --to flash_t5": (HeadConfig(**_SEQUENCE), "flash_t5"),
}
WRITE = {
  "hf": hf.to_pretrained,
  "enct5": enct5.to_folder,
  "flash_t5": flash_t5.to_folder,
}


def large_leaves(config, dtype="float32", seed=0):
  """Weights under which attention scores reach hundreds, in both stacks."""
  model = factory.create(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  inputs = [tokens] * (2 if model.config.is_language_model else 1)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
  rng = np.random.default_rng(seed)
  found = {}
  for path, x in trees.flatten(shapes["params"]).items():
    value = rng.normal(size=x.shape)
    if path[-2] in ("query", "key"):
      value *= 1.5
    elif path[-1] == "rel_embedding":
      value *= 30.0
    elif path[-1] == "scale":
      value = 1 + 0.1 * value
    elif path[-1] == "kernel":
      value *= x.shape[0] ** -0.5
    found[path] = table.leaf_of(value.astype(dtype))
  return model.config, found


def rows(one_eos: bool):
  """Tokens of several lengths, padded, most with several </s>."""
  rng = np.random.default_rng(1)
  x = rng.integers(3, VOCABULARY, (5, 23))
  for i, length in enumerate((23, 17, 9, 4, 2)):
    x[i, length:] = 0
    x[i, length - 1] = 1
  if not one_eos:
    x[0, [3, 11]] = 1
    x[1, 5] = 1
    # Truncated: none.
    x[2, 8] = 7
  return x.astype(np.int32)


def ours(config, leaves, x, y=None):
  model = factory.create(config)
  inputs = (x, y) if config.is_language_model else (x,)
  params = {"params": table.read_all(leaves)}
  return np.asarray(jax.jit(model.apply)(params, *inputs))


def in_transformers(jobs, folder, version):
  """The jobs with the answers of a process with that transformers."""
  path = os.path.join(folder, f"jobs-{version}.json")
  for job in jobs:
    job["answers"] = os.path.join(job["folder"] + "-answers", version)
  with open(path, "w") as file:
    json.dump(jobs, file)
  program = os.path.join(HERE, "transformers_loads.py")
  done = subprocess.run(
    [sys.executable, program, path, *([ORACLE] if version == "4.37.1" else [])],
    env=os.environ
    | {
      "USE_TF": "0",
      "USE_FLAX": "0",
      "HF_HUB_OFFLINE": "1",
      "HF_HOME": os.path.join(folder, f"home-{version}"),
    },
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  with open(f"{path}.answers") as file:
    return json.load(file)


BFLOAT16 = ml_dtypes.bfloat16
