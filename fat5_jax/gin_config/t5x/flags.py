"""Flags of T5X's commands that people paste, and what each is here."""

from __future__ import annotations

from typing import NamedTuple

from fat5_jax.errors import UserError

# Flags without a value, and with one; why there is nothing to do.
_SWITCHES = {
  "alsologtostderr": "lines go to the terminal",
  "logtostderr": "lines go to the terminal",
  "multiprocess_gpu": "hosts are found by themselves, or by"
  " --coordinator_address",
}
_VALUES = {
  "verbosity": "lines are for people",
  "v": "lines are for people",
  "stderrthreshold": "lines go to the terminal",
  "log_dir": "lines go to the terminal",
}
# These mean something where a task of SeqIO's own reads.
_OF_SEQIO = ("tfds_data_dir", "seqio_additional_cache_dirs")
_REFUSED = {
  "fdl_config": "configurations of Fiddle are not read: give gin files",
  "fdl_config_file": "configurations of Fiddle are not read: give gin files",
}
_ELSEWHERE = {
  "precompile": "python -m fat5_jax.plan compiles for chips that are not here",
  "export": "tools/convert_checkpoint.py writes Hugging Face folders",
}


class Flags(NamedTuple):
  """What T5X's flags ask for: notes for people, and folders for SeqIO."""

  notes: list[str]
  tfds_data_dir: str | None
  cache_dirs: list[str]


def take(command: str, arguments: list[str]) -> tuple[list[str], Flags]:
  """(all other arguments, what T5X's flags say).

  Raises:
    UserError: for one that asks for something that is not here.
  """
  rest: list[str] = []
  notes: list[str] = []
  found: dict[str, str] = {}
  waiting = iter(arguments)
  for argument in waiting:
    flag, has_value, value = argument.partition("=")
    name = flag.lstrip("-") if flag.startswith("-") else ""
    switch = name.removeprefix("no")
    if name in _SWITCHES or switch in _SWITCHES:
      notes.append(f"{flag}: {_SWITCHES.get(name) or _SWITCHES[switch]}")
      continue
    takes_value = (*_VALUES, *_OF_SEQIO, *_REFUSED, "run_mode", "shard_id")
    if name not in takes_value:
      rest.append(argument)
      continue
    if not has_value:
      value = next(waiting, None)
      if value is None:
        raise UserError(f"{argument}: write {argument}=VALUE")
    if name in _REFUSED:
      raise UserError(f"{flag}: {_REFUSED[name]}")
    if name in _VALUES:
      notes.append(f"{flag}: {_VALUES[name]}")
    found[name] = value
  _check_mode(command, found.get("run_mode"))
  if "run_mode" in found:
    notes.append(f"--run_mode: this is fat5_jax.{command}")
  if found.get("shard_id", "0") != "0":
    raise UserError(
      f"--shard_id={found['shard_id']}: one command, run on every host,"
      " predicts all rows: leave it out"
    )
  for name in _OF_SEQIO:
    if name in found:
      notes.append(f"--{name}: for tasks of SeqIO's own; others read DATA_DIR")
  return rest, Flags(
    notes,
    found.get("tfds_data_dir"),
    [d for d in found.get("seqio_additional_cache_dirs", "").split(",") if d],
  )


def _check_mode(command: str, mode: str | None) -> None:
  if mode in (None, command):
    return
  if mode in _ELSEWHERE:
    raise UserError(f"--run_mode={mode}: {_ELSEWHERE[mode]}")
  if mode not in ("train", "eval", "infer"):
    raise UserError(f"--run_mode={mode}: train, eval or infer")
  raise UserError(
    f"--run_mode={mode}: the command is python -m fat5_jax.{mode}"
  )


def to_seqio(flags: Flags) -> None:
  """Tells SeqIO where T5X's flags say that data lies."""
  if not flags.tfds_data_dir and not flags.cache_dirs:
    return
  import seqio

  if flags.tfds_data_dir:
    seqio.set_tfds_data_dir_override(flags.tfds_data_dir)
  if flags.cache_dirs:
    seqio.add_global_cache_dirs(flags.cache_dirs)
