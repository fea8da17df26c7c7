"""How far each position encoding reaches beyond the length it was trained at.

  python tools/bench_positions.py [--steps 400] [--seeds 2]

A tiny encoder tags every token with the last marker before it, of four, which
come one token in eight among fillers: what is nearest, and on which side, must
be read from positions. It is trained in rows of 32 tokens, and evaluated in
rows of 32, 64 and 128. Printed is the share of right tags, the mean of the
seeds and, in brackets, the least; docs/extrapolation.png plots the means.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import jax.numpy as jnp
import optax

from fat5_jax.models import factory, initial
from fat5_jax.models.config import HeadConfig, T5Config

LENGTH, TIMES, BATCH, ROWS = 32, (1, 2, 4), 32, 256
MARKERS, VOCAB, EVERY = 4, 16, 8
PLOT = os.path.join(ROOT, "docs", "extrapolation.png")
BASE = T5Config(
  vocab_size=VOCAB,
  emb_dim=64,
  num_heads=4,
  head_dim=16,
  num_encoder_layers=2,
  mlp_dim=128,
  mlp_activations=("gelu", "linear"),
  relative_attention_num_buckets=16,
  # Half of the length: FIRE's threshold too.
  relative_attention_max_distance=LENGTH // 2,
  max_positions=LENGTH * TIMES[-1],
  dtype="float32",
).with_head(HeadConfig("token_classification", num_labels=MARKERS))
ENCODINGS = {
  "t5": {},
  "t5, random positions": dict(randomized_positions=True),
  "alibi": dict(position_encoding="alibi"),
  "alibi, asymmetric": dict(position_encoding="alibi", alibi_mode="asymmetric"),
  "rope": dict(position_encoding="rope"),
  "rope, random positions": dict(
    position_encoding="rope", randomized_positions=True
  ),
  "fire": dict(position_encoding="fire"),
  "none": dict(position_encoding="none"),
}


def rows(rng: np.random.Generator, count: int, length: int):
  """(tokens, tags), (count, length); a tag is -1 before the first marker."""
  tokens = rng.integers(1 + MARKERS, VOCAB, (count, length))
  markers = rng.integers(1, 1 + MARKERS, tokens.shape)
  is_marker = rng.random(tokens.shape) < 1 / EVERY
  tokens = np.where(is_marker, markers, tokens)
  last = np.maximum.accumulate(
    np.where(is_marker, np.arange(length), -1), axis=1
  )
  tags = np.take_along_axis(tokens, np.maximum(last, 0), axis=1) - 1
  return tokens, np.where(last < 0, -1, tags)


def train(config: T5Config, steps: int, seed: int):
  """(model, parameters) after so many steps."""
  model = factory.create(config)
  optimizer = optax.adam(
    optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)
  )

  def loss(params, tokens, tags, key):
    logits = model.apply(
      {"params": params}, tokens, enable_dropout=True, rngs={"dropout": key}
    )
    one = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(tags, 0)
    )
    return jnp.mean(one, where=tags >= 0)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, tokens, tags, key):
    gradients = jax.grad(loss)(params, tokens, tags, key)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state

  params = jax.jit(initial.init_params, static_argnums=(0, 1))(model, seed)
  state, rng = optimizer.init(params), np.random.default_rng(seed)
  for key in jax.random.split(jax.random.key(seed), steps):
    params, state = step(params, state, *rows(rng, BATCH, LENGTH), key)
  return model, params


def accuracy(model, params, length: int) -> float:
  """The share of right tags in rows of a length, the same for all."""
  tokens, tags = rows(np.random.default_rng(10**6 + length), ROWS, length)
  predict = jax.jit(lambda p, x: model.apply({"params": p}, x).argmax(-1))
  right = np.asarray(predict(params, tokens)) == tags
  return float(right[tags >= 0].mean())


def plot(found: dict[str, np.ndarray]) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
  for name, shares in found.items():
    axes.plot(TIMES, shares.mean(axis=0), marker="o", label=name)
  axes.set_xscale("log", base=2)
  axes.set_xticks(TIMES, [f"{n} x {LENGTH}" for n in TIMES])
  axes.set(xlabel="tokens a row", ylabel="right tags", ylim=(0, 1.02))
  axes.set_title(f"Trained in rows of {LENGTH} tokens")
  axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  figure.savefig(PLOT, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--seeds", type=int, default=2)
  arguments = parser.parse_args()
  found = {}
  lengths = [LENGTH * n for n in TIMES]
  print(f"| encoding | {' | '.join(map(str, lengths))} | s a run |")
  print("|---" * (len(lengths) + 2) + "|")
  for name, changes in ENCODINGS.items():
    start, shares = time.monotonic(), []
    for seed in range(arguments.seeds):
      model, params = train(BASE.replace(**changes), arguments.steps, seed)
      shares.append([accuracy(model, params, n) for n in lengths])
    seconds = (time.monotonic() - start) / arguments.seeds
    found[name] = np.array(shares)
    cells = (f"{x.mean():.3f} ({x.min():.3f})" for x in found[name].T)
    print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
  plot(found)


if __name__ == "__main__":
  main()
