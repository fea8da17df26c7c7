"""Tokens/s of a training step and of greedy decoding, ours beside HF torch.

  python tools/bench_train.py [--batch 8 --inputs 256 --targets 64]

Same model (T5 1.1 small), same weights, same batch, same machine, one run, all
cores for both. Training is forward, backward and one AdamW update in float32
with the loss over all target tokens; decoding is greedy with a cache, `targets`
tokens a row. The two sides take turns, and the median of the rounds counts. A
large product by each side says what the machine can do: a ratio to that means
the same on any machine.

tools/on_chip.py takes `train_rate` from here: one side at a time, any size, on
whatever chip there is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fat5_jax.distributed import chips
from fat5_jax.inference import decoding
from fat5_jax.models import initial
from fat5_jax.models.config import T5Config
from fat5_jax.models.t5 import Transformer
from fat5_jax.training import flops, steps

VOCABULARY = 32128
# T5 1.1 by size: width, width of the feed-forward, layers of a stack, heads.
SIZES = {
  "tiny": (64, 128, 1, 2),
  "mini": (384, 1536, 4, 8),
  "small": (512, 1024, 8, 6),
  "base": (768, 2048, 12, 12),
  "large": (1024, 2816, 24, 16),
}


def hf_config(size: str):
  import transformers

  width, mlp, layers, heads = SIZES[size]
  return transformers.T5Config(
    vocab_size=VOCABULARY,
    d_model=width,
    d_kv=64,
    d_ff=mlp,
    num_layers=layers,
    num_heads=heads,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    dropout_rate=0.0,
    decoder_start_token_id=0,
  )


def our_config(size: str, **changes) -> T5Config:
  width, mlp, layers, heads = SIZES[size]
  return T5Config(
    vocab_size=VOCABULARY,
    emb_dim=width,
    mlp_dim=mlp,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    num_heads=heads,
    head_dim=64,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
  ).replace(**changes)


def make_hf_model(folder: str):
  """T5 1.1 small with random weights, its eos made unlikely."""
  import torch
  import transformers

  torch.manual_seed(0)
  model = transformers.T5ForConditionalGeneration(hf_config("small"))
  weight = torch.randn(VOCABULARY, SIZES["small"][0]) * 0.05
  model.lm_head.weight = torch.nn.Parameter(weight)
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


def our_batch(x, y) -> dict[str, np.ndarray]:
  return {
    "encoder_input_tokens": x,
    "decoder_target_tokens": y,
    "decoder_input_tokens": np.pad(y, ((0, 0), (1, 0)))[:, :-1],
    "decoder_loss_weights": np.ones_like(y),
  }


def training_sides(model, config, params, x, y):
  import torch

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
  batch = our_batch(x, y)
  # A copy: the step gives its buffers away.
  params = jax.tree.map(jnp.array, params)
  state = steps.TrainState(jnp.int32(0), params, ours_optimizer.init(params))

  def ours():
    nonlocal state
    state, sums = step(state, batch)
    jax.block_until_ready((state, sums))

  return {"ours": ours, "HF torch": theirs}


def decoding_sides(model, config, params, x, length):
  import torch

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

  whole = decoding.Search(decoding.Decoding(min_new_tokens=length))
  predict = jax.jit(
    lambda params, x: decoding.generate(
      Transformer(config), params, x, length, whole
    ).tokens[:, 0]
  )
  params = jax.device_put(params)

  def ours():
    tokens["ours"] = np.asarray(predict(params, x))

  return {"ours": ours, "HF torch": theirs}, tokens


def product_sides(size: int = 2048):
  """A large float32 product a side: what this machine could do at best."""
  import torch

  a = np.random.default_rng(0).normal(size=(2 * size, size))
  a = a.astype(np.float32)
  left, right = torch.tensor(a), torch.tensor(a[:size])
  product = jax.jit(jnp.dot)
  arrays = jax.device_put((a, a[:size]))
  sides = {
    "ours": lambda: product(*arrays).block_until_ready(),
    "HF torch": lambda: torch.mm(left, right),
  }
  return sides, 2.0 * 2 * size**3


# --- one side at a time ------------------------------------------------------


def train_rate(
  size: str, side: str, *, batch: int, inputs: int, targets: int, rounds: int
) -> dict:
  """What a training step takes: seconds, tokens/s, of the chip's peak (MFU).

  T5 1.1 from random weights, dropout 0, no padding, one AdamW update; AdamW's
  state and the parameters float32, products bfloat16 (torch: autocast). Tokens
  are those of inputs and targets; MFU counts three times the forward products,
  with attention's whole squares, whatever a side recomputes.

  `side` is "ours" or "ours, scanned" (over layers), or of HF torch: "torch
  eager" or "torch compile", then " + " and transformers' attention ("sdpa",
  "eager", "flex_attention").

  Raises:
    ValueError: where transformers has no such attention for T5.
  """
  rng = np.random.default_rng(0)
  tokens = lambda length: rng.integers(2, 32100, (batch, length), np.int32)
  x, y = tokens(inputs), tokens(targets)
  make = _our_step if side.startswith("ours") else _torch_step
  begin = time.perf_counter()
  step, loss, memory = make(size, side, x, y)
  step()
  loss()
  start = time.perf_counter() - begin
  step()
  loss()
  once = timed(lambda: (step(), loss()))
  calls = max(1, min(20, int(2 / once)))
  times = []
  for _ in range(rounds):
    times.append(
      timed(lambda: ([step() for _ in range(calls)], loss())) / calls
    )
  seconds = statistics.median(times)
  row = dict(size=size, side=side, batch=batch, inputs=inputs, targets=targets)
  row |= dict(seconds_a_step=seconds, start_seconds=start, loss=loss())
  row["tokens_per_second"] = batch * (inputs + targets) / seconds
  row["model_tflops"] = model_flops(size, x, y) / seconds / 1e12
  if chip := chips.of_kind(jax.devices()[0].device_kind):
    row["mfu"] = row["model_tflops"] * 1e12 / chip.flops
  if memory() is not None:
    row["memory_gib"] = memory() / 2**30
  return row


def model_flops(size: str, x, y) -> float:
  """Of a step: forward products, and twice as many backward."""
  config = our_config(
    size, attention_implementation="reference", scan_layers=True
  )
  model = Transformer(config)
  params = jax.eval_shape(lambda: initial.init_params(model, 0))
  forward = steps.make_eval_step(model)
  return 3 * flops.product_flops(
    jax.make_jaxpr(forward)(params, our_batch(x, y))
  )


def _our_step(size, side, x, y):
  """(step, loss so far, memory): step does not wait, the others do."""
  model = Transformer(our_config(size, scan_layers="scanned" in side))
  optimizer = optax.adamw(1e-4, weight_decay=0.0)
  step = steps.make_train_step(
    model,
    optimizer,
    seed=0,
    loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
  )

  def start():
    params = initial.init_params(model, 0)
    return steps.TrainState(jnp.int32(0), params, optimizer.init(params))

  state, batch = jax.jit(start)(), jax.device_put(our_batch(x, y))
  step = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  sums = None

  def update():
    nonlocal state, sums
    state, sums = step(state, batch)

  def loss():
    return float(sums["loss"])

  def memory():
    stats = step.memory_analysis()
    return stats.temp_size_in_bytes + stats.argument_size_in_bytes

  return update, loss, memory


def _torch_step(size, side, x, y):
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  how, _, attention = side.removeprefix("torch ").partition(" + ")
  torch.manual_seed(0)
  model = transformers.AutoModelForSeq2SeqLM.from_config(
    hf_config(size), attn_implementation=attention
  )
  model.config.use_cache = False
  model.to(device).train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.0, fused=device == "cuda"
  )
  run = torch.compile(model) if how == "compile" else model
  put = lambda array: torch.tensor(array, device=device).long()
  batch = dict(input_ids=put(x), labels=put(y))
  found = None

  def update():
    nonlocal found
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16):
      found = run(**batch).loss
    found.backward()
    optimizer.step()

  def memory():
    return torch.cuda.max_memory_allocated() if device == "cuda" else None

  return update, lambda: float(found.detach()), memory


# --- small, all cores, both in turns -----------------------------------------


def main():
  from rich.console import Console
  from rich.table import Table
  import torch
  import transformers

  from fat5_jax.convert import hf

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
  sides, flops = product_sides()
  rate = {n: flops / t for n, t in alternate(sides, flags.rounds).items()}
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
  names = ("ours", "HF torch")
  table.add_row(
    "a large product, GFLOP/s", *(f"{rate[s] / 1e9:,.0f}" for s in names), ""
  )
  # Of the faster side's: what the machine can do is one number.
  ceiling = max(rate.values())
  step = model_flops("small", x, y)
  table.add_row(
    "  of which training reaches",
    *(f"{step / train[s] / ceiling:.0%}" for s in names),
    "",
  )
  console = Console(width=120)
  console.print(table)
  console.print(f"decoded tokens equal: {same:.1%}")


if __name__ == "__main__":
  main()
