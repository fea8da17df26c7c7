"""A task as plain data: written beside a run, compared, and built again.

Reading a record runs no code of the data's: it names one of the factories
below and their arguments. What is a function of a person's own is recorded by
its name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
import hashlib
import importlib
import inspect
import re
from typing import Any

import seqio

from fat5_jax.data import features, mixtures, seqio_source, sources
from fat5_jax.errors import UserError

_MODULES = ("tasks", "head_tasks", "super_glue_tasks", "nli", "pretraining")
_FACTORIES: dict[str, Callable[..., seqio.Task]] = {}
# Arguments that are no plain data, or that a folder brings anew.
_NOT_RECORDED = ("vocabulary", "output_vocabulary", "source", "rename")
# What may differ between two records of the same data: where it lies, how it
# is scored, how long its rows may be.
_TOP_MAY_CHANGE = ("data_dir", "metrics", "lengths", "own_code", "asks")
_MAY_CHANGE = re.compile(
  r"^arguments\.(data_dir|metrics)$"
  r"|^source\.(files\.[^.]+|content)\.\d+\.path$"
)
# What decides no text of a task to pre-train on, but what is asked about it.
_DRAWN = ("objective", "text_length")
# Prints this many lines of a difference, then a count.
_LISTED = 20


def recorded(factory: Callable[..., seqio.Task]) -> Callable[..., seqio.Task]:
  """Makes a task factory leave its arguments in `task.source.record`."""
  name = f"{factory.__module__.rpartition('.')[2]}.{factory.__name__}"

  @functools.wraps(factory)
  def make(*args, **kwargs):
    bound = mixtures.bound(factory, args, kwargs)
    task = factory(*args, **kwargs)
    own_code: list[str] = []
    arguments = {
      key: _plain(value, own_code)
      for key, value in bound.arguments.items()
      if key not in _NOT_RECORDED
    }
    label = features.label_feature(task)
    found: dict[str, Any] = {"factory": name, "kind": "text_to_text"}
    if label is not None:
      names = list(label.names)
      found |= {"kind": label.kind, "problem_type": label.problem_type}
      found |= {"label_names": names, "num_labels": label.size}
      # Those that were found in the data.
      arguments |= {
        key: names for key in ("label_names", "tag_names") if key in arguments
      }
    found["arguments"] = arguments
    found["metrics"] = [metric.__name__ for metric in task.metric_fns]
    found["own_code"] = own_code
    task.source.record = found
    if bound.arguments.get("rename") is not None:
      task.source.row_code = bound.arguments["rename"]
    return task

  _FACTORIES[name] = make
  return make


def _plain(value: Any, own_code: list[str]) -> Any:
  """A value as JSON; the names of functions go to `own_code`."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v, own_code) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, own_code) for item in value]
  if callable(value):
    name = sources.code_name(value)
    own_code.append(name)
    return name
  if value is None or isinstance(value, (str, int, float, bool)):
    return value
  return str(value)


def describe(task: seqio.Task | seqio.Mixture) -> dict[str, Any]:
  """A task, or a mixture, as JSON."""
  if isinstance(task, seqio.Mixture):
    label = features.label_feature(task)
    return {
      "name": task.name,
      "kind": "text_to_text" if label is None else label.kind,
      "mixture": {
        sub.name: describe(sub) | {"rate": str(task.get_rate(sub))}
        for sub in seqio.get_subtasks(task)
      },
    }
  found: dict[str, Any] = {"name": task.name}
  if isinstance(task.source, seqio_source.SeqioSource):
    found |= task.source.record
    found["columns"] = list(task.source.columns)
    found["asks"] = _asks(task.source)
    found["source"] = task.source.rows_source.record()
  else:
    found["source"] = _seqio_source(task.source)
    found["preprocessors"] = [
      sources.code_name(step) for step in task.preprocessors
    ]
    found["metrics"] = [metric.__name__ for metric in task.metric_fns]
  found["vocabulary"] = {
    key: _vocabulary(feature.vocabulary)
    for key, feature in task.output_features.items()
    if not isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
  }
  return found


def _asks(source: seqio_source.SeqioSource) -> list[str]:
  """The text, or the pair, that is asked about a row: `{column}` in words.

  Empty where a row of words is no row of the task's.
  """
  # Words that survive what a task does to punctuation.
  words = {name: f"Column{i}Here" for i, name in enumerate(source.columns)}
  try:
    example = source.question(dict(words)) or {}
  except Exception:  # A row function may be anybody's.
    return []
  text = example.get("inputs", example.get("inputs_pretokenized"))
  if not isinstance(text, str):
    return []
  for name, word in words.items():
    text = text.replace(word, f"{{{name}}}")
  if re.search(r"column\d+here", text, re.IGNORECASE):
    # The task does something to its words that this cannot tell.
    return []
  return text.split(" </s> ")


def _seqio_source(source: seqio.DataSourceInterface) -> dict[str, Any]:
  """A source of SeqIO's own: its files, or the data set that it names."""
  found: dict[str, Any] = {
    "seqio": type(source).__name__,
    "splits": sorted(source.splits),
  }
  for key in ("_split_to_filepattern", "_dataset_fn"):
    if getattr(source, key, None) is not None:
      value = getattr(source, key)
      found[key.strip("_")] = (
        sources.code_name(value) if callable(value) else _plain(value, [])
      )
  patterns = getattr(source, "_split_to_filepattern", None)
  if isinstance(patterns, Mapping):
    del found["split_to_filepattern"]
    found["files"] = {
      split: [sources.file_record(path) for path in sources.expand(pattern)]
      for split, pattern in patterns.items()
    }
  dataset = getattr(source, "tfds_dataset", None)
  if dataset is not None:
    found["tfds"] = str(dataset.name)
  return found


def _vocabulary(vocabulary: seqio.Vocabulary) -> dict[str, Any]:
  found = {"kind": type(vocabulary).__name__, "size": vocabulary.vocab_size}
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    content = hashlib.sha256(vocabulary.sp_model)
    found["sha256"] = content.hexdigest()[:16]
  return found


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """What two records do not agree on, as `-` and `+` lines."""
  before, now = _compared(before), _compared(now)
  lines = []
  for key in sorted({*before, *now}):
    if before.get(key) != now.get(key):
      if key in before:
        lines.append(f"  - {key} = {before[key]!r}")
      if key in now:
        lines.append(f"  + {key} = {now[key]!r}")
  more = len(lines) - _LISTED
  return lines[:_LISTED] + ([f"  ... and {more} more"] if more > 0 else [])


def fingerprint(record: Mapping[str, Any]) -> str:
  """A hash of what `difference` compares."""
  text = repr(sorted(_compared(record).items()))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
  """What two records of the same data agree on, by its place in them."""
  tops = {k: v for k, v in record.items() if k not in _TOP_MAY_CHANGE}
  if "mixture" in tops:
    # Told by its parts; earlier records do not have it.
    tops.pop("kind", None)
    subs = tops.pop("mixture").items()
    parts = {f"mixture {name}": _compared(sub) for name, sub in subs}
    return _flat(tops) | {
      f"{name}.{key}": value
      for name, part in parts.items()
      for key, value in part.items()
    }
  return {
    key: value
    for key, value in _flat(tops).items()
    if not _MAY_CHANGE.search(key)
  }


# Sources whose record tells what their rows are.
_KNOWN = (
  *("Files", "ParallelFiles", "Conll", "SquadFiles"),
  *("HuggingFace", "Tfds", "Rows", "PronounFiles"),
)


def is_known(record: Mapping[str, Any]) -> bool:
  """Whether the record of a task tells all that decides its examples.

  What a function of a person's own makes is known to nobody.
  """
  return _source_is_known(record["source"])


def _source_is_known(source: Mapping[str, Any]) -> bool:
  if "seqio" in source:
    return "files" in source or "tfds" in source
  kind = source.get("kind")
  if kind == "Joined":
    return all(map(_source_is_known, source["parts"].values()))
  if kind == "Function":
    names = source["functions"].values()
    return all(name.startswith("fat5_jax.data.") for name in names)
  return kind in _KNOWN


def content_of_split(record: Mapping[str, Any], split: str) -> dict[str, Any]:
  """What decides the examples of a split: the record without other splits, and
  without what is drawn as examples are read."""
  found = dict(record)
  if "arguments" in found:
    arguments = found["arguments"].items()
    found["arguments"] = {k: v for k, v in arguments if k not in _DRAWN}
  source = dict(found["source"])
  for key in ("files", "functions", "parts"):
    if key in source:
      source[key] = source[key].get(split)
  found["source"] = source
  return {k: v for k, v in _compared(found).items() if k != "metrics"}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
  items: Iterable[tuple[Any, Any]]
  if isinstance(value, Mapping):
    items = value.items()
  elif isinstance(value, (list, tuple)) and any(
    isinstance(item, Mapping) for item in value
  ):
    items = enumerate(value)
  else:
    return {prefix: list(value) if isinstance(value, tuple) else value}
  found = {}
  for key, item in items:
    # A name may hold a dot.
    part = str(key).replace(".", "_")
    found |= _flat(item, f"{prefix}.{part}" if prefix else part)
  return found


class _NoRows:
  """The source of a task whose data is not wanted."""

  splits: dict[str, Any] = {}

  def record(self) -> dict[str, Any]:
    return {}


def build(
  record: Mapping[str, Any],
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  with_data: bool = False,
) -> seqio.Task | seqio.Mixture:
  """The task, or the mixture, of a record.

  Args:
    record: as `describe` gives it.
    vocabulary: of the folder that holds the record.
    data_dir: instead of the recorded one.
    with_data: whether its data must be there; without, the task has no rows,
      and can be asked about others.

  Raises:
    UserError: if a part of it is a person's own code, which a record cannot
      bring along.
  """
  if "mixture" in record:
    parts = [
      (build(part, vocabulary, data_dir, with_data), float(part["rate"]))
      for part in record["mixture"].values()
    ]
    return mixtures.make_mixture(record["name"], parts)
  for module in _MODULES:
    importlib.import_module(f"fat5_jax.data.{module}")
  factory = _FACTORIES.get(record.get("factory", ""))
  name = record.get("name")
  if factory is None:
    module = record.get("module")
    hint = "its gin file with --gin_file=..."
    if module:
      hint = f"--gin.MIXTURE_OR_TASK_MODULE={module}"
    raise UserError(
      f"task {name!r} of the run folder is registered by code: give {hint} and"
      f" --gin.MIXTURE_OR_TASK_NAME={name}"
    )
  sides = record.get("vocabulary", {})
  if len({str(side) for side in sides.values()}) > 1:
    raise UserError(
      f"task {name!r} of the run folder has two vocabularies, and the folder"
      " one: give the gin file of the training with --gin_file=..."
    )
  if with_data and record.get("own_code"):
    raise UserError(
      f"task {name!r} of the run folder is scored by code of your own"
      f" ({', '.join(record['own_code'])}): give the gin file of the training"
      " with --gin_file=..."
    )
  parameters = inspect.signature(factory).parameters
  arguments = {
    key: value
    for key, value in record["arguments"].items()
    if key in parameters and key not in ("metrics", "postprocess")
  }
  if "metrics" in parameters and with_data:
    arguments["metrics"] = record["metrics"]
  if data_dir is not None and "data_dir" in parameters:
    arguments["data_dir"] = data_dir
  if "source" in parameters:
    if not with_data:
      arguments["source"] = _renamed(_NoRows(), record["source"])
    elif parameters["source"].default is inspect.Parameter.empty:
      arguments["source"] = _source_of(record["source"], name)
  return factory(vocabulary=vocabulary, **arguments)


def question_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
  """The record of a task that asks as all tasks of a record do.

  None where a mixture's tasks do not ask alike.
  """
  if "mixture" not in record:
    return record
  parts = list(record["mixture"].values())
  asks = [
    (part.get("factory"), (part.get("arguments") or {}) | {"name": None})
    for part in parts
  ]
  if any(other != asks[0] for other in asks) or asks[0][0] is None:
    return None
  return parts[0] | {"lengths": record.get("lengths", {})}


def _source_of(record: Mapping[str, Any], task: str) -> Any:
  """The source of a record's rows, where it is files or a data set."""
  from fat5_jax.data import conll, squad

  kinds = {
    "Files": sources.Files,
    "ParallelFiles": sources.ParallelFiles,
    "Conll": conll.Conll,
    "SquadFiles": squad.SquadFiles,
    "HuggingFace": sources.HuggingFace,
    "Tfds": sources.Tfds,
  }
  make = kinds.get(record.get("kind", ""))
  if make is None:
    raise UserError(
      f"task {task!r} of the run folder has rows that a record cannot bring"
      " along: give the gin file of the training with --gin_file=..."
    )
  arguments = dict(record["arguments"])
  if "files" in record:
    paths = lambda files: [file["path"] for file in files]
    arguments["splits"] = {s: paths(f) for s, f in record["files"].items()}
    if make is sources.ParallelFiles:
      arguments["splits"] = {
        s: dict(zip(record["columns"], files))
        for s, files in arguments["splits"].items()
      }
  return _renamed(make(**arguments), record)


def _renamed(source: Any, record: Mapping[str, Any]) -> Any:
  """A source with its columns under the names that a record gives."""
  from fat5_jax.data import renamed

  if "renamed" not in record:
    return source
  return renamed.Renamed(source, record["renamed"])


def ask(
  task: seqio.Task, rows: Callable[[], Iterable[sources.LocatedRow]]
) -> seqio.Task:
  """The task over questions without answers, in its split ROWS."""
  name = "predict_rows"
  seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=task.source.asking(rows),
    preprocessors=task.preprocessors,
    output_features=task.output_features,
    postprocess_fn=task.postprocess_fn,
    metric_fns=[],
  )
