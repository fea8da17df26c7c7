"""Trains a model: `python -m fat5_jax.train --gin_file=...`.

A run is built before (training/run.py), from gin or in Python; here it is read
from top to bottom what happens to it.
"""

if __name__ == "__main__":
  # Before the heavy imports, so that --help answers at once.
  from fat5_jax.gin_config import cli

  raise SystemExit(cli.main("train"))

from fat5_jax.distributed.hosts import everyone
from fat5_jax.distributed.stop import StopSignal
from fat5_jax.loggers.metrics import MetricsLog
from fat5_jax.training import describe, folder, words
from fat5_jax.training.batches import RunBatches
from fat5_jax.training.best import Best
from fat5_jax.training.describe import dry_run, prepare_data
from fat5_jax.training.evaluations import Evaluations
from fat5_jax.training.meter import Meter
from fat5_jax.training.profile import Profile
from fat5_jax.training.run import Run
from fat5_jax.training.start import find_start
from fat5_jax.training.steps import TrainState

__all__ = ["Run", "dry_run", "prepare_data", "train"]


def train(run: Run) -> TrainState | None:
  """Trains until the last step, going on from what the run's folder holds.

  Returns:
    The final state; None after a signal, which saves first.

  Raises:
    UserError: for a mistake in the settings, the data or the checkpoint, and
      for a loss or gradient that is not finite.
  """
  run.check()
  with folder.opened(run) as home:
    begin = find_start(run, home.checkpoints, home.path)
    last_step = run.last_step(begin.begin_step, begin.step)
    evaluations = Evaluations(run, home.path)
    data = RunBatches(run, begin)  # Bad data shows now.
    home.write_records(begin)
    log = home.closing(MetricsLog(home.path, begin.step, run.loggers))
    log.settings(describe.settings(run), describe.text(run))
    evaluations.log_to(log, begin)
    words.opening_words(run, begin, last_step, home.path)
    meter = Meter(run, begin, last_step, log, home.checkpoints)
    best = Best(run.keep_best, run.patience, run.best_mode, home.path)
    state, step = begin.state, begin.step

    def save():
      place = begin.data | {"position": data.position}
      everyone.agree("step and data position", [step, place])
      log.flush()
      kept = run.program.swapped(state)
      home.checkpoints.save(
        step,
        kept.params,
        kept.opt_state,
        place | {"begin_step": begin.begin_step, "sums": meter.sums},
      )

    def evaluate():
      with meter.off_the_clock(), stop.evaluating():
        evaluations.at(step, run.program.swapped(state).params)
      follow()

    def follow():
      best.look(log)
      home.checkpoints.best = best.step

    profile = Profile(run.profile_steps, home.path, meter, step, last_step)
    with StopSignal() as stop, profile:
      follow()
      if begin.own_step is None:
        save()
      if evaluations.is_due(begin):
        evaluate()
      while step < last_step and not (best.exhausted or stop.at(step)):
        batch = next(data)
        with profile.step(step + 1), meter.begun(batch):
          state, sums = run.program.train_step(state, batch)
        step += 1
        meter.push(step, sums, data.epochs)
        profile.after(step)
        if run.saves_at(step):
          with meter.off_the_clock():
            save()
        if run.evaluates_at(step) and not stop.received:
          evaluate()
      profile.close()
      meter.close()
      save()
      if not stop.received and not evaluations.has(step):
        evaluate()
      home.checkpoints.wait()
    if stop.received:
      words.stopped_words(run, stop.name, step, home.path)
      state = None
    else:
      words.closing_words(run, log, evaluations.generation, home.path, step)
      best.tell(step, last_step)
    data.close()
    return state
