"""From a folder, of any format that is read, to a Model."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import flax.linen as nn
import seqio

from fat5_jax import macros
from fat5_jax.api import training
from fat5_jax.api.model import Model
from fat5_jax.api.words import as_user_error, of_python
from fat5_jax.checkpoints import reference
from fat5_jax.checkpoints import vocabulary as vocabulary_lib
from fat5_jax.data import sources
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.inference import own_task
from fat5_jax.models import factory
from fat5_jax.models.config import T5Config


def load(
  path: str | os.PathLike,
  *,
  dtype: str | None = None,
  mesh: Mapping[str, int] | None = None,
  attention: str | None = None,
  vocabulary: str | os.PathLike | seqio.Vocabulary | None = None,
  head_module: str | type[nn.Module] | None = None,
) -> Model:
  """The model that lies at a path; tensors are read when they are wanted.

  Args:
    path: a folder of Hugging Face's (T5, FLAN-T5, mT5, ByT5, their heads), of
      FAT5, EncT5 or a PEFT adapter, a run folder or one of its checkpoints, a
      T5X or Mesh TensorFlow checkpoint. Nothing is downloaded.
    dtype: of the products, "bfloat16" or "float32"; None predicts in the
      checkpoint's own and trains in bfloat16. Parameters are float32.
    mesh: devices by axis, {"fsdp": 8}; None puts a part of each batch on every
      device. See gin/runs/mesh.gin.
    attention: "mosaic_tpu", "mosaic_gpu", "triton", "chunked" or "reference";
      None is the chip's best.
    vocabulary: a SentencePiece model's path, or a SeqIO vocabulary; None is
      what the checkpoint brings.
    head_module: a head module of your own, as the run folder names it
      ("heads:MyHead") or its class: reading the folder alone runs no code.

  Raises:
    UserError: if there is none, or it is damaged.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise UserError(f"path is a {type(path).__name__}, and must name a folder")
  with of_python():
    source = reference.find(os.fspath(path))
    partitioner = Partitioner(mesh=mesh)
    config = reference.read_config(source).replace(
      scan_layers=False, remat_policy="none"
    )
    macros.check("ATTENTION", attention, "attention")
    if attention is not None:
      config = config.replace(attention_implementation=attention)
    if isinstance(vocabulary, (str, os.PathLike)):
      [path_here] = sources.expand(os.fspath(vocabulary))
      vocabulary = seqio.SentencePieceVocabulary(path_here, 100)
    elif not isinstance(vocabulary, (seqio.Vocabulary, type(None))):
      raise UserError(
        f"vocabulary is a {type(vocabulary).__name__}, and must be a"
        " SentencePiece model's path or a SeqIO vocabulary"
      )
    return Model(
      source,
      _with_dtype(config, dtype),
      partitioner,
      vocabulary or vocabulary_lib.read(source),
      head_layers=_head_layers(source, head_module),
      dtype=dtype,
      trainable=None if config.lora is None else training.LORA_TRAINABLE,
    )


def _with_dtype(config: T5Config, dtype: str | None) -> T5Config:
  with as_user_error():
    return config if dtype is None else config.replace(dtype=dtype)


def _head_layers(source: Any, head_module: Any) -> nn.Module | None:
  """The head module of a run folder, named or given by its class."""
  if not isinstance(head_module, type):
    return own_task.head_module_of(source, head_module)
  record = reference.own_head_record(source)
  name = head_module.__qualname__
  if record is None or record["module"].partition(":")[2] != name:
    has = record["module"] if record else "no head module of its own"
    raise UserError(f"head_module is {name}, and {source.run_dir} has {has}")
  return factory.make_head(head_module, record["fields"])
