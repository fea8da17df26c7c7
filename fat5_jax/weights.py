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
import numpy as np
import orbax.checkpoint as ocp

from fat5_jax import checkpoints, integrity, run_record, trainable
from fat5_jax.convert import (
  formats,
  hf,
  mesh_tf,
  orbax_files,
  t5x,
  table,
)
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config
from fat5_jax.optimizers import AdafactorState
from fat5_jax.sharding import Partitioner, put_parts

# Libraries whose checkpoints have Adafactor's slots.
_SLOT_READERS = {"t5x": t5x, "mesh_tf": mesh_tf}


class OtherOptimizerError(UserError):
  """A checkpoint's optimizer is not the run's."""


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint to read: which kind, where, and at which step.

  `kind` is "fat5" or one of convert.formats. `overrides` and `base` are those
  of formats.open_model. `continues` is False where a run makes another model
  of it, by a head or LoRA: its step and optimizer are not the run's.
  """

  kind: str
  path: str
  step: int = 0
  overrides: tuple[tuple[str, Any], ...] = ()
  base: str | None = None
  continues: bool = True

  @property
  def has_optimizer(self) -> bool:
    """Whether it counts steps, and holds what an optimizer keeps."""
    return self.kind in _SLOT_READERS or (
      self.kind == "fat5"
      and os.path.isdir(os.path.join(self.path, "optimizer"))
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
  if match and _is_own(path):
    if reason := integrity.problem(path, ("params",)):
      raise UserError(
        f"{path} is damaged ({reason}). Name its run folder for the last whole"
        " one"
      )
    return Source("fat5", path, int(match[1]))
  own = [
    n for n in checkpoints.steps(path) if _is_own(f"{path}/checkpoint_{n}")
  ]
  if own:
    step, _ = checkpoints.latest_whole(path, ("params",))
    return Source("fat5", os.path.join(path, f"checkpoint_{step}"), step)
  found = formats.find(path)
  if found is not None:
    return Source(*found, base=formats.base_of(found))
  raise UserError(
    f"{path}: neither a Hugging Face folder (config.json), nor a fat5_jax run"
    " (model.json and checkpoint_<step>), nor a T5X, Mesh TensorFlow or PEFT"
    " checkpoint"
  )


def _is_own(folder: str) -> bool:
  """Whether it is one of ours, whole or not: T5X's have the same name."""
  items = [os.path.join(folder, item) for item in integrity.ITEMS]
  return any(map(os.path.isdir, items)) or integrity.has_checksums(folder)


def own_head_record(source: Source) -> dict[str, Any] | None:
  """What a run folder says of a head module of a person's own, if it has one
  (models.factory.own_head)."""
  if source.kind != "fat5":
    return None
  found = run_record.read(source.run_dir).get("own_head")
  if found is not None and not (
    isinstance(found, dict) and isinstance(found.get("module"), str)
  ):
    raise UserError(
      f"{source.run_dir}/model.json: own_head is {str(found)[:80]!r}, and names"
      " no module"
    )
  return found


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
    config = run_record.read_config(source.run_dir)
    leaves = orbax_files.read_item(os.path.join(source.path, "params"))
    own_head = own_head_record(source) is not None
    run_record.check_tensors(config, leaves, source.path, own_head)
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


def fresh_names(
  path: str, config: T5Config, abstract: Any, reinitialize: str | None = None
) -> list[str]:
  """The parameters that a start from a checkpoint initialises; reads none.

  Arguments and errors are those of `initial_params`.
  """
  _, _, _, fresh = _matched(path, config, abstract, reinitialize)
  return list(map("/".join, fresh))


def _matched(
  path: str, config: T5Config, abstract: Any, reinitialize: str | None
) -> tuple[Source, bool, table.Leaves, list[tuple[str, ...]]]:
  """(source, whether a head is put on it, its tensors, paths of fresh ones)."""
  source = find(path)
  found_config, found = open_params(source)
  adds_head = _check_config(found_config, config, path)
  name = "/".join
  expected = table.flatten(checkpoints.as_on_disk(abstract))
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
  return source, adds_head, found, fresh


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
  source, adds_head, found, fresh = _matched(
    path, config, abstract, reinitialize
  )
  name = "/".join
  if fresh and initialise is None:
    raise UserError(
      f"{path} is not trained for this model: it has no"
      f" {', '.join(map(name, fresh[:4]))}"
    )
  targets = table.flatten(partitioner.place(checkpoints.as_on_disk(abstract)))
  reads = {
    where: functools.partial(_put, targets[where], leaf, name(where), path)
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
  continues = not fresh and not adds_head
  return params, dataclasses.replace(source, continues=continues), names


def _put(
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


def read_step(source: Source) -> int:
  """The step of a checkpoint that has an optimizer.

  That of a T5X checkpoint is what it says, or else its folder's number.
  """
  if source.kind not in _SLOT_READERS:
    return source.step
  step = _SLOT_READERS[source.kind].read_step(source.path)
  return source.step if step is None else step


def initial_optimizer(
  source: Source, abstract: Any, abstract_params: Any, partitioner: Partitioner
) -> Any:
  """Optimizer state of a checkpoint to start a run from.

  Args:
    source: the checkpoint.
    abstract: shapes of the state, in the run's layout.
    abstract_params: those of the parameters that it is for.
    partitioner: where it lies.

  Raises:
    OtherOptimizerError: if it is that of another optimizer.
  """
  on_disk = partitioner.place(
    checkpoints.as_on_disk(abstract), checkpoints.as_on_disk(abstract_params)
  )
  if source.kind in _SLOT_READERS:
    found = _adafactor_reads(source, on_disk)
  else:
    if reason := integrity.problem(source.path, ("optimizer",)):
      raise UserError(f"{source.path} is damaged ({reason})")
    try:
      path = os.path.join(source.path, "optimizer")
      found = checkpoints.open_item(path, on_disk)
    except (ValueError, KeyError, TypeError) as e:
      raise OtherOptimizerError(
        f"{source.path} holds the state of another optimizer than the gin file"
        f" asks for ({str(e).splitlines()[0]}). Export it with"
        " tools/convert_checkpoint.py and start from the weights alone"
      ) from None
  return checkpoints.as_running(found, abstract)


def _adafactor_reads(source: Source, on_disk: Any) -> Any:
  """Functions that read T5X's or Mesh TensorFlow's slots; see as_running."""
  is_slots = lambda x: isinstance(x, AdafactorState)
  parts = jax.tree.leaves(on_disk, is_leaf=is_slots)
  if len(parts) != 1 or not is_slots(parts[0]):
    raise OtherOptimizerError("the checkpoint's is Adafactor, the run's is not")
  try:
    step, slots = _SLOT_READERS[source.kind].open_slots(source.path)
  except UserError as e:
    raise OtherOptimizerError(str(e)) from None
  reads = {"count": functools.partial(_put, parts[0].count, _counter(step))}
  for name in t5x.SLOTS:
    targets, found = table.flatten(getattr(parts[0], name)), slots[name]
    for where in {**targets, **found}:
      there = found[where].shape if where in found else None
      wanted = targets[where].shape if where in targets else None
      if there != wanted:
        raise OtherOptimizerError(
          f"slot {name} of {'/'.join(where)} is {there} in the checkpoint, and"
          f" {wanted} in the run's Adafactor (beta1, factored,"
          " min_dim_size_to_factor, logical_factor_rules)"
        )
    reads[name] = table.nest(
      {k: functools.partial(_put, x, found[k]) for k, x in targets.items()}
    )
  reads = AdafactorState(**reads)
  return jax.tree.map(lambda _: reads, on_disk, is_leaf=is_slots)


def _counter(step: int) -> table.Leaf:
  return table.leaf_of(np.asarray(step, np.int32))


def adafactor_state(source: Source, config: T5Config) -> tuple[int, Any]:
  """(step, state of optimizers.adafactor) of a T5X or Mesh TensorFlow
  checkpoint, unstacked, to be written with its weights.

  Raises:
    UserError: if it has no Adafactor state, or not one of the model's shapes.
  """
  step, slots = _SLOT_READERS[source.kind].open_slots(source.path)
  shapes = {row.path: row.shape for row in hf.rows(config)}
  for name, found in slots.items():
    where = f"{source.path}: optimizer slot {name}"
    table.check_names(map("/".join, shapes), map("/".join, found), where)
  for path, shape in shapes.items():
    own = {name: slots[name][path].shape for name in t5x.SLOTS}
    full, unused = {"v": shape, "v_row": (1,), "v_col": (1,)}, (1,)
    if own["v"] == unused and len(shape) == 2:
      small, large = sorted(shape)
      full = {"v": unused, "v_row": (small,), "v_col": (large,)}
    full["m"] = shape if own["m"] != unused else unused
    where = f"{source.path}: optimizer slots of {'/'.join(path)}"
    table.check_shapes(full, own, where)
  read = lambda x: np.asarray(x.read(), np.float32)
  state = {
    name: table.nest({k: read(x) for k, x in slots[name].items()})
    for name in t5x.SLOTS
  }
  return step, (AdafactorState(np.int32(step), **state),)


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
    run_record.write(folder, config, description)
    integrity.write(target)
    os.rename(target, final)
