"""A run: what a gin file, or Python, describes, built once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import optax

from fat5_jax import macros, optimizers
from fat5_jax.checkpoints import CheckpointConfig
from fat5_jax.data import checks, curriculum, pipeline
from fat5_jax.distributed import hosts
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.inference.decoding import Decoding
from fat5_jax.loggers.metrics import check_loggers
from fat5_jax.models import factory
from fat5_jax.training import averaging
from fat5_jax.training.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A training run; `train` trains it, `plan` compiles it, `dry_run` tells it.

  Attributes:
    model: a `models.t5.Transformer`, or a head.
    train_dataset_cfg: training data.
    train_eval_dataset_cfg: data whose teacher-forced loss is reported, or None.
    infer_eval_dataset_cfg: data that is predicted and scored with the task's
      metrics, or None.
    checkpoint_cfg: when to save, what to start from.
    optimizer: an optax transformation, its learning rate inside; the log has
      that of optimizers.Optimizer.
    model_dir: the run folder; all hosts see it.
    partitioner: the mesh; None puts a part of each batch on every device.
    total_steps: the step to reach; counts those of the checkpoint started from.
    relative_steps: instead, steps after that checkpoint.
    eval_steps: batches of train_eval_dataset_cfg an evaluation reads; None all.
    eval_period: steps between evaluations; 0 for one at the end only.
    stats_period: steps between rows of the metrics; 100 or eval_period if less.
    random_seed: of initial parameters and dropout.
    z_loss: coefficient of log(Z)^2.
    label_smoothing: in [0, 1).
    loss_normalizing_factor: see losses.weights_and_normalizer.
    num_microbatches: parts a batch is split into to save memory.
    config_text: gives the operative configuration for `config.gin`.
    trainable: regular expression of the names of the parameters that train,
      None for all; see trainable.choose.
    frozen: regular expression of those of them that do not.
    decoding: how a language model's predictions are searched for.
    ema_decay: of an average of the parameters (averaging.py), which then is
      what is evaluated and kept; None averages nothing.
    parameter_dtype: of the parameters as they train; "bfloat16" compensates the
      optimizer's updates (optimizers.Compensated).
    keep_best: TASK/METRIC of the evaluations whose best step stays, whatever
      `keep` says; None follows none.
    best_mode: "max" or "min"; None by the metric's name.
    patience: evaluations without a better value after which the run ends; None
      never.
    eval_before_training: whether the start is evaluated too.
    loggers: what takes the metrics beside metrics.csv: of
      loggers.metrics.LOGGERS.
    profile_steps: (first, last) of the steps that jax.profiler captures into
      `profile` of the run folder; None captures none.

  Raises:
    UserError: for settings that no run has.
  """

  model: Any
  train_dataset_cfg: pipeline.DatasetConfig
  train_eval_dataset_cfg: pipeline.DatasetConfig | None
  infer_eval_dataset_cfg: pipeline.DatasetConfig | None
  checkpoint_cfg: CheckpointConfig
  optimizer: optax.GradientTransformation
  model_dir: str
  partitioner: Partitioner | None = None
  total_steps: int | None = None
  relative_steps: int | None = None
  eval_steps: int | None = 20
  eval_period: int = 1000
  stats_period: int | None = None
  random_seed: int = 42
  z_loss: float = 0.0001
  label_smoothing: float = 0.0
  loss_normalizing_factor: float | str | None = None
  num_microbatches: int | None = None
  config_text: Callable[[], str] | None = None
  trainable: str | None = None
  frozen: str | None = None
  decoding: Decoding = Decoding()
  ema_decay: float | None = None
  parameter_dtype: Literal["float32", "bfloat16"] = "float32"
  keep_best: str | None = None
  best_mode: str | None = None
  patience: int | None = None
  eval_before_training: bool = False
  loggers: Sequence[str] = ("tensorboard",)
  profile_steps: Sequence[int] | None = None

  def __post_init__(self):
    if (self.total_steps is None) == (self.relative_steps is None):
      raise UserError(
        f"TRAIN_STEPS = {self.total_steps} (counted from step 0 of the"
        f" checkpoint) and TRAIN_STEPS_RELATIVE = {self.relative_steps}, which"
        " a recipe may have set: set one of them, and the other to None"
      )
    if not isinstance(self.random_seed, int):
      raise UserError(
        f"RANDOM_SEED = {self.random_seed!r} must be a whole number"
      )
    for name, value, kind in (
      ("MODEL", self.model, nn.Module),
      ("OPTIMIZER", self.optimizer, optax.GradientTransformation),
    ):
      if not isinstance(value, kind):
        raise UserError(
          f"{name} builds a {type(value).__name__}: no {kind.__name__}"
        )
    macros.check("PARAMETER_DTYPE", self.parameter_dtype, "parameter_dtype")
    if isinstance(self.optimizer, optimizers.Compensated):
      raise UserError(
        "OPTIMIZER is Compensated: give the one inside of it, and"
        " PARAMETER_DTYPE = 'bfloat16'"
      )
    if self.patience is not None and self.keep_best is None:
      raise UserError(
        f"PATIENCE = {self.patience} needs a metric: KEEP_BEST = 'TASK/METRIC'"
      )
    check_loggers(self.loggers)
    if self.profile_steps is not None:
      first, last = self.profile_steps
      if not 1 <= first <= last:
        raise UserError(
          f"PROFILE_STEPS = {tuple(self.profile_steps)}: (first, last), from"
          " step 1 on and the first not after the last"
        )
    settle = functools.partial(object.__setattr__, self)
    for name in ("train", "train_eval", "infer_eval"):
      name = f"{name}_dataset_cfg"
      settle(name, self._seeded(getattr(self, name)))
    settle("partitioner", self.partitioner or Partitioner())
    settle(
      "stats_period", self.stats_period or min(100, self.eval_period or 100)
    )

  def _seeded(self, cfg):
    """`seed = None` is the run's seed, `split = None` no evaluation."""
    if cfg is None or cfg.split is None or cfg.seed is not None:
      return None if cfg is None or cfg.split is None else cfg
    return dataclasses.replace(cfg, seed=self.random_seed)

  @functools.cached_property
  def program(self) -> Program:
    """What it computes."""
    return Program(
      self.model,
      self.partitioner,
      self._whole_optimizer(),
      seed=self.random_seed,
      z_loss=self.z_loss,
      label_smoothing=self.label_smoothing,
      loss_normalizing_factor=self.loss_normalizing_factor,
      num_microbatches=self.num_microbatches,
      trainable=self.trainable,
      frozen=self.frozen,
    )

  def _whole_optimizer(self) -> optax.GradientTransformation:
    optimizer = self.optimizer
    if self.ema_decay is not None:
      optimizer = averaging.Averaged(optimizer, self.ema_decay)
    if self.parameter_dtype == "bfloat16":
      # Around the average, which then is one of float32 sums.
      optimizer = optimizers.Compensated(optimizer)
    return optimizer

  @functools.cached_property
  def own_head(self) -> dict[str, Any] | None:
    """A head module of a person's own (models.factory.own_head), or None."""
    try:
      return factory.own_head(self.model)
    except ValueError as e:
      raise UserError(str(e)) from None

  @property
  def batch_size(self) -> int:
    return self.train_dataset_cfg.batch_size

  @property
  def row_multiple(self) -> int:
    """What the rows of every batch must be a multiple of."""
    return self.program.row_multiple

  def check(self) -> None:
    """Raises UserError for a mistake in the settings or in the first rows.

    Nothing is written, and the hosts agree on the configuration.
    """
    config = self.model.config
    _ = self.own_head, self.program
    if self.config_text is not None:
      hosts.everyone.agree("the configuration", self.config_text())
    checks.check_task(self.train_dataset_cfg, config)
    for cfg in (self.train_eval_dataset_cfg, self.infer_eval_dataset_cfg):
      if cfg is not None:
        checks.check_task(cfg, config)
        pipeline.check_rows(cfg, evaluation=True)
    for stage in curriculum.stages(self.train_dataset_cfg, self.row_multiple):
      pipeline.check_rows(stage.config)
      self.partitioner.check(
        config,
        stage.config.batch_size,
        stage.config.lengths(),
        self.num_microbatches,
      )
    _ = self.program.abstract_state

  def last_step(self, begin_step: int, step: int) -> int:
    """The step to reach, of a run that began at `begin_step`.

    Raises:
      UserError: if it is past it at `step`.
    """
    last = self.total_steps
    if self.relative_steps is not None:
      last = begin_step + self.relative_steps
    if step > last:
      raise UserError(
        f"the run is at step {step}, past TRAIN_STEPS = {last}; steps of the"
        " checkpoint count, so raise it or use TRAIN_STEPS_RELATIVE"
      )
    return last

  def saves_at(self, step: int) -> bool:
    """Whatever may be the best is there when it is evaluated."""
    is_due = step % self.checkpoint_cfg.save.period == 0
    return is_due or (self.keep_best is not None and self.evaluates_at(step))

  def evaluates_at(self, step: int) -> bool:
    return bool(self.eval_period) and step % self.eval_period == 0
