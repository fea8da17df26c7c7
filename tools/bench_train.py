"""Tokens/s of a training step and of greedy decoding, ours beside HF torch.

  python tools/bench_train.py [--batch 8 --inputs 256 --targets 64]

Same model (T5 1.1 small), same weights, same batch, same machine, one run, all
cores for both. Training is forward, backward and one AdamW update in float32
with the loss over all target tokens; decoding is greedy with a cache, `targets`
tokens a row. The two sides take turns, and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
import torch
import transformers

from fat5_jax import decoding, steps
from fat5_jax.convert import hf
from fat5_jax.models.t5 import Transformer


def make_hf_model(folder: str):
  """T5 1.1 small with random weights, its eos made unlikely."""
  torch.manual_seed(0)
  config = transformers.T5Config(
    vocab_size=32128,
    d_model=512,
    d_kv=64,
    d_ff=1024,
    num_layers=8,
    num_heads=6,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    dropout_rate=0.0,
    decoder_start_token_id=0,
  )
  model = transformers.T5ForConditionalGeneration(config)
  model.lm_head.weight = torch.nn.Parameter(torch.randn(32128, 512) * 0.05)
  model.save_pretrained(folder)
  return model


def timed(function) -> float:
  begin = time.perf_counter()
  function()
  return time.perf_counter() - begin


def alternate(sides, rounds: int) -> dict[str, float]:
  """Median seconds of each side; they take turns after one warm-up each."""
  for function in sides.values():
    function()
  times = {name: [] for name in sides}
  for _ in range(rounds):
    for name, function in sides.items():
      times[name].append(timed(function))
  return {name: statistics.median(t) for name, t in times.items()}


def training_sides(model, config, params, x, y):
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
  tensors = dict(
    input_ids=torch.tensor(x).long(),
    attention_mask=torch.ones(x.shape, dtype=torch.long),
    labels=torch.tensor(y).long(),
  )

  def theirs():
    optimizer.zero_grad()
    model(**tensors).loss.backward()
    optimizer.step()

  ours_optimizer = optax.adamw(1e-4, weight_decay=0.0)
  step = jax.jit(
    steps.make_train_step(
      Transformer(config),
      ours_optimizer,
      seed=0,
      loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    ),
    donate_argnums=0,
  )
  batch = {
    "encoder_input_tokens": x,
    "decoder_target_tokens": y,
    "decoder_input_tokens": np.pad(y, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": np.ones_like(y),
  }
  # A copy: the step gives its buffers away.
  params = jax.tree.map(jnp.array, params)
  state = steps.TrainState(jnp.int32(0), params, ours_optimizer.init(params))

  def ours():
    nonlocal state
    state, sums = step(state, batch)
    jax.block_until_ready((state, sums))

  return {"ours": ours, "HF torch": theirs}


def decoding_sides(model, config, params, x, length):
  ids, mask = torch.tensor(x).long(), torch.ones(x.shape, dtype=torch.long)
  tokens = {}

  def theirs():
    with torch.inference_mode():
      tokens["HF torch"] = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        num_beams=1,
      ).numpy()[:, 1:]

  predict = jax.jit(
    lambda params, x: decoding.generate(
      Transformer(config.replace(eos_token_id=-1)), params, x, length
    )
  )
  params = jax.device_put(params)

  def ours():
    tokens["ours"] = np.asarray(predict(params, x))

  return {"ours": ours, "HF torch": theirs}, tokens


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--inputs", type=int, default=256)
  parser.add_argument("--targets", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args()
  rng = np.random.default_rng(0)
  x = rng.integers(2, 32100, (flags.batch, flags.inputs)).astype(np.int32)
  y = rng.integers(2, 32100, (flags.batch, flags.targets)).astype(np.int32)
  with tempfile.TemporaryDirectory() as folder:
    model = make_hf_model(folder)
    config, params = hf.from_pretrained(folder)
  table = Table(
    title=(
      f"T5 1.1 small, batch {flags.batch}, {flags.inputs}/{flags.targets}"
      f" tokens, float32, {os.cpu_count()} cores;"
      f" jax {jax.__version__}, torch {torch.__version__},"
      f" transformers {transformers.__version__}"
    )
  )
  for name in ("", "ours", "HF torch", "ratio"):
    table.add_column(name, justify="right" if name else "left")

  sides, tokens = decoding_sides(model.eval(), config, params, x, flags.targets)
  decode = alternate(sides, flags.rounds)
  same = (tokens["ours"] == tokens["HF torch"]).mean()
  train = alternate(
    training_sides(model.train(), config, params, x, y), flags.rounds
  )
  all_tokens = flags.batch * (flags.inputs + flags.targets)
  new_tokens = flags.batch * flags.targets
  for title, count, seconds in (
    ("training, input + target tokens/s", all_tokens, train),
    ("greedy decoding, new tokens/s", new_tokens, decode),
  ):
    table.add_row(
      title,
      *(f"{count / seconds[s]:,.0f}" for s in ("ours", "HF torch")),
      f"{seconds['HF torch'] / seconds['ours']:.2f}x",
    )
    table.add_row(
      "  seconds", *(f"{seconds[s]:.3f}" for s in ("ours", "HF torch")), ""
    )
  console = Console(width=120)
  console.print(table)
  console.print(f"decoded tokens equal: {same:.1%}")


if __name__ == "__main__":
  main()
