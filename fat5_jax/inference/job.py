"""All that an inference needs, and the texts that it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import secrets
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import seqio

import fat5_jax
from fat5_jax import console
from fat5_jax.data import (
  checks,
  features,
  files,
  formats,
  pipeline,
  seqio_source,
  sources,
)
from fat5_jax.data import (
  identity as identity_lib,
)
from fat5_jax.errors import UserError
from fat5_jax.inference import (
  heads,
  language_model,
  loading,
  output_file,
  own_task,
  rows,
  score,
  thresholds,
  writers,
)
from fat5_jax.inference.decoding import Decoding
from fat5_jax.inference.predictor import WINDOW, Predictor
from fat5_jax.inference.run import Inference

# Of a file whose rows are counted first.
_COUNTED_BYTES = 2**32
# Tokens of a question and a part of its context.
_SHORTEST_WINDOW = 16


@dataclasses.dataclass
class Job:
  """An `Inference`, built; nothing is predicted yet."""

  run: Inference
  loaded: loading.Loaded
  output_format: str
  vocabulary: seqio.Vocabulary
  told: rows.Told
  decisions: thresholds.Decisions
  dataset_cfg: pipeline.DatasetConfig | None = None
  # The task that the run folder tells, for rows that are asked in its words.
  own: seqio.Task | None = None
  max_input_length: int | None = None
  # The numbers of the rows that are predicted; those before `done` are there.
  part: slice = dataclasses.field(default_factory=lambda: slice(0, None))
  done: int = 0
  count: int = 0
  predictor: Predictor | None = None

  def lines(self) -> Iterator[str]:
    """The texts of the output, a record's each, predicted as they are taken.

    Raises:
      UserError: for rows that this model cannot be asked about.
    """
    run, loaded = self.run, self.loaded
    config = loaded.model.config
    self.predictor = predictor = Predictor(
      loaded.model,
      loaded.partitioner,
      run.batch_size,
      run.max_output_length,
      run.decoding.bind(self.vocabulary, config),
      # What is typed is answered soon.
      window=1 if run.path == "-" and not run.predicts_task else WINDOW,
    )
    # From the beginning of a window on: its batches are those of an uncut
    # command, to the last bit.
    again = self.done % (WINDOW * run.batch_size)
    part = slice(self.part.start + self.done - again, self.part.stop)
    if run.mode != "predict":
      if not config.is_language_model:
        raise UserError(
          f"MODE = {run.mode!r} is for a language model, not a head"
        )
      choices = run.decoding.allowed_outputs
      if run.mode == "rank" and choices is None:
        raise UserError("MODE = 'rank' needs ALLOWED_OUTPUTS to choose from")
      unused = dataclasses.replace(run.decoding, allowed_outputs=None)
      if unused != Decoding():
        raise UserError(
          f"MODE = {run.mode!r} does not search: leave out what says how"
          f" answers are searched for ({unused.changes()})"
        )
      rank = functools.partial(language_model.ranks, choices=choices)
      find = rank if run.mode == "rank" else language_model.scores
      found = find(
        score.Scorer(loaded.model, loaded.partitioner, run.batch_size),
        loaded.params,
        self._texts(),
        vocabulary=self.vocabulary,
        max_input_length=self.max_input_length,
        told=self.told,
        part=part,
      )
    elif config.is_language_model:
      found = language_model.answers(
        predictor,
        loaded.params,
        self._texts(),
        self.vocabulary,
        self.max_input_length,
        self.told,
        with_scores=run.output_scores,
        part=part,
      )
    else:
      found = heads.predict_task(
        predictor,
        loaded.params,
        *self._labelled(),
        self.max_input_length,
        self.told,
        part,
        self.decisions,
      )
    return writers.write(
      self._counted(itertools.islice(found, again, None)),
      self.output_format,
      config.head,
      self.told.index,
      part.start + again,
    )

  def _counted(self, records):
    """The records, counted; none at all is an error."""
    for record in records:
      self.count += 1
      yield record
    if not self.count and not self.done and self.run.num_shards == 1:
      name = "standard input" if self.run.path == "-" else self.run.path
      raise UserError(f"{name}: no rows, nothing to predict")

  def expected(self) -> int | None:
    """Records to come, about, where a quick count tells: lines of a file."""
    total = None
    if self.part.stop is not None:
      total = self.part.stop - self.part.start
    elif self.dataset_cfg is not None:
      counts = [
        part.source.known_rows(self.dataset_cfg.split)
        for part in seqio.get_subtasks(self.dataset_cfg.task())
        if isinstance(part.source, seqio_source.SeqioSource)
        and self.dataset_cfg.split in part.splits
      ]
      total = None if None in counts else sum(counts)
    elif self._is_soon_counted():
      with contextlib.suppress(UserError):  # Reading it tells more.
        total = formats.count_rows(self.run.path)
    return total and max(total - self.done, 0)

  def _is_soon_counted(self) -> bool:
    """Whether the input is a file, which may be read twice, of some size."""
    path = self.run.path
    return os.path.isfile(path) and os.path.getsize(path) < _COUNTED_BYTES

  def ticked_by(self, add: Callable[[int], None]) -> Callable[[], None]:
    """What to call after each record, so that `add` hears of all that is done.

    An answer is written when those of a window of rows are there; `add` hears
    of each batch of them.
    """
    if (
      self.run.mode == "predict" and self.loaded.model.config.is_language_model
    ):
      self.predictor.tick = add
      return lambda: None
    return lambda: add(1)

  def _rows(self) -> Iterator[sources.LocatedRow]:
    return rows.of_input(self.run.path, self.own, self.told)

  def _texts(self) -> Iterator[sources.LocatedRow]:
    """What a language model is asked."""
    if self.dataset_cfg is not None:
      return rows.of_task(self.dataset_cfg)
    is_answered = self.run.mode == "score"
    return rows.texts(self._rows(), self.own, answered=is_answered)

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

  def take_part(self) -> None:
    """Finds the rows of this shard, and those that are there already."""
    run = self.run
    if run.num_shards > 1:
      if self.output_format == "squad":
        raise UserError("NUM_SHARDS: the format squad is one text, not rows")
      total = self._total()
      ends = [total * i // run.num_shards for i in range(run.num_shards + 1)]
      self.part = slice(ends[run.shard], ends[run.shard + 1])
    done = output_file.records_there(run.file, self.kept)
    if jax.process_count() > 1:
      done = int(multihost_utils.broadcast_one_to_all(np.int64(done)))
    self.done = done
    self.told.is_part = done > 0
    if done:
      console.say(
        f"{done:,} predictions are there already, of a command that was cut"
        " short: going on"
      )

  def _total(self) -> int:
    """Rows, of which each is a record."""
    if self.loaded.model.config.is_language_model:
      rows_of = self._texts()
    elif self.dataset_cfg is not None:
      rows_of = rows.of_task(self.dataset_cfg)
    else:
      rows_of = self._rows()
    total = sum(1 for _ in rows_of)
    self.told.forget()
    return total

  @functools.cached_property
  def kept(self) -> output_file.Kept:
    """What makes predictions that are there those of this command."""
    run = self.run
    settings_of = dataclasses.asdict(
      dataclasses.replace(run, partitioner=None, model=None, vocabulary=None)
    )
    asked = (
      self.dataset_cfg.fingerprint()
      if self.dataset_cfg is not None
      else None
      if run.path == "-"
      else files.file_record(run.path)
    )
    source = self.loaded.source
    identity = {
      "fat5_jax": fat5_jax.__version__,
      "settings": {k: repr(v) for k, v in settings_of.items()},
      "model": repr(self.loaded.model.config),
      "vocabulary": _shown(self.vocabulary),
      "checkpoint": [source.path, source.step, source.state()],
      "asked": asked,
      # What 'dev' is may be found anew.
      "decisions": [
        np.asarray(value, np.float64).tolist() if value is not None else None
        for value in dataclasses.astuple(self.decisions)
      ],
      "format": self.output_format,
    }
    whole = functools.partial(
      writers.whole_records,
      form=self.output_format,
      is_first=self.part.start == 0,
    )
    return output_file.Kept(json.loads(json.dumps(identity)), whole)


def _shown(vocabulary: seqio.Vocabulary) -> Any:
  """What it is; another one each time where it does not show that."""
  try:
    return identity_lib.of(vocabulary)
  except identity_lib.Unknown:
    return secrets.token_hex(8)


def build(run: Inference) -> Job:
  run.check()
  loaded = loading.load_model(
    run.checkpoint_path,
    run.model,
    run.partitioner,
    run.head_module,
    dtype=run.dtype,
    is_trained=False,
  )
  source, head = loaded.source, loaded.model.config.head
  if head is not None:
    run.decoding.check_unused(head.kind)
    if run.output_scores:
      raise UserError(
        f"OUTPUT_SCORES: a head of kind {head.kind} has no answer whose tokens"
        " are counted; its predictions have their probabilities anyway"
      )
  decisions = thresholds.decisions(
    run.threshold, run.no_answer_threshold, source, head
  )
  vocabulary = run.vocabulary or loaded.vocabulary
  if vocabulary is None:
    raise UserError(f"{source.path} brings no vocabulary; set INFER_VOCABULARY")
  built = Job(
    run,
    loaded,
    writers.choose(run.output, run.output_format, head),
    vocabulary,
    rows.Told(),
    decisions,
    max_input_length=run.max_input_length,
  )
  output_file.check_beside_run(run.file, source.run_dir, source.path)
  if built.output_format == "glue":
    built.told.index = []
  if run.predicts_task:
    built.dataset_cfg = own_task.with_task_of_run(
      run.dataset_cfg, source, vocabulary
    )
    read = seqio_source.files_of(built.dataset_cfg.task())
    output_file.check(run.file, read)
    if not loaded.model.config.is_language_model:
      window = (built.dataset_cfg.lengths() or {}).get("inputs")
      built.max_input_length = run.max_input_length or window
  elif run.use_template:
    built.own, window = rows.task_of_run(source, vocabulary, run.path)
    built.max_input_length = run.max_input_length or window
  return built
