"""Mixtures of tasks, and the rates at which their rows are drawn.

T5's rates (T5 paper, section 3.5.2): r = min(rows, maximum)^(1/temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import math
import os
import re
from typing import Any

import seqio

from fat5_jax.data.files import listed, shown
from fat5_jax.errors import UserError

_WORDS = ("proportional", "equal")
# The rate of a task that has no training rows to draw. It is not 0, because its
# other splits are drawn from; and takes no share of a mixture around it.
_HELD_OUT = 1e-9

# What T5 mixes into `glue_v002_proportional`: the rows of each training set.
# WNLI is left out, as in the paper; what has rate 0 is evaluated only.
GLUE_RATES = {
  "glue_cola_v002": 8_551.0,
  "glue_sst2_v002": 67_349.0,
  "glue_mrpc_v002": 3_668.0,
  "glue_qqp_v002": 363_849.0,
  "glue_stsb_v002": 5_749.0,
  "glue_mnli_v002": 392_702.0,
  "glue_qnli_v002": 104_743.0,
  "glue_rte_v002": 2_490.0,
  "glue_mnli_mismatched_v002": 0.0,
}
# The same of SuperGLUE and DPR, which trains what WSC asks.
SUPER_GLUE_RATES = {
  "dpr_v001_simple": 1_322.0,
  "super_glue_wsc_v102_simple_train": 259.0,
  "super_glue_wsc_v102_simple_eval": 0.0,
  "super_glue_boolq_v102": 9_427.0,
  "super_glue_cb_v102": 250.0,
  "super_glue_copa_v102": 400.0,
  "super_glue_multirc_v102": 27_243.0,
  "super_glue_record_v102": 138_854.0,
  "super_glue_rte_v102": 2_490.0,
  "super_glue_wic_v102": 5_428.0,
}


def drawn(
  task: seqio.Task | seqio.Mixture, split: str = "train"
) -> list[tuple[seqio.Task, float]]:
  """The tasks that a split draws rows from, each with its rate.

  A task alone has rate 1. What has no such split, or rate 0, is not drawn.
  """
  if isinstance(task, seqio.Task):
    return [(task, 1.0)] if split in task.splits else []
  rates = [
    (part, float(task.get_rate(part)))
    for part in task.tasks
    if split in part.splits
  ]
  return [(part, rate) for part, rate in rates if rate > 0]


def training_rows(task: seqio.Task | seqio.Mixture) -> float:
  """The training rows of a task, or of all that a mixture draws from.

  Raises:
    UserError: for rows that nobody counts: a stream's, or those of a source of
      SeqIO's own that does not say.
  """
  if isinstance(task, seqio.Mixture):
    return sum(training_rows(part) for part, _ in drawn(task))
  if "train" not in task.splits:
    return 0
  if task.cache_dir:
    return task.get_cached_stats("train")["examples"]
  found = task.num_input_examples("train")
  if found is None:
    raise UserError(
      f"nobody counts the rows of task {task.name!r}, which is a stream, or one"
      " of SeqIO's own whose source does not tell: give the rates as numbers,"
      f" {{{task.name!r}: 1000.0, ...}}"
    )
  return found


def describe(mixture: seqio.Mixture) -> str:
  """What share of the training rows is drawn from each task; most first."""
  parts = sorted(drawn(mixture), key=lambda part: -part[1])
  total = sum(rate for _, rate in parts)
  shares = [f"{100 * rate / total:.3g} % {task.name}" for task, rate in parts]
  return f"{mixture.name} draws {', '.join(shares) or 'nothing'}"


def rate_num_examples(
  task: seqio.Task | seqio.Mixture,
  maximum: float | None = None,
  temperature: float = 1.0,
  scale: float = 1.0,
) -> float:
  """T5's rate of a task by its training rows.

  Equal to seqio.mixing_rate_num_examples; a task without a training split is
  evaluated only and has rate 0.
  """
  return _shaped(training_rows(task) * scale, maximum, temperature)


def _shaped(rate: float, maximum: float | None, temperature: float) -> float:
  """A rate, clipped and then flattened."""
  rate = min(rate, maximum) if maximum else rate
  return rate ** (1 / temperature) if temperature != 1 else rate


def named(tasks: Any) -> list[tuple[Any, float]]:
  """(task or its name, its number) of what a person names in a mixture.

  A mapping, or a list of pairs, has numbers; what has none has 1.

  Raises:
    UserError: for anything else, and numbers that are no rates.
  """
  if isinstance(tasks, Mapping):
    pairs = list(tasks.items())
  elif isinstance(tasks, (list, tuple)) and tasks:
    pairs = [x if isinstance(x, (list, tuple)) else (x, 1.0) for x in tasks]
  else:
    pairs = []
  if not pairs or any(len(pair) != 2 for pair in pairs):
    raise UserError(
      f"mixture: tasks = {shown(tasks)} must name tasks: {{'glue_cola_v002':"
      " 1.0, 'glue_rte_v002': 2.0}, or a list of names"
    )
  for task, number in pairs:
    if not isinstance(task, (str, seqio.Task, seqio.Mixture)):
      raise UserError(
        f"mixture: {shown(task)} is a {type(task).__name__}, neither a task's"
        " name nor a task"
      )
    _check_rate(number, task)
  return [(task, float(number)) for task, number in pairs]


def _name(task: Any) -> str:
  return task if isinstance(task, str) else task.name


def _check_rate(number: Any, task: Any) -> None:
  is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
  if not is_number or not 0 <= number < math.inf:
    raise UserError(
      f"mixture: the rate of {_name(task)} is {shown(number)}, and must be a"
      " number, 0 or more"
    )


def _check(
  pairs: Sequence[tuple[Any, float]],
  rates: Any,
  maximum: float | None,
  temperature: float,
) -> None:
  """Raises UserError for settings that make no rates."""
  is_list = isinstance(rates, (list, tuple))
  if rates not in _WORDS and not is_list:
    raise UserError(
      f"mixture: rates = {shown(rates)} must be 'proportional' (to the rows of"
      " each task), 'equal', or a number a task"
    )
  if is_list:
    if len(rates) != len(pairs):
      raise UserError(
        f"mixture: {len(rates)} rates, and {len(pairs)} tasks:"
        f" {listed(_name(task) for task, _ in pairs)}"
      )
    for rate, (task, _) in zip(rates, pairs):
      _check_rate(rate, task)
  for name, value in (("maximum", maximum), ("temperature", temperature)):
    if value is None and name == "maximum":
      continue
    if (
      not isinstance(value, (int, float))
      or isinstance(value, bool)
      or not 0 < value < math.inf
    ):
      raise UserError(
        f"mixture: {name} = {shown(value)} must be a number above 0"
      )


def make_mixture(
  name: str,
  parts: Sequence[tuple[seqio.Task | seqio.Mixture, float]],
  rates: Any = "equal",
  maximum: float | None = None,
  temperature: float = 1.0,
) -> seqio.Mixture:
  """The mixture of tasks, each with a number that scales its rate.

  Registered by its name, in the place of an earlier one. Rows are counted when
  a rate is first asked for.

  Raises:
    UserError: for two tasks of one name, and tasks that cannot be mixed.
  """
  _check(parts, rates, maximum, temperature)
  _check_fit(name, [task for task, _ in parts])
  found = []
  for i, (task, number) in enumerate(parts):
    if rates == "proportional":
      rate: Any = _Proportional(maximum, temperature, number)
      if isinstance(task, seqio.Mixture):
        rate = rate(task)
    else:
      base = 1.0 if rates == "equal" else float(rates[i])
      rate = _shaped(base * number, maximum, temperature)
    found.append((task, rate))
  seqio.MixtureRegistry.remove(name)
  return seqio.MixtureRegistry.add(name, found)


class _Proportional:
  """`rate_num_examples` of a task, worked out once."""

  def __init__(self, maximum: float | None, temperature: float, scale: float):
    self._how = (maximum, temperature, scale)
    self._found: dict[str, float] = {}

  def __call__(self, task: seqio.Task | seqio.Mixture) -> float:
    if task.name not in self._found:
      self._found[task.name] = float(rate_num_examples(task, *self._how))
    return self._found[task.name]


def _check_fit(name: str, tasks: Sequence[seqio.Task | seqio.Mixture]) -> None:
  """Raises UserError unless the tasks have names of their own, one vocabulary,
  and labels that mean the same.
  """
  names = [part.name for task in tasks for part in seqio.get_subtasks(task)]
  names += [task.name for task in tasks if isinstance(task, seqio.Mixture)]
  if name in names:
    raise UserError(
      f"mixture {name!r} holds a task of the same name: give it another name"
    )
  for again in names:
    if names.count(again) > 1:
      raise UserError(
        f"mixture {name!r}: two tasks are named {again!r}, and results are"
        " written by name: give each factory a name, or one a larger rate"
      )
  first = tasks[0]
  for task in tasks[1:]:
    mine, theirs = first.output_features, task.output_features
    if set(mine) != set(theirs):
      raise UserError(
        f"mixture {name!r}: {first.name} has {listed(sorted(mine))},"
        f" {task.name} has {listed(sorted(theirs))}; one model learns one kind"
        " of task"
      )
    for key, feature in mine.items():
      other = theirs[key]
      if _meaning(feature) != _meaning(other):
        raise UserError(
          f"mixture {name!r}: {key} of {first.name} and of {task.name} are not"
          f" the same ({_meaning(feature)}; {_meaning(other)})"
        )
      if feature.vocabulary != other.vocabulary:
        raise UserError(
          f"mixture {name!r}: {first.name} and {task.name} have other"
          f" vocabularies for {key}"
        )


def _meaning(feature: Any) -> str:
  """What a feature's numbers are, in words."""
  if not hasattr(feature, "problem_type"):
    return "text"
  if feature.kind != "sequence_classification":
    return f"{feature.kind} {listed(feature.names, 100)}".strip()
  return f"{feature.problem_type} {listed(feature.names, 100)}".strip()


# ---- Files with weights ------------------------------------------------------


def bound(
  factory: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
  """The arguments of a task factory, its defaults among them.

  Raises:
    UserError: naming those that are missing, or that it does not take.
  """
  signature = inspect.signature(factory)
  try:
    found = signature.bind(*args, **kwargs)
  except TypeError as e:
    given = {*signature.bind_partial(*args).arguments, *kwargs}
    missing = [
      parameter.name
      for parameter in signature.parameters.values()
      if parameter.default is parameter.empty and parameter.name not in given
    ]
    name = f"{factory.__module__.rpartition('.')[2]}.{factory.__name__}"
    what = (
      f"needs {' and '.join(missing)}"
      if missing
      else f"cannot be called so: {e}"
    )
    raise UserError(f"{name} {what}") from None
  found.apply_defaults()
  return found


def weighted(
  factory: Callable[..., seqio.Task],
) -> Callable[..., seqio.Task | seqio.Mixture]:
  """Makes a task factory understand training files with weights.

  What it makes of them is a mixture, `<name>_weighted`, of a task for each
  pattern (`<name>_<file>`); the other splits are those of task `<name>`.
  """

  @functools.wraps(factory)
  def make(*args, **kwargs):
    given = dict(bound(factory, args, kwargs).arguments)
    source = given["source"]
    weights = getattr(source, "weights", {})
    if not weights:
      return factory(**given)
    splits = dict(source.splits)
    # Labels that are found in the data are those of all files.
    whole = factory(**given | {"source": source.only(splits)})
    for key in ("label_names", "tag_names"):
      names = getattr(whole.output_features["targets"], "names", ())
      if key in given and names:
        given[key] = names
    parts: list[tuple[seqio.Task, float]] = []
    del splits["train"]
    if splits:
      part = {"source": source.only(splits), "name": whole.name}
      parts.append((factory(**given | part), _HELD_OUT))
    for pattern, weight in weights.items():
      part = {
        "source": source.only({"train": pattern}),
        "name": _part_name(whole.name, pattern, [t.name for t, _ in parts]),
      }
      parts.append((factory(**given | part), weight))
    return make_mixture(f"{whole.name}_weighted", parts)

  return make


def _part_name(task: str, pattern: str, taken: Sequence[str]) -> str:
  """A name by that of a file, and a number where another has it."""
  stem = re.sub(r"\W+", "_", os.path.basename(pattern).split(".")[0]).strip("_")
  first = name = f"{task}_{stem or 'files'}"
  number = 1
  while name in taken:
    number += 1
    name = f"{first}_{number}"
  return name
