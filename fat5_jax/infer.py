"""Predicts lines or a task: `python -m fat5_jax.infer --gin.MODEL_DIR=...`."""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax.gin_config import cli

  raise SystemExit(cli.main("infer"))

from collections.abc import Iterator
import dataclasses
import sys
from typing import Any

import seqio

from fat5_jax import console, fetched
from fat5_jax.data import checks, features, pipeline, seqio_source, sources
from fat5_jax.distributed import hosts
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.inference import (
  heads,
  language_model,
  loading,
  output_file,
  own_task,
  rows,
  settings,
  writers,
)
from fat5_jax.inference.predictor import Predictor

# Tokens of a question and a part of its context.
_SHORTEST_WINDOW = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
  """A checkpoint, the rows that it predicts, and where predictions go.

  Attributes:
    checkpoint_path: run folder, one checkpoint, or HF folder.
    input: a text file with one input a line, a .tsv, .csv or .jsonl file, or
      "-" for lines on standard input; None predicts the task of `dataset_cfg`,
      or reads standard input where there is none. Rows have the columns of the
      task that the run folder tells, and are asked about in its words; a line
      is its one column (a tagger's words are apart by spaces). Without such a
      task they have a column `inputs` (and `second` for pairs, or `question`
      and `context`). A column `inputs` where the task has none of that name is
      taken as it is.
    output: a file, or "-" for standard output.
    output_format: "jsonl" or "tsv"; by default what the ending of `output`
      says, else JSONL. Keys are inputs, prediction, and targets for a task.
      Heads also write "glue" (a submission), "squad" and "conll".
    dataset_cfg: the task and split to predict, where there is no input.
    batch_size: rows a batch.
    max_input_length: longer inputs are cut to this many tokens; None cuts none.
    max_output_length: most tokens of a prediction.
    use_template: whether the task's template is filled; False takes a language
      model's lines, and column `inputs`, as they are.
    model: overrides the checkpoint's own T5Config (same architecture).
    vocabulary: overrides the checkpoint's own.
    partitioner: the mesh; None puts a part of each batch on every device. Among
      several hosts all read the input, host 0 writes.
    head_module: see loading.load_model.
  """

  checkpoint_path: str
  input: str | None = None
  output: str = "-"
  output_format: str | None = None
  dataset_cfg: pipeline.DatasetConfig | None = None
  batch_size: int = 32
  max_input_length: int | None = None
  max_output_length: int = 256
  use_template: bool = True
  model: Any = None
  vocabulary: seqio.Vocabulary | None = None
  partitioner: Partitioner | None = None
  head_module: str | None = None

  @property
  def path(self) -> str:
    """What is read, where it is no task; of an address a copy."""
    return fetched.local(self.input or "-")

  @property
  def predicts_task(self) -> bool:
    return self.input is None and self.dataset_cfg is not None

  def check(self) -> None:
    """Raises UserError for what cannot be; nothing is read for it."""
    if not self.predicts_task and self.path == "-" and hosts.everyone.count > 1:
      raise UserError(
        "standard input reaches one host only: set INPUT to a file that all"
        f" {hosts.everyone.count} hosts see"
      )
    settings.check(
      self.input,
      checkpoint_path=self.checkpoint_path,
      output=self.output,
      output_format=self.output_format,
      infer_batch_size=self.batch_size,
      max_input_length=self.max_input_length,
      max_output_length=self.max_output_length,
      use_template=self.use_template,
    )
    read = [] if self.input in (None, "-") else [self.input]
    output_file.check(self.output, read)


@dataclasses.dataclass
class _Built:
  """All that an inference needs, built; nothing is predicted yet."""

  run: Inference
  loaded: loading.Loaded
  output_format: str
  vocabulary: seqio.Vocabulary
  told: rows.Told
  dataset_cfg: pipeline.DatasetConfig | None = None
  # The task that the run folder tells, for rows that are asked in its words.
  own: seqio.Task | None = None
  max_input_length: int | None = None
  count: int = 0

  def lines(self) -> Iterator[str]:
    """The lines of the output, predicted as they are taken.

    Raises:
      UserError: for rows that this model cannot be asked about.
    """
    run, loaded = self.run, self.loaded
    predictor = Predictor(
      loaded.model, loaded.partitioner, run.batch_size, run.max_output_length
    )
    if loaded.model.config.is_language_model:
      found = language_model.answers(
        predictor,
        loaded.params,
        self._texts(),
        self.vocabulary,
        self.max_input_length,
        self.told,
      )
    else:
      found = heads.predict_task(
        predictor,
        loaded.params,
        *self._labelled(),
        self.max_input_length,
        self.told,
      )
    return writers.write(
      self._counted(found),
      self.output_format,
      loaded.model.config.head,
      self.told.index,
    )

  def _counted(self, records):
    """The records, counted; none at all is an error."""
    for record in records:
      self.count += 1
      yield record
    if not self.count:
      name = "standard input" if self.run.path == "-" else self.run.path
      raise UserError(f"{name}: no rows, nothing to predict")

  def _rows(self) -> Iterator[sources.LocatedRow]:
    return rows.of_input(self.run.path, self.own, self.told)

  def _texts(self) -> Iterator[sources.LocatedRow]:
    """What a language model is asked."""
    if self.dataset_cfg is not None:
      return rows.of_task(self.dataset_cfg)
    return rows.texts(self._rows(), self.own)

  def _labelled(self) -> tuple[seqio.Task, str]:
    """The (task, split) that a head predicts."""
    head, path = self.loaded.model.config.head, self.run.path
    is_spans = head.kind == "question_answering"
    if self.dataset_cfg is not None:
      checks.check_task(self.dataset_cfg, self.loaded.model.config)
      task, split = self.dataset_cfg.task(), self.dataset_cfg.split
    else:
      split, own = seqio_source.ROWS, self.own
      has_labels = own is not None and features.label_feature(own) is not None
      if is_spans and not has_labels and rows.is_text(path):
        raise UserError(
          "question answering needs INPUT = a .jsonl, .tsv or .csv file with"
          " columns question and context"
        )
      pairs = own is None and not is_spans and rows.has_pairs(path)
      task = heads.asked(head, own, self._rows, self.vocabulary, pairs)
    length = self.max_input_length
    if is_spans and length is not None and length < _SHORTEST_WINDOW:
      raise UserError(
        f"MAX_INPUT_LENGTH = {length} has no room for a question and a context;"
        f" at least {_SHORTEST_WINDOW}"
      )
    return task, split


def _build(run: Inference) -> _Built:
  run.check()
  loaded = loading.load_model(
    run.checkpoint_path, run.model, run.partitioner, run.head_module
  )
  source, head = loaded.source, loaded.model.config.head
  vocabulary = run.vocabulary or loaded.vocabulary
  if vocabulary is None:
    raise UserError(f"{source.path} brings no vocabulary; set INFER_VOCABULARY")
  built = _Built(
    run,
    loaded,
    writers.choose(run.output, run.output_format, head),
    vocabulary,
    rows.Told(),
    max_input_length=run.max_input_length,
  )
  output_file.check_beside_run(run.output, source.run_dir, source.path)
  if built.output_format == "glue":
    built.told.index = []
  if run.predicts_task:
    built.dataset_cfg = own_task.with_task_of_run(
      run.dataset_cfg, source, vocabulary
    )
    read = seqio_source.files_of(built.dataset_cfg.task())
    output_file.check(run.output, read)
    if not loaded.model.config.is_language_model:
      window = (built.dataset_cfg.lengths() or {}).get("inputs")
      built.max_input_length = run.max_input_length or window
  elif run.use_template:
    built.own, window = rows.task_of_run(source, vocabulary, run.path)
    built.max_input_length = run.max_input_length or window
  return built


def dry_run(run: Inference) -> None:
  """Builds everything, and stops.

  Raises:
    UserError: for a mistake in the checkpoint, the input or the task.
  """
  built = _build(run)
  console.say(
    f"dry run: {built.loaded.source.path} and its vocabulary are fine"
  )


def infer(run: Inference) -> None:
  """Writes a prediction for every line, or every example of a task.

  Raises:
    UserError: for a mistake in the checkpoint, the input or the task.
  """
  built = _build(run)
  lines = built.lines()
  if run.path == "-" and run.dataset_cfg is None and sys.stdin.isatty():
    console.say("one input a line, end with Ctrl-D:")
  with output_file.opened(run.output) as file, settings.memory():
    for line in lines:
      file.write(line)
      file.flush()
  for line in built.told.describe(built.max_input_length):
    console.say(line)
  if run.output != "-":
    console.say(f"{built.count} predictions in {run.output}")
