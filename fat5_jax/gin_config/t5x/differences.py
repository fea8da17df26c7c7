"""What is no binding of ours with T5X's value, and is made here.

Each function takes the translation, whose bindings of ours it completes, and
the scope in which a configurable of T5X's was reached.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any

from fat5_jax import storage
from fat5_jax.errors import UserError
from fat5_jax.gin_config.t5x import cloud, ours
from fat5_jax.gin_config.t5x.model_rows import NETWORKS, OURS
from fat5_jax.gin_config.t5x.rows import REQUIRED, Macro, Reference
from fat5_jax.gin_config.t5x.table import NEVER, OWN_MACROS, TABLE

if TYPE_CHECKING:
  from fat5_jax.gin_config.t5x.translate import Translation

_VOCABULARY = "seqio.SentencePieceVocabulary"
_MODEL = "t5x.models.EncoderDecoderModel"
_DATASET = "t5x.utils.DatasetConfig"
_RULES = "t5x.partitioning.standard_logical_axis_rules"
_ADAFACTOR = "t5x.adafactor.Adafactor"
_PREDICT = f"{_MODEL}.predict_batch_with_aux"
_BEAM = "t5x.decoding.beam_search"
_SAMPLE = "t5x.decoding.temperature_sample"
_PARTITIONER = "t5x.partitioning.PjitPartitioner"
_RESTORE = "t5x.utils.RestoreCheckpointConfig"
_UNSET = (None, REQUIRED)


def partitioner(run: Translation, scope: str) -> None:
  """A submesh goes before a number; 2 dimensions of parameters are fsdp."""
  where = OURS[_PARTITIONER]
  if run.get(_PARTITIONER, "model_parallel_submesh", scope) not in _UNSET:
    run.ours[scope, f"{where}.num_partitions"] = None
  number = run.raw(_PARTITIONER, "num_partitions", scope)
  if number is not None and run.value(number.value, "") not in (1, *_UNSET):
    run.note(
      f"{number.where}: num_partitions splits the model over devices; on one,"
      " --gin.partitioning.PjitPartitioner.num_partitions=1"
    )
  dims = run.get(_RULES, "parameter_partitioning_dims", scope)
  if dims == 2 and run.has(_RULES, scope) and run.macro("MESH") is None:
    # T5X's data axis, over which parameters are split then.
    run.ours[scope, f"{where}.mesh"] = {"fsdp": -1}


def network(run: Translation, scope: str, module: str) -> None:
  """A scalable T5 has a table of positions in every layer."""
  name = f"{module}.T5Config"
  is_scalable = module == NETWORKS[1]
  if is_scalable:
    run.ours[scope, f"{ours.CONFIG}.relative_attention_per_layer"] = True
    run.ours[scope, f"{ours.CONFIG}.model_type"] = "umt5"
  elif run.get(name, "vocab_size", scope) == 250112:
    # The family that an export declares.
    run.ours[scope, f"{ours.CONFIG}.model_type"] = "mt5"
  if not (is_scalable and run.get(name, "scan_layers", scope)):
    # Matrices go by their size in T5X, too, whatever the rules.
    rules = f"{OURS[_ADAFACTOR]}.logical_factor_rules"
    for key in [key for key in run.ours if key[1] == rules]:
      del run.ours[key]


def vocabulary(run: Translation, scope: str) -> None:
  """A file of T5X's bucket is looked for here."""
  binding = run.raw(_VOCABULARY, "sentencepiece_model_file", scope)
  path = run.get(_VOCABULARY, "sentencepiece_model_file", scope)
  extra = run.get(_VOCABULARY, "extra_ids", scope)
  if binding is None or not isinstance(path, str):
    return
  folders = [run.macro("DATA_DIR"), *run.files.folders, os.curdir]
  try:
    file, extra, told = cloud.vocabulary(
      path,
      0 if extra in _UNSET else extra,
      run.macro("VOCAB_FILE"),
      [folder for folder in folders if isinstance(folder, str)],
      binding.where,
    )
  except UserError:
    if not run.is_plan:
      raise
    # What is compiled needs none.
    file, extra, told = "(VOCAB_FILE is not set)", 100, ""
  run.ours[scope, f"{_VOCABULARY}.sentencepiece_model_file"] = file
  run.ours[scope, f"{_VOCABULARY}.extra_ids"] = extra
  if told:
    run.note(told)


def model(run: Translation, scope: str) -> None:
  """One vocabulary; a learning rate where the optimizer has none."""
  found = [
    run.get(_MODEL, f"{side}_vocabulary", scope) for side in ("input", "output")
  ]
  if REQUIRED not in found and found[0] != found[1]:
    binding = run.raw(_MODEL, "output_vocabulary", scope)
    raise UserError(
      f"{binding.where}: output_vocabulary is not input_vocabulary: the"
      " embedding is one, so give both the same"
    )
  rate = ("", f"{OURS[_ADAFACTOR]}.learning_rate")
  optimizer = run.get(_MODEL, "optimizer_def", scope)
  is_others = isinstance(optimizer, Reference) and optimizer.name != _ADAFACTOR
  if is_others and rate in run.ours:
    del run.ours[rate]
    run.note(
      f"Trainer.learning_rate_fn: {optimizer.name} has a learning rate of its"
      " own, which counts, as in T5X"
    )


def decoding(run: Translation, scope: str) -> None:
  """A function and its settings, and those of the model's method, are one."""
  count = run.get(_PREDICT, "num_decodes", scope)
  returned = count if run.get(_PREDICT, "return_all_decodes", scope) else 1
  search = run.get(_MODEL, "decode_fn", scope)
  if search.name == _SAMPLE:
    found = _sampling(run, search.scope or scope, count, returned)
  else:
    alpha = run.get(_BEAM, "alpha", search.scope or scope)
    found = {
      "beam_rule": "t5x",
      "num_beams": count,
      "length_penalty": float(alpha),
      "num_return_sequences": returned,
    }
  root = {"train": ours.TRAIN, "eval": ours.EVAL, "infer": ours.INFER}
  made = Reference("", ours.DECODING, True)
  run.ours["", f"{root[run.command]}.decoding"] = made
  for name, value in found.items():
    run.ours["", f"{ours.DECODING}.{name}"] = value


def _sampling(
  run: Translation, scope: str, count: int, returned: int
) -> dict[str, Any]:
  top_k, top_p, temperature = (
    run.get(_SAMPLE, name, scope) for name in ("topk", "topp", "temperature")
  )
  # As there: 0 is none, and both at once an error.
  top_k, top_p = top_k or None, top_p or None
  if top_k is not None and top_p is not None:
    binding = run.raw(_SAMPLE, "topp", scope)
    raise UserError(
      f"{run.place(binding)}: topk = {top_k} and topp = {top_p}: one of them"
      " must be 0 in T5X, and topk is 1 where it is left out"
    )
  if top_k == 1 or temperature == 0:
    return {}
  if count > returned:
    binding = run.raw(_PREDICT, "num_decodes", scope)
    raise UserError(
      f"{run.place(binding)}: num_decodes = {count} samples, of which the"
      " likeliest is taken, are not here: set return_all_decodes = True, or"
      " num_decodes = 1"
    )
  return {
    "do_sample": True,
    "temperature": float(temperature),
    "top_k": top_k,
    "top_p": top_p,
    "num_return_sequences": returned,
  }


def restoring(run: Translation, scope: str) -> None:
  """What lies on Google Cloud is answered with how to get it."""
  binding = run.raw(_RESTORE, "path", scope)
  if binding is None:
    return
  path = TABLE[_RESTORE]["path"].ours(run.get(_RESTORE, "path", scope))
  if isinstance(path, str) and cloud.is_there(path) and not run.is_plan:
    macro, where = "utils.RestoreCheckpointConfig.path", binding.where
    if isinstance(binding.value, Macro):
      macro = binding.value.name
      where = run.where(macro)
    raise UserError(cloud.explain_checkpoint(path, macro, where))
  dtype = run.raw(_RESTORE, "dtype", scope)
  if run.command == "train" and dtype is not None and path is not None:
    if run.value(dtype.value, dtype.where) == "bfloat16":
      raise UserError(
        f"{dtype.where}: RestoreCheckpointConfig.dtype = 'bfloat16' would"
        " train bfloat16 parameters; here they are float32: set it to"
        " 'float32'"
      )


def dataset(run: Translation, scope: str) -> None:
  """Tasks that are built by name have no cache, and may have a folder."""
  from fat5_jax.data import ready

  task = run.get(_DATASET, "mixture_or_task_name", scope)
  if not isinstance(task, str) or task not in ready.TASKS:
    return
  if run.get(_DATASET, "use_cached", scope) is True:
    run.ours[scope, f"{OURS[_DATASET]}.use_cached"] = False
    run.note(f"use_cached = True: {task} is read from its files, not a cache")
  if task == "spoken_values":
    return
  folder = run.macro("DATA_DIR")
  files = (
    f"FOLDER, or FOLDER/{task}, has files named after the splits:"
    f" {_files(ready.TASKS[task])}"
  )
  if not isinstance(folder, str):
    run.note(
      f"{task}: no DATA_DIR is given, so its rows are asked of the Hugging Face"
      f" hub. With --gin.DATA_DIR=FOLDER they are read here; {files}"
    )
    return
  inside = os.path.join(folder, task)
  if os.path.isdir(inside):
    run.ours[scope, f"{OURS[_DATASET]}.data_dir"] = folder = inside
  if not _columns(ready.TASKS[task]) or run.is_plan:
    return
  names = os.listdir(folder) if os.path.isdir(folder) else []
  if not any(
    name.startswith(("train", "val", "dev", "test")) for name in names
  ):
    raise UserError(f"DATA_DIR {folder} has no rows of {task}: {files}")


def check_cache(run: Translation, scope: str) -> None:
  """Raises for a registered task whose cache T5X's files ask for in vain.

  Once the modules that register tasks are imported.
  """
  import seqio

  task = run.get(_DATASET, "mixture_or_task_name", scope)
  binding = run.raw(_DATASET, "use_cached", scope)
  if run.ours.get((scope, f"{OURS[_DATASET]}.use_cached"), False) is False:
    return
  if binding is None or run.value(binding.value, "") is not True:
    return
  module = run.get(_DATASET, "module", scope)
  with contextlib.suppress(ImportError):
    if isinstance(module, str):
      importlib.import_module(module)
  registered = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
  if task not in registered:
    return
  for part in seqio.get_subtasks(seqio.get_mixture_or_task(task)):
    if part.cache_dir is None:
      raise UserError(
        f"{run.place(binding)}: use_cached = True, and {part.name} has no"
        " cache: --gin.USE_CACHED_TASKS=False reads it without one,"
        " --seqio_additional_cache_dirs=FOLDER names where caches lie"
      )


def _columns(factory: Any) -> tuple[str, ...]:
  """The columns of a translation or a summary; none of others, whose files
  have layouts of their own."""
  from fat5_jax.data import tasks

  made = getattr(factory, "func", None)
  return (
    factory.args if made in (tasks.translation, tasks.summarization) else ()
  )


def _files(factory: Any) -> str:
  """Names of the files that a task is read from."""
  columns = _columns(factory)
  if not columns:
    return "as the data set is published, or train.tsv and train.jsonl"
  text = f"train.tsv or train.jsonl with columns {' and '.join(columns)}"
  if all(len(column) == 2 for column in columns):
    text += f", or {' and '.join(f'train.{code}' for code in columns)}"
  return f"{text}; validation and test likewise"


def steps(run: Translation) -> None:
  """relative_steps goes first in T5X; here it is one of the two."""
  if run.get(run.root, "relative_steps") not in _UNSET:
    run.ours["", f"{ours.TRAIN}.total_steps"] = None
  elif ("", f"{ours.TRAIN}.total_steps") in run.ours:
    run.ours["", f"{ours.TRAIN}.relative_steps"] = None


def saving(run: Translation) -> None:
  """None of T5X's saving and restoring are settings of ours."""
  for (scope, target), value in list(run.ours.items()):
    if not target.startswith(f"{ours.CHECKPOINTS}.CheckpointConfig."):
      continue
    if run.value(value, "") is not None:
      continue
    if target.endswith(".save"):
      made, settings = "SaveCheckpointConfig", {"period": NEVER, "keep": 1}
      run.note(
        "CheckpointConfig.save = None: the last step is saved all the same, for"
        " eval and infer"
      )
    else:
      made, settings = "RestoreCheckpointConfig", {"path": None}
    run.ours[scope, target] = Reference("", f"{ours.CHECKPOINTS}.{made}", True)
    for name, setting in settings.items():
      run.ours["", f"{ours.CHECKPOINTS}.{made}.{name}"] = setting


def inferring(run: Translation) -> None:
  """T5X writes into a folder, and cuts inputs and predictions to lengths."""
  config = run.get(run.root, "dataset_cfg")
  scope = config.scope if isinstance(config, Reference) else ""
  batch_size = run.raw(_DATASET, "batch_size", scope)
  if batch_size is not None:
    run.ours["", f"{ours.INFER}.batch_size"] = batch_size.value
  lengths = run.get(_DATASET, "task_feature_lengths", scope)
  if isinstance(lengths, dict):
    for side, end in (("inputs", "input"), ("targets", "output")):
      if side in lengths:
        run.ours["", f"{ours.INFER}.max_{end}_length"] = lengths[side]
  folder = run.get(run.root, "output_dir")
  if isinstance(folder, str):
    task = run.get(_DATASET, "mixture_or_task_name", scope)
    name = task if isinstance(task, str) else "task"
    if not storage.is_remote(folder):
      os.makedirs(folder, exist_ok=True)
    run.ours["", f"{ours.INFER}.output"] = os.path.join(
      folder, f"{name}-predict.jsonl-00000-of-00001"
    )
    run.ours["", f"{ours.INFER}.output_format"] = "jsonl"


def own_macros(run: Translation) -> None:
  """Macros that T5X has not set what is ours alone."""
  for name, target in OWN_MACROS.items():
    is_training = target.startswith((f"{ours.TRAIN}.", f"{ours.CHECKPOINTS}."))
    if not run.is_set(name) or (is_training and run.command != "train"):
      continue
    run.ours.setdefault(("", target), Macro(name))
  if not run.is_set("EVAL_SPLIT"):
    return
  # As in our own run files: another split to evaluate, or none.
  for parameter in (
    *("train_eval_dataset_cfg", "infer_eval_dataset_cfg"),
    "dataset_cfg",
  ):
    if parameter in TABLE[run.root]:
      config = run.get(run.root, parameter)
      if isinstance(config, Reference):
        run.ours[config.scope, f"{OURS[_DATASET]}.split"] = Macro("EVAL_SPLIT")


# By the configurable that was reached, and once all is imported.
AT_LAST = {_DATASET: check_cache}
# By the configurable that was reached.
OF_SCOPES = {
  **{
    f"{module}.T5Config": lambda run, scope, m=module: network(run, scope, m)
    for module in NETWORKS
  },
  _VOCABULARY: vocabulary,
  _MODEL: model,
  _PARTITIONER: partitioner,
  _PREDICT: decoding,
  _RESTORE: restoring,
  _DATASET: dataset,
}
# By command.
OF_RUNS = {
  "train": (steps, saving, own_macros),
  "eval": (own_macros,),
  "infer": (inferring, own_macros),
}
