"""A checkpoint as a model that predicts."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import seqio

from fat5_jax import console
from fat5_jax.checkpoints import load, reference, vocabulary
from fat5_jax.distributed import hosts
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.inference import own_task
from fat5_jax.models import factory, initial


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model, and its parameters on the devices.

  Attributes:
    model: a `models.t5.Transformer`, or a head.
    params: its parameters.
    vocabulary: what the checkpoint brings, or None.
    source: where they come from.
    partitioner: where they lie.
  """

  model: Any
  params: Any
  vocabulary: seqio.Vocabulary | None
  source: reference.CheckpointRef
  partitioner: Partitioner


def load_model(
  path: str,
  model: Any = None,
  partitioner: Partitioner | None = None,
  head_module: str | None = None,
  initialise: Callable[[list[str]], dict[str, jax.Array]] | None = None,
) -> Loaded:
  """What lies at a path, as a model.

  Args:
    path: run folder, one checkpoint, or a folder of any format that is read.
    model: may change run-time choices; its architecture must be the
      checkpoint's. None is the checkpoint's own.
    partitioner: the mesh; None puts a part of each batch on every device.
    head_module: allows a head module of a person's own, by the name that the
      run folder gives it, to be imported.
    initialise: see load.load_params; None is for a checkpoint that has all
      parameters of the model.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  source = reference.find(path)
  hosts.everyone.agree("the checkpoint to read", source.path)
  if model is None:
    config = reference.read_config(source).replace(
      scan_layers=False, remat_policy="none"
    )
    own_head = own_task.head_module_of(source, head_module)
    model = factory.create(config, head_layers=own_head)
  partitioner = partitioner or Partitioner()
  partitioner.check(model.config)
  params, source, _ = load.load_params(
    path,
    model.config,
    partitioner.place(initial.abstract_params(model)),
    partitioner,
    initialise=initialise,
  )
  console.say(f"weights of {source.path}")
  return Loaded(model, params, vocabulary.read(source), source, partitioner)
