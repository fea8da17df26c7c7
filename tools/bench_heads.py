"""What a head costs: parameters, memory and time, encoder-only or not.

  JAX_PLATFORMS=cpu python tools/bench_heads.py [--rows 8] [--length 128]

T5 1.1 small learns one batch of the size of a GLUE task's: as text to text, by
its heads, and with most of it frozen. Temporary memory is what the compiler
plans for one update with AdamW; times are medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

ROUNDS = 5
HEAD = r"lora_|^head/|^classifier/|^prompt_embedder/"


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--targets", type=int, default=8)
  flags = parser.parse_args()

  import jax
  import numpy as np
  from rich.console import Console
  from rich.table import Table

  from fat5_jax import objectives, optimizers
  from fat5_jax.models import factory, initial
  from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config
  from fat5_jax.training import steps, trainable

  base = T5Config(
    vocab_size=32128,
    emb_dim=512,
    num_heads=6,
    num_encoder_layers=8,
    num_decoder_layers=8,
    mlp_dim=1024,
    mlp_activations=("gelu", "linear"),
    dtype="float32",
  )
  rng = np.random.default_rng(0)
  ids = lambda n: rng.integers(2, 32000, (flags.rows, n)).astype(np.int32)
  text = {
    "encoder_input_tokens": ids(flags.length),
    "decoder_input_tokens": ids(flags.targets),
    "decoder_target_tokens": ids(flags.targets),
    "decoder_loss_weights": np.ones((flags.rows, flags.targets), np.int32),
  }
  classes = {
    "encoder_input_tokens": text["encoder_input_tokens"],
    "labels": rng.integers(0, 2, (flags.rows, 1)).astype(np.int32),
    "label_weights": np.ones((flags.rows, 1), np.int32),
  }
  sequence = HeadConfig("sequence_classification")
  both = HeadConfig("sequence_classification", body="encoder_decoder")
  sides = [
    ("text to text", None, None, None),
    ("classifier on both stacks (HF)", both, None, None),
    ("classifier on the encoder", sequence, None, None),
    ("EncT5, 1 decoder layer", HeadConfig("enct5"), None, None),
    ("encoder, LoRA rank 8 on q, v", sequence, LoRAConfig(), HEAD),
    ("encoder, head alone", sequence, None, HEAD),
    ("EncT5, prompt and head alone", HeadConfig("enct5"), None, HEAD),
  ]
  optimizer = optimizers.adamw(1e-4)
  found = []
  for name, head, lora, pattern in sides:
    model = factory.create(base, head, lora)
    batch = text if head is None else classes
    params = jax.jit(initial.init_params, static_argnums=(0, 1))(model, 0)
    chosen = trainable.choose(params, pattern, None)
    moving, _ = trainable.split(params, chosen)
    state = steps.TrainState(np.int32(0), params, optimizer.init(moving))
    step = jax.jit(
      steps.make_train_step(model, optimizer, seed=0, trains=chosen)
    )
    compiled = step.lower(state, batch).compile()

    def predict(params, batch, model=model):
      objective = objectives.of(model.config)
      weights = objective.label_weights(batch)
      return objective.loss_and_sums(model, params, batch, weights, 1.0, None)[
        0
      ]

    forward = jax.jit(predict).lower(params, batch).compile()
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    memory = compiled.memory_analysis()
    found.append(
      {
        "name": name,
        "total": count(params),
        "moving": count(moving),
        "optimizer": 4 * count(state.opt_state),
        "temporary": memory.temp_size_in_bytes,
        "step": (lambda c=compiled, s=state, b=batch: c(s, b)),
        "forward": (lambda c=forward, p=params, b=batch: c(p, b)),
        "step_s": [],
        "forward_s": [],
      }
    )
  for _ in range(ROUNDS):
    for side in found:
      for part in ("step", "forward"):
        start = time.perf_counter()
        jax.block_until_ready(side[part]())
        side[f"{part}_s"].append(time.perf_counter() - start)

  table = Table(
    title=f"T5 1.1 small, {flags.rows} x {flags.length} tokens, float32,"
    f" {jax.default_backend()}, jax {jax.__version__}",
    title_justify="left",
  )
  table.add_column("")
  for column in (
    "parameters",
    "of them training",
    "AdamW state",
    "temporary memory",
    "update",
    "forward",
  ):
    table.add_column(column, justify="right")
  first = found[0]
  for side in found:
    times = []
    for part in ("step_s", "forward_s"):
      median = statistics.median(side[part])
      ratio = median / statistics.median(first[part])
      times.append(f"{1000 * median:,.0f} ms ({ratio:.2f}x)")
    table.add_row(
      side["name"],
      f"{side['total'] / 1e6:.1f}M",
      f"{side['moving'] / 1e6:.3f}M",
      f"{side['optimizer'] / 2**20:,.1f} MiB",
      f"{side['temporary'] / 2**20:,.0f} MiB",
      *times,
    )
  Console(width=140).print(table)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
