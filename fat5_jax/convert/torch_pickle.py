"""The pickle of a PyTorch archive, gone through by hand: tensors and no more.

A machine of the opcodes that torch writes. It builds numbers, texts, tuples,
lists, dictionaries by text, and three records of its own, which nothing in the
pickle can change. Whatever else it meets is an error; nothing is called.
"""

from __future__ import annotations

from collections.abc import Collection
import pickletools
from typing import Any

from fat5_jax.errors import UserError


class Storage:
  """A storage: its type in torch, its entry's key, how many numbers."""

  __slots__ = ("type_name", "key", "size")

  def __init__(self, type_name: str, key: str, size: Any):
    self.type_name, self.key, self.size = type_name, key, size


class Tensor:
  """A tensor as recorded, which may be any nonsense."""

  __slots__ = ("storage", "offset", "shape", "strides")

  def __init__(self, storage: Storage, offset, shape: tuple, strides: tuple):
    self.storage, self.offset = storage, offset
    self.shape, self.strides = shape, strides


class _Name:
  """A name that may stand in the pickle of tensors."""

  __slots__ = ("module", "name")

  def __init__(self, module: str, name: str):
    self.module, self.name = module, name


_MARK = object()
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_TABLE = ("collections", "OrderedDict")
# Opcodes that push what they hold.
_VALUES = {
  *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"),
  *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
  *("BINFLOAT", "FLOAT"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(data: bytes, storage_types: Collection[str]) -> dict[str, Tensor]:
  """The tensors that a pickle names.

  Args:
    data: the pickle.
    storage_types: names of the storages that `torch` may be asked for.

  Raises:
    UserError: if it is damaged, or holds anything else.
  """
  try:
    found = _Machine(storage_types).run(data)
  except UserError:
    raise
  except Exception as e:
    # pickletools has several types of error for what is no pickle.
    raise UserError(f"damaged pickle: {str(e)[:200] or repr(e)}") from None
  if type(found) is not dict or not all(
    type(x) is Tensor for x in found.values()
  ):
    raise UserError("holds more than a table of tensors")
  return found


class _Machine:
  def __init__(self, storage_types: Collection[str]):
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._size = 0
    self._allowed = {("torch", name) for name in storage_types}
    self._allowed |= {_TENSOR, _PARAMETER, _TABLE}

  def run(self, data: bytes) -> Any:
    self._size = len(data)
    for opcode, argument, _ in pickletools.genops(data):
      if opcode.name == "STOP":
        return self._pop()
      self._step(opcode.name, argument)
    raise UserError("the pickle has no end")

  def _step(self, opcode: str, argument: Any) -> None:
    push = self._stack.append
    if opcode in _VALUES:
      push(argument)
    elif opcode in _CONSTANTS:
      push(_CONSTANTS[opcode])
    elif opcode in _TUPLES:
      push(tuple(reversed([self._pop() for _ in range(_TUPLES[opcode])])))
    elif opcode == "MARK":
      push(_MARK)
    elif opcode == "TUPLE":
      push(tuple(self._from_mark()))
    elif opcode == "EMPTY_LIST":
      push([])
    elif opcode == "EMPTY_DICT":
      push({})
    elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
      if argument >= self._size:
        raise UserError("damaged pickle: more memoized than there is")
      self._memo[argument] = self._top()
    elif opcode == "MEMOIZE":
      self._memo[len(self._memo)] = self._top()
    elif opcode in ("BINGET", "LONG_BINGET", "GET"):
      push(self._memo[argument])
    elif opcode in ("SETITEM", "SETITEMS"):
      items = self._from_mark() if opcode == "SETITEMS" else self._last_two()
      _fill(self._top(), items)
    elif opcode in ("APPEND", "APPENDS"):
      items = self._from_mark() if opcode == "APPENDS" else [self._pop()]
      if type(self._top()) is not list:
        raise UserError("damaged pickle: no list to append to")
      self._top().extend(items)
    elif opcode == "GLOBAL":
      push(self._name(*argument.split(" ", 1)))
    elif opcode == "STACK_GLOBAL":
      push(self._name(*self._last_two()))
    elif opcode == "BINPERSID":
      push(_storage(self._pop()))
    elif opcode == "REDUCE":
      push(_rebuilt(*self._last_two()))
    elif opcode == "BUILD":
      # Attributes of the table, such as torch's _metadata, tell no tensor.
      self._pop()
      if type(self._top()) is not dict:
        raise UserError("the pickle changes more than a table")
    elif opcode not in ("PROTO", "FRAME"):
      raise UserError(f"the pickle has {opcode}, which torch does not write")

  def _pop(self) -> Any:
    value = self._stack.pop()
    if value is _MARK:
      raise UserError("damaged pickle: nothing before the mark")
    return value

  def _top(self) -> Any:
    if self._stack[-1] is _MARK:
      raise UserError("damaged pickle: nothing before the mark")
    return self._stack[-1]

  def _last_two(self) -> list[Any]:
    last = self._pop()
    return [self._pop(), last]

  def _from_mark(self) -> list[Any]:
    items = []
    while (value := self._stack.pop()) is not _MARK:
      items.append(value)
    return items[::-1]

  def _name(self, module: Any, name: Any) -> _Name:
    if type(module) is not str or type(name) is not str:
      raise UserError("damaged pickle: a name is no text")
    if (module, name) not in self._allowed:
      raise UserError(
        f"the pickle asks for {module[:80]}.{name[:80]}, which is not a tensor;"
        " nothing was run. Convert the checkpoint to safetensors where you"
        " trust it"
      )
    return _Name(module, name)


def _fill(table: Any, items: list[Any]) -> None:
  """Sets items; keys are texts, whose hash costs what they are long."""
  keys, values = items[::2], items[1::2]
  if type(table) is not dict or len(keys) != len(values):
    raise UserError("damaged pickle: no table to fill")
  for key, value in zip(keys, values):
    if type(key) is not str:
      raise UserError("holds more than a table of tensors by name")
    if key in table:
      raise UserError(f"tensor {key[:80]!r} is there twice")
    table[key] = value


def _storage(pid: Any) -> Storage:
  if type(pid) is not tuple or len(pid) != 5:
    raise UserError("damaged pickle: a storage record has five parts")
  kind, storage_type, key, _, size = pid
  if (
    kind != "storage"
    or type(storage_type) is not _Name
    or storage_type.module != "torch"
    or type(key) is not str
  ):
    raise UserError("unknown record in the pickle")
  return Storage(storage_type.name, key, size)


def _rebuilt(function: Any, arguments: Any) -> Any:
  """What torch's function makes of its arguments, as a record."""
  if type(function) is not _Name or type(arguments) is not tuple:
    raise UserError("damaged pickle: no function to call")
  name = (function.module, function.name)
  if name == _TABLE and not arguments:
    return {}
  if name == _TENSOR and len(arguments) >= 4:
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is Storage and type(shape) is type(strides) is tuple:
      return Tensor(storage, offset, shape, strides)
  if name == _PARAMETER and arguments and type(arguments[0]) is Tensor:
    return arguments[0]
  raise UserError(f"damaged pickle: {function.name} of something else")
