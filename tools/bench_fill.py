"""How full rows are, and how fast they come, on real lengths of text.

  python tools/bench_fill.py [--data ../shared/data] [--seconds 5]

MRPC, SST-2 and OrangeSum (abstracts), all training rows, text to text: ours
packed, in at most 8 buckets, padded to the longest; and HF `datasets` with
DataCollatorForSeq2Seq, which pads a batch to its longest row, shuffled and
grouped by length. Fill is tokens over room, inputs and targets together; shapes
are those of all batches seen, each of which a compiler would compile. Every
side reads what is tokenised already, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# Longest inputs and targets; of a packed row; the rows of a batch.
LENGTHS = {
  "MRPC": ((128, 8), (512, 32), 32),
  "SST-2": ((80, 8), (512, 56), 32),
  "OrangeSum": ((1024, 128), (4096, 512), 8),
}
SIDES = (
  *("ours, packed", "ours, 8 buckets", "ours, padded"),
  *("HF, shuffled", "HF, by length"),
)


def orangesum(data: str) -> list[dict[str, str]]:
  def lines(name):
    path = os.path.join(data, "sum_orangesum_fr", name)
    with lzma.open(path, "rt", encoding="utf-8") as file:
      yield from map(str.strip, file)

  articles = {d["id"]: d for d in map(json.loads, lines("docs.jsonl.xz"))}
  rows = [articles[name] for name in lines("splits/abstract.train.txt.xz")]
  return [{"text": r["article"], "summary": r["heading"]} for r in rows]


def task_of(name: str, args):
  import seqio

  from fat5_jax.data import sources, tasks

  vocabulary = seqio.SentencePieceVocabulary(args.vocabulary, 100)
  if name != "OrangeSum":
    which = {"MRPC": "mrpc", "SST-2": "sst2"}[name]
    return tasks.glue(which, vocabulary, os.path.join(args.data, "glue"))
  return tasks.summarization(
    "text", "summary", vocabulary, source=sources.Files({"train": args.rows})
  )


def ours(name: str, side: str, args) -> dict:
  from fat5_jax.data import pipeline

  longest, packed, rows = LENGTHS[name]
  how = {
    "ours, packed": {"pack": True},
    "ours, 8 buckets": {"buckets": 8},
    "ours, padded": {},
  }[side]
  lengths = dict(
    zip(("inputs", "targets"), packed if how.get("pack") else longest)
  )
  config = pipeline.DatasetConfig(
    task_of(name, args), lengths, "train", rows, shuffle=True, **how
  )
  list(pipeline.prepare_all(config))
  begin = time.perf_counter()
  batches = pipeline.train_batches(config, 32_128)

  def found():
    for batch in batches:
      arrays = [
        batch[k] for k in ("encoder_input_tokens", "decoder_target_tokens")
      ]
      yield [(int((x > 0).sum()), x.shape) for x in arrays]

  return measured(found(), begin, args.seconds)


def theirs(name: str, side: str, args) -> dict:
  import datasets
  import torch
  import transformers
  from transformers.trainer_pt_utils import LengthGroupedSampler

  from fat5_jax.data import examples

  # The same tokens as ours: what is compared is what becomes of them.
  longest, _, rows = LENGTHS[name]
  found = examples.cut_to(
    task_of(name, args), "train", dict(zip(("inputs", "targets"), longest))
  )
  data = datasets.Dataset.from_list(
    [
      {"input_ids": r["inputs"].tolist(), "labels": r["targets"].tolist()}
      for r in found
    ]
  )
  tokenizer = transformers.T5TokenizerFast.from_pretrained(
    os.path.dirname(args.vocabulary)
  )
  collate = transformers.DataCollatorForSeq2Seq(tokenizer)
  begin = time.perf_counter()

  def batches():
    sizes = None
    if side == "HF, by length":
      sizes = [len(row) for row in data["input_ids"]]
    while True:
      how = {"shuffle": True}
      if sizes:
        how = {"sampler": LengthGroupedSampler(rows, lengths=sizes)}
      loader = torch.utils.data.DataLoader(
        data, batch_size=rows, collate_fn=collate, drop_last=True, **how
      )
      for batch in loader:
        yield [
          (
            int((batch["input_ids"] > 0).sum()),
            tuple(batch["input_ids"].shape),
          ),
          (int((batch["labels"] >= 0).sum()), tuple(batch["labels"].shape)),
        ]

  return measured(batches(), begin, args.seconds)


def measured(batches, begin: float, seconds: float) -> dict:
  """Of [(tokens, shape) of inputs, of targets] of batches."""
  tokens, room, shapes = [0, 0], [0, 0], set()
  first = None
  for count, batch in enumerate(batches, 1):
    first = first or time.perf_counter()
    for side, (number, shape) in enumerate(batch):
      tokens[side] += number
      room[side] += shape[0] * shape[1]
    shapes.add(tuple(shape for _, shape in batch))
    # Enough batches for the fill, enough time for the speed.
    if count >= 200 and time.perf_counter() - first > seconds:
      break
  return {
    "first": first - begin,
    "tokens_per_second": sum(tokens) / (time.perf_counter() - first),
    "fill": sum(tokens) / sum(room),
    "sides": [t / r for t, r in zip(tokens, room)],
    "shapes": len(shapes),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", default=os.path.join(ROOT, "../shared/data"))
  parser.add_argument("--seconds", type=float, default=5)
  parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
  parser.add_argument("--rows", help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.data = os.path.abspath(args.data)
  args.vocabulary = os.path.join(args.data, "vocab_t5", "spiece.model")
  if args.side:
    side = theirs if args.side[1].startswith("HF") else ours
    print(json.dumps(side(*args.side, args)))
    return
  print(
    f"{'rows':<10} {'side':<16} {'fill':>6} {'inputs/targets':>15}"
    f" {'shapes':>6} {'tokens/s':>11} {'first batch':>11}"
  )
  with tempfile.TemporaryDirectory() as folder:
    rows = os.path.join(folder, "orangesum.jsonl")
    with open(rows, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(r) + "\n" for r in orangesum(args.data))
    for name in LENGTHS:
      for side in SIDES:
        command = [
          sys.executable,
          os.path.abspath(__file__),
          "--side",
          name,
          side,
        ]
        command += [f"--data={args.data}", f"--seconds={args.seconds}"]
        done = subprocess.run(
          [*command, f"--rows={rows}"],
          env=os.environ
          | {
            "FAT5_JAX_CACHE": os.path.join(folder, "cache"),
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "HF_HUB_OFFLINE": "1",
          },
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          text=True,
          check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        sides = " / ".join(f"{share:.1%}" for share in found["sides"])
        print(
          f"{name:<10} {side:<16} {found['fill']:6.1%} {sides:>15}"
          f" {found['shapes']:6} {found['tokens_per_second']:11,.0f}"
          f" {found['first']:10.2f}s",
          flush=True,
        )


if __name__ == "__main__":
  main()
