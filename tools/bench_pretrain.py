"""Pre-training beside Hugging Face on this CPU; its data beside an H100.

  python tools/bench_pretrain.py --data=../shared/data [--seconds 60]

The first table is of T5's span corruption on books that are tokenised already:
T5 1.1 small, AdamW, products in float32 and in bfloat16 (parameters are
float32), 8 rows of 512 / 114 an update, every side in a process of its own with
all cores and its own pipeline, one after the other. Theirs joins the texts,
cuts chunks that just fill the rows, and masks them in a collator, as the
example of transformers does (run_t5_mlm_flax.py); the model is its torch T5.
"Flushed" sets denormal numbers to 0 (torch.set_flush_denormal), without which
AdamW's smallest ones slow torch down after some updates; XLA always does.
Tokens are those of inputs and targets, without padding.

The second is of the pipeline alone, one thread, beside what an H100 trains of
T5 1.1 base at the speed of its roofline: docs/plans/pretrain_base_h100.json, by
fat5_jax.plan of recipes/span_corruption.gin, BATCH_SIZE=128, --topology=h100:1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
ROWS, INPUTS, TARGETS = 8, 512, 114
# Tokens of text that fill both, without their ends: T5's own arithmetic.
CHUNK = 568
VOCABULARY, SENTINELS, LAST_SENTINEL = 32_128, 100, 32_099
PLAN = os.path.join(ROOT, "docs/plans/pretrain_base_h100.json")
ALONE = {
  "span corruption": ("span_corruption", INPUTS, TARGETS, None),
  "UL2": ("ul2", INPUTS, INPUTS, 128),
}


def task_of(args, objective: str, text_length: int | None):
  from fat5_jax import console

  with console.without_native_lines():
    import seqio

  from fat5_jax.data import pretraining, sources

  return pretraining.text(
    sources.Files({"train": os.path.join(args.data, args.files)}),
    seqio.SentencePieceVocabulary(args.vocabulary, SENTINELS),
    objective,
    text_length=text_length,
  )


def batches_of(args, objective, inputs, targets, text_length, rows=ROWS):
  from fat5_jax.data import pipeline

  config = pipeline.DatasetConfig(
    task_of(args, objective, text_length),
    {"inputs": inputs, "targets": targets},
    "train",
    rows,
    shuffle=True,
    pack=True,
  )
  return pipeline.train_batches(config, VOCABULARY)


def tokens_of(batch) -> int:
  sides = ("encoder_input_tokens", "decoder_target_tokens")
  return sum(int((batch[side] > 0).sum()) for side in sides)


# ---- Training ----------------------------------------------------------------


def ours(args, dtype: str):
  """Updates, each of which gives its tokens."""
  import jax
  import jax.numpy as jnp
  import optax

  from fat5_jax.models import initial
  from fat5_jax.models.t5 import Transformer
  from fat5_jax.training import steps
  from tools.bench_train import our_config

  model = Transformer(our_config("small", dtype=dtype))
  optimizer = optax.adamw(1e-4)
  params = jax.jit(lambda: initial.init_params(model, 0))()
  state = steps.TrainState(jnp.int32(0), params, optimizer.init(params))
  step = jax.jit(
    steps.make_train_step(
      model, optimizer, seed=0, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS"
    ),
    donate_argnums=0,
  )
  for batch in batches_of(args, "span_corruption", INPUTS, TARGETS, None):
    state, sums = step(state, batch)
    float(sums["loss"])
    yield tokens_of(batch)


def theirs(args, dtype: str, flush: bool = False):
  """The same by torch; products of bfloat16 are those of autocast."""
  import torch
  import transformers

  from fat5_jax.data import opening, pipeline
  from tools.bench_train import hf_config

  config = pipeline.DatasetConfig(
    task_of(args, "span_corruption", None),
    {"inputs": INPUTS, "targets": TARGETS},
    "train",
    ROWS,
  )
  (store,) = opening.stores(config)
  texts = [row["inputs"] for row in store.read(range(len(store)), ["inputs"])]
  joined = np.concatenate(texts)
  chunks = joined[: len(joined) // CHUNK * CHUNK].reshape(-1, CHUNK)
  torch.set_flush_denormal(flush)
  torch.manual_seed(0)
  model = transformers.T5ForConditionalGeneration(hf_config("small")).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
  loader = torch.utils.data.DataLoader(
    chunks, ROWS, shuffle=True, collate_fn=collate, drop_last=True
  )
  for x, y in loader:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
      loss = model(input_ids=x, labels=y).loss
    loss.backward()
    optimizer.step()
    yield x.numel() + y.numel()


def collate(rows):
  """(inputs, targets) of chunks, masked one after the other."""
  import torch

  rng = np.random.default_rng()
  pairs = [corrupted(np.asarray(row), rng) for row in rows]
  return [torch.tensor(np.stack(side)).long() for side in zip(*pairs)]


def corrupted(ids: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
  """T5's span corruption of one chunk (Raffel et al. 2020, 3.1.4)."""
  noise = round(len(ids) * 0.15)
  spans = round(noise / 3.0)

  def parts(total):
    cuts = np.sort(rng.permutation(total - 1)[: spans - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))

  lengths = np.stack([parts(len(ids) - noise), parts(noise)], axis=1).ravel()
  is_noise = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
  sides = []
  for hidden in (is_noise, ~is_noise):
    first = hidden & ~np.append(False, hidden[:-1])
    shown = np.where(first, LAST_SENTINEL + 1 - np.cumsum(first), ids)
    sides.append(np.append(shown[first | ~hidden], 1))
  return sides[0], sides[1]


SIDES = {
  f"{name}, {dtype}": functools.partial(side, dtype=dtype)
  for dtype in ("float32", "bfloat16")
  for name, side in (
    ("ours", ours),
    ("HF torch", theirs),
    ("HF torch, flushed", functools.partial(theirs, flush=True)),
  )
}


def rate(args, side: str) -> float:
  """Tokens/s of an update, in this process; the first two compile."""
  updates = SIDES[side](args)
  for _ in range(2):
    next(updates)
  tokens, begin = 0, time.perf_counter()
  while (seconds := time.perf_counter() - begin) < args.seconds or not tokens:
    tokens += next(updates)
  return tokens / seconds


# ---- Data --------------------------------------------------------------------


def alone(args, name: str) -> tuple[float, float]:
  """(tokens/s of the pipeline, share of the rows that is filled)."""
  batches = batches_of(args, *ALONE[name], rows=128)
  next(batches)
  tokens = room = 0
  begin = time.perf_counter()
  while (seconds := time.perf_counter() - begin) < 10:
    batch = next(batches)
    tokens += tokens_of(batch)
    room += sum(
      batch[side].size
      for side in ("encoder_input_tokens", "decoder_target_tokens")
    )
  return tokens / seconds, tokens / room


def consumed() -> float:
  """Tokens/s of base on an H100 by its plan."""
  with open(PLAN, encoding="utf-8") as file:
    (plan,) = json.load(file)
  return plan["tokens"] / plan["seconds_by_roofline"]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", default=os.path.join(ROOT, "../shared/data"))
  parser.add_argument("--files", default="corpus_books_en/train-00001*.xz")
  parser.add_argument("--seconds", type=float, default=60)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument(
    "--side", choices=(*SIDES, *ALONE), help=argparse.SUPPRESS
  )
  args = parser.parse_args()
  args.vocabulary = os.path.join(args.data, "vocab_t5", "spiece.model")
  if args.side in SIDES:
    print(json.dumps(rate(args, args.side)))
    return
  if args.side:
    print(json.dumps(alone(args, args.side)))
    return
  with tempfile.TemporaryDirectory() as cache:

    def run(side):
      command = [sys.executable, os.path.abspath(__file__), f"--side={side}"]
      command += [f"--data={args.data}", f"--files={args.files}"]
      done = subprocess.run(
        [*command, f"--seconds={args.seconds}"],
        env=os.environ
        | {
          "FAT5_JAX_CACHE": cache,
          "JAX_PLATFORMS": "cpu",
          "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        check=True,
      )
      return json.loads(done.stdout.splitlines()[-1])

    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for side in [*SIDES] * args.rounds:
      found[side].append(run(side))
    means = {side: statistics.mean(rates) for side, rates in found.items()}
    print("| span corruption, 8 x 512/114 | tokens/s | of each round |")
    print("|---|---|---|")
    for side, rates in found.items():
      each = ", ".join(f"{r:,.0f}" for r in rates)
      print(f"| {side} | {means[side]:,.0f} | {each} |")
    for dtype in ("float32", "bfloat16"):
      ratios = [
        means[f"ours, {dtype}"] / means[f"{name}, {dtype}"]
        for name in ("HF torch", "HF torch, flushed")
      ]
      print(
        f"ours over theirs, {dtype}: {ratios[0]:.2f}, flushed {ratios[1]:.2f}"
      )
    print()
    wanted = consumed()
    print("| pipeline alone | tokens/s | of the rows filled | of an H100's |")
    print("|---|---|---|---|")
    for name in ALONE:
      tokens, fill = run(name)
      print(f"| {name} | {tokens:,.0f} | {fill:.0%} | {tokens / wanted:.1f}x |")
    print(f"an H100 trains base at {wanted:,.0f} tokens/s at most, by roofline")


if __name__ == "__main__":
  main()
