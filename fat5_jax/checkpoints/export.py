"""A checkpoint of one library as a folder of another's, checked.

tools/convert_checkpoint.py and Python's `Model.export` are doors to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import re
from typing import Any

from fat5_jax import console, fetched, hub, storage
from fat5_jax.checkpoints import (
  export_checks,
  history,
  optimizer_state,
  reference,
  run_record,
  writer,
)
from fat5_jax.checkpoints.vocabulary import vocabulary_of
from fat5_jax.convert import (
  enct5,
  flash_t5,
  folders,
  formats,
  hf,
  lora,
  model_card,
  peft,
  plain_files,
  table,
  tokenizers,
)
from fat5_jax.errors import UserError
from fat5_jax.models.config import HeadConfig

FORMATS = ("fat5", "hf", "flash_t5", "enct5", "peft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
  """What is written, and how it is looked at.

  Attributes:
    to: one of FORMATS; None is fat5, and hf for a fat5_jax run.
    encoder_only: leaves the decoder out, unread.
    tokenizer: a folder with tokenizer files, or a SentencePiece model; None is
      the source's own.
    base: the model that a PEFT adapter belongs to; None is what it names.
    overrides: fields of T5Config that a checkpoint does not tell.
    optimizer: takes step and slots of a T5X or Mesh TensorFlow one along.
    check_transformers: loads the export in transformers, where torch is.
    say: tells a person what is done.
  """

  to: str | None = None
  encoder_only: bool = False
  tokenizer: str | None = None
  base: str | None = None
  overrides: tuple[tuple[str, Any], ...] = ()
  optimizer: bool = False
  check_transformers: bool = True
  say: Callable[[str], None] = print


def export(path: str, dest: str, how: Export = Export()) -> None:
  """Writes the checkpoint at `path` to the folder `dest`, or nothing.

  It is written beside `dest`, read again and compared there, tensor by tensor
  and on a few tokens, and only then takes its place.

  Raises:
    UserError: for a checkpoint that is damaged or that the format cannot hold,
      for a folder that may not be replaced, and if anything differs.
  """
  source = reference.find(path)
  base = fetched.local(how.base) if how.base else source.base
  source = dataclasses.replace(source, overrides=how.overrides, base=base)
  to = how.to or ("hf" if source.kind == "fat5" else "fat5")
  dest = storage.absolute(dest)
  if _same_folder(source.run_dir, dest):
    raise UserError(f"{dest}: source and destination are the same folder")
  if f"{_real(source.path)}{os.sep}".startswith(f"{_real(dest)}{os.sep}"):
    raise UserError(
      f"{dest}: the source is inside of it, and would be replaced with it;"
      " choose another destination"
    )
  own_head = reference.own_head_record(source)
  if own_head is not None:
    raise UserError(
      f"{source.run_dir}: its head is a module of your own"
      f" ({own_head['module']}), which no other library has and whose logits"
      " cannot be checked here. It stays a run of fat5_jax"
    )
  config, leaves = reference.open_params(source, how.encoder_only)
  leaves = table.finite(leaves, source.path)
  if how.encoder_only and config.is_language_model:
    config = config.with_head(HeadConfig("embedding"))
  size = sum(map(export_checks.count, leaves.values()))
  how.say(
    f"{source.path}: {formats.NAMES[source.kind]}, {_describe(config)},"
    f" {size:,} parameters, vocabulary"
    f" {config.vocab_size}, {next(iter(leaves.values())).dtype}"
  )
  if how.optimizer and (to != "fat5" or source.kind not in ("t5x", "mesh_tf")):
    raise UserError("--optimizer is for T5X and Mesh TensorFlow, --to fat5")
  if to == "fat5" and history.steps(dest):
    raise UserError(f"{dest}: holds checkpoints already")
  if config.lora is not None and to not in ("fat5", "peft"):
    how.say("LoRA is merged into the kernels")
    config, leaves = lora.merged(config, leaves)
  marks = {"marks": ()} if to == "fat5" else {}
  with folders.whole_folder(dest, **marks) as target:
    with _told_of(leaves) as counted:
      _write(source, config, counted, target, to, how)
    said = [export_checks.compared(config, leaves, target, to)]
    if to in ("hf", "enct5") and how.check_transformers:
      said.append(export_checks.in_transformers(config, leaves, target))
  how.say(f"{dest}: written as {formats.NAMES.get(to, to)}")
  for line in filter(None, said):
    how.say(line)


@contextlib.contextmanager
def _told_of(leaves: table.Leaves) -> Iterator[table.Leaves]:
  """The tensors to write, while a line tells how many bytes were read."""
  total = sum(leaf.nbytes for leaf in leaves.values()) / 2**20
  with console.Count("writing", "MiB", total) as count:
    yield {
      path: dataclasses.replace(
        leaf,
        read=_counting(leaf.read, count),
        read_part=leaf.read_part and _counting(leaf.read_part, count),
      )
      for path, leaf in leaves.items()
    }


def _counting(
  read: Callable[..., Any], count: console.Count
) -> Callable[..., Any]:
  def counted(*index):
    found = read(*index)
    count.add(found.nbytes / 2**20)
    return found

  return counted


def _real(path: str) -> str:
  """A path that all links are followed in; an address is itself."""
  path = fetched.address_of(path) if not storage.is_remote(path) else path
  return path if storage.is_remote(path) else os.path.realpath(path)


def _same_folder(first: str, second: str) -> bool:
  if storage.is_remote(_real(first)) or storage.is_remote(second):
    return _real(first) == second
  return os.path.exists(second) and os.path.samefile(first, second)


def _write(source, config, leaves, dest, to, how) -> None:
  if to == "fat5":
    _to_fat5(source, config, leaves, dest, how)
    return
  facts = {}
  if source.kind == "fat5":
    facts = model_card.facts_of_run(source.run_dir)
  tokenizer = how.tokenizer or _tokenizer(source, config, how)
  if to == "peft":
    peft.to_peft(config, leaves, dest, _base_of(source), facts, tokenizer)
    return
  write = {
    "hf": hf.to_pretrained,
    "flash_t5": flash_t5.to_folder,
    "enct5": enct5.to_folder,
  }[to]
  write(config, leaves, dest, tokenizer, facts=facts)


def _describe(config) -> str:
  text = (
    f"{config.model_type}, {config.num_encoder_layers}"
    f"+{config.num_decoder_layers} layers"
  )
  if config.head is not None:
    text += f", head {config.head.kind}"
    if config.head.kind not in ("embedding", "question_answering"):
      text += f" ({config.head.num_labels} labels)"
  if config.lora is not None:
    text += (
      f", LoRA rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    )
  return text


def _to_fat5(source, config, leaves, dest, how) -> None:
  vocabulary = None
  if source.kind == "fat5" or _has_tokenizer(source.run_dir):
    vocabulary = _vocabulary(source, config, how)
  step, opt_state = 0, None
  if how.optimizer:
    step, opt_state = optimizer_state.adafactor_state(source, config)
  writer.write_params(dest, config, leaves, vocabulary, step, opt_state)


def _base_of(source) -> str:
  """Where the run that trained an adapter started: as gin, or Python, said."""
  path = os.path.join(source.run_dir, "config.gin")
  if storage.exists(path):
    found = re.search(
      r"INITIAL_CHECKPOINT_PATH(?:/macro\.value)? = \\?\s*'([^']+)'",
      plain_files.read_text(path),
    )
    if found:
      # A folder is found again from anywhere; a name stays one. PEFT knows a
      # model of the hub by its name.
      if hub.is_there(found[1]):
        return hub.name(found[1])
      path = os.path.abspath(os.path.expanduser(found[1]))
      return path if os.path.isdir(path) else found[1]
  record = run_record.read_or_none(source.run_dir) or {}
  return hub.name(record.get("base") or "")


def _has_tokenizer(folder: str) -> bool:
  return any(os.path.lexists(os.path.join(folder, f)) for f in tokenizers.FILES)


def _vocabulary(source, config, how):
  with console.without_native_lines():  # Only here: it brings TensorFlow.
    from fat5_jax.data import vocabularies

  try:
    found = vocabulary_of(source.path)
  except vocabularies.OtherTokenizerError as e:
    how.say(f"note: no vocabulary taken along: {e}")
    return None
  if found.vocab_size > config.vocab_size:
    # infer and train refuse the ids that have no row.
    how.say(
      f"note: the tokenizer has {found.vocab_size} tokens, and the model's"
      f" embedding {config.vocab_size} rows; is it the model's?"
    )
  return found


def _tokenizer(source, config, how):
  """What the export's tokenizer is written from, or None."""
  if source.kind == "fat5":
    return _vocabulary(source, config, how)
  return source.run_dir if _has_tokenizer(source.run_dir) else None
