"""The data pipeline alone: tokens a second, fill, first batch, memory.

  python tools/bench_data.py --data=../shared/data/corpus_books_en

Rows are paragraphs of books, four fifths of each as inputs and the rest as
targets, packed into 512 / 128. The sides run one after the other, each in a
process of its own: preparing and reading, reading what is prepared, and, with
--before=COMMIT, the pipeline of that commit from a worktree of this repository.

  python tools/bench_data.py --resume=100000

instead: the first batch of a packed mixture at step 0, nothing prepared, and in
another process at that step, seconds and bytes read.
"""

import argparse
import hashlib
import json
import lzma
import os
import resource
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LENGTHS = {"inputs": 512, "targets": 128}


def write_rows(data: str, path: str, megabytes: float) -> int:
  """Paragraphs of the books as JSON lines, over and over up to a size."""
  files = sorted(name for name in os.listdir(data) if name.endswith(".xz"))
  count = written = 0
  with open(path, "w", encoding="utf-8") as out:
    while True:
      for name in files:
        with lzma.open(
          os.path.join(data, name), "rt", encoding="utf-8"
        ) as file:
          for line in file:
            for paragraph in json.loads(line)["text"].split("\n"):
              words = paragraph.split()
              if len(words) < 10:
                continue
              end = len(words) * 4 // 5
              row = {
                "inputs": " ".join(words[:end]),
                "targets": " ".join(words[end:]),
              }
              count += 1
              written += out.write(json.dumps(row) + "\n")
              if written > megabytes * 1e6:
                return count


def measure(path: str, vocabulary: str, seconds: float, batch: int) -> None:
  """Reads batches in this process, and prints what it saw as JSON."""
  begin = time.monotonic()
  import seqio

  from fat5_jax.data import pipeline, sources, tasks

  imported = time.monotonic()
  vocab = seqio.SentencePieceVocabulary(vocabulary, 100)
  task = tasks.text_to_text(
    sources.Files({"train": path}), "{inputs}", "{targets}", vocab, name="books"
  )
  config = pipeline.DatasetConfig(
    task, LENGTHS, "train", batch, shuffle=True, pack=True
  )
  batches = pipeline.train_batches(config, vocab.vocab_size)
  next(batches)
  first = time.monotonic()
  tokens, room = [0, 0], [0, 0]
  while time.monotonic() - first < seconds:
    found = next(batches)
    for side, key in enumerate(("encoder_input", "decoder_target")):
      values = found[f"{key}_tokens"]
      tokens[side] += int((values > 0).sum())
      room[side] += values.size
  end = time.monotonic()
  print(
    json.dumps(
      {
        "import": imported - begin,
        "first": first - imported,
        "tokens_per_second": sum(tokens) / (end - first),
        "fill": [t / r for t, r in zip(tokens, room)],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
      }
    )
  )


def mixture(path: str, vocabulary: str, batch: int):
  """A packed mixture of two tasks, and the ids of its vocabulary."""
  import seqio

  from fat5_jax.data import pipeline, sources, tasks

  vocab = seqio.SentencePieceVocabulary(vocabulary, 100)
  parts = [
    tasks.text_to_text(
      sources.Files({"train": path}), inputs, "{targets}", vocab, name=name
    )
    for name, inputs in (("go_on", "go on: {inputs}"), ("books", "{inputs}"))
  ]
  both = seqio.Mixture(
    "both", [(part, 1.0 + i) for i, part in enumerate(parts)]
  )
  return pipeline.DatasetConfig(
    both, LENGTHS, "train", batch, shuffle=True, pack=True
  ), vocab.vocab_size


def measure_resume(path: str, vocabulary: str, batch: int, place: str) -> None:
  """The first batch from a position on ("" is the beginning), as JSON."""
  from fat5_jax.data import pipeline

  config, size = mixture(path, vocabulary, batch)
  position = None
  if place:
    with open(place, encoding="utf-8") as file:
      position = json.load(file)
  before, begin = bytes_read(), time.monotonic()
  found = next(pipeline.train_batches(config, size, position))
  print(
    json.dumps(
      {
        "first": time.monotonic() - begin,
        "bytes": bytes_read() - before,
        "batch": digest(found),
      }
    )
  )


def digest(batch) -> str:
  """Of all arrays of a batch."""
  found = hashlib.sha256()
  for name in sorted(batch):
    found.update(name.encode() + batch[name].tobytes())
  return found.hexdigest()


def bytes_read() -> int:
  """By this process so far, from files, the page cache counted."""
  with open("/proc/self/io", encoding="utf-8") as file:
    return int(file.readline().split()[1])


def resume(args, path: str, folder: str) -> None:
  from fat5_jax.data import pipeline

  cache = os.environ["FAT5_JAX_CACHE"] = os.path.join(folder, "cache")
  print(f"{'from step':>10} {'first batch':>12} {'bytes read':>14}")
  first = run_side(ROOT, cache, args, path, "--place=")
  print(f"{0:10,} {first['first']:11.2f}s {first['bytes']:14,}", flush=True)
  config, size = mixture(path, args.vocabulary, args.batch)
  # What every host plans; none of the rows is read.
  batches = pipeline.train_batches(config, size, own=lambda rows: (0, 0))
  begin = time.monotonic()
  for _ in range(args.resume):
    next(batches)
  planned = time.monotonic() - begin
  place = os.path.join(folder, "position.json")
  with open(place, "w", encoding="utf-8") as file:
    json.dump(batches.position, file)
  expected = next(pipeline.train_batches(config, size, batches.position))
  again = run_side(ROOT, cache, args, path, f"--place={place}")
  same = again["batch"] == digest(expected)
  print(
    f"{args.resume:10,} {again['first']:11.2f}s {again['bytes']:14,}\n"
    f"the same batch: {same}; epochs {batches.epochs}; planning alone took"
    f" {planned / args.resume * 1e3:.2f} ms a step; the position has"
    f" {os.path.getsize(place):,} bytes"
  )


def run_side(
  root: str, cache: str, args, path: str, *more: str
) -> dict[str, float]:
  command = [sys.executable, os.path.abspath(__file__), "--measure", path]
  command += more
  for name in ("vocabulary", "seconds", "batch"):
    command.append(f"--{name}={getattr(args, name)}")
  done = subprocess.run(
    command,
    cwd=root,
    env=os.environ
    | {
      "PYTHONPATH": root,
      "FAT5_JAX_CACHE": cache,
      "JAX_PLATFORMS": "cpu",
      "TF_CPP_MIN_LOG_LEVEL": "3",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", default="../shared/data/corpus_books_en")
  parser.add_argument(
    "--vocabulary", default="../shared/data/vocab_t5/spiece.model"
  )
  parser.add_argument("--megabytes", type=float, nargs="+", default=[100])
  parser.add_argument("--seconds", type=float, default=20)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--before", help="a commit to measure too")
  parser.add_argument(
    "--resume", type=int, metavar="STEP", help="measure going on instead"
  )
  parser.add_argument("--measure", help=argparse.SUPPRESS)
  parser.add_argument("--place", help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.vocabulary = os.path.abspath(args.vocabulary)
  if args.measure:
    sys.path.insert(0, os.getcwd())
    if args.place is not None:
      measure_resume(args.measure, args.vocabulary, args.batch, args.place)
      return
    measure(args.measure, args.vocabulary, args.seconds, args.batch)
    return
  if args.resume:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path.insert(0, ROOT)
    with tempfile.TemporaryDirectory() as folder:
      path = os.path.join(folder, "books.jsonl")
      write_rows(args.data, path, args.megabytes[0])
      resume(args, path, folder)
    return
  print(
    f"{'MB':>6} {'side':<10} {'first batch':>11} {'tokens/s':>12} {'fill':>13}"
    f" {'memory':>9}"
  )
  with tempfile.TemporaryDirectory() as folder:
    for megabytes in args.megabytes:
      path = os.path.join(folder, f"books-{megabytes:g}.jsonl")
      write_rows(args.data, path, megabytes)
      cache = os.path.join(folder, f"cache-{megabytes:g}")
      sides = [("cold", ROOT), ("prepared", ROOT)]
      if args.before:
        tree = os.path.join(folder, "before")
        if not os.path.exists(tree):
          command = ["git", "worktree", "add", "--detach", tree, args.before]
          subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        sides.append((args.before, tree))
      for name, root in sides:
        found = run_side(root, cache, args, path)
        print(
          f"{megabytes:6g} {name:<10} {found['first']:10.1f}s"
          f" {found['tokens_per_second']:12,.0f} "
          f" {' / '.join(f'{share:.1%}' for share in found['fill']):>13}"
          f" {found['memory']:6,.0f} MB",
          flush=True,
        )
      os.remove(path)
    if args.before:
      command = ["git", "worktree", "remove", "--force", tree]
      subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


if __name__ == "__main__":
  main()
