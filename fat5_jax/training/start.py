"""Where a run starts from: its state, and its place in the data."""

from __future__ import annotations

import dataclasses
from typing import Any

from fat5_jax import console, trees
from fat5_jax.checkpoints import load, optimizer_state, reference
from fat5_jax.checkpoints.checkpointer import Checkpointer
from fat5_jax.distributed import hosts
from fat5_jax.errors import UserError
from fat5_jax.training import averaging, same_run
from fat5_jax.training.run import Run
from fat5_jax.training.steps import TrainState


@dataclasses.dataclass(frozen=True)
class Start:
  """A state to train on from.

  Attributes:
    state: parameters and optimizer; the first step of training takes them.
    step: the one that they are of.
    begin_step: where the run once began.
    data: the `dataset` that it was trained on, and its `position` in it, None
      for the beginning.
    sums: of a row of metrics that was not complete yet.
    own_step: the step of this run's own checkpoint, None for a new run.
  """

  state: TrainState
  step: int
  begin_step: int
  data: dict[str, Any]
  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  own_step: int | None = None


def find_start(run: Run, checkpointer: Checkpointer, model_dir: str) -> Start:
  """The state that a run starts from, first match wins:

  1. the latest checkpoint of this run;
  2. INITIAL_CHECKPOINT_PATH, a checkpoint of the same model with its optimizer
     (ours, T5X's, Mesh TensorFlow's): weights, optimizer and step, as T5X does;
  3. INITIAL_CHECKPOINT_PATH, any other: its weights, and fresh ones where the
     model has what it has not (a head, LoRA), step 0;
  4. scratch.

  Raises:
    UserError: for a checkpoint that is damaged or another model's.
  """
  own_step = checkpointer.find_latest()
  if own_step is not None:
    found = _own_checkpoint(run, checkpointer, model_dir, own_step)
  elif run.checkpoint_cfg.restore.path:
    found = _other_checkpoint(run)
  else:
    console.say(f"starting from scratch, seed {run.random_seed}")
    found = Start(run.program.init_state(), 0, 0, _beginning(run))
  hosts.everyone.agree("step and data position", [found.step, found.data])
  return found


def _beginning(run: Run) -> dict[str, Any]:
  return {"dataset": run.train_dataset_cfg.fingerprint(), "position": None}


def _own_checkpoint(run, checkpointer, model_dir, step) -> Start:
  data = _beginning(run)
  abstract = run.program.swapped(run.program.abstract_state)
  params, opt_state, found = checkpointer.restore(
    step, abstract.params, abstract.opt_state, run.partitioner
  )
  if found["dataset"] == data["dataset"]:
    data["position"] = found["position"]
  else:
    console.say(
      "the training data's settings changed since the checkpoint; reading it"
      " from its beginning"
    )
  console.say(f"going on from step {step} of {model_dir}")
  if run.config_text is not None:
    same_run.tell_changes(model_dir, run.config_text())
  state = TrainState(run.program.counter(step), params, opt_state)
  state = run.program.swapped(state)
  return Start(state, step, found["begin_step"], data, found["sums"], step)


def _other_checkpoint(run: Run) -> Start:
  program, restore = run.program, run.checkpoint_cfg.restore
  params, source, fresh = load.load_params(
    restore.path,
    run.model.config,
    program.abstract_start,
    run.partitioner,
    restore.reinitialize,
    program.fresh_params,
  )
  begin_step, core = 0, None
  if source.has_optimizer and source.continues:
    begin_step = reference.read_step(source)
    _check_steps(run, source.path, begin_step)
    params = optimizer_state.compensated(source, params, run.partitioner)
    core = _its_optimizer(run, source)
  console.say(f"starting from {source.path}, step {begin_step}")
  if fresh:
    console.say(f"not in it, so initialised: {', '.join(fresh)}")
  state = program.state_from(begin_step, params, core)
  return Start(state, begin_step, begin_step, _beginning(run))


def _check_steps(run: Run, path: str, begin_step: int) -> None:
  if run.total_steps is None or run.total_steps > begin_step:
    return
  text = (
    f"TRAIN_STEPS = {run.total_steps} counts from step 0 of {path}, which is at"
    f" step {begin_step}: nothing is left to train. To train set it to more"
    " than that, or take TRAIN_STEPS = None and TRAIN_STEPS_RELATIVE; an export"
    " of the checkpoint (tools/convert_checkpoint.py --to hf) begins at step"
    " 0, its schedule and optimizer anew"
  )
  # As many steps as it has make another run of it: other layers, other types.
  if run.total_steps < begin_step:
    raise UserError(text)
  console.say(f"note: {text}")


def _its_optimizer(run: Run, source: reference.CheckpointRef) -> Any:
  """The state of a checkpoint's optimizer, None where it is not the run's.

  Without what is kept around it (averaging.core).
  """
  abstract = run.program.abstract_state
  if optimizer_state.has_average(source):
    # Its live parameters are not those that the run starts from.
    console.say("starting from an average of parameters: a fresh optimizer")
    return None
  if len(run.program.trains) < len(trees.flatten(abstract.params)):
    console.say("a part of the parameters trains: a fresh optimizer")
    return None
  try:
    return optimizer_state.load_optimizer(
      source,
      averaging.core(abstract.opt_state),
      abstract.params,
      run.partitioner,
    )
  except optimizer_state.OtherOptimizerError as e:
    if source.kind == "fat5":
      raise
    console.say(f"a fresh optimizer: {e}")
    return None
