"""Memory and rate of an evaluation against the number of its rows.

  python tools/bench_eval.py [--rows 2000 20000 200000]

A tiny classifier (and, with --text, a tiny text-to-text model) is evaluated on
rows of a file, prepared before; each number of rows in a process of its own.
`grown` is what the process holds more at its peak than before its first row.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def write_rows(path: str, count: int) -> None:
  with open(path, "w", encoding="utf-8") as file:
    for i in range(count):
      row = {"text": f"row {i} {'of words ' * (i % 5)}", "label": "ab"[i % 2]}
      file.write(json.dumps(row) + "\n")


def measure(path: str, is_text: bool, folder: str) -> None:
  import seqio

  from fat5_jax.data import head_tasks, pipeline, sources, tasks
  from fat5_jax.distributed.sharding import Partitioner
  from fat5_jax.evaluation.generation import InferenceEvaluator
  from fat5_jax.models import factory, initial
  from fat5_jax.models.config import HeadConfig, T5Config

  vocabulary, source = seqio.ByteVocabulary(0), sources.Files({"test": path})
  head = None
  if is_text:
    task = tasks.text_to_text(
      source, "{text}", "{label}", vocabulary, name="rows"
    )
  else:
    task = head_tasks.classification(
      source, "{text}", "label", vocabulary, ("a", "b"), name="rows"
    )
    head = HeadConfig("sequence_classification", label_names=("a", "b"))
  config = T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="float32",
  )
  model = factory.create(config, head)
  params = initial.init_params(model, 0)
  data = pipeline.DatasetConfig(task, None, "test", 256)
  evaluator = InferenceEvaluator(model, data, folder, Partitioner())
  begin, before = time.monotonic(), peak()
  found = evaluator.evaluate(params, 0)
  print(
    json.dumps(
      {
        "seconds": time.monotonic() - begin,
        "before": before,
        "grown": peak() - before,
        "metrics": found["rows"],
      }
    )
  )


def peak() -> float:
  """MB that this process held at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--rows", type=int, nargs="+", default=[2000, 20000, 200000]
  )
  parser.add_argument("--text", action="store_true")
  parser.add_argument("--measure", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    with tempfile.TemporaryDirectory() as folder:
      measure(args.measure, args.text, folder)
    return
  print(f"{'rows':>8} {'rows/s':>8} {'before':>9} {'grown':>8}")
  with tempfile.TemporaryDirectory() as folder:
    for count in args.rows:
      path = os.path.join(folder, f"rows-{count}.jsonl")
      write_rows(path, count)
      command = [sys.executable, os.path.abspath(__file__), "--measure", path]
      done = subprocess.run(
        command + ["--text"] * args.text,
        env=os.environ
        | {
          "FAT5_JAX_CACHE": os.path.join(folder, "cache"),
          "JAX_PLATFORMS": "cpu",
          "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
      )
      found = json.loads(done.stdout.splitlines()[-1])
      print(
        f"{count:8,} {count / found['seconds']:8,.0f}"
        f" {found['before']:6,.0f} MB {found['grown']:5,.0f} MB",
        flush=True,
      )


if __name__ == "__main__":
  main()
