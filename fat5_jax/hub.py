"""`hf://org/name[@revision][/file]`: the Hugging Face hub, fetched when asked.

A model's safetensors and tokenizer files, a data set's files; no pickles and no
code. What was fetched once is found without a network (HF_HUB_OFFLINE=1 asks
for none), in the hub's own cache. HF_ENDPOINT names another server.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import time
from typing import NamedTuple

from fat5_jax import storage
from fat5_jax.errors import UserError

_ADDRESS = re.compile(
  r"hf://(?P<data>datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
  r"(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?$"
)
# Of a model; the first line is its weights, the last its tokenizer.
_MODEL_FILES = (
  *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
  *("adapter_model.safetensors", "adapter_config.json", "config.json"),
  *("spiece.model", "tokenizer.json", "tokenizer_config.json"),
  *("special_tokens_map.json", "added_tokens.json"),
)
_DATA_FILES = tuple(
  f"*.{kind}{packed}"
  for kind in ("csv", "tsv", "json", "jsonl", "parquet", "txt", "arrow")
  for packed in ("", ".gz", ".xz", ".bz2")
)


class _Place(NamedTuple):
  """A part of the hub; `file` is a pattern within it, or None for all."""

  repo: str
  kind: str
  revision: str | None
  file: str | None


def is_there(path: str) -> bool:
  return storage.is_remote(path) and storage.scheme(path) == "hf"


def _parse(address: str) -> _Place:
  match = _ADDRESS.match(address)
  if match is None:
    raise UserError(
      f"{address}: no address of the hub; hf://org/name, hf://org/name@revision"
      " or hf://datasets/org/name/file are"
    )
  kind = "dataset" if match["data"] else "model"
  return _Place(match["repo"], kind, match["revision"], match["file"])


def name(path: str) -> str:
  """The name that other programs know a model of the hub by; any other path is
  itself.
  """
  return _parse(path).repo if is_there(path) else path


def snapshot(address: str) -> str:
  """The folder of a model or a data set on this machine, or one of its files.

  Raises:
    UserError: if it is not on the hub, may not be read, or cannot be reached
      and was never fetched.
  """
  place = _parse(address)
  folder = _fetched(place)
  if place.file is not None:
    path = os.path.join(folder, place.file)
    if not os.path.exists(path):
      raise UserError(f"{address}: {place.repo} has no such file")
    return path
  if place.kind == "model" and not any(
    name.endswith(".safetensors") for name in os.listdir(folder)
  ):
    raise UserError(
      f"{address}: no safetensors there, and pickles are not fetched. Where it"
      " has pytorch_model.bin: get it with `hf download`, and give the folder"
    )
  return folder


def matching(pattern: str) -> dict[str, str]:
  """(address: file on this machine) of a data set's files, sorted."""
  place = _parse(pattern)
  if place.file is None:
    raise UserError(f"{pattern}: name files in it, such as {pattern}/*.parquet")
  folder = _fetched(place)
  begin = pattern[: -len(place.file)]
  found = {
    begin + name: os.path.join(folder, name)
    for name in _names(folder)
    if fnmatch.fnmatch(name, place.file)
  }
  if not found:
    raise UserError(f"{pattern}: {place.repo} has no such file")
  return found


def pinned(address: str) -> str:
  """An address with the commit that it means now."""
  place = _parse(address)
  folder = _fetched(place)
  commit = os.path.basename(folder)
  data = "datasets/" if place.kind == "dataset" else ""
  file = f"/{place.file}" if place.file else ""
  return f"hf://{data}{place.repo}@{commit}{file}"


@functools.cache
def _fetched(place: _Place) -> str:
  """The folder of the commit, with what is wanted of it."""
  import huggingface_hub
  from huggingface_hub import constants, errors

  address = f"hf://{'datasets/' * (place.kind == 'dataset')}{place.repo}"

  if place.file is not None:
    wanted: tuple[str, ...] = (place.file,)
  else:
    wanted = _MODEL_FILES if place.kind == "model" else _DATA_FILES
  is_offline = constants.HF_HUB_OFFLINE
  begin, pause = time.monotonic(), 1.0
  while True:
    try:
      return huggingface_hub.snapshot_download(
        place.repo,
        repo_type=place.kind,
        revision=place.revision,
        allow_patterns=list(wanted),
        # A model's folders hold the same weights for other programs.
        ignore_patterns=["*/*"] if place.kind == "model" else None,
      )
    except errors.RevisionNotFoundError:
      raise UserError(
        f"{address}: {place.repo} has no revision {place.revision!r}"
      ) from None
    except errors.GatedRepoError:
      raise UserError(
        f"{address}: its authors give access on request: ask for it on its"
        " page, then `hf auth login` or HF_TOKEN"
      ) from None
    except errors.RepositoryNotFoundError:
      raise UserError(
        f"{address}: not on the hub, or private: then `hf auth login` or"
        " HF_TOKEN"
      ) from None
    except errors.HFValidationError as e:
      raise UserError(f"{address}: {str(e)[:200]}") from None
    except OSError as e:
      # HTTP's errors, and what is not in the cache, are such too.
      text = " ".join(str(e.__cause__ or e).split())[:200]
      status = getattr(getattr(e, "response", None), "status_code", None)
      if status in (401, 403):
        raise UserError(
          f"{address}: no access ({status}): `hf auth login`, or HF_TOKEN"
        ) from None
      if is_offline:
        raise UserError(
          f"{address}: not in the hub's cache on this machine, and"
          " HF_HUB_OFFLINE allows no fetching"
        ) from None
      tried = time.monotonic() - begin
      if tried > storage.PATIENCE_SECONDS:
        raise UserError(
          f"{address}: the hub was not reached for {tried:.0f} s: {text}"
        ) from None
    storage.tell_trying("the Hugging Face hub")
    time.sleep(pause)
    pause = min(2 * pause, 16)


def _names(folder: str) -> list[str]:
  return sorted(
    os.path.relpath(os.path.join(here, name), folder).replace(os.sep, "/")
    for here, _, names in os.walk(folder)
    for name in names
  )
