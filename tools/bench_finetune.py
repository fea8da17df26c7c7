"""Rows/s of fine-tuning on SST-2, ours beside Hugging Face's Trainer.

  python tools/bench_finetune.py --data=../shared/data/glue [--seconds 120]

T5 1.1 small with random weights, float32, AdamW, about 32 rows an update on
every side, text to text and as a classifier. Ours packed, in buckets, padded;
theirs the Trainer with dynamic padding, the length of the batch's longest row.
Every side trains in a process of its own, one after the other, on all cores,
through its own data pipeline; the first update, which compiles, is not counted.
An epoch's time is that of its 67,349 rows at this rate.
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
EPOCH = 67_349
SIDES = {
  "text": ("ours, packed", "ours, 8 buckets", "ours, padded", "HF Trainer"),
  "classes": ("ours, 8 buckets", "ours, padded", "HF Trainer"),
}
# Ours: rows of a batch, tokens of a row, and what goes into it.
SHAPES = {
  "ours, packed": (5, {"inputs": 256, "targets": 32}, {"pack": True}),
  "ours, 8 buckets": (15, {"inputs": 80, "targets": 8}, {"buckets": 8}),
  "ours, padded": (32, {"inputs": 80, "targets": 8}, {}),
}


def ours(kind: str, side: str, args) -> dict[str, float]:
  from bench_train import our_config
  import jax
  import optax
  import seqio

  from fat5_jax.data import head_tasks, pipeline, tasks
  from fat5_jax.models import factory, initial
  from fat5_jax.models.config import HeadConfig
  from fat5_jax.training import steps

  vocabulary = seqio.SentencePieceVocabulary(args.vocabulary, 100)
  batch_size, lengths, how = SHAPES[side]
  config = our_config("small", dropout_rate=0.1)
  head = None
  make = tasks.glue
  if kind == "classes":
    make, head = head_tasks.glue, HeadConfig("sequence_classification")
    lengths = {"inputs": lengths["inputs"]}
    batch_size = 17 if "buckets" in how else batch_size
  data = pipeline.DatasetConfig(
    make("sst2", vocabulary, args.data),
    lengths,
    "train",
    batch_size,
    shuffle=True,
    **how,
  )
  model = factory.create(config, head)
  optimizer = optax.adamw(1e-4, weight_decay=0.0)
  step = jax.jit(
    steps.make_train_step(
      model,
      optimizer,
      seed=0,
      loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    ),
    donate_argnums=0,
  )
  params = initial.init_params(model, 0)
  state = steps.TrainState(jax.numpy.int32(0), params, optimizer.init(params))
  batches = pipeline.train_batches(data, config.vocab_size)
  # Every shape once: each is compiled in its first update.
  seen = set()
  begin = time.perf_counter()
  while time.perf_counter() - begin < args.seconds / 2 or not seen:
    batch = next(batches)
    seen.add(batch["encoder_input_tokens"].shape)
    state, sums = step(state, batch)
    jax.block_until_ready(sums)
  rows = updates = tokens = 0
  begin = time.perf_counter()
  while time.perf_counter() - begin < args.seconds:
    batch = next(batches)
    # What was not compiled above does not come in here.
    if batch["encoder_input_tokens"].shape not in seen:
      continue
    state, sums = step(state, batch)
    jax.block_until_ready(sums)
    segments = batch.get("encoder_segment_ids")
    real = batch["encoder_input_tokens"] > 0
    rows += int(
      segments.max(axis=1).sum() if segments is not None else real[:, 0].sum()
    )
    tokens += real.sum() / real.size
    updates += 1
  return _found(rows, updates, tokens / updates, begin)


def theirs(kind: str, args) -> dict[str, float]:
  import csv

  from bench_train import hf_config
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count())
  tokenizer = transformers.T5TokenizerFast.from_pretrained(
    os.path.dirname(args.vocabulary)
  )
  with open(os.path.join(args.data, "SST-2", "train.tsv"), newline="") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  config = hf_config("small")
  config.dropout_rate = 0.1
  names = ("negative", "positive")
  if kind == "text":
    model = transformers.T5ForConditionalGeneration(config)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model)
    features = [
      {
        "input_ids": ids,
        "labels": tokenizer(names[int(row["label"])])["input_ids"],
      }
      for row, ids in zip(
        rows,
        tokenizer(["sst2 sentence: " + r["sentence"].strip() for r in rows])[
          "input_ids"
        ],
      )
    ]
  else:
    config.num_labels = 2
    model = transformers.T5ForSequenceClassification(config)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    found = tokenizer([r["sentence"].strip() for r in rows])["input_ids"]
    features = [
      {"input_ids": ids, "labels": int(row["label"])}
      for row, ids in zip(rows, found)
    ]

  class Clock(transformers.TrainerCallback):
    begin, updates = 0.0, 0

    def on_step_end(self, arguments, state, control, **unused):
      if state.global_step == 3:
        self.begin = time.perf_counter()
      elif self.begin:
        self.updates += 1
        if time.perf_counter() - self.begin > args.seconds:
          control.should_training_stop = True

  clock = Clock()
  with tempfile.TemporaryDirectory() as folder:
    trainer = transformers.Trainer(
      model,
      transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=32,
        max_steps=1_000_000,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
      ),
      train_dataset=features,
      data_collator=collate,
      callbacks=[clock],
    )
    trainer.train()
  sizes = torch.tensor([len(f["input_ids"]) for f in features[: 32 * 200]])
  sizes = sizes.reshape(-1, 32).float()
  fill = float(sizes.mean() / sizes.max(dim=1).values.mean())
  return _found(32 * clock.updates, clock.updates, fill, clock.begin)


def _found(rows: int, updates: int, fill: float, begin: float) -> dict:
  seconds = time.perf_counter() - begin
  return {
    "rows_per_second": rows / seconds,
    "rows_per_update": rows / updates,
    "fill": float(fill),
    "epoch": EPOCH / (rows / seconds),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", default="../shared/data/glue")
  parser.add_argument(
    "--vocabulary", default="../shared/data/vocab_t5/spiece.model"
  )
  parser.add_argument("--seconds", type=float, default=120)
  parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.data = os.path.abspath(args.data)
  args.vocabulary = os.path.abspath(args.vocabulary)
  if args.side:
    kind, side = args.side
    run = theirs(kind, args) if side == "HF Trainer" else ours(*args.side, args)
    print(json.dumps(run))
    return
  print(
    f"{'task':<8} {'side':<16} {'rows/s':>7} {'of HF':>6} {'an epoch':>9}"
    f" {'rows/update':>11} {'fill':>6}"
  )
  for kind, sides in SIDES.items():
    results = {}
    for side in reversed(sides):
      command = [
        sys.executable,
        os.path.abspath(__file__),
        "--side",
        kind,
        side,
      ]
      for name in ("data", "vocabulary", "seconds"):
        command.append(f"--{name}={getattr(args, name)}")
      done = subprocess.run(
        command,
        env=os.environ
        | {
          "JAX_PLATFORMS": "cpu",
          "TF_CPP_MIN_LOG_LEVEL": "3",
          "HF_HUB_OFFLINE": "1",
          "PYTHONPATH": os.path.join(ROOT, "tools"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
      )
      found = results[side] = json.loads(done.stdout.splitlines()[-1])
      ratio = (
        found["rows_per_second"] / results["HF Trainer"]["rows_per_second"]
      )
      print(
        f"{kind:<8} {side:<16} {found['rows_per_second']:7.1f} {ratio:5.2f}x"
        f" {found['epoch'] / 60:6.1f} min {found['rows_per_update']:11.1f}"
        f" {found['fill']:6.1%}",
        flush=True,
      )


if __name__ == "__main__":
  main()
