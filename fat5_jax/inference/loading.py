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
from fat5_jax.errors import UserError
from fat5_jax.inference import own_task
from fat5_jax.models import factory, initial

# The parts of a model that are T5's own, and the parameters of their products.
_BODY = ("encoder", "decoder", "token_embedder")
_FACTORS = ("kernel", "embedding", "lora_a", "lora_b")


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
  dtype: str | None = None,
  is_trained: bool = True,
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
    dtype: of the products; None is the model's own.
    is_trained: whether parameters are all float32, as training wants them; else
      those of products lie in their dtype: fewer bytes, the same predictions.

  Raises:
    UserError: if there is none, or it is damaged, or `dtype` is not that of a
      model that is given.
  """
  source = reference.find(path)
  hosts.everyone.agree("the checkpoint to read", source.path)
  if model is None:
    config = reference.read_config(source).replace(
      scan_layers=False, remat_policy="none"
    )
    if dtype is not None:
      config = config.replace(dtype=dtype)
    own_head = own_task.head_module_of(source, head_module)
    model = factory.create(config, head_layers=own_head)
  elif dtype not in (None, model.config.dtype):
    raise UserError(
      f"DTYPE = {dtype!r}: the model that is given computes in"
      f" {model.config.dtype}; say it there (T5Config.dtype)"
    )
  partitioner = partitioner or Partitioner()
  partitioner.check(model.config)
  params, source, _ = load.load_params(
    path,
    model.config,
    _abstract(model, partitioner, is_trained),
    partitioner,
    initialise=initialise,
  )
  console.say(f"weights of {source.path}")
  return Loaded(model, params, vocabulary.read(source), source, partitioner)


def _abstract(model: Any, partitioner: Partitioner, is_trained: bool) -> Any:
  """Parameters as they shall lie on the devices."""

  def as_used(path, x):
    names = [key.key for key in path]
    # What every use casts to the dtype of the products.
    is_factor = names[0] in _BODY and names[-1] in _FACTORS
    return x if not is_factor else x.update(dtype=model.config.dtype)

  abstract = initial.abstract_params(model)
  if not is_trained:
    abstract = jax.tree_util.tree_map_with_path(as_used, abstract)
  return partitioner.place(abstract)


def another(loaded: Loaded, path: str) -> Loaded:
  """The same model with the parameters of another of its run's checkpoints."""
  model, partitioner = loaded.model, loaded.partitioner
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  abstract = partitioner.place(jax.tree.map(like, loaded.params))
  params, source, _ = load.load_params(
    path, model.config, abstract, partitioner
  )
  console.say(f"weights of {source.path}")
  return dataclasses.replace(loaded, params=params, source=source)
