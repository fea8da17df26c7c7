"""Rows/s of generation over rows of mixed lengths, ours beside HF generate.

  python tools/bench_generate.py [--rows 20000 --peer_rows 2048 --beams 1 4]

Same model (T5 1.1 with random weights), same rows, same number of new tokens a
row, one run, all cores (or the one accelerator) for both. Each side is a
process of its own. Lengths of inputs are lognormal, up to 512 tokens.

Ours is what `infer` does: the Predictor over all rows, compiling included. HF
generate gets batches of the same most rows and tokens, padded to the longest:
in the order of the rows, as one writes it, and sorted in the same windows as
ours. After one batch to warm up it answers `peer_rows` rows spread over all;
ours answers those again, taking turns with it. `equal` is the share of those
rows whose answers are token for token the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

LONGEST = 512
SIDES = ("ours", "HF, in order", "HF, by length")


def make_rows(count: int, median: float, spread: float) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  lengths = median * np.exp(spread * rng.normal(size=count))
  lengths = np.clip(lengths, 1, LONGEST - 1).astype(int)
  return [
    np.append(rng.integers(3, 32000, length), 1).astype(np.int32)
    for length in lengths
  ]


def write_model(size: str, folder: str) -> None:
  """T5 1.1, whose scores are as far apart as a trained model's."""
  import torch
  import transformers

  from tools import bench_train

  torch.manual_seed(0)
  config = bench_train.hf_config(size)
  model = transformers.T5ForConditionalGeneration(config)
  model.lm_head.weight.data.normal_(0, 1 / config.d_model**0.5 * 4)
  model.save_pretrained(folder)


# --- a side, in its own process ----------------------------------------------


class Ours:
  def __init__(self, flags):
    import jax

    from fat5_jax.distributed.sharding import Partitioner
    from fat5_jax.models.t5 import Transformer

    self.jax, self.flags, self.predictors = jax, flags, {}
    self.partitioner = Partitioner()
    config, params = read_ours(flags.folder)
    self.model = Transformer(config.replace(dtype=flags.dtype))
    if flags.dtype != "float32":
      params = jax.tree.map(lambda x: x.astype(flags.dtype), params)
    self.params = jax.device_put(params)

  def answer(self, rows, beams, side):
    from fat5_jax.inference.decoding import Decoding, Search
    from fat5_jax.inference.predictor import Predictor

    flags = self.flags
    if beams not in self.predictors:
      asked = Decoding(num_beams=beams, min_new_tokens=flags.outputs)
      self.predictors[beams] = Predictor(
        self.model,
        self.partitioner,
        flags.batch,
        flags.outputs,
        Search(asked),
      )
    predict = self.predictors[beams]
    predict.tokens = predict.room = 0
    found = predict(self.params, ({"inputs": row} for row in rows))
    tokens = [answer.tokens[0] for _, answer in found]
    return tokens, {
      "shapes": len(predict.shapes.seen),
      "padding": 1 - predict.tokens / predict.room,
    }

  def memory(self):
    stats = self.jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


class Theirs:
  def __init__(self, flags):
    import torch
    import transformers

    self.torch, self.flags = torch, flags
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.model = transformers.T5ForConditionalGeneration.from_pretrained(
      flags.folder, dtype=getattr(torch, flags.dtype)
    )
    self.model = self.model.to(self.device).eval()

  def answer(self, rows, beams, side):
    from fat5_jax.inference import batches
    from fat5_jax.inference.predictor import WINDOW

    flags, torch = self.flags, self.torch
    order = np.arange(len(rows))
    if side == "HF, by length":
      size = WINDOW * flags.batch
      windows = [order[i : i + size] for i in range(0, len(rows), size)]
      order = np.concatenate(
        [sorted(window, key=lambda i: len(rows[i])) for window in windows]
      )
    found, shapes, tokens, room = {}, set(), 0, 0
    length_of = lambda i: len(rows[i])
    for batch in batches.group(order, length_of, flags.batch):
      shape = len(batch), max(map(length_of, batch))
      x = batches.padded([rows[i] for i in batch], shape, 0)
      ids = torch.tensor(x, device=self.device).long()
      with torch.inference_mode():
        answers = self.model.generate(
          input_ids=ids,
          attention_mask=(ids != 0).long(),
          max_new_tokens=flags.outputs,
          min_new_tokens=flags.outputs,
          num_beams=beams,
          do_sample=False,
        )
      found |= dict(zip(batch, answers[:, 1:].cpu().numpy()))
      shapes.add(shape)
      tokens += sum(map(length_of, batch))
      room += x.size
    return [found[i] for i in range(len(rows))], {
      "shapes": len(shapes),
      "padding": 1 - tokens / room,
    }

  def memory(self):
    if self.device == "cuda":
      return self.torch.cuda.max_memory_allocated()
    return None


def read_ours(folder: str):
  from fat5_jax.convert import hf

  return hf.from_pretrained(folder)


def serve(flags) -> None:
  """Answers the lines of standard input, one each."""
  import resource

  side = Ours(flags) if flags.side == "ours" else Theirs(flags)
  rows = make_rows(flags.rows, flags.median, flags.spread)
  answers, sys.stdout = sys.stdout, sys.stderr
  print("{}", file=answers, flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    chosen = [rows[i] for i in range(*asked["rows"])]
    begin = time.perf_counter()
    tokens, told = side.answer(chosen, asked["beams"], asked["side"])
    told["seconds"] = time.perf_counter() - begin
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    told["memory"] = side.memory() or resident
    if asked["file"]:
      np.save(asked["file"], np.stack(tokens))
    print(json.dumps(told), file=answers, flush=True)


class Worker:
  def __init__(self, side: str, flags, folder: str):
    command = [sys.executable, os.path.abspath(__file__), "--side", side]
    command += ["--folder", folder]
    for name in ("batch", "outputs", "dtype", "rows", "median", "spread"):
      command += [f"--{name}", str(getattr(flags, name))]
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    self._read()

  def _read(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      sys.exit("bench_generate: a side ended; its lines are above")
    return json.loads(line)

  def __call__(self, rows, beams, side="ours", file=None) -> dict:
    asked = dict(rows=rows, beams=beams, side=side, file=file)
    print(json.dumps(asked), file=self._process.stdin, flush=True)
    return self._read()


# --- both ---------------------------------------------------------------------


def measure(flags, beams: int, rows: int, workers, folder: str):
  """(what, rows, rows/s, shapes, padding, memory, equal) of each line."""
  ours, theirs = workers
  whole = ours((0, rows), beams)
  yield "ours, all, compiling included", rows, whole, None
  theirs((0, min(flags.batch, rows)), beams)
  # Windows of rows in turns, spread over all.
  size = min(flags.peer_rows, rows)
  window = min(size, 1024)
  starts = np.linspace(0, rows - window, max(1, size // window)).astype(int)
  sums: dict[str, dict] = {}
  for start in starts:
    chosen, tokens = (int(start), int(start) + window), {}
    for side in SIDES:
      file = os.path.join(folder, f"{side}.npy")
      worker = ours if side == "ours" else theirs
      told = worker(chosen, beams, side, file)
      tokens[side] = np.load(file)
      same = (tokens[side] == tokens["ours"]).all(axis=1).mean()
      told |= {"equal": same / len(starts)}
      total = sums.setdefault(side, dict(told, seconds=0, equal=0))
      total["seconds"] += told["seconds"]
      total["equal"] += told["equal"]
      total["memory"] = told["memory"]
  for side, told in sums.items():
    name = "ours, the same rows again" if side == "ours" else side
    yield name, window * len(starts), told, told["equal"]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", default="small")
  parser.add_argument("--rows", type=int, default=20000)
  parser.add_argument("--beam_rows", type=int, help="of beams (as --rows)")
  parser.add_argument("--peer_rows", type=int, default=2048)
  parser.add_argument("--median", type=float, default=30, help="input tokens")
  parser.add_argument("--spread", type=float, default=0.8, help="of logarithms")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument(
    "--outputs", type=int, default=16, help="new tokens a row"
  )
  parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.side:
    return serve(flags)
  print(
    f"T5 1.1 {flags.size}, {flags.dtype}, at most {flags.batch} rows and"
    f" {flags.batch * 512:,} tokens a batch, {flags.outputs} new tokens a row,"
    f" inputs of {flags.median:g} tokens (spread {flags.spread:g}),"
    f" {os.cpu_count()} cores"
  )
  head = ("rows", "rows/s", "shapes", "padding", "peak MiB", "equal", "ratio")
  with tempfile.TemporaryDirectory() as folder:
    write_model(flags.size, folder)
    workers = [Worker(side, flags, folder) for side in ("ours", "theirs")]
    for beams in flags.beams:
      print(
        f"\n{'beams: ' + str(beams):<30}" + "".join(f"{x:>9}" for x in head)
      )
      rows = flags.rows if beams == 1 else flags.beam_rows or flags.rows
      mine = None
      for name, count, told, equal in measure(
        flags, beams, rows, workers, folder
      ):
        rate = count / told["seconds"]
        if name.startswith("ours, the"):
          mine = rate
        ratio = f"{mine / rate:.2f}x" if mine else ""
        print(
          f"{name:<30}{count:9,}{rate:9.1f}{told['shapes']:9}"
          f"{told['padding']:9.0%}{told['memory'] / 2**20:9,.0f}"
          f"{'' if equal is None else f'{equal:.1%}':>9}{ratio:>9}",
          flush=True,
        )


if __name__ == "__main__":
  main()
