"""What T5X's files name in T5X's own bucket: found here, or how to get it.

Other addresses are read where they lie, as in files of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
import os
import re

from fat5_jax import fetched
from fat5_jax.convert import sentencepiece_file
from fat5_jax.errors import UserError

_VOCABULARY = re.compile(r"gs://t5-data/vocabs/([\w.]+)/sentencepiece\.model$")
_CHECKPOINT = re.compile(
  r"gs://t5-data/pretrained_models/(?:t5x/)?(?P<name>[\w.]+)/?(?P<rest>.*)$"
)
# Pieces without sentinels, by the beginning of a name.
_PIECES = {
  "cc_all.32000": 32000,
  "cc_en.32000": 32000,
  "mc4.250000": 250000,
  "umt5.256000": 256000,
}
# The same weights, and the same vocabulary, on the Hugging Face hub.
_ON_THE_HUB = (
  (
    r"(flan_)?t5_(?:1_1_|v1_1_)?(lm100k_)?(small|base|large|xl|xxl|3b|11b)"
    r"(_lm100k)?.*",
    None,
  ),
  (r"mt5_(small|base|large|xl|xxl).*", "google/mt5-{}"),
  (r"byt5_(small|base|large|xl|xxl).*", "google/byt5-{}"),
  (r"umt5_(small|base|xl|xxl).*", "google/umt5-{}"),
)


def is_there(path: str) -> bool:
  return path.startswith("gs://t5-data/")


def _hub_name(name: str) -> str | None:
  name = name.lower()
  for pattern, hub in _ON_THE_HUB:
    match = re.fullmatch(pattern, name)
    if match and hub:
      return hub.format(match[1])
    if match:
      flan, before, size, after = match.groups()
      if flan:
        return f"google/flan-t5-{size}"
      if before or after:
        return f"google/t5-{size}-lm-adapt"
      kind = "google/t5-v1_1-" if "1_1" in name else "google-t5/t5-"
      return kind + size
  return None


def explain_checkpoint(path: str, macro: str, where: str) -> str:
  """How to get a checkpoint that lies on Google Cloud, in a line."""
  folder = path.rstrip("/").rsplit("/", 1)[-1]
  text = (
    f"{where}: {path} lies in T5X's bucket, which is not read from here. Get it"
    f" with `gcloud storage cp -r {path.rstrip('/')} .` and give"
    f" --gin.{macro}={folder}"
  )
  match = _CHECKPOINT.match(path)
  hub = _hub_name(match["name"]) if match else None
  if hub is not None:
    text += f"; or take the same weights, --gin.{macro}=hf://{hub}"
    if macro == "INITIAL_CHECKPOINT_PATH":
      text += (
        ", which counts no steps: set --gin.TRAIN_STEPS_RELATIVE to those that"
        " you want"
      )
  return text


def _extra_pieces(path: str) -> tuple[int, int]:
  """(pieces without sentinels, sentinels) of a SentencePiece model."""
  data = sentencepiece_file.read(path)
  texts = [
    sentencepiece_file._piece(value)[0]
    for field, value in sentencepiece_file._fields(data)
    if field == sentencepiece_file._PIECES
  ]
  extra = sum(b"<extra_id_" in text for text in texts)
  return len(texts) - extra, extra


def vocabulary(
  path: str,
  extra_ids: int,
  vocab_file: str | None,
  folders: Iterable[str],
  where: str,
) -> tuple[str, int, str]:
  """(file, extra_ids, a line for people or "") of what T5X's file names.

  A file of T5X's own that is called 100extra holds its sentinels as pieces;
  Hugging Face's spiece.model of the same vocabulary does not. Either way the
  vocabulary has those of the name and the extra_ids that are asked for.

  Args:
    path: as T5X's file has it.
    extra_ids: bound beside it.
    vocab_file: VOCAB_FILE, which goes first.
    folders: where a file of that name is looked for.
    where: for people.

  Raises:
    UserError: where there is none, or one of another size.
  """
  match = _VOCABULARY.match(path)
  if match is None and vocab_file is None:
    if is_there(path):
      raise UserError(
        f"{where}: {path} lies in T5X's bucket, which is not read from here:"
        " --gin.VOCAB_FILE=its copy"
      )
    return path, extra_ids, ""
  if match is None:
    return vocab_file, extra_ids, f"{path} is VOCAB_FILE {vocab_file}"
  name = match[1]
  stem = re.sub(r"\.\d+extra$", "", name)
  tail = re.search(r"\.(\d+)extra$", name)
  wanted = extra_ids + (int(tail[1]) if tail else 0)
  found = fetched.local(vocab_file) if vocab_file else None
  found = found or _beside(name, stem, folders)
  if found is None:
    raise UserError(
      f"{where}: {path} lies in T5X's bucket, which is not read from here. Get"
      f" it with `gcloud storage cp {path} .`, or take the spiece.model of a"
      " Hugging Face folder of that family, and give --gin.VOCAB_FILE=it"
      " (hf://google/t5-v1_1-base/spiece.model, say); or put it into DATA_DIR,"
      f" beside the gin file or here as {name}/sentencepiece.model"
    )
  if not os.path.isfile(found):
    raise UserError(f"VOCAB_FILE {found}: no such file")
  pieces, extra = _extra_pieces(found)
  added = max(wanted - extra, 0)
  told = f"{path} is {vocab_file or found}, with extra_ids = {added}"
  if _PIECES.get(stem, pieces) != pieces:
    told += (
      f"; another vocabulary: it has {pieces:,} pieces, that of the name"
      f" {_PIECES[stem]:,}"
    )
  return found, added, told


def _beside(name: str, stem: str, folders: Iterable[str]) -> str | None:
  for folder in folders:
    for tail in (
      *(f"vocabs/{name}/sentencepiece.model", f"{name}/sentencepiece.model"),
      *(f"t5-data/vocabs/{name}/sentencepiece.model", f"{name}.model"),
    ):
      path = os.path.join(folder, tail)
      if os.path.isfile(path):
        return path
    for plain in ("sentencepiece.model", "spiece.model"):
      path = os.path.join(folder, plain)
      # The name says no more than that; its size says which.
      if os.path.isfile(path) and _extra_pieces(path)[0] == _PIECES.get(stem):
        return path
  return None
