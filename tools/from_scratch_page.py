"""What `from_scratch` found: a table, a plot, samples; docs/from_scratch.md."""

from __future__ import annotations

import csv
import glob
import json
import os

import numpy as np

from tools.from_scratch import OBJECTIVES, ROOT, TASKS, Road, run_name

NAMES = {
  "nothing": "from nothing",
  "causal_lm": "causal",
  "span_corruption": "span corruption",
  "ul2": "UL2",
}


def seconds(road: Road) -> float:
  """In which a step ran; what ran beside another counts once."""
  spans = []
  for path in glob.glob(road.path("*.json")):
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
    spans.append((found["begin"], found["end"]))
  total, reached = 0.0, 0.0
  for begin, end in sorted(spans):
    total += max(0.0, end - max(begin, reached))
    reached = max(reached, end)
  return total


def metrics(run: str, dataset: str, name: str) -> dict[int, float]:
  """Values of a metric by step, from a run folder."""
  found = {}
  with open(os.path.join(run, "metrics.csv"), encoding="utf-8") as file:
    for row in csv.DictReader(file):
      kind = row["dataset"].split("/")[0]
      if row["metric"] == name and kind == dataset:
        found[int(row["step"])] = float(row["value"])
  if not found:
    raise SystemExit(f"{run}: no {dataset} metric {name!r}")
  return found


def scores(road: Road, start: str, task: str, at=max) -> np.ndarray:
  """Of the last step, or the first, by seed, in percent."""
  curves = [curve_of(road, start, task, k) for k in range(TASKS[task].seeds)]
  return np.array([curve[at(curve)] for curve in curves])


def curve_of(road: Road, start: str, task: str, seed: int) -> dict:
  """A metric of held-out rows by step, in percent."""
  run = road.path(run_name(start, task, seed))
  return metrics(run, "inference_eval", TASKS[task].metric)


def table(road: Road) -> str:
  lines = ["| start | " + " | ".join(TASKS) + " |"]
  lines.append("|---" * (len(TASKS) + 1) + "|")
  for start, name in NAMES.items():
    cells = []
    for task in TASKS:
      found = scores(road, start, task)
      cell = f"{found.mean():.1f}"
      if len(found) > 1:
        cell += f" ({found.min():.1f} to {found.max():.1f})"
      cells.append(cell)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def plot(road: Road, path: str) -> None:
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
      for kind, style in (("train", "-"), ("training_eval", "o")):
        loss = metrics(
          road.path(start), kind, "loss_per_nonpadding_target_token"
        )
        points = zip(*sorted(loss.items()))
        first.plot(*points, style, color=color, markersize=3)
    for axis, task in zip(others, TASKS):
      for seed in range(TASKS[task].seeds):
        curve = sorted(curve_of(road, start, task, seed).items())
        label = name if not seed else None
        axis.plot(*zip(*curve), "-o", color=color, label=label, markersize=3)
  first.set_title("loss on its own objective; dots: held-out books")
  first.title.set_fontsize(9)
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
  """What transformers answers of UL2 after the books, and summaries."""
  import transformers

  folder = road.path("ul2-books-hf")
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
      asked = " ".join(asked[:160].replace("|", " ").split())
      lines.append(f"| {asked} ... | {row['prediction']} |")
  return "\n".join(lines)


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
python tools/convert_checkpoint.py /tmp/fat5 /models/fat5-books --to hf
python -m fat5_jax.train --gin_file=recipes/fat5_from_scratch.gin \\
  --gin_file=models/from_checkpoint.gin \\
  --gin.INITIAL_CHECKPOINT_PATH=/models/fat5-books --gin.TRAIN_STEPS=2000 \\
  --gin.TRAIN_FILES='/data/reviews/train*' \\
  --gin.VALIDATION_FILES='/data/reviews/dev*' --gin.MODEL_DIR=/tmp/reviews
python tools/convert_checkpoint.py /tmp/reviews /models/fat5 --to hf
python -m fat5_jax.train --gin_file=recipes/classify.gin \\
  --gin.INITIAL_CHECKPOINT_PATH=/models/fat5 \\
  --gin.MIXTURE_OR_TASK_NAME=glue_sst2_classes --gin.DATA_DIR=/data/glue \\
  --gin.MODEL_DIR=/tmp/sst2
python tools/convert_checkpoint.py /tmp/sst2 /models/fat5-sst2 --to hf
```

The second reading begins with the export: it counts its steps from 0, with a
schedule of its own. From the run folder itself a run goes on counting, and
TRAIN_STEPS would have to be more than the 8,000 that it has.

A model of {parameters:.1f}M parameters ({size:.1f} MB in bfloat16) reads
{tokens:.1f}M tokens by each objective, from the same weights. Three quarters of
the examples are of books, each token once; the others of the tasks' training
rows, without their labels, and of SQuAD's paragraphs. Then it reads a third as
many, in three quarters of the examples SST-2's sentences, without their labels
too, in the others the tasks' texts again.

## Does it pay?

Held-out rows after the same fine-tuning, the same rate for all, in percent; of
more than one run the mean, and the lowest and highest:

{table}

{about}.

QNLI: {train:,} of its development rows train, as many as RTE has; held out are
{held_out:,} that share neither question nor sentence with them. Who always says
the most frequent class has 50.9 of SST-2, {most:.1f} of QNLI, 52.7 of RTE. One
run's standard error is 1.4 of SST-2, {error:.1f} of QNLI and 3.0 of RTE. SST-2
after a quarter of its updates: {early}.

![losses and metrics](from_scratch.png)

What gains and what does not, and what else was tried: [pairs.md](pairs.md).

## What it says

{samples}

By transformers from UL2's export after the books (4 beams); summaries greedy,
of held-out dialogues.

Made by `tools/from_scratch.py`.
"""


def rows_of(path: str) -> list[dict]:
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def write(road: Road) -> None:
  """The page and the plot; prints the table."""
  found = table(road)
  print(found)
  size = os.path.getsize(road.path("ul2-hf/model.safetensors"))
  told = [f"{k}: {t.metric}, {t.steps} updates" for k, t in TASKS.items()]
  labels = [row["label"] for row in rows_of(road.path("qnli.jsonl"))]
  most = max(labels.count(x) for x in set(labels)) / len(labels)
  page = PAGE.format(
    minutes=seconds(road) / 60,
    size=size / 1e6,
    parameters=size / 2e6,
    tokens=road.tokens / 1e6,
    table=found,
    about="; ".join(told),
    train=len(rows_of(road.path("qnli-train.jsonl"))),
    held_out=len(labels),
    most=100 * most,
    error=50 / len(labels) ** 0.5,
    early=", ".join(
      f"{name} {scores(road, start, 'SST-2', min).mean():.1f}"
      for start, name in NAMES.items()
    ),
    samples=samples(road),
  )
  with open(os.path.join(ROOT, "docs/from_scratch.md"), "w") as file:
    file.write(page)
  plot(road, os.path.join(ROOT, "docs/from_scratch.png"))
