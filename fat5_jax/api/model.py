"""A T5 in Python: it predicts, scores, embeds, is fine-tuned and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
import tempfile
from typing import Any

import flax.linen as nn
import optax
import seqio

from fat5_jax import console, storage, trees
from fat5_jax import train as train_command
from fat5_jax.api import data, training
from fat5_jax.api.asking import CLASSIFIERS, Asks
from fat5_jax.api.fine_tuned import FineTuned
from fat5_jax.api.predict import Answers
from fat5_jax.api.words import as_user_error, of_python, quiet
from fat5_jax.checkpoints import export as export_lib
from fat5_jax.checkpoints import reference
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError, nearest
from fat5_jax.inference import loading
from fat5_jax.models import factory, initial
from fat5_jax.models.config import (
  HEAD_KINDS,
  HeadConfig,
  LoRAConfig,
  T5Config,
)
from fat5_jax.training import trainable as trainable_lib
from fat5_jax.training.program import Program


class Model(Asks):
  """A T5 with its vocabulary: a language model, or one under a head.

  It is what lies at a checkpoint; `with_head` and `with_lora` give another
  model with fresh parts, `fine_tune` makes this one the trained one, as
  Hugging Face's Trainer does.

  Attributes:
    config: its T5Config: sizes, head, LoRA, dtype.
    vocabulary: SeqIO's, or None where the checkpoint brings none.
    path: the checkpoint that its parameters are read from.
  """

  def __init__(
    self,
    source: reference.CheckpointRef,
    config: T5Config,
    partitioner: Partitioner,
    vocabulary: seqio.Vocabulary | None,
    *,
    head_layers: nn.Module | None = None,
    dtype: str | None = None,
    trainable: str | None = None,
    is_fresh: bool = False,
    owner: Any = None,
  ):
    """For `load`. `is_fresh`: parts of it are in no checkpoint yet; `owner`
    keeps a temporary folder that it is read from."""
    self.config, self.vocabulary = config, vocabulary
    self._source, self._partitioner = source, partitioner
    self._head_layers, self._dtype = head_layers, dtype
    self._trainable, self._frozen = trainable, None
    self._is_fresh, self._owner = is_fresh, owner
    self._answers: Answers | None = None
    self._loaded: loading.Loaded | None = None

  def __repr__(self) -> str:
    config = self.config
    head = "language_model" if config.head is None else config.head.kind
    lora = "" if config.lora is None else f", LoRA rank {config.lora.rank}"
    return (
      f"Model({head}, {config.model_type}, {config.num_encoder_layers}"
      f"+{config.num_decoder_layers} layers of {config.emb_dim}{lora};"
      f" {self.path})"
    )

  @property
  def path(self) -> str:
    return self._source.path

  @property
  def parameters(self) -> dict[str, Any]:
    """The parameters on the devices: T5X's tree, float32.

    The dictionaries are a copy: a change of theirs changes no model.
    """
    with of_python():
      return trees.nest(trees.flatten(self._load().params))

  def _module(self, **changes: Any) -> nn.Module:
    with as_user_error():
      config = self.config.replace(**changes)
      return factory.create(config, head_layers=self._head_layers)

  def _load(self) -> loading.Loaded:
    if self._loaded is None:
      module = self._module()
      program = Program(module, self._partitioner, optax.identity())
      self._loaded = loading.load_model(
        self.path,
        module,
        self._partitioner,
        initialise=program.fresh_params if self._is_fresh else None,
      )
    return self._loaded

  def _vocabulary(self) -> seqio.Vocabulary:
    if self.vocabulary is None:
      raise UserError(
        f"{self.path} brings no vocabulary: load(path,"
        " vocabulary='spiece.model')"
      )
    return self.vocabulary

  def _ask(self, *kinds: str) -> Answers:
    """What answers, if the model is one of these kinds."""
    head = self.config.head
    kind = "language_model" if head is None else head.kind
    if kinds and kind not in kinds:
      hint = f"model.with_head({kinds[0]!r}, ...) gives one to fine-tune"
      if kinds[0] == "language_model":
        hint = "load one"
      raise UserError(
        f"the model is of kind {kind}, and this asks one of"
        f" {' or '.join(kinds)}: {hint}"
      )
    if self._answers is None:
      self._answers = Answers(
        self._load(), self._vocabulary(), asks_as_run=not self._is_fresh
      )
    return self._answers

  # ---- Other models of it ----

  def with_head(
    self,
    kind: str,
    labels: Sequence[str] | None = None,
    *,
    module: nn.Module | None = None,
    **options: Any,
  ) -> Model:
    """This T5 under a fresh head, to be fine-tuned.

    Args:
      kind: "sequence_classification", "token_classification",
        "question_answering", "embedding", "enct5" or "language_model".
      labels: names of the classes or tags, in the order of the outputs. A
        regression has none, but `num_labels` numbers.
      module: a flax module of your own in place of the head's hidden layers,
        called as `module(x, enable_dropout=...)`.
      **options: fields of HeadConfig: problem_type, body, pooling, widths,
        activation, dropout_rate, decoder_layers, max_answer_tokens, ...

    Raises:
      UserError: for a head that cannot be, or if the model has one already.
    """
    with of_python():
      if kind not in HEAD_KINDS:
        raise UserError(
          f"kind = {kind!r}.{nearest(str(kind), HEAD_KINDS)} A head is one of"
          f" {', '.join(HEAD_KINDS)}"
        )
      if isinstance(labels, str):
        raise UserError(f"labels is one text, and must be a list: [{labels!r}]")
      if labels is not None:
        labels = list(labels)
        if len(set(map(str, labels))) < len(labels):
          raise UserError(f"labels = {labels} holds a name twice")
        options = {"num_labels": len(labels), "label_names": labels} | options
      needs = kind in (*CLASSIFIERS, "token_classification")
      if needs and not labels and options.get("problem_type") != "regression":
        raise UserError(f"kind {kind!r} needs labels=[...], the classes' names")
      if options.get("problem_type") == "regression" and "num_labels" not in (
        options
      ):
        options["num_labels"] = 1
      with as_user_error():
        before = reference.read_config(self._source)
        if before.head is not None and before.head.kind != "embedding":
          raise UserError(
            f"{self.path} has a head of kind {before.head.kind} already: load a"
            " model without"
          )
        config = self.config.with_head(HeadConfig(kind, **options))
      other = self._other(config, module)
      with as_user_error():
        factory.own_head(other._module())
      return other

  def with_lora(
    self,
    rank: int = 8,
    *,
    alpha: float = 16.0,
    dropout_rate: float = 0.0,
    targets: Sequence[str] = ("query", "value"),
  ) -> Model:
    """This model with low-rank updates, which alone train (with its head).

    See gin/lora.gin and LoRAConfig. `export(to="peft")` writes an adapter,
    `export(to="hf")` merges them.

    Raises:
      UserError: for what no LoRA is, or if the model has one.
    """
    with of_python():
      if self.config.lora is not None:
        raise UserError(f"{self.path} has LoRA already")
      with as_user_error():
        lora = LoRAConfig(rank, alpha, dropout_rate, tuple(targets))
        config = self.config.replace(lora=lora)
      other = self._other(config, self._head_layers)
      other._trainable = training.LORA_TRAINABLE
      abstract = initial.abstract_params(other._module())
      trainable_lib.check_lora(abstract, config)
      return other

  def _other(self, config: T5Config, head_layers: Any) -> Model:
    other = Model(
      self._source,
      config,
      self._partitioner,
      self.vocabulary,
      head_layers=head_layers,
      dtype=self._dtype,
      trainable=self._trainable,
      is_fresh=True,
      owner=self._owner,
    )
    other._frozen = self._frozen
    return other

  def freeze(self, pattern: str | None) -> Model:
    """Leaves parameters as they are in trainings to come; gives this model.

    Args:
      pattern: regular expression, searched in names such as
        `encoder/layers_0/attention/query/kernel`; None freezes nothing. It
        takes the place of an earlier one.

    Raises:
      UserError: for a pattern that matches nothing, or leaves nothing.
    """
    with of_python():
      abstract = initial.abstract_params(self._module())
      trainable_lib.choose(abstract, self._trainable, pattern)
      self._frozen = pattern
      return self

  # ---- Training and export ----

  def fine_tune(
    self,
    rows: Any,
    inputs: str | Sequence[str] | None = None,
    targets: str | Sequence[str] | None = None,
    *,
    validation: Any = None,
    steps: int | None = None,
    epochs: float | None = None,
    metrics: Sequence[str | Callable[..., Any]] | None = None,
    run_folder: str | os.PathLike | None = None,
    batch_size: int | None = None,
    learning_rate: float | Callable[[Any], Any] | None = None,
    optimizer: str | optax.GradientTransformation | None = None,
    max_input_tokens: int | None = None,
    max_target_tokens: int | None = None,
    dropout: float = 0.1,
    seed: int = 42,
    pack: bool | None = None,
    buckets: int | Sequence[Any] | None = None,
    skip_bad_rows: bool = False,
    scan_layers: bool = False,
    remat_policy: str | tuple[str, ...] = "none",
    checkpoint_period: int = 1000,
    keep: int | None = 3,
    **more: Any,
  ) -> FineTuned:
    """Trains this model, which then has the trained parameters.

    The run is that of `python -m fat5_jax.train` with runs/finetune.gin, whose
    defaults it has: the same settings give the same bits.

    Args:
      rows: a list of dictionaries, a pandas frame, a data set of Hugging
        Face's, files (.jsonl, .tsv, .csv, .parquet; CoNLL's for tags, SQuAD's
        .json for answers), or a SeqIO task, which says the rest itself.
      inputs: a column's name, or a template: "summarize: {text}"; two of them
        for pairs of a classifier; the column of a tagger's words ("words").
      targets: likewise; for heads the column of labels, of tags ("tags"). Rows
        of question answering have question, context and answers.
      validation: rows of any of these kinds that are evaluated; None none. Of
        a SeqIO task the name of a split.
      steps: to train; or
      epochs: passes over the rows.
      metrics: names ("exact_match", "rouge", "accuracy", ...; data.metrics
        BY_NAME), or functions of (targets, predictions) that return {name:
        value}; None is what suits the task.
      run_folder: keeps checkpoints, metrics and curves; the same call again
        goes on where it was, as the command does. None is a temporary folder,
        which is gone with the model and its process: export what shall stay.
      batch_size: 128, 32 under a head with labels, or all rows if they are
        fewer.
      learning_rate: 0.001 constant (AdamW without LoRA 0.0001), or a function
        of the step, as optimizers.create_learning_rate_scheduler makes.
      optimizer: "adafactor" (the default), "adamw" (LoRA's default), or an
        optax transformation with its rate inside.
      max_input_tokens: the longest of the rows, 512 at most; what is cut is
        said, windows of tags and spans are not.
      max_target_tokens: likewise.
      dropout: of the model.
      seed: of fresh parameters, order and dropout.
      pack: several examples a row; None is True for language models, where
        there are no buckets.
      buckets: rows of about one length together: how many lengths, or which.
      skip_bad_rows: leaves out rows that would be an error.
      scan_layers: compiles one layer, not all of them.
      remat_policy: what is computed again in the backward pass, to save memory:
        "none", "minimal", "gathered" or "full".
      checkpoint_period: steps between checkpoints.
      keep: checkpoints that stay; None all.
      **more: fields of training.run.Run: eval_period (1000, 0 for one at the
        end only), eval_steps (20), stats_period, z_loss, label_smoothing,
        loss_normalizing_factor, num_microbatches.

    Of a model that was fine-tuned before, optimizer and steps count on, as
    where gin starts from a run folder.

    Returns:
      The run: metrics, plot, folder. Ctrl-C saves, and returns it with
      `stopped`.

    Raises:
      UserError: for a mistake in the settings or the rows.
    """
    with of_python():
      wanted = training.Wanted(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        max_input_tokens=max_input_tokens,
        max_target_tokens=max_target_tokens,
        learning_rate=learning_rate,
        optimizer=optimizer,
        seed=seed,
        pack=pack,
        buckets=buckets,
        checkpoint_period=checkpoint_period,
        keep=keep,
      )
      module = self._module(
        dropout_rate=dropout,
        dtype=self._dtype or "bfloat16",
        scan_layers=scan_layers,
        remat_policy=remat_policy,
      )
      task, split = data.task_of(
        rows,
        validation,
        self.config,
        self._vocabulary(),
        inputs,
        targets,
        metrics,
        skip_bad_rows,
      )
      folder, owner = _folder(run_folder)
      run = training.make_run(
        wanted,
        module,
        task,
        split,
        start=self.path,
        run_folder=folder,
        partitioner=self._partitioner,
        trainable=self._trainable,
        frozen=self._frozen,
        more=more,
      )
      # The run reads its own; two copies would fill a device.
      self._answers = self._loaded = None
      with quiet():
        state = train_command.train(run)
      self._become(run, folder, owner)
      return FineTuned(
        self, folder, self._source.step, state is None, self._owner
      )

  def _become(self, run: Any, folder: str, owner: Any) -> None:
    """The model at the last checkpoint of a run."""
    self._source = reference.find(folder)
    self.config = run.model.config.replace(
      scan_layers=False, remat_policy="none"
    )
    self._is_fresh, self._owner = False, owner

  def export(
    self,
    folder: str | os.PathLike,
    to: str = "hf",
    *,
    encoder_only: bool = False,
    tokenizer: str | None = None,
    check_transformers: bool = True,
  ) -> str:
    """Writes the model for another library; tools/convert_checkpoint.py's door.

    What was written is read again and compared, and loaded in transformers
    where torch is installed, before it takes the folder's place.

    Args:
      folder: a new one, or an earlier export.
      to: "hf", "flash_t5", "enct5", "peft" (LoRA's matrices alone) or "fat5".
      encoder_only: leaves the decoder out.
      tokenizer: a folder with tokenizer files, or a SentencePiece model, in
        place of the model's own.
      check_transformers: False leaves transformers out.

    Returns:
      The folder's absolute path.

    Raises:
      UserError: for a folder that may not be replaced, a format that does not
        hold this model, or parts that no training has made.
    """
    with of_python():
      if to not in export_lib.FORMATS:
        raise UserError(
          f"to = {to!r}.{nearest(str(to), export_lib.FORMATS)} It is one of"
          f" {', '.join(export_lib.FORMATS)}"
        )
      if self._is_fresh:
        raise UserError(
          "the model's head or LoRA is fresh, and no checkpoint has it:"
          " fine_tune it first"
        )
      how = export_lib.Export(
        to=to,
        encoder_only=encoder_only,
        tokenizer=tokenizer,
        check_transformers=check_transformers,
        say=console.say,
      )
      export_lib.export(self.path, os.fspath(folder), how)
      return storage.absolute(os.fspath(folder))


def _folder(run_folder: Any) -> tuple[str, Any]:
  """(the run folder, what removes it when it is temporary)."""
  if run_folder is None:
    owner = tempfile.TemporaryDirectory(prefix="fat5_jax_")
    console.say(
      f"no run_folder given: {owner.name} is temporary, gone with this process"
    )
    return owner.name, owner
  if not isinstance(run_folder, (str, os.PathLike)):
    raise UserError(
      f"run_folder is a {type(run_folder).__name__}, and must name a folder"
    )
  return storage.absolute(os.fspath(run_folder)), None
