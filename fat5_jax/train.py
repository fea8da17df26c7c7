"""Trains a model: `python -m fat5_jax.train --gin_file=...`.

The loop is read from top to bottom. Everything it uses is built before (from
gin, or by hand) and passed in.
"""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax import cli

  raise SystemExit(cli.main("train"))

import collections
from collections.abc import Callable
import contextlib
import dataclasses
import itertools
import os
import secrets
import shlex
import shutil
import sys
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fat5_jax import (
  checkpoints,
  console,
  hosts,
  metrics,
  run_folder,
  run_lock,
  run_record,
  steps,
  weights,
)
from fat5_jax import trainable as trainable_lib
from fat5_jax.convert import table
from fat5_jax.data import features, pipeline, vocabularies
from fat5_jax.errors import UserError
from fat5_jax.eval import InferenceEvaluator, loss_metrics
from fat5_jax.models import factory
from fat5_jax.program import Program
from fat5_jax.sharding import Partitioner

_CLOSING_METRICS = (
  "loss_per_nonpadding_target_token",
  "accuracy",
  "non_padding_fraction/overall",
  "timing/target_tokens_per_second",
)
# Steps that may be in flight; bounds how late a NaN or a signal is seen.
_IN_FLIGHT = 2


def train(
  *,
  model: Any,
  train_dataset_cfg: pipeline.DatasetConfig,
  train_eval_dataset_cfg: pipeline.DatasetConfig | None,
  infer_eval_dataset_cfg: pipeline.DatasetConfig | None,
  checkpoint_cfg: checkpoints.CheckpointConfig,
  optimizer: optax.GradientTransformation,
  model_dir: str,
  partitioner: Partitioner | None = None,
  data_shards: int | None = None,
  total_steps: int | None = None,
  relative_steps: int | None = None,
  eval_steps: int | None = 20,
  eval_period: int = 1000,
  stats_period: int | None = None,
  random_seed: int = 42,
  z_loss: float = 0.0001,
  label_smoothing: float = 0.0,
  loss_normalizing_factor: float | str | None = None,
  num_microbatches: int | None = None,
  config_text: Callable[[], str] | None = None,
  trainable: str | None = None,
  frozen: str | None = None,
  dry_run: bool = False,
  plan: Callable[[Program, pipeline.DatasetConfig, int], None] | None = None,
) -> steps.TrainState | None:
  """Trains until `total_steps`, going on from what `model_dir` holds.

  Args:
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
    data_shards: streams into which the data is split, each read by the hosts
      that need it; None is as many as hosts when the run began. The order of
      the data depends on it, not on the hosts.
    total_steps: the step to reach; counts those of the checkpoint started from.
    relative_steps: instead, steps after that checkpoint.
    eval_steps: batches of train_eval_dataset_cfg an evaluation reads; None all.
    eval_period: steps between evaluations; 0 for one at the end only.
    stats_period: steps between rows of the metrics; 100 or eval_period if less.
    random_seed: of initial parameters and dropout.
    z_loss: coefficient of log(Z)^2.
    label_smoothing: in [0, 1).
    loss_normalizing_factor: see losses.normalise.
    num_microbatches: parts a batch is split into to save memory.
    config_text: gives the operative configuration for `config.gin`.
    trainable: regular expression of the names of the parameters that train,
      None for all; see trainable.choose.
    frozen: regular expression of those of them that do not.
    dry_run: print what would run, decode one batch, and stop.
    plan: called with what would run, the data and the steps, instead of all
      that follows (plan.py).

  Returns:
    The final state; None after a dry run, a plan, or a SIGTERM (which saves
    first).

  Raises:
    UserError: for a mistake in the settings, the data or the checkpoint, and
      for a loss or gradient that is not finite.
  """
  if (total_steps is None) == (relative_steps is None):
    raise UserError(
      "set one of TRAIN_STEPS (counted from step 0 of the checkpoint) and"
      " TRAIN_STEPS_RELATIVE"
    )
  if not isinstance(random_seed, int):
    raise UserError(f"RANDOM_SEED = {random_seed!r} must be a whole number")
  # `seed = None` and `split = None` are T5X's and ours: the run's seed, and no
  # evaluation.
  seeded = lambda cfg: (
    cfg
    if cfg is None or cfg.seed is not None
    else dataclasses.replace(cfg, seed=random_seed)
  )
  train_dataset_cfg, train_eval_dataset_cfg, infer_eval_dataset_cfg = (
    seeded(cfg) if cfg is None or cfg.split is not None else None
    for cfg in (
      train_dataset_cfg,
      train_eval_dataset_cfg,
      infer_eval_dataset_cfg,
    )
  )
  for name, value, kind in (
    ("MODEL", model, nn.Module),
    ("OPTIMIZER", optimizer, optax.GradientTransformation),
  ):
    if not isinstance(value, kind):
      raise UserError(
        f"{name} builds a {type(value).__name__}: no {kind.__name__}"
      )
  config = model.config
  try:
    own_head = factory.own_head(model)
  except ValueError as e:
    raise UserError(str(e)) from None
  partitioner = partitioner or Partitioner()
  program = Program(
    model,
    partitioner,
    optimizer,
    seed=random_seed,
    z_loss=z_loss,
    label_smoothing=label_smoothing,
    loss_normalizing_factor=loss_normalizing_factor,
    num_microbatches=num_microbatches,
    trainable=trainable,
    frozen=frozen,
  )
  if plan is not None:
    plan(program, train_dataset_cfg, total_steps or relative_steps)
    return None
  if config_text is not None:
    hosts.everyone.agree("the configuration", config_text())
  task = train_dataset_cfg.task()
  for dataset_cfg in (
    train_dataset_cfg,
    train_eval_dataset_cfg,
    infer_eval_dataset_cfg,
  ):
    if dataset_cfg is not None:
      pipeline.check_task(dataset_cfg, config)
      is_evaluation = dataset_cfg is not train_dataset_cfg
      pipeline.check_rows(dataset_cfg, is_evaluation)
  partitioner.check(
    config,
    train_dataset_cfg.batch_size,
    train_dataset_cfg.lengths(),
    num_microbatches,
  )
  abstract = program.abstract_state
  if dry_run:
    _dry_run(train_dataset_cfg, config, abstract, program.trains, config_text)
    _tell_start(checkpoint_cfg.restore, config, abstract)
    console.say("dry run: nothing was trained or written")
    return None

  model_dir = checkpoints.prepare_model_dir(model_dir)
  with contextlib.ExitStack() as opened:
    if jax.process_index() == 0:
      opened.enter_context(run_lock.held(model_dir))
    run_record.check_same_model(model_dir, config)
    record = train_dataset_cfg.record()
    run_folder.check_same_task(model_dir, record, own_head)
    _check_shared(model_dir)
    checkpointer = opened.enter_context(
      checkpoints.Checkpointer(model_dir, checkpoint_cfg.save)
    )
    opened.enter_context(_disk_errors(model_dir, checkpointer))

    # Where the state comes from, first match wins:
    #   1. the latest checkpoint of this run;
    #   2. INITIAL_CHECKPOINT_PATH, a checkpoint of the same model with its
    #      optimizer (ours, T5X's, Mesh TensorFlow's): weights, optimizer and
    #      step, as T5X does;
    #   3. INITIAL_CHECKPOINT_PATH, any other: its weights, and fresh ones where
    #      the model has what it has not (a head, LoRA), step 0;
    #   4. scratch.
    rows = partitioner.rows(train_dataset_cfg.batch_size)
    groups = partitioner.row_groups(train_dataset_cfg.batch_size)
    position = {
      "batches": 0,
      "dataset": train_dataset_cfg.fingerprint(),
      "data_shards": data_shards or groups,
    }
    total: dict[str, float] = {}
    own_step = checkpointer.find_latest()
    initial_path = checkpoint_cfg.restore.path
    if own_step is not None:
      params, opt_state, found = checkpointer.restore(
        own_step, abstract.params, abstract.opt_state, partitioner
      )
      state = steps.TrainState(jnp.int32(own_step), params, opt_state)
      begin_step, total = found["begin_step"], found["sums"]
      shards_then = found.get("data_shards", 1)
      if found["dataset"] == position["dataset"] and (
        data_shards in (None, shards_then)
      ):
        position["batches"] = found["batches"]
        position["data_shards"] = shards_then
      else:
        console.say(
          "the training data's settings changed since the checkpoint; reading"
          " it from its beginning"
        )
      console.say(f"going on from step {own_step} of {model_dir}")
      if config_text is not None:
        run_folder.tell_changes(model_dir, config_text())
    elif initial_path:
      params, source, fresh = weights.initial_params(
        initial_path,
        config,
        abstract.params,
        partitioner,
        checkpoint_cfg.restore.reinitialize,
        program.fresh_params,
      )
      begin_step, opt_state = 0, None
      if source.has_optimizer and source.continues:
        begin_step = weights.read_step(source)
        if len(program.trains) == len(table.flatten(abstract.params)):
          try:
            opt_state = weights.initial_optimizer(
              source, abstract.opt_state, abstract.params, partitioner
            )
          except weights.OtherOptimizerError as e:
            if source.kind == "fat5":
              raise
            console.say(f"a fresh optimizer: {e}")
        else:
          console.say("a part of the parameters trains: a fresh optimizer")
      if opt_state is None:
        opt_state = program.init_optimizer(params)
      state = steps.TrainState(jnp.int32(begin_step), params, opt_state)
      console.say(f"starting from {source.path}, step {begin_step}")
      if fresh:
        console.say(f"not in it, so initialised: {', '.join(fresh)}")
    else:
      state = program.init_state()
      begin_step = 0
      console.say(f"starting from scratch, seed {random_seed}")

    step = first_step = int(state.step)
    hosts.everyone.agree("step and data position", [step, position])
    last_step = total_steps
    if relative_steps is not None:
      last_step = begin_step + relative_steps
    if step > last_step:
      raise UserError(
        f"the run is at step {step}, past TRAIN_STEPS = {last_step}; steps of"
        " the checkpoint count, so raise it or use TRAIN_STEPS_RELATIVE"
      )
    if step == last_step and own_step is not None:
      console.say(f"nothing is left to train: step {step} is the last")
    evaluator = None
    if infer_eval_dataset_cfg is not None:
      evaluator = InferenceEvaluator(
        model, infer_eval_dataset_cfg, model_dir, partitioner
      )
    batches = pipeline.train_batches(
      train_dataset_cfg,
      config.vocab_size,
      skip=position["batches"],
      rows=rows,
      num_shards=position["data_shards"],
    )
    # The first batch shows bad data before anything is written.
    batches = itertools.chain([next(batches)], batches)

    text_side = "inputs" if features.label_feature(task) else "targets"
    vocabulary = task.output_features[text_side].vocabulary
    run_record.write(
      model_dir,
      config,
      vocabularies.save(vocabulary, model_dir),
      random_seed=random_seed,
      task=record,
      own_head=own_head,
      base=run_folder.base_of(model_dir, initial_path, own_step),
    )
    _write_model_info(model_dir, abstract, program.trains)
    if config_text is not None:
      checkpoints.write_atomically(
        os.path.join(model_dir, "config.gin"), config_text()
      )
    log = metrics.MetricsLog(model_dir, first_step)
    console.say(
      f"{_count(abstract.params):,} parameters, {_count(program.moving):,} of"
      f" them training, on {jax.device_count()} {jax.default_backend()}"
      f" device(s) ({partitioner.describe()}), {config.dtype}; results in"
      f" {model_dir}"
    )

    def save() -> None:
      hosts.everyone.agree("step and data position", [step, position])
      checkpointer.save(
        step,
        state.params,
        state.opt_state,
        # The sums of a row of metrics that is not complete yet.
        position | {"begin_step": begin_step, "sums": total},
      )

    def run_evaluation() -> None:
      if train_eval_dataset_cfg is not None:
        values = loss_metrics(
          program, state.params, train_eval_dataset_cfg, eval_steps
        )
        name = f"training_eval/{train_eval_dataset_cfg.task().name}"
        log.write(step, name, values, events=name)
        console.say(
          f"step {step}  {name}  "
          + "  ".join(
            f"{k} {values[k]:.4f}"
            for k in ("loss_per_nonpadding_target_token", "accuracy")
            if k in values
          )
        )
      if evaluator is not None:
        for name, values in evaluator.evaluate(state.params, step).items():
          log.write(step, f"inference_eval/{name}", values)
          console.say(
            f"step {step}  inference_eval/{name}  "
            + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
          )
      cuts = features.cuts_of(task, train_dataset_cfg.lengths())
      for name, cut in cuts.items():
        if cut.describe():
          console.say(f"{name}: cut to TASK_FEATURE_LENGTHS: {cut.describe()}")
      log.plot()

    stats_period = stats_period or min(100, eval_period or 100)
    progress = console.Progress(first_step, last_step)
    pending: collections.deque = collections.deque()
    mark, waited = time.monotonic(), 0.0
    last_evaluated = None
    last_part = "training_eval/" if evaluator is None else "inference_eval/"
    if log.has(first_step, last_part):
      last_evaluated = first_step

    def drain(limit: int) -> None:
      """Takes the sums of finished steps in, until `limit` are in flight."""
      nonlocal total, mark, waited
      while len(pending) > limit:
        done_step, sums = pending.popleft()
        sums = jax.device_get(sums)
        bad_leaf = sums.pop("bad_leaf")
        rate = sums.pop("learning_rate", None)
        if bad_leaf >= 0 or not np.isfinite(sums["loss"]):
          where = _not_finite(done_step, sums, bad_leaf, program.moving)
          if not getattr(optimizer, "skip_nan_updates", False):
            raise UserError(where + _mends(checkpointer))
          console.say(f"{where} skip_nan_updates: the run goes on")
        metrics.add(total, sums)
        seconds = max(time.monotonic() - mark - waited, 1e-9)
        values = metrics.scalars(total)
        due = done_step % stats_period == 0 or done_step == last_step
        progress.update(
          done_step,
          loss=values["loss_per_nonpadding_target_token"],
          learning_rate=rate,
          tokens_per_second=total["target_tokens"] / seconds,
          padding=1 - values["non_padding_fraction/overall"],
          force=due,
        )
        if due:
          if rate is not None:
            values["learning_rate"] = rate
          values |= {
            "timing/steps_per_second": total["steps"] / seconds,
            "timing/target_tokens_per_second": total["target_tokens"] / seconds,
            "timing/input_tokens_per_second": total["encoder_tokens"] / seconds,
          }
          log.write(done_step, "train", values, events="train")
          total = {}
          mark, waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def off_the_clock():
      nonlocal waited
      begin = time.monotonic()
      progress.pause()
      yield
      progress.resume()
      waited += time.monotonic() - begin

    with hosts.StopSignal() as stop:
      if own_step is None:
        save()
      elif (
        eval_period
        and step > begin_step
        and step % eval_period == 0
        and last_evaluated != step
      ):
        # The run was killed between saving this step and evaluating it.
        with off_the_clock(), stop.evaluating():
          run_evaluation()
          last_evaluated = step
      while step < last_step and not stop.at(step):
        batch = partitioner.to_devices(
          next(batches), rows[0], train_dataset_cfg.batch_size
        )
        state, sums = program.train_step(state, batch)
        step += 1
        position["batches"] += 1
        pending.append((step, sums))
        drain(_IN_FLIGHT)
        evaluate_now = eval_period and step % eval_period == 0
        save_now = step % checkpoint_cfg.save.period == 0
        if evaluate_now or save_now:
          drain(0)
          with off_the_clock():
            if save_now:
              save()
            if evaluate_now and not stop.received:
              with stop.evaluating():
                run_evaluation()
                last_evaluated = step
      drain(0)
      progress.pause()
      save()
      if not stop.received and last_evaluated != step:
        with stop.evaluating():
          run_evaluation()
      checkpointer.wait()
    if stop.received:
      log.close()
      console.say(
        f"stopped by {stop.name} at step {step}, which is saved in {model_dir}."
        " Run the same command again to go on:\n  " + _command_line()
      )
      return None
    _closing_words(log, evaluator, task, model_dir, step)
    log.close()
    return state


def _check_shared(model_dir: str) -> None:
  """Raises UserError, naming them, for hosts that see another folder."""
  if hosts.everyone.count == 1:
    return
  path = os.path.join(model_dir, ".hosts")
  checkpoints.write_atomically(path, secrets.token_hex(8))
  hosts.everyone.agree("MODEL_DIR's path", model_dir)
  try:
    with open(path, encoding="utf-8") as file:
      seen = file.read()
  except OSError:
    seen = "no file of host 0's: it is another folder"
  hosts.everyone.agree("what lies in MODEL_DIR, which all must share", seen)


def _command_line() -> str:
  return shlex.join(getattr(sys, "orig_argv", sys.argv))


def _not_finite(step, sums, bad_leaf, abstract_params) -> str:
  where = (
    "the loss"
    if bad_leaf < 0
    else f"the gradient of {steps.leaf_name(abstract_params, bad_leaf)}"
  )
  return (
    f"step {step}: loss {float(sums['loss']):.6g}; first not finite: {where}."
  )


def _mends(checkpointer) -> str:
  checkpointer.wait()
  return (
    f" {checkpointer.last_good()}. Usual mends: a lower learning rate or more"
    " warm-up, global_norm_clip_threshold = 1.0, dtype = 'float32'"
  )


@contextlib.contextmanager
def _disk_errors(model_dir: str, checkpointer):
  """A disk that is full, gone or read-only, in a line."""
  try:
    yield
  except OSError as e:
    if e.strerror is None:
      raise
    raise UserError(
      f"{e.filename or model_dir}: {e.strerror}. {checkpointer.last_good()}"
    ) from e


def _closing_words(log, evaluator, task, model_dir: str, step: int) -> None:
  """The table, samples, plot, and what to try next."""
  console.metrics_table(
    f"metrics at step {step}",
    [
      (dataset, metric, value)
      for dataset, values in log.latest().items()
      for metric, value in values.items()
      if metric in _CLOSING_METRICS or dataset.startswith("inference_eval")
    ],
  )
  if evaluator is not None:
    console.samples_table(evaluator.samples(step, 8))
  console.say(f"curves: {log.plot()}")
  python = "python"
  if shutil.which("python") != sys.executable:
    python = sys.executable
  columns, example = run_folder.example(task)
  command = (
    f"{python} -m fat5_jax.infer --gin.MODEL_DIR={shlex.quote(model_dir)}"
  )
  if len(columns) > 1:
    console.say(
      f"try your own rows next (columns {', '.join(columns)}):\n  {command}"
      " --gin.INPUT=rows.jsonl"
    )
  else:
    echo = f"echo {shlex.quote(example)} | " if example else ""
    console.say(f"try your own lines next:\n  {echo}{command}")


def _count(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _parameter_lines(
  abstract: steps.TrainState, trains: frozenset[tuple[str, ...]]
) -> list[str]:
  """A line a parameter, whether it trains, the totals; then the optimizer."""
  moving, fixed = trainable_lib.split(abstract.params, trains)
  lines = []
  for title, tree in (
    ("parameter", abstract.params),
    ("optimizer", abstract.opt_state),
  ):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in leaves:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      is_fixed = title == "parameter" and tuple(name.split("/")) not in trains
      lines.append(
        f"{title} {name:<72} size {leaf.size:>12,} shape {leaf.shape}"
        + "  frozen" * is_fixed
      )
    size = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves)
    lines.append(f"total {title}s: {_count(tree):,} ({size / 2**20:,.1f} MiB)")
    if title == "parameter":
      lines.append(f"training: {_count(moving):,}, frozen: {_count(fixed):,}")
    lines.append("")
  return lines


def _write_model_info(model_dir: str, abstract, trains) -> None:
  checkpoints.write_atomically(
    os.path.join(model_dir, "model-info.txt"),
    "\n".join(_parameter_lines(abstract, trains)),
  )


def _tell_start(restore, config, abstract) -> None:
  """Says which parameters come from a checkpoint, and which are new."""
  if restore.path is None:
    console.say("parameters start from scratch")
    return
  fresh = weights.fresh_names(
    restore.path, config, abstract.params, restore.reinitialize
  )
  console.say(f"parameters start from {restore.path}")
  if fresh:
    console.say(f"not in it, or anew, so initialised: {', '.join(fresh)}")


def _dry_run(dataset_cfg, config, abstract, trains, config_text) -> None:
  """Prints parameters, the configuration, and a batch decoded to text."""
  console.say("\n".join(_parameter_lines(abstract, trains)))
  if config_text is not None:
    console.say(config_text())
  batch = next(pipeline.train_batches(dataset_cfg, config.vocab_size))
  task_features = dataset_cfg.task().output_features
  console.say("one batch:")
  for key, array in batch.items():
    console.say(f"  {key} {array.shape} {array.dtype}")
  for row in range(min(3, dataset_cfg.batch_size)):
    for key, feature in (
      ("encoder_input_tokens", "inputs"),
      ("decoder_target_tokens", "targets"),
      ("labels", "targets"),
    ):
      if key not in batch:
        continue
      if key == "labels":
        shown = ", ".join(f"{x:g}" for x in batch[key][row][:32])
        console.say(f"  row {row} labels: {shown}")
        continue
      segments = batch.get(key.split("_")[0] + "_segment_ids")
      tokens = batch[key][row]
      parts = [tokens]
      if segments is not None:
        ids = segments[row]
        parts = [tokens[ids == i] for i in range(1, ids.max(initial=0) + 1)]
      texts = [pipeline.show(task_features[feature], part) for part in parts]
      console.say(f"  row {row} {feature}: " + " | ".join(texts[:4]))
