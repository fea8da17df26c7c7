"""What optimizers keep of each parameter, and what bfloat16 parameters lose.

  python tools/bench_optimizers.py [--steps 400 --out docs]

Prints two tables, and draws docs/kahan.png. The bytes are those of the arrays
that a run of T5 1.1 small holds. The curves are of a small T5 that learns to
read spoken dates and amounts from nothing, by FAT5's AdamW, with float32
products: parameters in float32, in bfloat16 with Kahan's compensation, and in
bfloat16 without, which no run of fat5_jax does. They differ in nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import itertools
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fat5_jax import optimizers
from fat5_jax.data import spoken_values
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.models import factory, initial
from fat5_jax.models.config import T5Config
from fat5_jax.training.program import Program
from tools.bench_train import our_config

ROWS, INPUTS, TARGETS = 32, 44, 12
READER = T5Config(
  vocab_size=384,
  emb_dim=64,
  num_heads=2,
  head_dim=32,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=128,
  mlp_activations=("gelu", "linear"),
  dropout_rate=0.0,
  dtype="float32",
)


class Rounded(optax.GradientTransformationExtraArgs):
  """An optimizer of bfloat16 parameters that lets small updates go."""

  parameter_dtype = jnp.dtype(jnp.bfloat16)

  def __new__(cls, inner):
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads, state, params, **more):
      return inner.update(wide(grads), state, wide(params), **more)

    return super().__new__(cls, inner.init, update)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  lines = [head, ("---",) * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- What is kept ------------------------------------------------------------

KEPT = {
  "Adafactor": optimizers.adafactor(1e-3),
  "Adafactor, momentum": optimizers.adafactor(1e-3, beta1=0.9),
  "AdamW": optimizers.adamw(1e-3),
  "AdamW, bfloat16 state": optimizers.adamw(1e-3, state_dtype="bfloat16"),
  "Muon": optimizers.muon(1e-3),
  "Muon, bfloat16 state": optimizers.muon(1e-3, state_dtype="bfloat16"),
}


def kept() -> str:
  """Bytes per parameter of T5 1.1 small, of each optimizer."""
  model = factory.create(our_config("small"))
  params = jax.jit(lambda: initial.init_params(model, 0))()
  count = sum(x.size for x in jax.tree.leaves(params))
  each = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / count
  rows = []
  for name, optimizer in KEPT.items():
    for kahan in (False, True):
      if kahan and name in ("Adafactor, momentum", "Muon"):
        continue
      whole = optimizers.Compensated(optimizer) if kahan else optimizer
      dtype = getattr(whole, "parameter_dtype", jnp.float32)
      # As training.program.Program begins a run.
      state = jax.jit(whole.init)(params)
      trained = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
      sizes = each(trained), each(state), each((trained, state))
      title = f"{name}, Kahan" if kahan else name
      rows.append((title, *(f"{size:.2f}" for size in sizes)))
      del state, trained
  return table(("optimizer", "parameters", "state", "both"), rows)


# ---- What is lost ------------------------------------------------------------


def batches(seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Batches of texts as bytes, for ever; ids as ByT5's."""
  rows = list(spoken_values.rows(20000, 500, seed, "train"))
  rng = np.random.default_rng(seed)

  def tokens(texts, length):
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts):
      found = [byte + 3 for byte in text.encode()][: length - 1] + [1]
      row[: len(found)] = found
    return ids

  while True:
    chosen = [rows[i] for i in rng.integers(0, len(rows), ROWS)]
    targets = tokens([row["value"] for row in chosen], TARGETS)
    yield {
      "encoder_input_tokens": tokens([row["text"] for row in chosen], INPUTS),
      "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
      "decoder_target_tokens": targets,
      "decoder_loss_weights": (targets != 0).astype(np.int32),
    }


def losses(around, steps: int, rate: float) -> np.ndarray:
  """The loss of a target, in nats, at each step of one run."""
  schedule = optimizers.create_learning_rate_scheduler(
    "constant * linear_warmup * cosine_to_end",
    rate,
    warmup_steps=steps // 10,
    total_steps=steps,
  )
  optimizer = optimizers.adamw(
    schedule,
    eps=1e-6,
    multiply_by_parameter_scale=True,
    global_norm_clip_threshold=1.0,
  )
  one = Partitioner(devices=jax.devices()[:1])
  program = Program(
    factory.create(READER),
    one,
    around(optimizer),
    loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
  )
  state, found = program.init_state(), []
  for batch in itertools.islice(batches(), steps):
    placed = one.to_devices(batch, 0, ROWS)
    state, sums = program.train_step(state, placed)
    found.append(float(sums["loss"]))
  return np.array(found)


RUNS = {
  "float32": lambda optimizer: optimizer,
  "bfloat16, Kahan": optimizers.Compensated,
  "bfloat16": Rounded,
}


def lost(steps: int, rate: float, out: str) -> str:
  """The three runs as a table, drawn into `out`."""
  curves = {name: losses(run, steps, rate) for name, run in RUNS.items()}
  _draw(curves, rate, os.path.join(out, "kahan.png"))
  tail = steps // 10
  exact = curves["float32"]
  rows = [
    (
      name,
      f"{curve[-tail:].mean():.3f}",
      f"{np.abs(curve - exact)[-tail:].max():.3f}",
    )
    for name, curve in curves.items()
  ]
  head = ("parameters", f"loss, last {tail} steps", "farthest from float32")
  return table(head, rows)


def _draw(curves: dict[str, np.ndarray], rate: float, path: str) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
  width = 9
  styles = {"float32": dict(lw=4, color="0.75")}
  for name, curve in curves.items():
    smooth = np.convolve(curve, np.ones(width) / width, "valid")
    steps = np.arange(len(smooth)) + width
    axes.plot(steps, smooth, label=name, **styles.get(name, dict(lw=1.3)))
  axes.set_xlabel("step")
  axes.set_ylabel(f"loss per target (nats), mean of {width} steps")
  axes.set_title(
    f"FAT5's AdamW, rate {rate:g}, cosine to 0: parameters in", fontsize=10
  )
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--rate", type=float, default=0.005)
  parser.add_argument("--out", default="docs")
  args = parser.parse_args()
  begin = time.perf_counter()
  print(kept(), end="\n\n", flush=True)
  print(lost(args.steps, args.rate, args.out))
  seconds = time.perf_counter() - begin
  print(f"\n{seconds:.0f} s, jax {jax.__version__}, {jax.devices()[0]}")


if __name__ == "__main__":
  main()
