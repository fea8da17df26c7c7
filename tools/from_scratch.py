"""From a folder of books to tables: does FAT5's pre-training pay?

  python tools/from_scratch.py /tmp/road --data=../shared/data [--tokens 5e6]

Trains a vocabulary; from nothing, three times, a small FAT5 on as many tokens
of text: by UL2's denoisers, by T5's span corruption, and as a causal language
model; exports each of them, and the weights that they all began with, to the
format of Hugging Face; and fine-tunes the exports on six tasks, with one recipe
a task.
Every step is a command of the library, written beside its results; what is in
the folder already is kept, and the same command goes on.

Writes docs/from_scratch.md and .png.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
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
# Of each objective, lengths that its examples fill: UL2's need the most room.
OBJECTIVES = {
  "ul2": {"inputs": 256, "targets": 192, "text": 96},
  "span_corruption": {"inputs": 256, "targets": 64, "text": None},
  "causal_lm": {"inputs": 8, "targets": 256, "text": None},
}
# Adafactor's, relative to the parameters.
RATE = 0.01
NAMES = {
  "nothing": "from nothing",
  "causal_lm": "causal",
  "span_corruption": "span corruption",
  "ul2": "UL2",
}
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


class Task:
  """A fine-tuning: its gin, how long, and what it is judged by."""

  def __init__(self, text, lengths, rows, steps, metric):
    self.text, self.lengths, self.rows, self.steps = text, lengths, rows, steps
    self.metric = metric
    self.more = "" if "targets" in lengths else "BUCKETS = 4\n"


def sentences(task: str, steps: int, inputs: int, metric: str) -> Task:
  text = SENTENCES.replace("{task}", task)
  return Task(text, {"inputs": inputs}, 2048 // inputs, steps, metric)


# About 2,000 tokens an update.
TASKS = {
  "SST-2": sentences("glue_sst2_classes", 800, 128, "accuracy"),
  "RTE": sentences("glue_rte_classes", 400, 256, "accuracy"),
  "MRPC": sentences("glue_mrpc_classes", 400, 128, "f1"),
  "STS-B": sentences("glue_stsb_classes", 400, 128, "pearson_corrcoef"),
  "UD tags": Task(TAGS, {"inputs": 128}, 16, 400, "tag_accuracy"),
  "DialogSum": Task(
    SUMMARIES, {"inputs": 320, "targets": 64}, 8, 300, "rougeLsum"
  ),
}


class Road:
  """The steps, each a command whose results stay in the folder."""

  def __init__(self, folder: str, data: str, tokens: int):
    self.folder, self.data = os.path.abspath(folder), os.path.abspath(data)
    self.tokens = tokens
    self.vocabulary = self.path("spiece.model")
    self._environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "FAT5_JAX_CACHE": self.path("cache"),
      "TF_CPP_MIN_LOG_LEVEL": "3",
      "PYTHONPATH": ROOT,
    }

  def path(self, *names: str) -> str:
    return os.path.join(self.folder, *names)

  def do(self, name: str, *command: str) -> None:
    """Runs Python with these arguments, once; what it prints goes to a file."""
    done = self.path(f"{name}.json")
    if os.path.exists(done):
      return
    begin = time.perf_counter()
    with open(self.path(f"{name}.out"), "w", encoding="utf-8") as file:
      status = subprocess.run(
        [sys.executable, *command],
        cwd=self.folder,
        env=self._environment,
        stdout=file,
        stderr=subprocess.STDOUT,
      ).returncode
    if status:
      raise SystemExit(f"{name} failed: see {file.name}")
    seconds = time.perf_counter() - begin
    with open(done, "w", encoding="utf-8") as file:
      json.dump({"command": command, "seconds": seconds}, file)
    print(f"{name}: {seconds:,.0f} s", flush=True)

  def seconds(self) -> float:
    """Of all steps together."""
    found = 0.0
    for path in glob.glob(self.path("*.json")):
      with open(path, encoding="utf-8") as file:
        found += json.load(file)["seconds"]
    return found

  # ---- The steps

  def make_vocabulary(self) -> None:
    self.do(
      "vocabulary",
      os.path.join(ROOT, "tools/train_vocabulary.py"),
      self.vocabulary,
      os.path.join(self.data, BOOKS),
      "--pieces=8000",
    )

  def pretrain(self, start: str) -> None:
    lengths = dict(OBJECTIVES["ul2" if start == "nothing" else start])
    text = lengths.pop("text")
    flags = {
      "VOCAB_FILE": self.vocabulary,
      "TRAIN_FILES": os.path.join(self.data, BOOKS),
      "VALIDATION_FILES": os.path.join(self.data, HELD_OUT),
      "MODEL_DIR": self.path(start),
      "TASK_FEATURE_LENGTHS": lengths,
      "TEXT_LENGTH": text,
      "BATCH_SIZE": ROWS,
    }
    if start == "nothing":
      # The weights that the others begin with: a step of a rate of 0.
      flags |= {"TRAIN_STEPS": 1, "LEARNING_RATE": 0.0, "WARMUP_STEPS": 0}
      flags |= {"EVAL_SPLIT": None}
    else:
      steps = round(self.tokens / (ROWS * self.tokens_a_row(start)))
      flags |= {"OBJECTIVE": start, "TRAIN_STEPS": steps}
      flags |= {"EVAL_PERIOD": steps // 8, "CHECKPOINT_PERIOD": steps}
    self.do(start, *command("recipes/fat5_from_scratch.gin", flags))

  def tokens_a_row(self, objective: str) -> float:
    """Tokens of text, each counted once, that a row of a batch holds."""
    import seqio

    from fat5_jax.data import pipeline, pretraining, sources

    lengths = dict(OBJECTIVES[objective])
    task = pretraining.text(
      sources.Files({"train": os.path.join(self.data, BOOKS)}),
      seqio.SentencePieceVocabulary(self.vocabulary, extra_ids=100),
      objective,
      name="counted",
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

  def export(self, start: str) -> None:
    self.do(
      f"{start}-hf",
      os.path.join(ROOT, "tools/convert_checkpoint.py"),
      self.path(start),
      self.path(f"{start}-hf"),
      "--to=hf",
    )

  def tune(self, start: str, name: str, seed: int) -> None:
    """Fine-tunes an export, in transformers' format as a user has it."""
    task = TASKS[name]
    run = run_name(start, name, seed)
    text = task.text.format(data=self.data, folder=self.folder)
    text += COMMON.format(
      folder=self.folder,
      lengths=task.lengths,
      period=task.steps // 4,
      rate=RATE,
      rows=task.rows,
      steps=task.steps,
    )
    path = self.path(f"{run}.gin")
    with open(path, "w", encoding="utf-8") as file:
      file.write(text + task.more)
    flags = {
      "INITIAL_CHECKPOINT_PATH": self.path(f"{start}-hf"),
      "MODEL_DIR": self.path(run),
      "RANDOM_SEED": seed,
    }
    self.do(run, *command(path, flags))


def run_name(start: str, task: str, seed: int) -> str:
  return f"{start}-{task.replace(' ', '_')}-{seed}"


def command(gin_file: str, flags: dict) -> list[str]:
  """Arguments of a training."""
  words = ["-m", "fat5_jax.train", f"--gin_file={gin_file}"]
  return words + [f"--gin.{name}={value!r}" for name, value in flags.items()]


def metrics(run: str, dataset: str, name: str) -> dict[int, float]:
  """Values of a metric by step, from a run folder."""
  found = {}
  with open(os.path.join(run, "metrics.csv"), encoding="utf-8") as file:
    for row in csv.DictReader(file):
      if row["metric"] == name and row["dataset"].startswith(dataset):
        found[int(row["step"])] = float(row["value"])
  if not found:
    raise SystemExit(f"{run}: no {dataset} metric {name!r}")
  return found


# ---- What is told ------------------------------------------------------------


def scores(road: Road, start: str, task: str, seeds: int) -> np.ndarray:
  """Of the last step, by seed, those that are there; in percent."""
  found = []
  for seed in range(seeds):
    curve = curve_of(road, start, task, seed)
    found += [curve[max(curve)]] if curve else []
  return np.array(found)


def curve_of(road: Road, start: str, task: str, seed: int) -> dict:
  """A metric of held-out rows by step, in percent; empty before its run."""
  run = run_name(start, task, seed)
  if not os.path.exists(road.path(f"{run}.json")):
    return {}
  return metrics(road.path(run), "inference_eval", TASKS[task].metric)


def table(road: Road, seeds: int) -> str:
  lines = ["| start | " + " | ".join(TASKS) + " |"]
  lines.append("|---" * (len(TASKS) + 1) + "|")
  for start, name in NAMES.items():
    cells = []
    for task in TASKS:
      found = scores(road, start, task, seeds)
      cell = f"{found.mean():.1f}" if len(found) else ""
      if len(found) > 1:
        cell += f" ({found.min():.1f} to {found.max():.1f})"
      cells.append(cell)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def plot(road: Road, seeds: int, path: str) -> None:
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  panels = 1 + len(TASKS)
  figure, axes = pyplot.subplots(
    2, (panels + 1) // 2, figsize=(13, 6), layout="constrained"
  )
  first, *others = axes.flat
  for start, name in NAMES.items():
    color = f"C{list(NAMES).index(start)}"
    if start in OBJECTIVES:
      loss = metrics(
        road.path(start), "train", "loss_per_nonpadding_target_token"
      )
      first.plot(*zip(*sorted(loss.items())), color=color, label=name)
    for axis, task in zip(others, TASKS):
      for seed in range(seeds):
        curve = sorted(curve_of(road, start, task, seed).items())
        if curve:
          label = name if not seed else None
          axis.plot(*zip(*curve), "-o", color=color, label=label, markersize=3)
  first.set_title("loss on its own objective")
  for axis, (task, setting) in zip(others, TASKS.items()):
    axis.set_title(f"{task}, {setting.metric}")
  for axis in axes.flat[panels:]:
    axis.axis("off")
  for axis in axes[1]:
    axis.set_xlabel("updates")
  others[0].legend(frameon=False)
  figure.savefig(path, dpi=110)


PROMPTS = (
  "[R] The captain looked at the <extra_id_0> and said nothing.",
  "[R] She opened the <extra_id_0>, and went into the <extra_id_1>.",
  "[S] It was a dark night, and the old man <extra_id_0>",
)


def samples(road: Road) -> str:
  """What transformers answers of UL2's export, and summaries, a line each."""
  import transformers

  folder = road.path("ul2-hf")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
  lines = ["| asked | answered |", "|---|---|"]
  for prompt in PROMPTS:
    ids = tokenizer(prompt, return_tensors="pt")
    found = model.float().generate(
      **ids, max_new_tokens=24, num_beams=4, no_repeat_ngram_size=3
    )
    answer = tokenizer.decode(found[0]).replace("<pad>", "").strip()
    lines.append(f"| `{prompt}` | `{answer}` |")
  run = road.path(run_name("ul2", "DialogSum", 0))
  found = glob.glob(
    os.path.join(run, "inference_eval", "dialogsum-*[0-9].jsonl")
  )
  with open(max(found), encoding="utf-8") as file:
    for line in list(file)[:3]:
      row = json.loads(line)
      asked = row["input"]["inputs_pretokenized"]
      lines.append(f"| {asked[:160]} ... | {row['prediction']} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder")
  parser.add_argument("--data", default=os.path.join(ROOT, "../shared/data"))
  parser.add_argument("--tokens", type=float, default=5e6)
  parser.add_argument("--seeds", type=int, default=1, help="of fine-tuning")
  flags = parser.parse_args()
  os.makedirs(flags.folder, exist_ok=True)
  road = Road(flags.folder, flags.data, int(flags.tokens))
  road.make_vocabulary()
  hold_out(road)
  for start in NAMES:
    road.pretrain(start)
    road.export(start)
  for seed in range(flags.seeds):
    for task in TASKS:
      for start in NAMES:
        road.tune(start, task, seed)
  write(road, flags.seeds)


PAGE = """# FAT5 from nothing

From a folder of books to fine-tuned models, on two CPU cores, by one command
({minutes:.0f} minutes):

```
python tools/from_scratch.py /tmp/road --data=../shared/data
```

What it does, on data of your own:

```
python tools/train_vocabulary.py spiece.model '/data/books/train*' --pieces 8000
python -m fat5_jax.train --gin_file=recipes/fat5_from_scratch.gin \\
  --gin.VOCAB_FILE=spiece.model --gin.TRAIN_FILES='/data/books/train*' \\
  --gin.VALIDATION_FILES='/data/books/dev*' --gin.MODEL_DIR=/tmp/fat5
python tools/convert_checkpoint.py /tmp/fat5 /models/fat5 --to hf
python -m fat5_jax.train --gin_file=recipes/classify.gin \\
  --gin.INITIAL_CHECKPOINT_PATH=/models/fat5 \\
  --gin.MIXTURE_OR_TASK_NAME=glue_sst2_classes --gin.DATA_DIR=/data/glue \\
  --gin.MODEL_DIR=/tmp/sst2
python tools/convert_checkpoint.py /tmp/sst2 /models/fat5-sst2 --to hf
```

A model of 5.9M parameters ({size:.1f} MB in bfloat16) reads {tokens:.1f}M
tokens of books by each objective, each token once, from the same weights.

## Does it pay?

Held-out rows after the same fine-tuning, the same rate for all{seeds}:

{table}

{about}

![losses and metrics](from_scratch.png)

## What it says

{samples}

By transformers from UL2's export (4 beams); summaries greedy, of held-out
dialogues.

Made by `tools/from_scratch.py`.
"""


def write(road: Road, seeds: int) -> None:
  """The page and the plot; prints the table."""
  found = table(road, seeds)
  print(found)
  told = [f"{k}: {t.metric}, {t.steps} updates" for k, t in TASKS.items()]
  page = PAGE.format(
    minutes=road.seconds() / 60,
    size=os.path.getsize(road.path("ul2-hf/model.safetensors")) / 1e6,
    tokens=road.tokens / 1e6,
    seeds="" if seeds == 1 else f", {seeds} seeds",
    table=found,
    about="; ".join(told),
    samples=samples(road),
  )
  with open(os.path.join(ROOT, "docs/from_scratch.md"), "w") as file:
    file.write(page)
  plot(road, seeds, os.path.join(ROOT, "docs/from_scratch.png"))


def hold_out(road: Road) -> None:
  """DialogSum's test rows with the first of their three summaries."""
  source = os.path.join(road.data, "sum_dialogsum_en/dialogsum.test.jsonl")
  with (
    open(source, encoding="utf-8") as rows,
    open(road.path("dialogsum.jsonl"), "w", encoding="utf-8") as file,
  ):
    for row in map(json.loads, rows):
      kept = {"dialogue": row["dialogue"], "summary": row["summary1"]}
      file.write(json.dumps(kept, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
