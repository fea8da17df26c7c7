"""A SentencePiece model out of a `tokenizer.json` that stands alone.

Newer Hugging Face folders have no `spiece.model`. What made it a Unigram model
is all in the JSON: pieces with scores, the compiled normaliser, how spaces are
written. A BPE model is there too, where convert/fast_tokenizer.py wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from typing import Any

import seqio

from fat5_jax.convert import plain_files, sentencepiece_file
from fat5_jax.errors import UserError


class OtherTokenizerError(UserError):
  """A tokenizer that is none of T5's; another may be set."""


_SENTINEL = re.compile(r"<extra_id_(\d+)>$")
# Texts on which the model must say what the JSON's own tokenizer says.
_PROBES = (
  "The quick brown fox jumps over the lazy dog.",
  "  two  spaces,\ttabs\nand lines ",
  "Ünïcödé: ﬁne — “quotes”, ½, Ⅷ, ａｂｃ; 日本語, русский, 😀!",
  "1,234.56 {a: [b]} <tag> C++ e-mail@x.org",
)


def vocabulary(path: str) -> seqio.SentencePieceVocabulary:
  """The vocabulary of a `tokenizer.json`.

  The SentencePiece model that it amounts to is kept in the folder for temporary
  files, under the hash of its content.

  Raises:
    OtherTokenizerError: if it is no Unigram tokenizer as T5's are.
    UserError: if it is damaged.
  """
  found = plain_files.read_json(path)
  try:
    content, extra_ids = _model(found, path)
    sentencepiece_file.check(content)
  except UserError:
    raise
  except Exception as e:
    # JSON of the wrong things in the wrong places.
    raise UserError(
      f"{path}: not a tokenizer as T5's are: {type(e).__name__} {str(e)[:200]}"
    ) from None
  name = f"fat5_jax-{hashlib.sha256(content).hexdigest()[:16]}.model"
  target = os.path.join(tempfile.gettempdir(), name)
  # Of that name there may be another's file.
  if not os.path.isfile(target) or plain_files.read_bytes(target) != content:
    plain_files.replace_with(target, content)
  result = seqio.SentencePieceVocabulary(target, extra_ids)
  try:
    _check(result, path, found.get("added_tokens") or ())
  except UserError:
    raise
  except BaseException as e:
    if isinstance(e, (KeyboardInterrupt, SystemExit)):
      raise
    # Of SentencePiece's, protobuf's and (no Exception) Rust's own types.
    raise UserError(
      f"{path}: SentencePiece or tokenizers does not load it: {str(e)[:200]}"
    ) from None
  return result


def _model(found: dict[str, Any], path: str) -> tuple[bytes, int]:
  """(a serialised SentencePiece model, how many sentinels come after it)."""
  from sentencepiece import sentencepiece_model_pb2 as spm

  model = found.get("model") or {}
  # Old files do not say the type; only Unigram has pieces in pairs.
  is_pairs = isinstance(model.get("vocab"), list)
  kind = model.get("type", "Unigram" if is_pairs else None)
  if kind not in ("Unigram", "BPE"):
    raise OtherTokenizerError(
      f"{path}: a tokenizer of type {str(kind)[:40]!r}; T5's are 'Unigram'."
      " Set VOCABULARY in gin"
    )
  is_bpe = kind == "BPE"
  pieces = _scored(model) if is_bpe else model["vocab"]
  unknown = model.get("unk_id")
  if is_bpe:
    unknown = model["vocab"].get(model.get("unk_token"))
  added = {token["content"]: token for token in found.get("added_tokens") or ()}
  for text, token in added.items():
    # SentencePiece finds its own pieces in what the normaliser gives.
    is_found = token.get("normalized") or token.get("special")
    is_piece = token["id"] < len(pieces) and is_found
    if text not in _SPECIAL and not _SENTINEL.match(text) and not is_piece:
      raise OtherTokenizerError(
        f"{path}: it adds the token {text!r}, which SentencePiece would not"
        " find in a text as it does. Set VOCABULARY in gin"
      )
  pieces = pieces + [
    [token["content"], 0.0]
    for token in sorted(added.values(), key=lambda token: token["id"])
    if token["id"] >= len(pieces)
  ]
  extra_ids = 0
  # T5's sentinels are the last ids, <extra_id_0> the very last.
  while pieces and _is_sentinel(pieces[-1][0], extra_ids):
    pieces, extra_ids = pieces[:-1], extra_ids + 1
  proto = spm.ModelProto()
  types = spm.ModelProto.SentencePiece
  ids = {}
  for number, (text, score) in enumerate(pieces):
    kind = types.NORMAL
    if number == unknown:
      kind = types.UNKNOWN
    elif text in added:
      kind = types.CONTROL if added[text]["special"] else types.USER_DEFINED
    elif model.get("byte_fallback") and re.match(r"<0x[0-9A-F]{2}>$", text):
      kind = types.BYTE
    proto.pieces.add(piece=text, score=score, type=kind)
    ids[text] = number
  trainer = proto.trainer_spec
  trainer.model_type = trainer.BPE if is_bpe else trainer.UNIGRAM
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = bool(model.get("byte_fallback"))
  trainer.unk_id = 2 if unknown is None else unknown
  trainer.pad_id, trainer.eos_id = ids.get("<pad>", -1), ids.get("</s>", -1)
  trainer.bos_id = ids.get("<s>", -1)
  trainer.pad_piece, trainer.eos_piece = "<pad>", "</s>"
  _set_normalizer(proto.normalizer_spec, found, path)
  return proto.SerializeToString(), extra_ids


def _scored(model: dict[str, Any]) -> list[list[Any]]:
  """BPE's pieces by number, each scored by when it is joined."""
  joined: dict[str, int] = {}
  for rank, pair in enumerate(model["merges"]):
    # Newer files have the two in a list.
    parts = pair.split(" ") if isinstance(pair, str) else pair
    joined.setdefault("".join(parts), rank)
  last = len(model["merges"])
  in_order = sorted(model["vocab"], key=model["vocab"].__getitem__)
  return [[text, -float(joined.get(text, last))] for text in in_order]


def _is_sentinel(text: str, number: int) -> bool:
  match = _SENTINEL.match(text)
  return bool(match) and int(match[1]) == number


def _parts(node: dict[str, Any] | None) -> list[dict[str, Any]]:
  """A normaliser or pre-tokenizer, a sequence of them taken apart."""
  if node is None:
    return []
  if node["type"] == "Sequence":
    inside = node.get("normalizers") or node.get("pretokenizers") or []
    return [part for item in inside for part in _parts(item)]
  return [node]


def _is_spaces(replace: dict[str, Any]) -> bool:
  """Whether a Replace takes runs of spaces for one."""
  pattern = replace.get("pattern", {}).get("Regex", "")
  if replace.get("content") in (" ", "▁") and pattern in (" {2,}", " +"):
    return True
  # Of fast_tokenizer.py: at the beginning, at the end.
  ends = (r"\A▁ *\z", r"\A *\z", r"\A▁ +", r"\A +", r" +\z")
  return replace.get("content") in ("", "▁") and pattern in ends


def _is_ours(replace: dict[str, Any]) -> bool:
  """Whether a Replace says what SentencePiece does without being told."""
  pattern, content = replace.get("pattern", {}), replace.get("content")
  if "String" in pattern:
    return (pattern["String"], content) in ((" ", "▁"), ("\r\n", "  "))
  regex = pattern.get("Regex", "")
  return content == "" and regex.startswith(r"\A▁(?=")


# What T5's tokenizers add to their pieces, beside the sentinels.
_SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")


def _set_normalizer(spec, found: dict[str, Any], path: str) -> None:
  spec.add_dummy_prefix = False
  spec.remove_extra_whitespaces = False
  spec.escape_whitespaces = True
  parts = _parts(found.get("normalizer")) + _parts(found.get("pre_tokenizer"))
  kinds = {part["type"] for part in parts}
  for part in parts:
    kind = part["type"]
    if kind in ("NFKC", "Lowercase") and "Precompiled" in kinds:
      # fast_tokenizer.py has them before the table, which has them too.
      continue
    if kind == "Precompiled":
      spec.name = "precompiled"
      if "NFKC" in kinds:
        # nmt_'s rules alone have ends of lines.
        nmt = any(p.get("pattern") == {"String": "\r\n"} for p in parts)
        ends = "_cf" if "Lowercase" in kinds else ""
        spec.name = f"{'nmt_' if nmt else ''}nfkc{ends}"
      charsmap = part["precompiled_charsmap"]
      spec.precompiled_charsmap = base64.b64decode(charsmap)
    elif kind in ("WhitespaceSplit", "Strip") or (
      kind == "Replace" and _is_spaces(part)
    ):
      # Each takes runs of spaces for one.
      spec.remove_extra_whitespaces = True
    elif kind == "Prepend" and part["prepend"] == "▁":
      spec.add_dummy_prefix = True
    elif kind == "Replace" and _is_ours(part):
      continue
    elif kind == "Metaspace":
      scheme = part.get("prepend_scheme", "always")
      spec.add_dummy_prefix = (
        scheme != "never" and part.get("add_prefix_space") is not False
      )
    else:
      raise OtherTokenizerError(
        f"{path}: its {kind} is none of T5's tokenizers'. Set VOCABULARY in gin"
      )


def _check(result: seqio.SentencePieceVocabulary, path: str, added) -> None:
  """Raises UserError unless the model says what the JSON's tokenizer says."""
  import tokenizers

  theirs = tokenizers.Tokenizer.from_file(path)
  own = [token["content"] for token in added if not token["special"]]
  for text in (*_PROBES, *(f"{text} a{text}b {text}c" for text in own)):
    ids = theirs.encode(text, add_special_tokens=False).ids
    if list(result.encode(text)) != ids:
      raise OtherTokenizerError(
        f"{path}: as a SentencePiece model it would read {text!r} otherwise"
        " than Hugging Face's tokenizer does. Copy the checkpoint's"
        " spiece.model there, or set VOCABULARY in gin"
      )
