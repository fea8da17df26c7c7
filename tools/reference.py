"""Writes docs/reference.md from the code: `python tools/reference.py`.

Every macro, task, head, metric, recipe and flag. A test holds the page and the
code together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import functools
import inspect
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
GIN, PAGE = os.path.join(ROOT, "gin"), os.path.join(ROOT, "docs/reference.md")
# Where a macro's default is looked for, the first that sets it.
_FOLDERS = ("runs", "models", "heads", "optimizers", "", "recipes")
_SET = re.compile(r"^([A-Z][A-Z0-9_]*) = (.*?)(?:\s+#.*)?$", re.MULTILINE)


def page() -> str:
  """The text of docs/reference.md."""
  parts = [
    "# Reference",
    "Made from the code by `python tools/reference.py`.",
    "## Macros\n\nSet by `--gin.NAME=VALUE` or in a gin file; each is checked"
    " before anything is built, and so is a parameter that the shipped files"
    " bind to one. `must be set` has no default; a default of another file"
    " (a head, a recipe) comes with that file.",
    _table(("macro", "must be", "default", "what it is", "file"), _macros()),
    "## Tasks\n\nBuilt by name (`MIXTURE_OR_TASK_NAME`), from local files in"
    " `DATA_DIR` or from Hugging Face; a factory (`@tasks.text_to_text()`)"
    " makes one of your own rows.",
    _table(("task", "what it is", "metrics"), _tasks()),
    _table(("factory", "what it makes"), _factories()),
    _table(("source", "its rows"), _sources()),
    "## Heads\n\n`HeadConfig.kind`; the first is no head but T5 itself.",
    _table(("kind", "what it says of a row", "gin file"), _heads()),
    "## Metrics\n\nBy name, or a function of yours with the same signature.",
    _table(("metric", "what it is"), _metrics()),
    "## Recipes and gin files\n\n`--gin_file=NAME`; later files win.",
    _table(("file", "what it is for"), _files()),
    "## Flags",
    *_flags(),
  ]
  return "\n\n".join(parts) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  lines = [f"| {' | '.join(head)} |", "|---" * len(tuple(head)) + "|"]
  for row in rows:
    cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in row)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _first_sentence(function: Callable) -> str:
  text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
  return text.rstrip(".")


def _gin_files() -> Iterator[str]:
  """Paths in the gin folder, in the order of _FOLDERS, then by name."""
  found = []
  for folder, _, names in os.walk(GIN):
    found += [os.path.relpath(os.path.join(folder, n), GIN) for n in names]
  rank = lambda path: _FOLDERS.index(os.path.dirname(path).partition("/")[0])
  # finetune.gin is what others change; what all sizes share comes before them.
  yield from sorted(
    (path for path in found if path.endswith(".gin")),
    key=lambda x: (rank(x), "finetune" not in x, x.count("/"), x),
  )


@functools.cache
def _text(path: str) -> str:
  with open(os.path.join(GIN, path), encoding="utf-8") as file:
    return file.read()


def _macros() -> Iterator[tuple[str, ...]]:
  from fat5_jax.macros import MACROS

  defaults: dict[str, tuple[str, str]] = {}
  for path in _gin_files():
    for name, value in _SET.findall(_text(path)):
      defaults.setdefault(name, (value, path))
  for name, macro in MACROS.items():
    value, path = defaults.get(name, ("", ""))
    if "REQUIRED" in value:
      value = "must be set"
    elif value:
      value = f"`{value}`"
    yield f"`{name}`", macro.kind.words, value, macro.about, path


def _tasks() -> Iterator[tuple[str, ...]]:
  import seqio

  from fat5_jax.data import examples, ready, tasks

  vocabulary = seqio.ByteVocabulary()
  for name, factory in ready.TASKS.items():
    task = factory(vocabulary=vocabulary, data_dir=None)
    if isinstance(task, seqio.Mixture):
      rates = {part: task.get_rate(part) for part in task.tasks}
      drawn = [f"{part.name} ({n:,.0f})" for part, n in rates.items() if n]
      yield (
        f"`{name}`",
        f"A mixture, drawn at T5's rates: {', '.join(drawn)}",
        "",
      )
      continue
    made = factory
    while isinstance(made, functools.partial):
      made = made.func
    what = _first_sentence(made)
    if made.__name__ == "<lambda>":
      what = _first_sentence(tasks.quickstart)
    if examples.is_denoised(task):
      denoisers = task.source.layout.denoisers
      asked = "; ".join(f"{d.prefix} {d.describe()}".strip() for d in denoisers)
      what = f"Texts without answers, to pre-train on: {asked}"
    metrics = ", ".join(f"`{_name(metric)}`" for metric in task.metric_fns)
    yield f"`{name}`", re.sub(r", (e\.g\.|registered|`).*", "", what), metrics


def _name(metric: Callable) -> str:
  while isinstance(metric, functools.partial):
    metric = metric.func
  return metric.__name__


def _factories() -> Iterator[tuple[str, ...]]:
  from fat5_jax.data import head_tasks, nli, pretraining, tasks

  for module, names in (
    (tasks, ("text_to_text", "mixture", "translation", "summarization")),
    (tasks, ("squad", "glue")),
    (head_tasks, ("classification", "tagging", "spans")),
    (nli, ("text", "classes")),
    (pretraining, ("text",)),
  ):
    for name in names:
      function = getattr(module, name)
      parameters = ", ".join(inspect.signature(function).parameters)
      room = module.__name__.rpartition(".")[2]
      yield f"`{room}.{name}({parameters})`", _first_sentence(function)


def _sources() -> Iterator[tuple[str, ...]]:
  from fat5_jax.data import conll, renamed, sources, squad

  for module, names in (
    (sources, ("Files", "ParallelFiles", "HuggingFace", "Tfds", "Function")),
    (squad, ("SquadFiles",)),
    (conll, ("Conll",)),
    (renamed, ("Renamed",)),
  ):
    for name in names:
      kind = getattr(module, name)
      parameters = ", ".join(inspect.signature(kind).parameters)
      room = module.__name__.rpartition(".")[2]
      yield f"`{room}.{name}({parameters})`", _first_sentence(kind)


def _heads() -> Iterator[tuple[str, ...]]:
  from fat5_jax.objectives import heads

  yield "", "text: `infer` decodes it", "models/"
  for kind, says, path in (
    ("language_model", "text; hidden layers before T5's projection", ""),
    ("sequence_classification", heads.SingleLabel, ""),
    ("enct5", heads.SingleLabel, ""),
    ("token_classification", heads.Tags, ""),
    ("question_answering", heads.Spans, ""),
    ("embedding", heads.Contrastive, ""),
  ):
    path = f"heads/{kind}.gin"
    if not isinstance(says, str):
      says = _first_sentence(says)
    yield f"`{kind}`", says, path


def _metrics() -> Iterator[tuple[str, ...]]:
  from fat5_jax.data import metrics

  for name, function in metrics.BY_NAME.items():
    parameters = ", ".join(inspect.signature(function).parameters)
    yield f"`{name}({parameters})`", _first_sentence(function)


def _files() -> Iterator[tuple[str, ...]]:
  for path in _gin_files():
    words = []
    for line in _text(path).splitlines():
      if not line.startswith("#"):
        break
      if line == "#":
        break
      words.append(line.lstrip("# "))
    yield f"`{path}`", " ".join(words)


def _flags() -> Iterator[str]:
  from fat5_jax.gin_config import flags

  os.environ["COLUMNS"] = "80"
  for command in ("train", "eval", "infer", "plan"):
    text = flags.parser(command).format_help().rstrip()
    yield f"### {command}\n\n```\n{text}\n```"


if __name__ == "__main__":
  with open(PAGE, "w", encoding="utf-8") as file:
    file.write(page())
  print(f"written: {PAGE}")
