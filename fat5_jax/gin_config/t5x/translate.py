"""A run of T5X's gin files as a gin text in our names.

What the command comes to use is followed from its function on, as gin would
build it: scopes, macros and later files count as they do there. Every value on
that way is asked of the table, and is bound to ours, told, or refused.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from fat5_jax import macros
from fat5_jax.errors import UserError, nearest
from fat5_jax.gin_config.t5x import cloud
from fat5_jax.gin_config.t5x.model_rows import OURS
from fat5_jax.gin_config.t5x.reading import (
  OUR_ALIASES,
  Binding,
  Files,
  is_t5x_name,
  replace,
  walk,
)
from fat5_jax.gin_config.t5x.rows import REQUIRED, Macro, Reference, Row
from fat5_jax.gin_config.t5x.table import OWN_MACROS, TABLE

_ROOTS = {"train": "train", "plan": "train", "eval": "evaluate"}
_OTHER_COMMANDS = {"train": "train", "evaluate": "eval", "infer": "infer"}
_VOCABULARY = "seqio.SentencePieceVocabulary"
_MODEL = "t5x.models.EncoderDecoderModel"
_PREDICT = f"{_MODEL}.predict_batch_with_aux"
_DATASET = "t5x.utils.DatasetConfig"
_RULES = "t5x.partitioning.standard_logical_axis_rules"
_ADAFACTOR = "t5x.adafactor.Adafactor"
_INFER = "fat5_jax.infer.infer"
_DATA = "fat5_jax.data.pipeline.DatasetConfig"
# Of the configurables of SeqIO, those that the table knows.
_KNOWN_BUT_OURS = tuple(name for name in TABLE if name.startswith("seqio."))
_UNSET = object()


class Translation:
  """The bindings of a run, followed from a command's function.

  Attributes:
    notes: lines for people, of what is taken otherwise than in T5X.
    neutral: names of what there is nothing to do for.
  """

  def __init__(self, command: str, files: Files):
    self._command = "train" if command == "plan" else command
    self._is_plan = command == "plan"
    self._root = f"__main__.{_ROOTS.get(command, command)}"
    self._files = files
    self.notes: list[str] = []
    self.neutral: list[str] = []
    self._macros: dict[str, Binding] = {}
    # By configurable and parameter, the binding of every scope.
    self._bound: dict[tuple[str, str], dict[str, Binding]] = {}
    self._passed: list[Binding] = []
    # (scope, our parameter in full): our value.
    self._ours: dict[tuple[str, str], Any] = {}
    self._used: dict[str, Any] = {}
    self._visited: set[tuple[str, str]] = set()
    self._sort()

  def _sort(self) -> None:
    """Bindings by what they bind; raises for a name that T5X has not."""
    for binding in self._files.bindings:
      name, parameter = binding.name, binding.parameter
      if not parameter:
        self._macros[name] = binding
      elif name in TABLE:
        known = TABLE[name]
        if parameter not in known:
          raise UserError(
            f"{binding.where}: {name} has no parameter {parameter!r} that is"
            f" known here.{nearest(parameter, known)} Known:"
            f" {', '.join(known) or 'none'}"
          )
        self._bound.setdefault((name, parameter), {})[binding.scope] = binding
      elif is_t5x_name(name):
        raise UserError(
          f"{binding.where}: {name}.{parameter} is not known here"
        )
      else:
        self._passed.append(binding)

  # ---- Values ----

  def _value(self, value: Any, where: str, seen: tuple[str, ...] = ()) -> Any:
    """The value with its macros followed; REQUIRED stays."""

    def follow(part):
      if not isinstance(part, Macro) or part == REQUIRED:
        return part
      if part.name in seen:
        raise UserError(
          f"macros refer to each other: {' -> '.join([*seen, part.name])}"
        )
      binding = self._macros.get(part.name)
      if binding is None:
        raise UserError(
          f"{where}: nothing sets {part.name}."
          + (
            " A model file does:"
            " --gin_file=t5x/examples/t5/t5_1_1/small.gin, before the run file"
            if part.name == "MODEL"
            else f" --gin.{part.name}=... does"
          )
        )
      return self._value(binding.value, binding.where, (*seen, part.name))

    return replace(value, follow)

  def _own_macro(self, name: str) -> Any:
    """The value of a macro, or None."""
    if name not in self._macros:
      return None
    value = self._value(Macro(name), "")
    return None if value == REQUIRED else value

  def _raw(self, name: str, parameter: str, scope: str) -> Binding | None:
    """The binding that counts: that of the innermost scope that has one."""
    by_scope = self._bound.get((name, parameter), {})
    parts = scope.split("/") if scope else []
    for n in range(len(parts), -1, -1):
      if "/".join(parts[:n]) in by_scope:
        return by_scope["/".join(parts[:n])]
    return None

  def get(self, name: str, parameter: str, scope: str = "") -> Any:
    """The value of a parameter of T5X's, or its default in the table."""
    binding = self._raw(name, parameter, scope)
    if binding is None:
      return TABLE[name][parameter].default
    return self._value(binding.value, binding.where)

  # ---- The way through T5X's configurables ----

  def _visit(self, name: str, scope: str) -> None:
    """Takes over all that is bound of a configurable, in a scope."""
    if (name, scope) in self._visited or name not in TABLE:
      return
    self._visited.add((name, scope))
    for parameter, row in TABLE[name].items():
      binding = self._raw(name, parameter, scope)
      if binding is None:
        if row.default == REQUIRED:
          continue
        binding = Binding(
          "", name, parameter, row.default, f"T5X's default of {parameter}"
        )
      self._take(row, binding, scope)
    if name == _MODEL and (
      self._command != "train"
      or self._value(self.get(self._root, "infer_eval_dataset_cfg"), "")
      not in (None, REQUIRED)
    ):
      self._visit(_PREDICT, scope)

  def _take(self, row: Row, binding: Binding, scope: str) -> None:
    value = self._value(binding.value, binding.where)
    what = f"{binding.name.rpartition('.')[2]}.{binding.parameter}"
    if value != REQUIRED:
      self._check(row, value, binding, what)
      told = row.tells(value)
      if told and told not in self.notes:
        self.notes.append(told)
    if row.is_neutral and binding.where and not row.tells(value):
      self._note_neutral(binding.parameter)
    to = row.to
    if isinstance(to, dict):
      to = to.get(self._command, "")
    if to:
      ours = value if value == REQUIRED else row.ours(value)
      # A macro keeps its name where its value is ours, too.
      if ours == value and type(ours) is type(value):
        ours = binding.value
      own = OURS.get(binding.name, "")
      is_own = own and to.rpartition(".")[0] == own
      self._ours[scope if is_own else "", to] = ours
    for part in walk(value):
      if isinstance(part, Reference):
        self._visit(part.name, part.scope or scope)

  def _note_neutral(self, name: str) -> None:
    if name not in self.neutral:
      self.neutral.append(name)

  def _check(self, row: Row, value: Any, binding: Binding, what: str) -> None:
    """Raises UserError for a value that is not honoured."""
    if not row.holds(value):
      shown = show(value) if len(show(value)) < 200 else "this"
      made = ""
      if row.makes and not row.instead:
        made = f"it may be None or @{' or @'.join(row.makes)}"
      raise UserError(
        f"{binding.where}: {what} = {shown} cannot be honoured:"
        f" {row.instead or made}"
      )
    name = binding.value.name if isinstance(binding.value, Macro) else ""
    if name in macros.MACROS and value is not None and value != []:
      plain = macros.REFERENCE if isinstance(value, Reference) else value
      where = self._macros[name].where
      label = where if where.startswith("--gin.") else f"{where}: {name}"
      macros.check(name, plain, label)

  # ---- What is another thing here ----

  def _check_root(self) -> None:
    if any(name == self._root for name, _ in self._bound):
      return
    for function, command in _OTHER_COMMANDS.items():
      if any(name == f"__main__.{function}" for name, _ in self._bound):
        raise UserError(
          f"these T5X files are for python -m fat5_jax.{command}. For"
          f" fat5_jax.{self._command} add its run file, --gin_file="
          f"t5x/configs/runs/{_run_file(self._command)}"
          + (
            ", or give --gin.MODEL_DIR=... alone, without gin files: a run"
            " folder tells its task"
            if command == "train"
            else ""
          )
        )
    if any(name == "__main__.precompile" for name, _ in self._bound):
      raise UserError(
        "T5X's precompile: python -m fat5_jax.plan compiles a training run for"
        " a chip that is not here"
      )
    ours = [b for b in self._passed if b.name in _OUR_FUNCTIONS]
    if ours:
      raise UserError(
        f"{ours[0].where} is a run of fat5_jax's, and the model T5X's: take the"
        " run file and the model file of one of them (t5x/configs/runs/"
        f"{_run_file(self._command)}, or models/t5_1_1/small.gin)"
      )
    raise UserError(
      "these T5X files have no run: add a run file,"
      f" --gin_file=t5x/configs/runs/{_run_file(self._command)}"
    )

  def _check_ours(self) -> None:
    """Raises where a run file of ours stands beside T5X's."""
    for binding in self._passed:
      if binding.name in _OUR_FUNCTIONS and binding.parameter in (
        *("model", "dataset_cfg", "train_dataset_cfg", "checkpoint_path"),
        *("input", "checkpoint_cfg"),
      ):
        raise UserError(
          f"{binding.where} is a run of fat5_jax's, beside one of T5X's: take"
          " one of them"
        )

  def _steps(self) -> None:
    """relative_steps goes first in T5X; here it is one of the two."""
    train = "fat5_jax.train.train"
    if self.get(self._root, "relative_steps") not in (None, REQUIRED):
      self._ours["", f"{train}.total_steps"] = None
    elif ("", f"{train}.total_steps") in self._ours:
      self._ours["", f"{train}.relative_steps"] = None

  def _partitioner(self, scope: str) -> None:
    where = "fat5_jax.sharding.Partitioner"
    name = "t5x.partitioning.PjitPartitioner"
    submesh = self.get(name, "model_parallel_submesh", scope)
    if submesh not in (None, REQUIRED):
      self._ours[scope, f"{where}.num_partitions"] = None
    dims = self.get(_RULES, "parameter_partitioning_dims", scope)
    if dims == 2 and (_RULES, scope) in self._visited:
      mesh = self._own_macro("MESH")
      if mesh is None:
        # T5X's data axis, over which parameters are split then.
        self._ours[scope, f"{where}.mesh"] = {"fsdp": -1}

  def _network(self, name: str, scope: str) -> None:
    """A scalable T5 has a table of positions in every layer."""
    config = "fat5_jax.models.config.T5Config"
    if "scalable" in name:
      self._ours[scope, f"{config}.relative_attention_per_layer"] = True
      self._ours[scope, f"{config}.model_type"] = "umt5"
    elif self.get(name, "vocab_size", scope) == 250112:
      self._ours[scope, f"{config}.model_type"] = "mt5"
    rules = f"{OURS[_ADAFACTOR]}.logical_factor_rules"
    scans = "scalable" in name and self.get(name, "scan_layers", scope)
    if not scans:
      # Matrices go by their size in T5X, too, whatever the rules.
      for key in [k for k in self._ours if k[1] == rules]:
        del self._ours[key]

  def _vocabulary(self, scope: str) -> None:
    binding = self._raw(_VOCABULARY, "sentencepiece_model_file", scope)
    path = self.get(_VOCABULARY, "sentencepiece_model_file", scope)
    extra = self.get(_VOCABULARY, "extra_ids", scope)
    given = self._own_macro("VOCAB_FILE")
    if REQUIRED in (path, given) or not isinstance(path, str):
      return
    folders = [self._own_macro("DATA_DIR"), *self._files.folders, os.curdir]
    try:
      file, extra = cloud.vocabulary(
        path,
        0 if extra in (None, REQUIRED) else extra,
        given,
        [f for f in folders if isinstance(f, str)],
        binding.where,
      )
    except UserError:
      if not self._is_plan:
        raise
      # What is compiled needs none.
      file, extra = "(VOCAB_FILE is not set)", 100
    self._ours[scope, f"{_VOCABULARY}.sentencepiece_model_file"] = file
    self._ours[scope, f"{_VOCABULARY}.extra_ids"] = extra
    if file != path:
      self.notes.append(f"{path}: {file}")

  def _check_vocabularies(self, scope: str) -> None:
    value = {
      side: self.get(_MODEL, f"{side}_vocabulary", scope)
      for side in ("input", "output")
    }
    if REQUIRED not in value.values() and value["input"] != value["output"]:
      binding = self._raw(_MODEL, "output_vocabulary", scope)
      raise UserError(
        f"{binding.where}: output_vocabulary is not input_vocabulary: the"
        " embedding is one, so give both the same"
      )

  def _sampling(self, scope: str) -> None:
    name = "t5x.decoding.temperature_sample"
    temperature = self.get(name, "temperature", scope)
    topk = self.get(name, "topk", scope)
    if topk == 0 and temperature != 0:
      binding = self._raw(name, "topk", scope)
      row = TABLE[name]["topk"]
      raise UserError(f"{binding.where}: temperature_sample: {row.instead}")

  def _checkpoint(self, scope: str) -> None:
    name = "t5x.utils.RestoreCheckpointConfig"
    binding = self._raw(name, "path", scope)
    if binding is None:
      return
    path = TABLE[name]["path"].ours(self.get(name, "path", scope))
    if isinstance(path, str) and cloud.is_there(path) and not self._is_plan:
      macro = (
        binding.value.name
        if isinstance(binding.value, Macro)
        else "utils.RestoreCheckpointConfig.path"
      )
      where = binding.where
      if isinstance(binding.value, Macro):
        where = self._macros[macro].where
      raise UserError(cloud.explain_checkpoint(path, macro, where))
    dtype = self._raw(name, "dtype", scope)
    if self._command == "train" and dtype is not None:
      if self._value(dtype.value, dtype.where) == "bfloat16":
        raise UserError(
          f"{dtype.where}: RestoreCheckpointConfig.dtype = 'bfloat16' would"
          " train bfloat16 parameters; here they are float32: set it to"
          " 'float32'"
        )

  def _dataset(self, scope: str) -> None:
    """Tasks that are built by name have no cache, and may have a folder."""
    from fat5_jax.data import tasks

    task = self.get(_DATASET, "mixture_or_task_name", scope)
    if not isinstance(task, str) or task not in tasks.READY:
      return
    if self.get(_DATASET, "use_cached", scope) is True:
      self._ours[scope, f"{_DATA}.use_cached"] = False
      note = f"use_cached = True: {task} is read from its files, not a cache"
      if note not in self.notes:
        self.notes.append(note)
    folder = self._own_macro("DATA_DIR")
    if isinstance(folder, str) and os.path.isdir(os.path.join(folder, task)):
      self._ours[scope, f"{_DATA}.data_dir"] = os.path.join(folder, task)
    # Made anew where a macro names it, and from files in any case.
    self._task_files(task, folder)

  def _task_files(self, task: str, folder: str | None) -> None:
    if folder is None and task.startswith(("wmt", "glue", "squad", "cnn")):
      note = (
        f"{task}: no DATA_DIR is given, so its rows are asked of the Hugging"
        " Face hub; --gin.DATA_DIR=FOLDER reads files named after its splits"
        " (FOLDER/train.tsv, or .jsonl, with the task's columns; translations"
        " also train.en and train.de), there or in FOLDER/" + task
      )
      if note not in self.notes:
        self.notes.append(note)

  def _infer(self) -> None:
    """T5X writes into a folder, and cuts inputs and predictions to lengths."""
    config = self.get(self._root, "dataset_cfg")
    scope = config.scope if isinstance(config, Reference) else ""
    folder = self.get(self._root, "output_dir")
    task = self.get(_DATASET, "mixture_or_task_name", scope)
    lengths = self.get(_DATASET, "task_feature_lengths", scope)
    binding = self._raw(_DATASET, "batch_size", scope)
    if binding is not None:
      self._ours["", f"{_INFER}.batch_size"] = binding.value
    if isinstance(lengths, dict):
      for side, ours in (("inputs", "input"), ("targets", "output")):
        if side in lengths:
          self._ours["", f"{_INFER}.max_{ours}_length"] = lengths[side]
    if isinstance(folder, str):
      name = task if isinstance(task, str) else "task"
      os.makedirs(folder, exist_ok=True)
      self._ours["", f"{_INFER}.output"] = os.path.join(
        folder, f"{name}-predict.jsonl-00000-of-00001"
      )
      self._ours["", f"{_INFER}.output_format"] = "jsonl"

  def _own_macros(self) -> None:
    for name, target in OWN_MACROS.items():
      if name not in self._macros:
        continue
      if target.startswith("fat5_jax.train.") and self._command != "train":
        continue
      if ("", target) not in self._ours:
        self._ours["", target] = Macro(name)
    # As in our own run files: another split to evaluate, or none.
    if "EVAL_SPLIT" in self._macros:
      for parameter in (
        *("train_eval_dataset_cfg", "infer_eval_dataset_cfg"),
        "dataset_cfg",
      ):
        if parameter in TABLE[self._root]:
          config = self.get(self._root, parameter)
          if isinstance(config, Reference):
            self._ours[config.scope, f"{_DATA}.split"] = Macro("EVAL_SPLIT")

  def _saving(self) -> None:
    """A run without saving keeps its last step, for what comes after it."""
    name = "t5x.utils.CheckpointConfig"
    for key in [k for k in self._ours if k[1].startswith("fat5_jax.checkp")]:
      if key[1].endswith("CheckpointConfig.save") and (
        self._value(self._ours[key], "") is None
      ):
        saving = "fat5_jax.checkpoints.SaveCheckpointConfig"
        self._ours[key] = Reference("", saving, True)
        self._ours["", f"{saving}.period"] = 2**31 - 1
        self._ours["", f"{saving}.keep"] = 1
        self.notes.append(
          f"{name.split('.')[-1]}.save = None: the last step"
          " is saved, for eval and infer"
        )
      elif key[1].endswith("CheckpointConfig.restore") and (
        self._value(self._ours[key], "") is None
      ):
        restore = "fat5_jax.checkpoints.RestoreCheckpointConfig"
        self._ours[key] = Reference("", restore, True)
        self._ours["", f"{restore}.path"] = None

  # ---- The text ----

  def run(self) -> str:
    """The gin text."""
    self._check_root()
    self._check_ours()
    self._visit(self._root, "")
    self._follow_passed()
    for name, scope in list(self._visited):
      if name.endswith("network.T5Config"):
        self._network(name, scope)
      elif name == _VOCABULARY:
        self._vocabulary(scope)
      elif name == _MODEL:
        self._check_vocabularies(scope)
      elif name == "t5x.partitioning.PjitPartitioner":
        self._partitioner(scope)
      elif name == "t5x.decoding.temperature_sample":
        self._sampling(scope)
      elif name == "t5x.utils.RestoreCheckpointConfig":
        self._checkpoint(scope)
      elif name == _DATASET:
        self._dataset(scope)
    if self._command == "train":
      self._steps()
      self._saving()
    if self._command == "infer":
      self._infer()
    self._own_macros()
    if ("", f"{OURS[_ADAFACTOR]}.learning_rate") in self._ours:
      optimizer = self._value(self.get(_MODEL, "optimizer_def"), "")
      if isinstance(optimizer, Reference) and optimizer.name != _ADAFACTOR:
        del self._ours["", f"{OURS[_ADAFACTOR]}.learning_rate"]
    text = self._text()
    self._check_macros()
    return text

  def _follow_passed(self) -> None:
    """What someone's own configurables are built of may be T5X's, or SeqIO's
    that the table knows."""
    for binding in self._passed:
      for part in walk(self._value(binding.value, binding.where)):
        if isinstance(part, Reference):
          self._visit(part.name, part.scope or binding.scope)

  def _text(self) -> str:
    lines: list[str] = []
    modules: dict[str, str] = {}

    def name_of(full: str) -> str:
      module = _module_of(full, self._files.modules)
      alias = OUR_ALIASES.get(module)
      modules[module] = alias or ""
      return full.replace(module, alias, 1) if alias else full

    def in_ours(part):
      if isinstance(part, Macro):
        if part != REQUIRED:
          self._use(part.name, in_ours)
        return part
      full = OURS.get(part.name, part.name)
      if is_t5x_name(full):
        raise UserError(
          f"@{full} of T5X has no place here as a value: leave it out"
        )
      return part._replace(name=name_of(full))

    for (scope, target), value in self._ours.items():
      key = f"{scope}/" if scope else ""
      value = self._keep_macro(value)
      lines.append(f"{key}{name_of(target)} = {show(replace(value, in_ours))}")
    for binding in self._passed:
      key = f"{binding.scope}/" if binding.scope else ""
      value = show(replace(binding.value, in_ours))
      full = f"{binding.name}.{binding.parameter}"
      lines.append(f"{key}{name_of(full)} = {value}")
    for module, where in self._files.modules.items():
      _import(module, where)
      if module not in OUR_ALIASES:
        modules.setdefault(module, "")
    imports = [
      f"import {module}" + f" as {alias}" * bool(alias)
      for module, alias in sorted(modules.items())
    ]
    set_macros = [f"{name} = {show(v)}" for name, v in self._used.items()]
    head = "from __gin__ import dynamic_registration"
    return "\n".join([head, *imports, *set_macros, *lines]) + "\n"

  def _keep_macro(self, value: Any) -> Any:
    """A macro's value in its place where ours may not have it (None)."""
    if not isinstance(value, Macro) or value == REQUIRED:
      return value
    found = self._value(value, "")
    if found == REQUIRED or value.name not in macros.MACROS:
      return value
    plain = macros.REFERENCE if isinstance(found, Reference) else found
    return value if macros.MACROS[value.name].kind.holds(plain) else found

  def _use(self, name: str, in_ours: Any) -> None:
    if name in self._used:
      return
    binding = self._macros.get(name)
    if binding is None:
      raise UserError(f"nothing sets {name}: --gin.{name}=... does")
    self._used[name] = None  # Its place, before those that it uses.
    self._used[name] = replace(binding.value, in_ours)

  def _check_macros(self) -> None:
    """Raises for a macro of the command line that nothing uses."""
    named = {
      part.name
      for binding in self._files.bindings
      for part in walk(binding.value)
      if isinstance(part, Macro)
    }
    named |= {*OWN_MACROS, "VOCAB_FILE", "EVAL_SPLIT"}
    unused = []
    for name, binding in self._macros.items():
      if name in named:
        continue
      if binding.where.startswith("--gin."):
        hint = nearest(name, named) or nearest(name.upper(), named)
        raise UserError(f"--gin.{name}: no file of this run uses {name}.{hint}")
      unused.append(name)
    if unused:
      self.notes.append(
        f"set and used by no file, in T5X neither: {', '.join(unused)}"
      )


_OUR_FUNCTIONS = (
  *("fat5_jax.train.train", "fat5_jax.eval.evaluate"),
  "fat5_jax.infer.infer",
)


def _run_file(command: str) -> str:
  return {"train": "finetune.gin"}.get(command, f"{command}.gin")


def _module_of(full: str, imported: dict[str, str]) -> str:
  """The module of a configurable: the longest that was imported, or may be."""
  parts = full.split(".")[:-1]
  names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
  for name in names:
    if name in imported or name in OUR_ALIASES:
      return name
  if full.startswith("fat5_jax."):
    return names[1]
  return names[-1]


def _import(module: str, where: str) -> None:
  """Imports what a file asks for, which registers its tasks."""
  try:
    importlib.import_module(module)
  except ImportError as e:
    parent, _, name = module.rpartition(".")
    try:
      # `from package import name` may be of what is no module.
      if parent and hasattr(importlib.import_module(parent), name):
        return
    except ImportError:
      pass
    hint = ""
    if str(getattr(e, "name", "")).split(".")[0] in ("t5x", "t5"):
      hint = (
        ". T5X and t5 are not here; SeqIO is, and the tasks of the T5 paper are"
        " known by their names"
      )
    raise UserError(f"{where}: import {module}: {e}{hint}") from None


def show(value: Any) -> str:
  """A value in gin's syntax."""
  if isinstance(value, Macro):
    return f"%{value.name}"
  if isinstance(value, Reference):
    scope = f"{value.scope}/" if value.scope else ""
    return f"@{scope}{value.name}" + "()" * value.is_call
  if isinstance(value, dict):
    pairs = (f"{show(k)}: {show(v)}" for k, v in value.items())
    return "{" + ", ".join(pairs) + "}"
  if isinstance(value, list):
    return f"[{', '.join(map(show, value))}]"
  if isinstance(value, tuple):
    return f"({', '.join(map(show, value))}{',' * (len(value) == 1)})"
  return repr(value)
