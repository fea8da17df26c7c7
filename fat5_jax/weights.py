"""Weights to start from: what lies at a path, read, fitted to a run, written.

A checkpoint is a run of fat5_jax or one of convert/formats.py; its tensors are
read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import logging
import os
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fat5_jax import checkpoints, trainable
from fat5_jax.convert import formats, mesh_tf, orbax_files, t5x, table
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config
from fat5_jax.sharding import Partitioner, put_parts


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint to read: which kind, where, and at which step.

  `kind` is "fat5" or one of convert.formats. `overrides` and `base` are those
  of formats.open_model.
  """

  kind: str
  path: str
  step: int = 0
  overrides: tuple[tuple[str, Any], ...] = ()
  base: str | None = None

  @property
  def has_optimizer(self) -> bool:
    return self.kind == "fat5" and os.path.isdir(
      os.path.join(self.path, "optimizer")
    )

  @property
  def run_dir(self) -> str:
    """The folder that tells what is beside the tensors."""
    if self.kind == "peft" and self.base:
      return self.base
    return os.path.dirname(self.path) if self.kind == "fat5" else self.path


# google/flan-t5-small, or t5-small
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w-][\w.-]*$")


def find(path: str) -> Source:
  """What lies at a path: a run folder (its latest checkpoint), one checkpoint
  of a run, or a checkpoint of another library.

  Raises:
    UserError: if it is none of these.
  """
  given, path = path, os.path.abspath(os.path.expanduser(path))
  if not os.path.exists(path) and formats.find(path) is None:
    hint = ""
    if _HUB_NAME.match(given):
      hint = (
        f". If {given} is a model of the Hugging Face hub: nothing is"
        f" downloaded here; get it with `hf download {given} --local-dir"
        f" {given.split('/')[-1]}` and give that folder"
      )
    raise UserError(f"{path}: no such checkpoint{hint}")
  match = checkpoints.STEP_FOLDER.match(os.path.basename(path))
  if match and os.path.isdir(os.path.join(path, "params")):
    return Source("fat5", path, int(match[1]))
  own = [
    step
    for step in checkpoints.steps(path)
    if os.path.isdir(os.path.join(path, f"checkpoint_{step}", "params"))
  ]
  if own:
    return Source("fat5", os.path.join(path, f"checkpoint_{own[-1]}"), own[-1])
  found = formats.find(path)
  if found is not None:
    return Source(*found, base=formats.base_of(found))
  raise UserError(
    f"{path}: neither a Hugging Face folder (config.json), nor a fat5_jax run"
    " (model.json and checkpoint_<step>), nor a T5X, Mesh TensorFlow or PEFT"
    " checkpoint"
  )


def read_config(source: Source) -> T5Config:
  """The T5Config of a checkpoint."""
  return open_params(source)[0]


def model_config(path: str, **changes: Any) -> T5Config:
  """The T5Config of the checkpoint at `path`, with run-time fields changed.

  For gin: `T5Config` comes from the checkpoint instead of a size file.
  """
  return read_config(find(path)).replace(**changes)


def open_params(
  source: Source, without_decoder: bool = False
) -> tuple[T5Config, table.Leaves]:
  """The config of a checkpoint, and its tensors, read when wanted.

  Layers are unstacked. `without_decoder` leaves the decoder out, unread.
  """
  if source.kind == "fat5":
    found = checkpoints.read_model_json(source.run_dir)
    if found is None:
      raise UserError(f"{source.run_dir}: model.json is missing")
    config = T5Config(**found["model"])
    leaves = orbax_files.read_item(os.path.join(source.path, "params"))
  else:
    config, leaves = formats.open_model(
      source.kind,
      source.path,
      overrides=dict(source.overrides),
      base=source.base,
    )
  if without_decoder:
    leaves = {k: leaf for k, leaf in leaves.items() if k[0] != "decoder"}
  return config, leaves


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


def initial_params(
  path: str,
  config: T5Config,
  abstract: Any,
  partitioner: Partitioner | None = None,
  reinitialize: str | None = None,
  initialise: Callable[[list[str]], dict[str, jax.Array]] | None = None,
) -> tuple[Any, Source, list[str]]:
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
  source = find(path)
  found_config, found = open_params(source)
  adds_head = _check_config(found_config, config, path)
  name = "/".join
  on_disk = checkpoints.as_on_disk(abstract)
  expected = table.flatten(on_disk)
  again = lambda name: None
  if reinitialize:
    again = trainable.searcher("REINITIALIZE", reinitialize)

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
  if fresh and initialise is None:
    raise UserError(
      f"{path} is not trained for this model: it has no"
      f" {', '.join(map(name, fresh[:4]))}"
    )
  targets = table.flatten(partitioner.place(on_disk))
  reads = {
    where: functools.partial(_put, targets[where], leaf)
    for where, leaf in found.items()
  }
  names = list(map(name, fresh))
  if fresh:
    values = initialise(names)
    reads |= {
      where: functools.partial(values.get, name(where)) for where in fresh
    }
  # Only now are the tensors read, one at a time.
  params = checkpoints.as_running(table.nest(reads), abstract)
  return params, source, names


def _put(target: jax.ShapeDtypeStruct, leaf: table.Leaf) -> jax.Array:
  return put_parts(target, leaf.read_part or leaf.read().__getitem__)


def initial_optimizer(
  source: Source, abstract: Any, abstract_params: Any, partitioner: Partitioner
) -> Any:
  """Optimizer state of a fat5_jax checkpoint to start a run from.

  Args:
    source: the checkpoint.
    abstract: shapes of the state, in the run's layout.
    abstract_params: those of the parameters that it is for.
    partitioner: where it lies.

  Raises:
    UserError: if it is that of another optimizer.
  """
  path = os.path.join(source.path, "optimizer")
  on_disk = partitioner.place(
    checkpoints.as_on_disk(abstract), checkpoints.as_on_disk(abstract_params)
  )
  try:
    found = checkpoints.open_item(path, on_disk)
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(
      f"{source.path} holds the state of another optimizer than the gin file"
      f" asks for ({str(e).splitlines()[0]}). Export it with"
      " tools/convert_checkpoint.py and start from the weights alone"
    ) from None
  return checkpoints.as_running(found, abstract)


def adafactor_state(source: Source, config: T5Config) -> tuple[int, Any]:
  """(step, state of optimizers.adafactor with a schedule) of a T5X or Mesh
  TensorFlow checkpoint, unstacked, to be written with its weights.

  Raises:
    UserError: if it has no Adafactor state, or one of other shapes.
  """
  from fat5_jax import optimizers

  reader = mesh_tf if source.kind == "mesh_tf" else t5x
  step, slots = reader.open_slots(source.path)
  _, leaves = open_params(source)
  shapes = table.nest(
    {k: jax.ShapeDtypeStruct(x.shape, jnp.float32) for k, x in leaves.items()}
  )
  optimizer = optimizers.adafactor(
    optimizers.create_learning_rate_scheduler(),
    # Whether there is momentum; how much, the run's gin file says.
    beta1=0.9 if any(x.shape != (1,) for x in slots["m"].values()) else None,
  )
  expected = jax.eval_shape(optimizer.init, shapes)
  filled = {}
  for name in t5x.SLOTS:
    wanted = table.flatten(getattr(expected[0], name))
    found = slots[name]
    where = f"{source.path}: optimizer slot {name}"
    table.check_names(map("/".join, wanted), map("/".join, found), where)
    table.check_shapes(
      {"/".join(k): x.shape for k, x in wanted.items()},
      {"/".join(k): found[k].shape for k in wanted},
      where,
    )
    filled[name] = table.nest(
      {k: np.asarray(x.read(), np.float32) for k, x in found.items()}
    )
  count = np.int32(step)
  return step, (
    expected[0]._replace(count=count, **filled),
    expected[1]._replace(count=count),
  )


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

  folder = checkpoints.prepare_model_dir(folder)
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
    ).save(os.path.join(target, "params"), table.nest(leaves))
    if opt_state is not None:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.join(target, "optimizer"), opt_state)
    description = None
    if vocabulary is not None:
      description = vocabularies.save(vocabulary, folder)
    checkpoints.write_model_json(folder, config, description)
    os.rename(target, final)
