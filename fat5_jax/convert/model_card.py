"""README.md of an exported folder: what it is, and the lines that load it.

tests/test_exports.py runs the lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
import json
import os
import re
from typing import Any

from fat5_jax import hub, storage
from fat5_jax.convert import hf_heads, plain_files, tensor_files
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig, T5Config

_PIPELINES = {
  "language_model": "text2text-generation",
  "sequence_classification": "text-classification",
  "token_classification": "token-classification",
  "question_answering": "question-answering",
  "embedding": "sentence-similarity",
  "enct5": "text-classification",
}
_WHAT = {
  "language_model": "text to text",
  "sequence_classification": "a classifier of texts",
  "token_classification": "a tagger of tokens",
  "question_answering": "a finder of answers (spans) in a text",
  "embedding": "sentence embeddings",
  "enct5": "a classifier of texts by EncT5: prompts read T5's decoder layers",
}
# Settings of config.gin worth a line.
_SETTINGS = (
  *("TASK_FEATURE_LENGTHS", "BATCH_SIZE", "TRAIN_STEPS"),
  *("TRAIN_STEPS_RELATIVE", "DROPOUT_RATE", "LABEL_SMOOTHING", "Z_LOSS"),
  *("TRAINABLE", "FROZEN", "LORA_RANK", "LORA_TARGETS", "RANDOM_SEED"),
  *("OPTIMIZER", "base_learning_rate", "factors", "warmup_steps"),
  *("LEARNING_RATE", "SCHEDULE", "WARMUP_STEPS", "DTYPE", "PARAMETER_DTYPE"),
  *("CURRICULUM", "OBJECTIVE"),
)


def facts_of_run(run_dir: str) -> dict[str, Any]:
  """What the files of a run folder tell; what is not there is left out."""
  facts: dict[str, Any] = {}
  path = os.path.join(run_dir, "model.json")
  if storage.exists(path):
    model = tensor_files.read_json(path)
    for key in ("task", "base", "random_seed"):
      if model.get(key) is not None:
        facts[key] = model[key]
    _check_task(facts.get("task"), path)
  path = os.path.join(run_dir, "config.gin")
  if storage.exists(path):
    facts["settings"] = _settings(plain_files.read_text(path))
  path = os.path.join(run_dir, "metrics.csv")
  if storage.exists(path):
    lines = plain_files.read_text(path).splitlines(keepends=True)
    try:
      facts["metrics"] = _last_metrics(csv.DictReader(lines))
    except csv.Error as e:
      raise UserError(f"{path}: not a table of metrics: {e}") from None
  if "base" not in facts and "INITIAL_CHECKPOINT_PATH" in facts.get(
    "settings", {}
  ):
    facts["base"] = facts["settings"]["INITIAL_CHECKPOINT_PATH"].strip("'\"")
  if isinstance(facts.get("base"), str):
    facts["base"] = hub.name(facts["base"])
  return facts


def _check_task(task: Any, path: str) -> None:
  """Raises UserError for what no run writes as its task."""
  if task is None:
    return
  wrong = not isinstance(task, dict)
  if not wrong:
    arguments = task.get("arguments", {})
    wrong = not isinstance(arguments, dict) or not isinstance(
      task.get("name", ""), str
    )
    parts = task.get("mixture", {})
    wrong |= not isinstance(parts, dict) or not all(
      isinstance(part, dict) and isinstance(part.get("arguments", {}), dict)
      for part in parts.values()
    )
  if not wrong:
    asks = task.get("asks") or arguments.get("inputs") or ()
    asks = [asks] if isinstance(asks, str) else asks
    wrong = not isinstance(asks, (list, tuple)) or not all(
      isinstance(text, str) for text in asks
    )
  if wrong:
    raise UserError(f"{path}: task is {str(task)[:80]!r}, no record of a task")


def _settings(gin: str) -> dict[str, str]:
  """Chosen values of an operative configuration, as they are written there."""
  gin = re.sub(r"= *\\\n\s*", "= ", gin)
  names = (*_SETTINGS, "INITIAL_CHECKPOINT_PATH")
  found = {}
  for line in gin.splitlines():
    match = re.match(r"\s*([\w./]+)\s*=\s*(.*\S)", line)
    if match is None:
      continue
    name = match[1].removesuffix("/macro.value").rpartition(".")[2]
    if name in names and match[2] != "None" and match[2][:1] != "%":
      found.setdefault(name, match[2])
  return found


def _last_metrics(rows) -> list[tuple[str, str, int, float]]:
  """The last value of every metric of an evaluation."""
  last: dict[tuple[str, str], tuple[int, float]] = {}
  for row in rows:
    try:
      where = (row["dataset"], row["metric"])
      last[where] = (int(row["step"]), float(row["value"]))
    except (KeyError, TypeError, ValueError):
      continue
  return [
    (dataset, metric, step, value)
    for (dataset, metric), (step, value) in sorted(last.items())
    if "eval/" in dataset
  ]


def text(
  config: T5Config, format_name: str, facts: Mapping[str, Any] | None = None
) -> str:
  """README.md of an export.

  Args:
    config: of the model.
    format_name: `hf_stock`, `hf_tokens`, `hf_code` (hf_heads.form), `enct5`,
      `flash_t5` or `peft`.
    facts: of `facts_of_run`, and `base`, the model it started from.
  """
  facts = dict(facts or {})
  head = config.head or HeadConfig("language_model")
  task = facts.get("task") or {}
  base = str(facts.get("base") or "")
  parts = [
    _front_matter(config, head, task, base, facts.get("metrics") or [])
    + f"# {task.get('name') or _first_upper(_WHAT[head.kind])}",
    f"{_FAMILY[config.model_type]}, {config.num_encoder_layers} encoder and"
    f" {config.num_decoder_layers} decoder layers: {_WHAT[head.kind]}."
    + (f" It started from `{base}`." if base else "")
    + " Written by fat5_jax.",
    _task_lines(task),
    _labels(head),
    "## In transformers\n\n"
    + _in_words(_usage(config, head, format_name, base), task, head),
    # An adapter's base need not be where it says; the run has both.
    _OURS.format(base=" --base BASE", folder="MODEL_DIR")
    if format_name == "peft"
    else _OURS.format(base="", folder="/models/this"),
    _training(facts),
  ]
  return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _first_upper(text: str) -> str:
  return text[:1].upper() + text[1:]


_FAMILY = {"t5": "T5", "mt5": "mT5", "umt5": "umT5"}


def _quoted(value: Any) -> str:
  """A YAML scalar; JSON's strings are YAML's."""
  return json.dumps(value, ensure_ascii=False)


def _front_matter(config, head, task, base, metrics) -> str:
  sentences = head.kind == "embedding"
  library = "sentence-transformers" if sentences else "transformers"
  pipeline = _PIPELINES[head.kind]
  lines = ["---", f"library_name: {library}", f"pipeline_tag: {pipeline}"]
  # A folder of one's own is no model that a reader could find.
  if base and not os.path.isabs(base):
    lines.append(f"base_model: {_quoted(base)}")
  lines += ["tags:", f"- {config.model_type}", "- fat5_jax"]
  name = task.get("name")
  if datasets := _datasets(task):
    lines += ["datasets:", *(f"- {_quoted(one)}" for one in datasets)]
  results = [m for m in metrics if m[0].startswith("inference_eval")]
  if results:
    lines += ["model-index:", f"- name: {_quoted(name or 'fat5_jax')}"]
    lines += ["  results:", f"  - task: {{type: {pipeline}}}"]
    dataset = _quoted(name or results[0][0].split("/")[-1])
    lines.append(f"    dataset: {{name: {dataset}, type: {dataset}}}")
    lines.append("    metrics:")
    lines += [
      f"    - {{type: {_quoted(metric)}, value: {value!r}}}"
      for _, metric, _, value in results
    ]
  return "\n".join([*lines, "---", "", ""])


def _task_lines(task: Mapping[str, Any]) -> str:
  objective = _objective(task)
  task = {**task.get("arguments", {}), **task, "objective": objective}
  if objective:
    # Texts are no questions.
    task["asks"] = None
  keys = ("name", "kind", "objective", "asks", "inputs", "targets", "label")
  rows = [
    (key, task[key])
    for key in (*keys, "metrics")
    if task.get(key) not in (None, "", [], ())
  ]
  if not rows:
    return ""
  return "## Task\n\n" + _table(("what", "value"), rows)


def _parts(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The tasks of a mixture, or the task."""
  return list(task.get("mixture", {"": task}).values())


def _datasets(task: Mapping[str, Any]) -> list[str]:
  """What a reader finds on the hub; files of one's own have no name there."""
  found = [(part.get("source") or {}).get("dataset") for part in _parts(task)]
  return sorted({one for one in found if one})


def _objective(task: Mapping[str, Any]) -> Any:
  """That of a pre-training, of all its texts the same; else None."""
  parts = _parts(task)
  if any(part.get("factory") != "pretraining.text" for part in parts):
    return None
  found = [part.get("arguments", {}).get("objective") for part in parts]
  return found[0] if all(one == found[0] for one in found) else None


def _in_words(usage: str, task: Mapping[str, Any], head: HeadConfig) -> str:
  """The lines of use with texts as the task words them, a pair as two."""
  if objective := _objective(task):
    mode = {"ul2": "[R] ", "span_corruption": ""}.get(str(objective))
    # ByT5's sentinels are bytes, which no text spells.
    if mode is not None and "ByteVocabulary" not in json.dumps(task):
      gap = "The captain looked at the <extra_id_0> and said nothing."
      usage = usage.replace(_SENTENCES, f"[{mode + gap!r}]")
      usage = usage.replace("tokens, skip_special_tokens=True", "tokens")
    return usage
  inputs = task.get("asks") or task.get("arguments", {}).get("inputs")
  parts = [inputs] if isinstance(inputs, str) else list(inputs or ())
  if head.kind == "embedding":
    parts = parts[:1]
  names = {1: ("texts",), 2: ("first", "second")}.get(len(parts))
  if names is None:
    return usage
  lines = [
    "# Columns stand in braces; put there what a row has in them.",
    *(f"{name} = [{part!r}]" for name, part in zip(names, parts)),
    f"batch = tokenizer({', '.join(names)}, padding=True,"
    ' return_tensors="pt")\n',
  ]
  usage = usage.replace(_TEXTS, "\n".join(lines))
  return usage.replace(_SENTENCES, f"[{parts[0]!r}]")


def _labels(head: HeadConfig) -> str:
  if head.kind in ("language_model", "embedding"):
    return ""
  names = enumerate(hf_heads.label_names_of(head))
  found = "## Outputs\n\n" + _table(("index", "label"), names)
  if head.kind in ("sequence_classification", "enct5"):
    found += f"\n\n`problem_type`: `{head.problem_type}`."
  return found


def _table(header: Sequence[str], rows) -> str:
  def cell(value):
    value = value if isinstance(value, str) else json.dumps(value, default=str)
    return value.replace("|", "\\|").replace("\n", " ")

  lines = [header, ["---"] * len(header), *(map(cell, row) for row in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _training(facts: Mapping[str, Any]) -> str:
  settings = {
    k: v
    for k, v in (facts.get("settings") or {}).items()
    if k != "INITIAL_CHECKPOINT_PATH"
  }
  if "random_seed" in facts:
    settings.setdefault("RANDOM_SEED", str(facts["random_seed"]))
  found = ""
  if settings:
    rows = [(k, f"`{v}`") for k, v in settings.items()]
    found = "## How it was trained\n\n" + _table(("setting", "value"), rows)
  if facts.get("metrics"):
    header = ("data", "metric", "step", "value")
    found += "\n\n## Metrics\n\n" + _table(
      header, [(d, m, str(s), f"{v:.6g}") for d, m, s, v in facts["metrics"]]
    )
  return found


_OURS = """## In fat5_jax

`INITIAL_CHECKPOINT_PATH` of a run may be this folder;
`python tools/convert_checkpoint.py /models/this MODEL_DIR{base}` makes a run of
it, for `fat5_jax.infer` and `fat5_jax.eval`. From Python:

```python
import fat5_jax

model = fat5_jax.load("{folder}")
params = model.parameters  # T5X's tree, float32
```"""

_SENTENCES = '["a text", "and another one, which is longer"]'
_TEXTS = f"""texts = {_SENTENCES}
batch = tokenizer(texts, padding=True, return_tensors="pt")
"""
_LOAD = (
  """```python
{first}import torch
from transformers import {class_name}, AutoTokenizer

folder = "/models/this"  # where this folder is; transformers 4: no dots
tokenizer = AutoTokenizer.from_pretrained(folder{options})
model = {class_name}.from_pretrained(folder{options})
"""
  + _TEXTS
  + """with torch.no_grad():
  {result}
{more}```"""
)
_TRUST = ", trust_remote_code=True"
_CODE = """transformers has no class for this model. `modeling_fat5_jax.py`
in this folder is one, and `trust_remote_code=True` uses it (tested with 4.37.1
and 5). Classes of transformers itself refuse the folder."""
_TOKENS = """With `modeling_fat5_jax.py` of this folder (tested with 4.37.1, 5):

{code}

The head is one linear layer on the encoder, so transformers 5 reads it without
that file, as a classifier of tokens:

{stock}

`decoder.final_layer_norm.weight` is empty on purpose: classes with a decoder
refuse this folder for it, instead of answering from a decoder that is not
there. The class above may name it as unexpected."""
_POOLED = {
  "eos": """ids = batch["input_ids"]
positions = torch.arange(ids.shape[1])
last = torch.where(ids == model.config.eos_token_id, positions, -1).amax(1)
logits = logits[torch.arange(len(ids)), last]  # at the last </s> of each text
""",
  "mean": """mask = batch["attention_mask"][..., None]
logits = (logits * mask).sum(1) / mask.sum(1)  # the mean over real tokens
""",
  "first": "logits = logits[:, 0]  # at the first token\n",
}
_ANSWERS = {
  "single_label_classification": "labels = [model.config.id2label[i] for i in"
  " logits.argmax(-1).tolist()]\n",
  "multi_label_classification": "labels = [\n  [model.config.id2label[i] for i"
  " in row.nonzero()[:, 0].tolist()]\n  for row in logits.sigmoid() > 0.5\n]\n",
  "regression": "",
}
_TAGS = (
  "# One a piece; a word has that of its first piece.\n"
  "labels = [\n  [model.config.id2label[i] for i in row] for row in"
  " logits.argmax(-1).tolist()\n]\n"
)


def _usage(config, head, format_name: str, base: str) -> str:
  if format_name == "flash_t5":
    return (
      "FAT5's own code (catie-aq/flashT5) reads this folder; it may name"
      " `encoder.block.0.layer.0.layer_norm.weight` as unexpected, which is"
      " empty on purpose, so that classes of transformers refuse the folder."
      " For transformers, write the model with `--to hf`."
    )
  if format_name == "peft":
    return _adapter_usage(head, base)
  if head.kind == "embedding":
    return _embedding_usage(config, head)
  _, auto_class = hf_heads.ENDINGS[head.kind]
  logits = "logits = model(**batch).logits"
  if head.kind == "language_model":
    load = _LOAD.format(
      first="",
      class_name=auto_class,
      options=_TRUST if format_name == "hf_code" else "",
      result="tokens = model.generate(**batch, max_new_tokens=32)",
      more="print(tokenizer.batch_decode(tokens, skip_special_tokens=True))\n",
    )
    return load if format_name == "hf_stock" else f"{_CODE}\n\n{load}"
  if head.kind == "question_answering":
    result = "output = model(**batch)"
    more = "start, end = output.start_logits, output.end_logits\n"
  else:
    result = logits
    is_tags = head.kind == "token_classification"
    more = _TAGS if is_tags else _ANSWERS[head.problem_type]
  load = _LOAD.format(
    first="",
    class_name=auto_class,
    options="" if format_name == "hf_stock" else _TRUST,
    result=result,
    more=more,
  )
  if format_name == "hf_stock":
    if head.kind == "sequence_classification":
      load += (
        "\n\nThe class of transformers refuses a batch whose texts have"
        " different numbers of `</s>`, or none."
      )
    return load
  if format_name != "hf_tokens":
    note = _CODE
    if format_name == "enct5":
      note += (
        " hackyon's own code (hackyon/EncT5) reads it too, with transformers 4:"
        " on 5 its answers are wrong."
      )
    return f"{note}\n\n{load}"
  if head.kind == "sequence_classification":
    more = _POOLED[head.pooled] + more
  elif head.kind == "question_answering":
    more = (
      'padding = batch["attention_mask"][..., None] == 0\n'
      "start, end = logits.masked_fill(padding, -1e9).unbind(-1)\n"
    )
  stock = _LOAD.format(
    first="# transformers 5\n",
    class_name="AutoModelForTokenClassification",
    options="",
    result=logits,
    more=more,
  )
  return _TOKENS.format(code=load, stock=stock)


def _embedding_usage(config, head) -> str:
  pooled = {
    "mean": 'mask = batch["attention_mask"][..., None]\n'
    "x = (x * mask).sum(1) / mask.sum(1)\n",
    "first": "x = x[:, 0]\n",
    # As sentence-transformers: a tokenizer ends every text in </s>.
    "eos": 'last = batch["attention_mask"].sum(1) - 1\n'
    "x = x[torch.arange(len(x)), last]\n",
  }[head.pooled]
  stock = _LOAD.format(
    first="",
    class_name=f"{hf_heads.PREFIXES[config.model_type]}EncoderModel",
    options="",
    result="x = model(**batch).last_hidden_state",
    more=pooled + "embeddings = torch.nn.functional.normalize(x.float())\n",
  )
  return f"""```python
# sentence-transformers
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("/models/this")  # where this folder is
embeddings = model.encode({_SENTENCES})
```

Or the encoder alone:

{stock}

`decoder.final_layer_norm.weight` is empty on purpose: classes with a decoder
refuse this folder for it, instead of answering from a decoder that is not
there."""


def _adapter_usage(head, base: str) -> str:
  _, auto_class = hf_heads.ENDINGS[head.kind]
  if head.kind not in ("language_model", "token_classification"):
    return (
      "This adapter belongs to a model with a head; transformers has no class"
      " that puts one on a bare T5 in this way. `--to hf` writes both, merged."
    )
  answer = "tokens = model.generate(**batch, max_new_tokens=32)"
  if head.kind != "language_model":
    answer = "logits = model(**batch).logits"
  return f"""```python
# peft
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({base or "BASE"!r})
model = PeftModel.from_pretrained(base, "/models/this")
tokenizer = AutoTokenizer.from_pretrained("/models/this")
{_TEXTS}{answer}
```"""
