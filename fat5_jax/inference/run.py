"""An inference: what a gin file, or the command line, describes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import seqio

from fat5_jax import fetched
from fat5_jax.data import pipeline
from fat5_jax.distributed import hosts
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.inference import output_file, settings
from fat5_jax.inference.decoding import Decoding


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
    mode: "predict"; "score", the log-likelihood of each row's targets: those of
      the task, or of its template, or a column `targets`; or "rank", the
      likeliest of the decoding's allowed outputs.
    shard, num_shards: of so many commands, each with its own number, which
      predict the rows together: this one's file ends in `-00001-of-00004`, and
      all of them one after the other are the whole.
    batch_size: rows a batch.
    max_input_length: longer inputs are cut to this many tokens; None cuts none.
    max_output_length: most tokens of a prediction.
    use_template: whether the task's template is filled; False takes a language
      model's lines, and column `inputs`, as they are.
    decoding: how a language model answers.
    output_scores: whether each answer has its `score`: the log-probability of
      its tokens, of beams as they compare.
    threshold: of a multi-label head: what a label's probability must be above;
      'dev' and 'dev_by_class' are what the run's evaluation found best. None is
      0.5.
    no_answer_threshold: of question answering: by how much no answer must score
      better than the best, to be the answer; None always answers.
    model: overrides the checkpoint's own T5Config (same architecture).
    dtype: of the products, "bfloat16" or "float32"; None is the checkpoint's.
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
  mode: Literal["predict", "score", "rank"] = "predict"
  shard: int = 0
  num_shards: int = 1
  batch_size: int = 32
  max_input_length: int | None = None
  max_output_length: int = 256
  use_template: bool = True
  decoding: Decoding = Decoding()
  output_scores: bool = False
  threshold: float | str | None = None
  no_answer_threshold: float | None = None
  model: Any = None
  dtype: str | None = None
  vocabulary: seqio.Vocabulary | None = None
  partitioner: Partitioner | None = None
  head_module: str | None = None

  @property
  def path(self) -> str:
    """What is read, where it is no task; of an address a copy."""
    return fetched.local(self.input or "-")

  @property
  def file(self) -> str:
    """Where predictions go: a shard's own."""
    if self.num_shards == 1:
      return self.output
    return f"{self.output}-{self.shard:05d}-of-{self.num_shards:05d}"

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
      output_scores=self.output_scores,
      mode=self.mode,
      shard=self.shard,
      num_shards=self.num_shards,
    )
    if self.shard >= self.num_shards:
      raise UserError(
        f"SHARD = {self.shard}: NUM_SHARDS = {self.num_shards} are numbered"
        f" from 0 to {self.num_shards - 1}"
      )
    if self.num_shards > 1 and (
      self.output == "-" or (self.path == "-" and not self.predicts_task)
    ):
      raise UserError(
        "NUM_SHARDS: a shard reads a part of a file and writes a file; set"
        " INPUT and OUTPUT"
      )
    read = [] if self.input in (None, "-") else [self.input]
    output_file.check(self.file, read)
