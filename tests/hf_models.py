"""Tiny random Hugging Face models, written to folders by the tests."""

import dataclasses
import json
import os

import numpy as np
import torch
import transformers

_DIMS = dict(
  vocab_size=101,
  d_model=32,
  d_kv=8,
  d_ff=48,
  num_layers=2,
  num_heads=4,
  relative_attention_num_buckets=32,
  relative_attention_max_distance=128,
  decoder_start_token_id=0,
  pad_token_id=0,
  eos_token_id=1,
)


@dataclasses.dataclass(frozen=True)
class Family:
  """A config class, a model class, changes, and whether the output is tied."""

  config: str
  model: str
  changes: dict
  tied: bool


FAMILIES = {
  "t5_1_0": Family("T5Config", "T5ForConditionalGeneration", {}, True),
  "t5_1_1": Family(
    "T5Config",
    "T5ForConditionalGeneration",
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    False,
  ),
  "flan": Family(
    "T5Config",
    "T5ForConditionalGeneration",
    {
      "feed_forward_proj": "gated-gelu",
      "tie_word_embeddings": False,
      "num_heads": 6,
    },
    False,
  ),
  "ul2": Family(
    "T5Config",
    "T5ForConditionalGeneration",
    {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    False,
  ),
  "mt5": Family("MT5Config", "MT5ForConditionalGeneration", {}, False),
  "umt5": Family("UMT5Config", "UMT5ForConditionalGeneration", {}, False),
  "umt5_tied": Family("UMT5Config", "UMT5ForConditionalGeneration", {}, True),
  "byt5": Family(
    "T5Config",
    "T5ForConditionalGeneration",
    {
      "feed_forward_proj": "gated-gelu",
      "tie_word_embeddings": False,
      "num_decoder_layers": 1,
    },
    False,
  ),
  "other_buckets": Family(
    "T5Config",
    "T5ForConditionalGeneration",
    {
      "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 20,
    },
    True,
  ),
}


def make(family: str, folder, seed: int = 0, **changes):
  """A random model saved to `folder`; the model, in eval mode."""
  spec = FAMILIES[family]
  torch.manual_seed(seed)
  sizes = {**_DIMS, **spec.changes, **changes}
  config = getattr(transformers, spec.config)(**sizes)
  model = getattr(transformers, spec.model)(config).eval()
  with torch.no_grad():
    if not spec.tied:
      # transformers 5 ties every fresh T5; the file's two tensors decide.
      model.lm_head.weight = torch.nn.Parameter(
        torch.randn(config.vocab_size, config.d_model)
      )
    for name, parameter in model.named_parameters():
      # HF starts these at almost nothing and at one: a test would be blind.
      if "relative_attention_bias" in name:
        parameter.normal_()
      elif "layer_norm" in name:
        parameter.normal_(1.0, 0.1)
      elif "SelfAttention" in name or "EncDecAttention" in name:
        parameter.mul_(2.0)
      elif name == "shared.weight" and spec.tied:
        # A tied model with a large embedding only repeats its last token.
        parameter.mul_(0.2)
  model.save_pretrained(folder)
  return model


def tokens(rows=3, inputs=25, targets=30, vocab=101, seed=0):
  """Padded inputs and targets."""
  rng = np.random.default_rng(seed)
  x = rng.integers(2, vocab, (rows, inputs))
  y = rng.integers(2, vocab, (rows, targets))
  x[1, inputs // 2 :] = 0
  x[2, 3:] = 0
  y[1, 9:] = 0
  return x.astype(np.int32), y.astype(np.int32)


def edit_config(folder, **changes):
  """Rewrites keys of a folder's config.json; None removes one."""
  path = os.path.join(folder, "config.json")
  with open(path) as file:
    config = json.load(file)
  for key, value in changes.items():
    if value is None:
      config.pop(key, None)
    else:
      config[key] = value
  with open(path, "w") as file:
    json.dump(config, file)
