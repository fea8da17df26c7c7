"""From a folder of books to tables: does FAT5's pre-training pay?

  python tools/from_scratch.py /tmp/road --data=../shared/data [--tokens 8e6]

Trains a vocabulary; from nothing, three times, a small FAT5 on as many tokens
of text: by UL2's denoisers, by T5's span corruption, and as a causal language
model; exports each of them, and the weights that they all began with, to the
format of Hugging Face; and fine-tunes the exports on six tasks, with one recipe
a task.
Three quarters of the texts are books. The others are what the tasks' training
rows say, without their labels, and paragraphs of SQuAD. An export reads on, by
its own objective, a third as many tokens: three quarters of the examples are
SST-2's sentences, the others those texts (arXiv:2004.10964).

Every step is a command of the library, written beside its results, two of them
at a time, on half of the cores each; what is in the folder already is kept, and
the same command goes on.

Writes docs/from_scratch.md and .png (tools/from_scratch_page.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from concurrent import futures
import csv
import dataclasses
import json
import lzma
import os
import queue
import subprocess
import sys
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BOOKS = "corpus_books_en/train-0000[0-4]*.xz"
HELD_OUT = "corpus_books_en/train-00005*.xz"
ROWS = 4
# Arrays of tens of MB that every update frees and asks for again: kept, and in
# pages of 2 MB, a small model's update takes three quarters of the time.
LARGE_PAGES = (
  "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1"
  ":glibc.malloc.trim_threshold=8589934592"
)
# Of each objective, lengths that its examples fill: UL2's need the most room.
OBJECTIVES = {
  "ul2": {"inputs": 256, "targets": 192, "text": 96},
  "span_corruption": {"inputs": 256, "targets": 64, "text": None},
  "causal_lm": {"inputs": 8, "targets": 256, "text": None},
}
# Adafactor's, relative to the parameters.
RATE = 0.01
RECIPE = "recipes/fat5_from_scratch.gin"
SENTENCES = """
from __gin__ import dynamic_registration
include 'recipes/classify.gin'
MIXTURE_OR_TASK_NAME = '{task}'
DATA_DIR = '{data}/glue'
"""
TAGS = """
from __gin__ import dynamic_registration
include 'recipes/tag.gin'
TRAIN_FILES = '{data}/pos_ud_ewt/*-train.conllu.xz'
VALIDATION_FILES = '{data}/pos_ud_ewt/*-dev.conllu.xz'
"""
# The training file of DialogSum is not among the data: its development rows
# train, its test rows are held out.
SUMMARIES = """
from __gin__ import dynamic_registration
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks
include 'runs/finetune.gin'
include 'models/from_checkpoint.gin'
MIXTURE_OR_TASK_NAME = @tasks.text_to_text()
tasks.text_to_text:
  source = @sources.Files()
  inputs = 'summarize: {{dialogue}}'
  targets = '{{summary}}'
  name = 'dialogsum'
  vocabulary = %VOCABULARY
  metrics = ('rouge',)
sources.Files.splits = {{
  'train': '{data}/sum_dialogsum_en/dialogsum.dev.jsonl',
  'validation': '{folder}/dialogsum.jsonl',
}}
"""
# QNLI's training file is not among the data: as many of its development rows
# train as RTE has, the others are held out.
QUESTIONS = """
from __gin__ import dynamic_registration
import fat5_jax.data.head_tasks as head_tasks
import fat5_jax.data.sources as sources
include 'recipes/classify.gin'
MIXTURE_OR_TASK_NAME = @head_tasks.classification()
head_tasks.classification:
  source = @sources.Files()
  inputs = ('{{question}}', '{{sentence}}')
  label = 'label'
  vocabulary = %VOCABULARY
  name = 'qnli'
sources.Files.splits = {{
  'train': '{folder}/qnli-train.jsonl',
  'validation': '{folder}/qnli.jsonl',
}}
"""
COMMON = """
DTYPE = 'bfloat16'
DROPOUT_RATE = 0.1
TRAIN_STEPS = {steps}
TRAIN_STEPS_RELATIVE = None
EVAL_PERIOD = {period}
CHECKPOINT_PERIOD = {steps}
STATS_PERIOD = {period}
BATCH_SIZE = {rows}
TASK_FEATURE_LENGTHS = {lengths}
SCHEDULE = 'constant * linear_warmup * linear_to_end'
LEARNING_RATE = {rate}
WARMUP_STEPS = 20
"""


@dataclasses.dataclass(frozen=True)
class Task:
  """A fine-tuning: its gin, how long, how often, and what it is judged by."""

  text: str
  lengths: dict[str, int]
  rows: int
  steps: int
  metric: str
  # More where a difference is near what one run's chance is.
  seeds: int = 1

  @property
  def gin(self) -> str:
    buckets = "" if "targets" in self.lengths else "BUCKETS = 4\n"
    return self.text + COMMON + buckets


def glue(task: str, inputs: int, steps: int, metric: str, **more) -> Task:
  text = SENTENCES.replace("{task}", task)
  return Task(text, {"inputs": inputs}, 2048 // inputs, steps, metric, **more)


# About 2,000 tokens an update.
TASKS = {
  "SST-2": glue("glue_sst2_classes", 128, 1000, "accuracy", seeds=3),
  "QNLI": Task(QUESTIONS, {"inputs": 128}, 16, 150, "accuracy", seeds=3),
  "UD tags": Task(TAGS, {"inputs": 128}, 16, 200, "tag_accuracy"),
  "DialogSum": Task(
    SUMMARIES, {"inputs": 320, "targets": 64}, 8, 300, "rougeLsum"
  ),
  "STS-B": glue("glue_stsb_classes", 128, 300, "pearson_corrcoef"),
  "RTE": glue("glue_rte_classes", 256, 200, "accuracy"),
}


class Road:
  """The steps, each a command whose results stay in the folder."""

  def __init__(self, folder: str, data: str, tokens: int):
    self.folder, self.data = os.path.abspath(folder), os.path.abspath(data)
    self.tokens = tokens
    self.vocabulary = self.path("spiece.model")
    self.texts = self.path("texts.jsonl")
    self.sentences = self.path("sentences.jsonl")
    self.files = {os.path.join(self.data, BOOKS): 3.0, self.texts: 1.0}
    self.task_files = {self.sentences: 3.0, self.texts: 1.0}
    self._environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "FAT5_JAX_CACHE": self.path("cache"),
      "TF_CPP_MIN_LOG_LEVEL": "3",
      "PYTHONPATH": ROOT,
      "GLIBC_TUNABLES": LARGE_PAGES,
    }
    # A small model's update leaves a second core half idle.
    cores = sorted(os.sched_getaffinity(0))
    self.lanes: queue.Queue[set[int]] = queue.Queue()
    for half in (cores[::2], cores[1::2]):
      if half:
        self.lanes.put(set(half))

  def path(self, *names: str) -> str:
    return os.path.join(self.folder, *names)

  def do(self, name: str, *command: str) -> None:
    """Runs Python with these arguments, once; what it prints goes to a file."""
    done = self.path(f"{name}.json")
    if os.path.exists(done):
      return
    cores = self.lanes.get()
    begin = time.time()
    try:
      with open(self.path(f"{name}.out"), "w", encoding="utf-8") as file:
        process = subprocess.Popen(
          [sys.executable, *command],
          cwd=self.folder,
          env=self._environment,
          stdout=file,
          stderr=subprocess.STDOUT,
        )
        os.sched_setaffinity(process.pid, cores)
        status = process.wait()
    finally:
      self.lanes.put(cores)
    end = time.time()
    if status:
      raise SystemExit(f"{name} failed: see {file.name}")
    with open(done, "w", encoding="utf-8") as file:
      json.dump({"command": command, "begin": begin, "end": end}, file)
    print(f"{name}: {end - begin:,.0f} s", flush=True)

  # ---- The steps

  def make_vocabulary(self) -> None:
    self.do(
      "vocabulary",
      os.path.join(ROOT, "tools/train_vocabulary.py"),
      self.vocabulary,
      *self.files,
      "--pieces=8000",
    )

  def begin(self) -> None:
    """The weights that all begin with: a step of a rate of 0."""
    flags = self._reading("ul2", self.files)
    flags |= {"VOCAB_FILE": self.vocabulary, "MODEL_DIR": "nothing"}
    flags |= {"TRAIN_STEPS": 1, "LEARNING_RATE": 0.0, "WARMUP_STEPS": 0}
    flags |= {"EVAL_SPLIT": None}
    self.do("nothing", *training(RECIPE, flags))
    self._export("nothing", "nothing-hf")

  def pretrain(self, start: str) -> None:
    """By an objective: first mostly books, then the tasks' texts."""
    flags = self._reading(start, self.files)
    flags |= self._steps(self.tokens / self.tokens_a_row(start, self.files))
    flags |= {"VOCAB_FILE": self.vocabulary, "MODEL_DIR": start}
    self.do(start, *training(RECIPE, flags))
    self._export(start, f"{start}-books-hf")

    adapted = f"{start}-texts"
    flags = self._reading(start, self.task_files)
    rows = self.tokens / 3 / self.tokens_a_row(start, self.task_files)
    flags |= self._steps(rows) | {"MODEL_DIR": adapted}
    flags |= {"INITIAL_CHECKPOINT_PATH": self.path(f"{start}-books-hf")}
    self.do(adapted, *training(RECIPE, flags, "models/from_checkpoint.gin"))
    self._export(adapted, f"{start}-hf")

  def _reading(self, objective: str, files: dict) -> dict:
    lengths = dict(OBJECTIVES[objective])
    return {
      "TRAIN_FILES": files,
      "VALIDATION_FILES": os.path.join(self.data, HELD_OUT),
      "OBJECTIVE": objective,
      "TEXT_LENGTH": lengths.pop("text"),
      "TASK_FEATURE_LENGTHS": lengths,
      "BATCH_SIZE": ROWS,
    }

  def _steps(self, rows: float) -> dict:
    steps = round(rows / ROWS)
    every = max(1, steps // 8)
    return {
      "TRAIN_STEPS": steps,
      "EVAL_PERIOD": every,
      "CHECKPOINT_PERIOD": every,
    }

  def _export(self, run: str, folder: str) -> None:
    tool = os.path.join(ROOT, "tools/convert_checkpoint.py")
    self.do(folder, tool, run, folder, "--to=hf")

  def tokens_a_row(self, objective: str, files: dict) -> float:
    """Tokens of text, each counted once, that a row of a batch holds."""
    from fat5_jax import console

    with console.without_native_lines():
      import seqio

    from fat5_jax.data import pipeline, pretraining, sources

    lengths = dict(OBJECTIVES[objective])
    task = pretraining.text(
      sources.Files({"train": files}),
      seqio.SentencePieceVocabulary(self.vocabulary, extra_ids=100),
      objective,
      name=f"counted_{objective}",
      text_length=lengths.pop("text"),
    )
    os.environ["FAT5_JAX_CACHE"] = self.path("cache")
    batches = pipeline.train_batches(
      pipeline.DatasetConfig(task, lengths, "train", ROWS, pack=True), 8192
    )
    counts = []
    for batch, _ in zip(batches, range(100)):
      sides = ("encoder_input_tokens", "decoder_target_tokens")
      # Neither padding, ends, unknown, modes nor sentinels.
      is_text = [(batch[s] > 5) & (batch[s] < 8000) for s in sides]
      counts.append(sum(x.sum() for x in is_text) / ROWS)
    return float(np.mean(counts))

  def tune(self, start: str, name: str, seed: int) -> None:
    """Fine-tunes an export, in transformers' format as a user has it."""
    task = TASKS[name]
    run = run_name(start, name, seed)
    text = task.gin.format(
      data=self.data,
      folder=self.folder,
      lengths=task.lengths,
      period=task.steps // 4,
      rate=RATE,
      rows=task.rows,
      steps=task.steps,
    )
    path = self.path(f"{run}.gin")
    with open(path, "w", encoding="utf-8") as file:
      file.write(text)
    flags = {
      "INITIAL_CHECKPOINT_PATH": self.path(f"{start}-hf"),
      "MODEL_DIR": self.path(run),
      "RANDOM_SEED": seed,
    }
    self.do(run, *training(path, flags))


def run_name(start: str, task: str, seed: int) -> str:
  return f"{start}-{task.replace(' ', '_')}-{seed}"


def training(gin_file: str, flags: dict, *more: str) -> list[str]:
  """Arguments of a training, from gin files of which the later decide."""
  words = [f"--gin_file={name}" for name in (gin_file, *more)]
  words += [f"--gin.{name}={value!r}" for name, value in flags.items()]
  return ["-m", "fat5_jax.train", *words]


# ---- The data ----------------------------------------------------------------


def read_glue(data: str, task: str, name: str) -> Iterator[dict]:
  path = os.path.join(data, "glue", task, f"{name}.tsv")
  with open(path, encoding="utf-8-sig") as file:
    yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def said(data: str, task: str, columns: tuple, words: int) -> Iterator[str]:
  """What training rows say, those of so many words."""
  for row in read_glue(data, task, "train"):
    text = " ".join(row[column] or "" for column in columns)
    if len(text.split()) >= words:
      yield text


def texts(data: str) -> Iterator[str]:
  """What the tasks' training rows say, and paragraphs of SQuAD; no labels."""
  # Most of SST-2's rows are pieces of others.
  yield from said(data, "SST-2", ("sentence",), 10)
  yield from said(data, "MRPC", ("#1 String", "#2 String"), 10)
  for task in ("RTE", "STS-B"):
    yield from said(data, task, ("sentence1", "sentence2"), 10)
  path = os.path.join(data, "pos_ud_ewt/en_ewt-ud-train.conllu.xz")
  with lzma.open(path, "rt", encoding="utf-8") as file:
    lines = [x[9:].strip() for x in file if x.startswith("# text = ")]
  yield from (" ".join(lines[i : i + 8]) for i in range(0, len(lines), 8))
  path = os.path.join(data, "sum_dialogsum_en/dialogsum.dev.jsonl")
  with open(path, encoding="utf-8") as file:
    yield from (json.loads(line)["dialogue"] for line in file)
  path = os.path.join(data, "qa_squad_en/squad_extra_train.jsonl")
  with open(path, encoding="utf-8") as file:
    yield from dict.fromkeys(json.loads(line)["context"] for line in file)


def dialogues(data: str) -> Iterator[dict]:
  """DialogSum's test rows with the first of their three summaries."""
  path = os.path.join(data, "sum_dialogsum_en/dialogsum.test.jsonl")
  with open(path, encoding="utf-8") as file:
    for row in map(json.loads, file):
      yield {"dialogue": row["dialogue"], "summary": row["summary1"]}


def questions(data: str) -> tuple[list[dict], list[dict]]:
  """QNLI's rows that train, and those that share nothing with them."""
  rows = list(read_glue(data, "QNLI", "dev"))
  order = np.random.default_rng(0).permutation(len(rows))
  train = [rows[i] for i in order[:2490]]
  seen = {row[side] for row in train for side in ("question", "sentence")}
  others = [rows[i] for i in order[2490:]]
  return train, [
    row for row in others if not {row["question"], row["sentence"]} & seen
  ]


def write_rows(path: str, rows: Iterable[dict]) -> None:
  from fat5_jax.convert import plain_files

  lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
  plain_files.replace_with(path, "".join(lines).encode())


def write_data(road: Road) -> None:
  """The files that are made of the data, those that are not there."""
  train, held_out = questions(road.data)
  files = {
    road.texts: ({"text": text} for text in texts(road.data)),
    road.sentences: (
      {"text": text} for text in said(road.data, "SST-2", ("sentence",), 6)
    ),
    road.path("dialogsum.jsonl"): dialogues(road.data),
    road.path("qnli-train.jsonl"): train,
    road.path("qnli.jsonl"): held_out,
  }
  for path, rows in files.items():
    if not os.path.exists(path):
      write_rows(path, rows)


def _go(road: Road, pool: futures.Executor) -> None:
  """Pre-trains, and fine-tunes each start as soon as it is there."""
  ready = {pool.submit(lambda: None): "nothing"}
  ready |= {pool.submit(road.pretrain, start): start for start in OBJECTIVES}
  tunings = []
  for one in futures.as_completed(ready):
    one.result()
    tunings += [
      pool.submit(road.tune, ready[one], name, seed)
      for name, task in TASKS.items()
      for seed in range(task.seeds)
    ]
  for one in tunings:
    one.result()


def main() -> None:
  from tools import from_scratch_page

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder")
  parser.add_argument("--data", default=os.path.join(ROOT, "../shared/data"))
  parser.add_argument("--tokens", type=float, default=8e6)
  flags = parser.parse_args()
  for name in (os.path.dirname(BOOKS), "glue", "sum_dialogsum_en"):
    if not os.path.isdir(os.path.join(flags.data, name)):
      parser.error(f"--data={flags.data}: no folder {name} is there")
  os.makedirs(flags.folder, exist_ok=True)
  road = Road(flags.folder, flags.data, int(flags.tokens))
  write_data(road)
  road.make_vocabulary()
  # Alone: it fills the cache of tokens for the others.
  road.begin()
  with futures.ThreadPoolExecutor(road.lanes.qsize()) as pool:
    try:
      _go(road, pool)
    except BaseException:
      # What has not begun does not: the failure is told now.
      pool.shutdown(cancel_futures=True)
      raise
  from_scratch_page.write(road)


if __name__ == "__main__":
  main()
