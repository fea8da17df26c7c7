"""Task factories: from a source and two templates to a SeqIO task.

Bind them from gin (`MIXTURE_OR_TASK_NAME = @tasks.text_to_text()`) or call them
from Python. Those of the T5 paper, and others, are ready under their names
(ready.py): give the name and, for local files, DATA_DIR.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import seqio
import tensorflow as tf

from fat5_jax.data import (
  features,
  folders,
  layouts,
  mixtures,
  preprocessors,
  records,
  seqio_source,
  sources,
  spoken_values,
)
from fat5_jax.data import glue as glue_lib
from fat5_jax.data import metrics as metrics_lib
from fat5_jax.data import squad as squad_lib
from fat5_jax.errors import UserError, nearest

# What SeqIO sees of a text besides the row.
_TOKENS = {
  **dict.fromkeys(("inputs", "targets"), tf.TensorSpec([None], tf.int32)),
  **dict.fromkeys(
    ("inputs_pretokenized", "targets_pretokenized"),
    tf.TensorSpec([], tf.string),
  ),
}


def add_text_task(
  name: str,
  source,
  row_fn: sources.RowFn,
  vocabulary: seqio.Vocabulary,
  *,
  columns: Sequence[str],
  unanswered: Callable[[sources.Row], sources.Row],
  output_vocabulary: seqio.Vocabulary | None = None,
  postprocess: Callable[..., Any] | None = None,
  metrics: Sequence[str | Callable[..., Any]] = (),
  extra_features: Mapping[str, tf.TensorSpec] | None = None,
  skip_bad_rows: bool = False,
) -> seqio.Task:
  """Registers a text-to-text task, in place of an earlier one of that name.

  `columns` and `unanswered`: see SeqioSource.
  """
  features.check_given(vocabulary, name)
  seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=seqio_source.SeqioSource(
      source,
      row_fn,
      seqio_source.TEXT_TO_TEXT | (extra_features or {}),
      layouts.Text(),
      skip_bad_rows,
      columns,
      unanswered,
    ),
    preprocessors=[seqio_source.preprocessor(layouts.Text(), _TOKENS)],
    output_features={
      "inputs": seqio.Feature(vocabulary, add_eos=True),
      "targets": seqio.Feature(output_vocabulary or vocabulary, add_eos=True),
    },
    postprocess_fn=postprocess,
    metric_fns=metrics_lib.find(metrics, name),
  )


@mixtures.weighted
@records.recorded
def text_to_text(
  source,
  inputs: str,
  targets: str,
  vocabulary: seqio.Vocabulary,
  name: str = "text_to_text",
  metrics: Sequence[str | Callable[..., Any]] = ("exact_match",),
  postprocess: Callable[..., Any] | None = None,
  output_vocabulary: seqio.Vocabulary | None = None,
  skip_bad_rows: bool = False,
  label_names: Mapping[str, Sequence[str]] | None = None,
) -> seqio.Task:
  """A task from rows and two templates.

  Args:
    source: `sources.Files`, `ParallelFiles`, `HuggingFace`, `Tfds`, `Function`.
    inputs: template with `{column}` fields, "translate: {text}"; `{a.b}` is
      the field b of column a, `{a.0}` its first item.
    targets: likewise.
    vocabulary: SeqIO vocabulary of inputs (and targets).
    name: under which it is registered, and results are written.
    metrics: names of data.metrics, or functions (targets, predictions).
    postprocess: decoded text to what the metrics compare.
    output_vocabulary: where targets have a vocabulary of their own.
    skip_bad_rows: leave out rows that would be an error.
    label_names: by column, the words for its class numbers; columns of a data
      set of HF's that are ClassLabel have theirs.

  Raises:
    UserError: for an unknown metric or a missing vocabulary.
  """
  asked = preprocessors.fields(inputs)
  answers = set(preprocessors.fields(targets)) - set(asked)
  names = dict(label_names or {})
  for column in {*asked, *answers} - set(names):
    if hasattr(source, "label_names"):
      names[column] = source.label_names(column)
  return add_text_task(
    name,
    source,
    preprocessors.template(inputs, targets, names),
    vocabulary,
    columns=asked,
    unanswered=lambda row: row
    | dict.fromkeys(answers, preprocessors.Unanswered()),
    output_vocabulary=output_vocabulary,
    postprocess=postprocess,
    metrics=metrics,
    skip_bad_rows=skip_bad_rows,
  )


# ---- The tasks of the T5 paper -----------------------------------------------


@records.recorded
def glue(
  name: str,
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  source: Any = None,
) -> seqio.Task:
  """A GLUE task, e.g. "sst2", registered as `glue_sst2_v002`.

  Args:
    name: cola sst2 mrpc stsb qqp mnli mnli_matched mnli_mismatched qnli rte
      wnli.
    vocabulary: SeqIO vocabulary.
    data_dir: folder with the official layout (`SST-2/train.tsv`, `dev.tsv`);
      None reads HF's `glue` dataset.
    source: of rows, instead of both.

  Raises:
    UserError: for an unknown name or missing files.
  """
  task = glue_lib.find(name)
  if name == "stsb":
    row_fn, postprocess = preprocessors.stsb, preprocessors.to_float
  else:
    prefix = "mnli" if "mnli" in name else name
    row_fn = preprocessors.glue(prefix, tuple(task.features), task.label_names)
    postprocess = preprocessors.label_to_class(tuple(task.label_names))
  source, rename = glue_lib.source(name, data_dir, source)
  return add_text_task(
    f"glue_{name}_v002",
    source,
    rename(row_fn),
    vocabulary,
    columns=tuple(task.features),
    unanswered=lambda row: row
    | {"label": -1, task.label_column: 0 if name == "stsb" else -1},
    postprocess=postprocess,
    metrics=task.metrics,
  )


@records.recorded
def squad(
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  name: str = "squad_v010_allanswers",
  source: Any = None,
) -> seqio.Task:
  """SQuAD 1.1: columns id, question, context, answers; all answers count.

  Args:
    vocabulary: SeqIO vocabulary.
    data_dir: folder with the official `train-v1.1.json` / `dev-v1.1.json` or
      train/validation files of one question a row; None reads HF's `squad`.
    name: of the task.
    source: of rows, instead of both.
  """
  return add_text_task(
    name,
    source or squad_lib.source(data_dir),
    preprocessors.squad,
    vocabulary,
    columns=("question", "context"),
    unanswered=lambda row: row | {"answers": ["?"]},
    postprocess=preprocessors.all_answers,
    metrics=("squad",),
    extra_features={
      "answers": tf.TensorSpec([None], tf.string),
      "id": tf.TensorSpec([], tf.string),
    },
  )


@records.recorded
def translation(
  source_language: str,
  target_language: str,
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  name: str | None = None,
  hf_path: str = "wmt/wmt14",
  hf_name: str | None = None,
  source: Any = None,
) -> seqio.Task:
  """Translation with T5's prefix, BLEU as metric.

  Args:
    source_language: code, "en".
    target_language: code, "de".
    vocabulary: SeqIO vocabulary.
    data_dir: folder with line-aligned `train.en`, `train.de`, `val.en` ...
      (`.gz` allowed) or files of rows with a column a language; None reads HF.
    name: of the task; `wmt_en_de` by default.
    hf_path: HF dataset read where there is no data_dir.
    hf_name: its configuration, `de-en`.
    source: of rows, instead of both.
  """
  pair = (source_language, target_language)
  if source is None:
    source = folders.aligned_files(data_dir, {code: code for code in pair})
  if source is None:
    source = folders.named_splits(data_dir, hf_path, hf_name)
  return add_text_task(
    name or f"wmt_{source_language}_{target_language}",
    source,
    preprocessors.translate(*pair),
    vocabulary,
    columns=(source_language,),
    unanswered=lambda row: {
      **row.get("translation", row),
      target_language: "?",
    },
    metrics=("bleu",),
  )


@records.recorded
def summarization(
  article: str,
  summary: str,
  vocabulary: seqio.Vocabulary,
  data_dir: str | None = None,
  name: str = "summarize",
  hf_path: str = "abisee/cnn_dailymail",
  hf_name: str | None = "3.0.0",
  source: Any = None,
) -> seqio.Task:
  """Summarisation with T5's prefix, ROUGE as metric.

  Args:
    article: column of the text.
    summary: column of its summary.
    vocabulary: SeqIO vocabulary.
    data_dir: folder with files of rows named after their split, or line-aligned
      `train.source`, `train.target`, `val.source` ...; None reads HF.
    name: of the task.
    hf_path: HF dataset read where there is no data_dir.
    hf_name: its configuration.
    source: of rows, instead of both.
  """
  if source is None:
    endings = {article: "source", summary: "target"}
    source = folders.aligned_files(data_dir, endings)
  if source is None:
    source = folders.named_splits(data_dir, hf_path, hf_name)
  return add_text_task(
    name,
    source,
    preprocessors.summarize(article, summary),
    vocabulary,
    columns=(article,),
    unanswered=lambda row: row | {summary: "?"},
    metrics=("rouge",),
  )


@records.recorded
def quickstart(
  vocabulary: seqio.Vocabulary,
  name: str = "spoken_values",
  train_rows: int = 20000,
  validation_rows: int = 500,
  seed: int = 0,
) -> seqio.Task:
  """Written dates and amounts to ISO dates and numbers; made from a seed.

  See data/spoken_values.py. The validation rows never occur in training.
  """
  rows = functools.partial(
    spoken_values.rows, train_rows, validation_rows, seed
  )
  return add_text_task(
    name,
    sources.Function(
      {
        "train": functools.partial(rows, "train"),
        "validation": functools.partial(rows, "validation"),
      }
    ),
    preprocessors.template("{text}", "{value}"),
    vocabulary,
    columns=("text",),
    unanswered=lambda row: row | {"value": "?"},
    metrics=("exact_match",),
  )


# ---- Mixtures ----------------------------------------------------------------


def mixture(
  tasks: Any,
  vocabulary: seqio.Vocabulary | None = None,
  data_dir: str | None = None,
  rates: Any = None,
  maximum: float | None = None,
  temperature: float = 1.0,
  name: str = "mixture",
) -> seqio.Mixture:
  """Rows of several tasks, drawn at rates; each is evaluated apart.

  Args:
    tasks: names (of ready or registered tasks and mixtures) or tasks: a list,
      or each with a number, {'glue_cola_v002': 1.0, 'glue_rte_v002': 2.0} or
      pairs. The number scales the rate; a task of 0 is evaluated only.
    vocabulary: of the ready tasks.
    data_dir: local files of the ready tasks.
    rates: 'proportional' to the training rows of each task, which are counted
      once (the default of a list), 'equal' (that of tasks with numbers, which
      then are the rates), or a number a task.
    maximum: no rate is larger, T5's artificial limit on the size of a data set.
    temperature: T of T5's r^(1/T), after the maximum; 1 changes nothing.
    name: under which it is registered, and results are written.

  Raises:
    UserError: for an unknown task, no rate, and tasks that one model cannot
      learn together.
  """
  pairs = mixtures.named(tasks)
  if rates is None:
    has_numbers = isinstance(tasks, Mapping) or any(
      isinstance(x, (list, tuple)) for x in tasks
    )
    rates = "equal" if has_numbers else "proportional"
  parts, missing = [], []
  for task, number in pairs:
    try:
      parts.append((resolve(task, vocabulary, data_dir), number))
    except UserError as e:
      missing.append(str(e))
  if missing:
    raise UserError(
      f"mixture {name!r}:\n  "
      + "\n  ".join(missing)
      + "\n@tasks.mixture() mixes those tasks that you have"
    )
  return mixtures.make_mixture(name, parts, rates, maximum, temperature)


def register(task: seqio.Task | seqio.Mixture) -> None:
  """Makes SeqIO know a task, or a mixture, by its name.

  A later task may have taken the name: the one that is used counts.
  """
  for registry, kind in (
    (seqio.TaskRegistry, seqio.Task),
    (seqio.MixtureRegistry, seqio.Mixture),
  ):
    registry.remove(task.name)
    if isinstance(task, kind):
      registry.add_provider(task.name, task)


def resolve(
  task: str | seqio.Task | seqio.Mixture,
  vocabulary: seqio.Vocabulary | None = None,
  data_dir: str | None = None,
) -> seqio.Task | seqio.Mixture:
  """The task of a name: a registered one, or one of T5's, built now.

  Raises:
    UserError: for an unknown name, with the nearest known one.
  """
  if not isinstance(task, str):
    return task
  from fat5_jax.data import ready

  if task in ready.TASKS:
    return ready.TASKS[task](vocabulary=vocabulary, data_dir=data_dir)
  registered = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if task in registered:
    return seqio.get_mixture_or_task(task)
  known = sorted({*ready.TASKS, *registered})
  raise UserError(
    f"unknown task {task!r}.{nearest(task, known)} Known:"
    f" {', '.join(known)}. Others: bind"
    " MIXTURE_OR_TASK_NAME = @tasks.text_to_text()"
  )
