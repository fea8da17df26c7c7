"""A run of T5X's gin files as a gin text in our names.

What the command comes to use is followed from its function on, as gin would
build it: scopes, macros and later files count as they do there. Every value on
that way is asked of the table, and is bound to ours, told, or refused.
"""

from __future__ import annotations

from typing import Any

from fat5_jax import macros
from fat5_jax.errors import UserError, nearest
from fat5_jax.gin_config.t5x import differences, writing
from fat5_jax.gin_config.t5x import ours as our_names
from fat5_jax.gin_config.t5x.model_rows import OURS
from fat5_jax.gin_config.t5x.reading import (
  Binding,
  Files,
  is_t5x_name,
  replace,
  walk,
)
from fat5_jax.gin_config.t5x.rows import REQUIRED, Macro, Reference, Row
from fat5_jax.gin_config.t5x.table import OWN_MACROS, TABLE

_FUNCTIONS = {"train": "train", "eval": "evaluate", "infer": "infer"}
_RUN_FILES = {
  "train": "t5x/configs/runs/finetune.gin",
  "eval": "t5x/configs/runs/eval.gin",
  "infer": "t5x/configs/runs/infer.gin",
}
_OUR_FUNCTIONS = (our_names.TRAIN, our_names.EVAL, our_names.INFER)
# A run file of ours binds one of these.
_OUR_RUN = (
  *("model", "dataset_cfg", "train_dataset_cfg", "checkpoint_path"),
  *("input", "checkpoint_cfg"),
)
_MODEL = "t5x.models.EncoderDecoderModel"


class Translation:
  """The bindings of a run, followed from a command's function.

  Attributes:
    command: train, eval or infer; a plan is of train.
    root: the function's full name in T5X.
    files: what was read.
    ours: (scope, parameter of ours in full) to its value.
    notes: lines for people, of what is taken otherwise than in T5X.
    neutral: names of what there is nothing to do for.
  """

  def __init__(self, command: str, files: Files):
    self.is_plan = command == "plan"
    self.command = "train" if self.is_plan else command
    self.root = f"__main__.{_FUNCTIONS[self.command]}"
    self.files = files
    self.ours: dict[tuple[str, str], Any] = {}
    self.notes: list[str] = []
    self.neutral: list[str] = []
    self._macros: dict[str, Binding] = {}
    # By configurable and parameter, the binding of every scope.
    self._bound: dict[tuple[str, str], dict[str, Binding]] = {}
    self._passed: list[Binding] = []
    self._visited: set[tuple[str, str]] = set()
    # Bindings that count, by identity.
    self._counted: set[int] = set()
    self._sort()

  def _sort(self) -> None:
    """Bindings by what they bind; raises for a name that T5X has not."""
    for binding in self.files.bindings:
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

  def value(self, value: Any, where: str, seen: tuple[str, ...] = ()) -> Any:
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
        hint = f"--gin.{part.name}=... does"
        if part.name == "MODEL":
          hint = "a model file does: --gin_file=t5x/examples/t5/t5_1_1/base.gin"
        raise UserError(f"{where}: nothing sets {part.name}; {hint}")
      return self.value(binding.value, binding.where, (*seen, part.name))

    return replace(value, follow)

  def is_set(self, name: str) -> bool:
    """Whether a macro is."""
    return name in self._macros

  def macro(self, name: str) -> Any:
    """The value of a macro; None where it has none."""
    value = self.value(Macro(name), "") if self.is_set(name) else None
    return None if value == REQUIRED else value

  def where(self, macro: str) -> str:
    """Where a macro is set, for people."""
    return self._macros[macro].where

  def raw(self, name: str, parameter: str, scope: str) -> Binding | None:
    """The binding that counts: that of the innermost scope that has one."""
    by_scope = self._bound.get((name, parameter), {})
    parts = scope.split("/") if scope else []
    for n in range(len(parts), -1, -1):
      if "/".join(parts[:n]) in by_scope:
        return by_scope["/".join(parts[:n])]
    return None

  def get(self, name: str, parameter: str, scope: str = "") -> Any:
    """The value of a parameter of T5X's, or its default in the table."""
    binding = self.raw(name, parameter, scope)
    if binding is None:
      return TABLE[name][parameter].default
    return self.value(binding.value, binding.where)

  def has(self, name: str, scope: str) -> bool:
    """Whether the command comes to build it."""
    return (name, scope) in self._visited

  def note(self, text: str) -> None:
    """Keeps a line for people, once."""
    if text not in self.notes:
      self.notes.append(text)

  # ---- The way through T5X's configurables ----

  def _visit(self, name: str, scope: str) -> None:
    """Takes over all that is bound of a configurable, in a scope."""
    if (name, scope) in self._visited or name not in TABLE:
      return
    self._visited.add((name, scope))
    for parameter, row in TABLE[name].items():
      binding = self.raw(name, parameter, scope)
      if binding is not None:
        self._counted.add(id(binding))
      elif row.default == REQUIRED:
        continue
      self._take(
        row,
        binding
        or Binding("", name, parameter, row.default, f"{name}'s default"),
        scope,
        is_bound=binding is not None,
      )
    # A method of T5X's model, which predictions alone call.
    if name == _MODEL and self._predicts():
      self._visit(f"{_MODEL}.predict_batch_with_aux", scope)

  def _predicts(self) -> bool:
    if self.command != "train":
      return True
    return isinstance(self.get(self.root, "infer_eval_dataset_cfg"), Reference)

  def _take(
    self, row: Row, binding: Binding, scope: str, is_bound: bool
  ) -> None:
    if row is TABLE[_MODEL]["decode_fn"] and not self._predicts():
      return
    value = self.value(binding.value, binding.where)
    told = None
    if value != REQUIRED:
      self._check(row, value, binding)
      told = row.tells(value)
    if told:
      self.note(told)
    elif row.is_neutral and is_bound and binding.parameter not in self.neutral:
      self.neutral.append(binding.parameter)
    to = self._target(row)
    if to:
      ours = value if value == REQUIRED else row.ours(value)
      # A macro keeps its name where its value is ours, too.
      if ours == value and type(ours) is type(value):
        ours = binding.value
      is_same = to.rpartition(".")[0] == OURS.get(binding.name)
      self.ours[scope if is_same else "", to] = self._keep_macro(ours)
    for part in walk(value):
      if isinstance(part, Reference):
        self._visit(part.name, part.scope or scope)

  def _check(self, row: Row, value: Any, binding: Binding) -> None:
    """Raises UserError for a value that is not honoured."""
    if not row.holds(value):
      shown = writing.show(value)
      what = f"{binding.name.rpartition('.')[2]}.{binding.parameter}"
      raise UserError(
        f"{self.place(binding)}: {what} = {shown:.200} cannot be honoured:"
        f" {row.instead}"
      )
    plain = replace(value, lambda _: macros.REFERENCE)
    name = binding.value.name if isinstance(binding.value, Macro) else ""
    if name in macros.MACROS and value is not None and value != []:
      where = self._macros[name].where
      label = where if where.startswith("--gin.") else f"{where}: {name}"
      macros.check(name, plain, label)
    to = self._target(row)
    if to.startswith("fat5_jax.") and not (row.makes and value is None):
      words = writing.type_problem(to, row.ours(plain))
      if words:
        raise UserError(
          f"{self.place(binding)}: {binding.parameter} ="
          f" {writing.show(value):.200} must be of type {words}"
        )

  def place(self, binding: Binding) -> str:
    """Where a value is from: the last of the macros that it goes through."""
    while isinstance(binding.value, Macro) and binding.value != REQUIRED:
      binding = self._macros[binding.value.name]
    return binding.where

  def _target(self, row: Row) -> str:
    """Our parameter, or nothing."""
    return row.to if isinstance(row.to, str) else row.to.get(self.command, "")

  def _keep_macro(self, value: Any) -> Any:
    """A macro's value in its place where ours may not have it (None)."""
    if not isinstance(value, Macro) or value == REQUIRED:
      return value
    found = self.value(value, "")
    if found == REQUIRED or value.name not in macros.MACROS:
      return value
    plain = macros.REFERENCE if isinstance(found, Reference) else found
    return value if macros.MACROS[value.name].kind.holds(plain) else found

  # ---- Which run it is ----

  def _check_root(self) -> None:
    """Raises unless T5X's files say what this command shall do."""
    ours = [
      binding
      for binding in self._passed
      if binding.name in _OUR_FUNCTIONS and binding.parameter in _OUR_RUN
    ]
    if ours:
      raise UserError(
        f"{ours[0].where}: a run of fat5_jax's, among T5X's files: take run"
        " file and model file of one of them, such as"
        f" {_RUN_FILES[self.command]}"
      )
    bound = {name for name, _ in self._bound}
    if self.root in bound:
      return
    if "__main__.precompile" in bound:
      raise UserError(
        "T5X's precompile: python -m fat5_jax.plan compiles a training run for"
        " a chip that is not here"
      )
    add = f"--gin_file={_RUN_FILES[self.command]}"
    for command, function in _FUNCTIONS.items():
      if f"__main__.{function}" in bound:
        hint = ""
        if command == "train":
          hint = (
            "; or give --gin.MODEL_DIR=... without gin files: a run folder"
            " tells its task"
          )
        raise UserError(
          f"these T5X files are for python -m fat5_jax.{command}. For"
          f" fat5_jax.{self.command} give a model file and {add}{hint}"
        )
    raise UserError(f"these T5X files have no run: add a run file, {add}")

  def _check_macros(self) -> None:
    """Raises for a macro of the command line that nothing uses."""
    named = {*OWN_MACROS, "VOCAB_FILE", "EVAL_SPLIT"}
    for binding in self.files.bindings:
      parts = walk(binding.value)
      named |= {part.name for part in parts if isinstance(part, Macro)}
    unused = []
    for name, binding in self._macros.items():
      if name in named:
        continue
      if binding.where.startswith("--gin."):
        hint = nearest(name, named) or nearest(name.upper(), named)
        raise UserError(f"--gin.{name}: no file of this run uses {name}.{hint}")
      unused.append(name)
    if unused:
      self.note(f"set, and used by no file: {', '.join(unused)}")

  def _tell_unused(self) -> None:
    """Says what is bound and changes nothing, as in T5X: another binding with
    a scope goes first, or the run does not build it."""
    reached = {name for name, _ in self._visited}
    left = [
      binding
      for by_scope in self._bound.values()
      for binding in by_scope.values()
      if id(binding) not in self._counted
    ]
    flags = [b.where for b in left if b.where.startswith("--gin.")]
    unused = {
      f"{'.'.join(b.name.split('.')[-2:])}.{b.parameter}"
      for b in left
      if b.name not in reached and not b.where.startswith("--gin.")
    }
    if flags:
      self.note(
        f"{', '.join(flags)}: changes nothing in this run, as in T5X (a binding"
        " with a scope goes first, or nothing builds it)"
      )
    if unused:
      self.note(f"bound, and not used by this run: {', '.join(sorted(unused))}")

  def text(self) -> str:
    """What gin shall read."""
    self._check_root()
    self._check_macros()
    self._visit(self.root, "")
    # What someone's own configurables are built of may be T5X's.
    for binding in self._passed:
      for part in walk(self.value(binding.value, binding.where)):
        if isinstance(part, Reference):
          self._visit(part.name, part.scope or binding.scope)
    self._tell_unused()
    for name, scope in sorted(self._visited):
      if name in differences.OF_SCOPES:
        differences.OF_SCOPES[name](self, scope)
    for complete in differences.OF_RUNS[self.command]:
      complete(self)
    bindings = [
      (scope, target, value, target)
      for (scope, target), value in self.ours.items()
    ]
    bindings += [
      (b.scope, f"{b.name}.{b.parameter}", b.value, b.where)
      for b in self._passed
    ]
    for _, target, _, where in bindings[len(self.ours) :]:
      writing.check_name(target, self.files.modules, where)
    values = {name: binding.value for name, binding in self._macros.items()}
    text = writing.text(bindings, values, self.files.modules)
    for name, scope in sorted(self._visited):
      if name in differences.AT_LAST:
        differences.AT_LAST[name](self, scope)
    return text
