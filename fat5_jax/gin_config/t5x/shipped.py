"""T5X's run and model files for people who no longer have them.

A user's own gin file includes them by T5X's names. The run files and one model
file a family lie in files/, in T5X's language and with T5X's values; a size is
the family's with the sizes of our own file of that name.
"""

from __future__ import annotations

import io
import os
import re

from fat5_jax.gin_config.t5x import ours
from gin import config_parser

_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "files")
_MODEL = re.compile(r"t5x/examples/t5/(t5_1_0|t5_1_1|mt5|byt5)/(\w+)\.gin$")
# The tiny one of T5X is smaller than ours.
_TINY = {
  "emb_dim": 8,
  "num_heads": 4,
  "num_encoder_layers": 2,
  "num_decoder_layers": 2,
  "head_dim": 3,
  "mlp_dim": 16,
}


def names() -> list[str]:
  """All names that `find` knows."""
  runs = [
    f"t5x/configs/runs/{name}"
    for name in sorted(os.listdir(os.path.join(_FOLDER, "runs")))
  ]
  models = [
    f"t5x/examples/t5/{family}/{size}.gin"
    for family in ("t5_1_0", "t5_1_1", "mt5", "byt5")
    for size in sorted({"tiny", "base", *_sizes(family)})
  ]
  return [*runs, *models]


def _sizes(family: str) -> dict[str, str]:
  """Size, as T5X names it, to our file."""
  found = {}
  for root in ours.GIN_ROOTS[:1]:
    folder = os.path.join(root, "models", family)
    for name in os.listdir(folder):
      size = name.removesuffix(".gin")
      # T5X writes 3B.gin, 11B.gin.
      size = size.upper() if size[0].isdigit() else size
      found[size] = os.path.join(folder, name)
  return found


def find(name: str) -> tuple[str, str] | None:
  """(a name for people, text) of what we ship for a file of T5X's, or None."""
  run = re.match(r"t5x/configs/runs/(\w+\.gin)$", name)
  if run:
    path = os.path.join(_FOLDER, "runs", run[1])
    return (name, _read(path)) if os.path.isfile(path) else None
  model = _MODEL.match(name)
  if model is None:
    return None
  family, size = model.groups()
  if size == "base":
    return name, _read(os.path.join(_FOLDER, "models", f"{family}.gin"))
  if size == "tiny":
    # As in T5X, whatever the family.
    return name, _size_text("t5_1_1", _TINY)
  ours = _sizes(family).get(size)
  return None if ours is None else (name, _size_text(family, _dims(ours)))


def _size_text(family: str, sizes: dict[str, int]) -> str:
  lines = [
    f"include 't5x/examples/t5/{family}/base.gin'",
    "network.Transformer.config = @network.T5Config()",
    "network.T5Config:",
    *(f"  {name} = {value!r}" for name, value in sizes.items()),
  ]
  return "\n".join(lines) + "\n"


def _read(path: str) -> str:
  with open(path, encoding="utf-8") as file:
    return file.read()


class _Values(config_parser.ParserDelegate):
  def configurable_reference(self, scoped_configurable_name, evaluate):
    return None

  def macro(self, macro_name):
    return None


def _dims(path: str) -> dict[str, int]:
  """The sizes that one of our model files binds itself."""
  text = io.StringIO(_read(path))
  return {
    statement.arg_name: statement.value
    for statement in config_parser.ConfigParser(text, _Values())
    if isinstance(statement, config_parser.BindingStatement)
    and statement.selector == "config.T5Config"
    and isinstance(statement.value, int)
    and not isinstance(statement.value, bool)
  }
