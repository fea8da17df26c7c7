"""MODEL_DIR of a run: locked, of this run, with its checkpoints and records."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os

import jax

from fat5_jax.checkpoints import run_folder, run_lock, run_record
from fat5_jax.checkpoints.checkpointer import Checkpointer
from fat5_jax.data import features, vocabularies
from fat5_jax.errors import UserError
from fat5_jax.loggers.metrics import MetricsLog
from fat5_jax.training import describe, same_run
from fat5_jax.training.run import Run
from fat5_jax.training.start import Start


class RunFolder:
  """What lies in MODEL_DIR, and who may write there.

  Attributes:
    path: of the folder.
    checkpoints: its Checkpointer.
  """

  def __init__(
    self,
    run: Run,
    path: str,
    checkpoints: Checkpointer,
    stack: contextlib.ExitStack,
  ):
    self._run, self.path, self.checkpoints = run, path, checkpoints
    self._stack = stack

  def closing(self, log: MetricsLog) -> MetricsLog:
    """The log; it is closed with the folder, told whether training failed."""
    self._stack.push(lambda kind, *_: log.close(failed=kind is not None))
    return log

  def write_records(self, begin: Start) -> None:
    """What the run is: model.json, model-info.txt, config.gin."""
    run = self._run
    task = run.train_dataset_cfg.task()
    text_side = "inputs" if features.label_feature(task) else "targets"
    vocabulary = task.output_features[text_side].vocabulary
    initial_path = run.checkpoint_cfg.restore.path
    run_record.write(
      self.path,
      run.model.config,
      vocabularies.save(vocabulary, self.path),
      random_seed=run.random_seed,
      task=run.train_dataset_cfg.record(),
      own_head=run.own_head,
      base=same_run.base_of(self.path, initial_path, begin.own_step),
    )
    run_folder.write_atomically(
      os.path.join(self.path, "model-info.txt"),
      "\n".join(describe.parameter_lines(run.program)),
    )
    if run.config_text is not None:
      run_folder.write_atomically(
        os.path.join(self.path, "config.gin"), run.config_text()
      )


@contextlib.contextmanager
def opened(run: Run) -> Iterator[RunFolder]:
  """The run's folder, held against other processes while it trains.

  Raises:
    UserError: if it cannot be written, is in use, or holds another run; and for
      a disk that is full, gone or read-only.
  """
  path = run_folder.prepare_model_dir(run.model_dir)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(run_lock.held(path))
    run_record.check_same_model(path, run.model.config)
    record = run.train_dataset_cfg.record()
    same_run.check_same_task(path, record, run.own_head)
    run_folder.check_shared(path)
    checkpoints = stack.enter_context(
      Checkpointer(path, run.checkpoint_cfg.save)
    )
    stack.enter_context(_disk_errors(path, checkpoints))
    yield RunFolder(run, path, checkpoints, stack)


@contextlib.contextmanager
def _disk_errors(path: str, checkpoints: Checkpointer):
  """A disk that is full, gone or read-only, in a line."""
  try:
    yield
  except OSError as e:
    if e.strerror is None:
      raise
    raise UserError(
      f"{e.filename or path}: {e.strerror}. {checkpoints.last_good()}"
    ) from e
