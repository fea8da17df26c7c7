"""What a run would do, for a person: its parameters, a batch, its start."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import seqio

from fat5_jax import console, storage
from fat5_jax.checkpoints import history, load
from fat5_jax.data import curriculum, mixtures, pipeline
from fat5_jax.training import trainable
from fat5_jax.training.program import Program
from fat5_jax.training.run import Run


def count(tree: Any) -> int:
  """Numbers in all arrays of a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parameter_lines(program: Program) -> list[str]:
  """A line a parameter, whether it trains, the totals; then the optimizer."""
  abstract, trains = program.abstract_state, program.trains
  trained, frozen = trainable.split(abstract.params, trains)
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
    lines.append(f"total {title}s: {count(tree):,} ({size / 2**20:,.1f} MiB)")
    if title == "parameter":
      lines.append(f"training: {count(trained):,}, frozen: {count(frozen):,}")
    lines.append("")
  return lines


def text(run: Run) -> str | None:
  """The gin file of a run; None of one that was built in Python."""
  return None if run.config_text is None else run.config_text()


def settings(run: Run) -> dict[str, Any]:
  """Plain values of a run by name, for whoever compares runs."""
  parts = {
    "": run,
    "model/": run.model.config,
    "head/": run.model.config.head,
    "lora/": run.model.config.lora,
    "data/": run.train_dataset_cfg,
  }
  found = {
    prefix + field.name: getattr(part, field.name)
    for prefix, part in parts.items()
    if part is not None
    for field in dataclasses.fields(part)
  }
  plain = (str, int, float, bool, type(None))
  found = {k: v for k, v in found.items() if isinstance(v, plain)}
  sizes = {
    f"data/{k}_length": v for k, v in run.train_dataset_cfg.lengths().items()
  }
  return (
    found
    | sizes
    | {
      "data/task": run.train_dataset_cfg.task().name,
      "parameters": count(run.program.abstract_state.params),
      "parameters_training": count(run.program.trained),
      "devices": jax.device_count(),
      "device_kind": jax.devices()[0].device_kind,
    }
  )


def dry_run(run: Run) -> None:
  """Prints parameters, the configuration, and a batch decoded to text.

  Raises:
    UserError: as training would, for what shows before its first step.
  """
  run.check()
  console.say("\n".join(parameter_lines(run.program)))
  if run.config_text is not None:
    console.say(run.config_text())
  task = run.train_dataset_cfg.task()
  if isinstance(task, seqio.Mixture):
    console.say(mixtures.describe(task))
  stages = curriculum.stages(run.train_dataset_cfg, run.row_multiple)
  for line in curriculum.describe(
    stages, run.relative_steps or run.total_steps
  ):
    console.say(line)
  _tell_batch(run.train_dataset_cfg, run.model.config.vocab_size)
  _tell_start(run)
  console.say("dry run: nothing was trained or written")


def prepare_data(run: Run) -> None:
  """Prepares what the run would train and be evaluated on, and tells of it.

  Raises:
    UserError: as training would, for bad data.
  """
  for cfg in (
    run.train_dataset_cfg,
    run.train_eval_dataset_cfg,
    run.infer_eval_dataset_cfg,
  ):
    if cfg is not None:
      for path, about in pipeline.prepare_all(cfg):
        console.say(f"{path}: {about}")


def _tell_batch(dataset_cfg: pipeline.DatasetConfig, vocab_size: int) -> None:
  batch = pipeline.first_batch(dataset_cfg, vocab_size)
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


def _tell_start(run: Run) -> None:
  """Says which parameters come from a checkpoint, and which are new."""
  restore = run.checkpoint_cfg.restore
  folder = storage.absolute(run.model_dir)
  own_step, _ = history.latest_whole(folder)
  if own_step is not None:
    console.say(f"going on from step {own_step} of {folder}")
    return
  if restore.path is None:
    console.say("parameters start from scratch")
    return
  fresh = load.fresh_names(
    restore.path,
    run.model.config,
    run.program.abstract_state.params,
    restore.reinitialize,
  )
  console.say(f"parameters start from {restore.path}")
  if fresh:
    console.say(f"not in it, or anew, so initialised: {', '.join(fresh)}")
