"""Parameters to start from: a checkpoint's, fitted to a run's model."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax

from fat5_jax import trees
from fat5_jax.checkpoints import layout
from fat5_jax.checkpoints.reference import CheckpointRef, find, open_params
from fat5_jax.convert import table
from fat5_jax.distributed.sharding import Partitioner, put_parts
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

# What a language model's checkpoint does not have, and a head has.
_HEADS_OWN = ("head", "classifier", "prompt_embedder")
# Fields that may differ between a checkpoint and the run that starts from it.
_NOT_COMPARED = (
  "model_type",
  "pad_token_id",
  "eos_token_id",
  "decoder_start_token_id",
)
_OF_THE_DECODER = (
  "num_decoder_layers",
  "logits_via_embedding",
  "scale_decoder_outputs",
)


def _check_config(found: T5Config, config: T5Config, path: str) -> bool:
  """Whether a head is put on a bare T5.

  Raises:
    UserError: if the checkpoint's model cannot become the run's.
  """
  before, now = found.architecture(), config.architecture()
  ignored = set(_NOT_COMPARED)
  # An encoder alone is read as an embedding, which has no layers of its own.
  bare = found.head is None or found.head.kind == "embedding"
  adds_head = bare and config.head is not None and config.head != found.head
  if adds_head:
    ignored.add("head")
    if not config.is_language_model:
      ignored.update(_OF_THE_DECODER)
  if found.lora is None:
    ignored.add("lora")
  lines = [
    f"  - {key} = {before[key]!r}\n  + {key} = {now[key]!r}"
    for key in now
    if before[key] != now[key] and key not in ignored
  ]
  if lines:
    raise UserError(
      f"INITIAL_CHECKPOINT_PATH {path} is not the model of the gin file"
      " (- checkpoint, + gin):\n" + "\n".join(lines) + "\nInclude"
      " 'models/from_checkpoint.gin' to take the model from the checkpoint"
    )
  return adds_head


def fresh_names(
  path: str, config: T5Config, abstract: Any, reinitialize: str | None = None
) -> list[str]:
  """The parameters that a start from a checkpoint initialises; reads none.

  Arguments and errors are those of `load_params`.
  """
  _, _, _, fresh = _matched(path, config, abstract, reinitialize)
  return list(map("/".join, fresh))


def _matched(
  path: str, config: T5Config, abstract: Any, reinitialize: str | None
) -> tuple[CheckpointRef, bool, table.Leaves, list[tuple[str, ...]]]:
  """(source, whether a head is put on it, its tensors, paths of fresh ones)."""
  source = find(path)
  found_config, found = open_params(source)
  adds_head = _check_config(found_config, config, path)
  name = "/".join
  expected = trees.flatten(layout.to_disk_layout(abstract))
  again = lambda name: None
  if reinitialize:
    again = trees.searcher("REINITIALIZE", reinitialize)

  def is_fresh(where):
    if again(name(where)):
      return True
    adds_lora = found_config.lora is None and where[-1].startswith("lora_")
    return (adds_head and where[0] in _HEADS_OWN) or adds_lora

  fresh = sorted(where for where in expected if is_fresh(where))
  if reinitialize and not any(again(name(where)) for where in expected):
    raise UserError(f"REINITIALIZE = {reinitialize!r} matches no parameter")
  for where in list(found):
    left_out = adds_head and where[0] == "decoder" and where not in expected
    if where in fresh or left_out or again(name(where)):
      del found[where]
  wanted = {where: x for where, x in expected.items() if where not in fresh}
  table.check_names(map(name, wanted), map(name, found), path)
  table.check_shapes(
    {name(where): x.shape for where, x in wanted.items()},
    {name(where): x.shape for where, x in found.items()},
    path,
  )
  return source, adds_head, found, fresh


def load_params(
  path: str,
  config: T5Config,
  abstract: Any,
  partitioner: Partitioner | None = None,
  reinitialize: str | None = None,
  initialise: Callable[[list[str]], dict[str, jax.Array]] | None = None,
) -> tuple[Any, CheckpointRef, list[str]]:
  """Parameters to start a run from, in its layout and as float32.

  A bare T5 gives its body to a head: what the head adds (its layers, EncT5's
  prompts, LoRA's matrices) keeps its fresh values, the decoder layers and the
  projection that it leaves out are dropped. A host reads one tensor at a time
  and keeps what its own devices hold.

  Args:
    path: see RestoreCheckpointConfig.
    config: of the run's model.
    abstract: shapes (and shardings) of its parameters.
    partitioner: where they lie; None is one device.
    reinitialize: see RestoreCheckpointConfig.
    initialise: gives fresh values of the named parameters, unstacked; None is
      for a checkpoint that has all of them.

  Returns:
    The parameters, where they come from, and the names of the fresh ones.

  Raises:
    UserError: if the checkpoint is not of the run's architecture, or lacks
      parameters that nothing initialises.
  """
  partitioner = partitioner or Partitioner(devices=jax.devices()[:1])
  source, adds_head, found, fresh = _matched(
    path, config, abstract, reinitialize
  )
  name = "/".join
  if fresh and initialise is None:
    raise UserError(
      f"{path} is not trained for this model: it has no"
      f" {', '.join(map(name, fresh[:4]))}"
    )
  targets = trees.flatten(partitioner.place(layout.to_disk_layout(abstract)))
  reads = {
    where: functools.partial(put, targets[where], leaf, name(where), path)
    for where, leaf in found.items()
  }
  names = list(map(name, fresh))
  if fresh:
    values = initialise(names)
    reads |= {
      where: functools.partial(values.get, name(where)) for where in fresh
    }
  # Only now are the tensors read, one at a time.
  params = layout.to_run_layout(trees.nest(reads), abstract)
  continues = not fresh and not adds_head
  return params, dataclasses.replace(source, continues=continues), names


def put(
  target: jax.ShapeDtypeStruct, leaf: table.Leaf, name: str = "", path: str = ""
) -> jax.Array:
  """Puts a tensor on the devices; one with a name must be of numbers."""
  read = leaf.read_part or leaf.read().__getitem__

  def checked(part):
    array = read(part)
    if name:
      table.check_finite(array, name, path)
    return array

  return put_parts(target, checked)
