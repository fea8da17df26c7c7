"""Weights written as a run folder, one tensor in memory at a time."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

import orbax.checkpoint as ocp

from fat5_jax import trees
from fat5_jax.checkpoints import integrity, run_folder, run_record
from fat5_jax.convert import table
from fat5_jax.models.config import T5Config


class _LeafHandler(ocp.type_handlers.NumpyHandler):
  """Lets orbax write tensors that are read one at a time."""

  async def serialize(self, values, infos, args=None):
    for i, (leaf, info) in enumerate(zip(values, infos)):
      arg = None if args is None else [args[i]]
      for written in await super().serialize([leaf.read()], [info], arg):
        written.result()
    return []


def write_params(
  folder: str,
  config: T5Config,
  leaves: table.Leaves,
  vocabulary: Any = None,
  step: int = 0,
  opt_state: Any = None,
) -> None:
  """Writes weights as a run folder, to start other runs from, or nothing.

  Args:
    folder: MODEL_DIR; must hold no checkpoint.
    config: of the model.
    leaves: its tensors, unstacked; one is in memory at a time.
    vocabulary: SeqIO vocabulary, or None.
    step: of the checkpoint.
    opt_state: the optimizer's state at that step, or None.
  """
  from fat5_jax.data import vocabularies  # only here: it brings TensorFlow

  folder = run_folder.prepare_model_dir(folder)
  registry = ocp.type_handlers.create_type_handler_registry(
    (table.Leaf, _LeafHandler())
  )
  final = os.path.join(folder, f"checkpoint_{step}")
  with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
    target = os.path.join(scratch, "checkpoint")
    os.mkdir(target)
    logging.getLogger("absl").setLevel(logging.ERROR)  # of array metadata
    ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    ).save(os.path.join(target, "params"), trees.nest(leaves))
    if opt_state is not None:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.join(target, "optimizer"), opt_state)
    description = None
    if vocabulary is not None:
      description = vocabularies.save(vocabulary, folder)
    run_record.write(folder, config, description)
    integrity.write(target)
    os.rename(target, final)
