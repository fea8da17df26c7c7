"""A `tokenizer.json` that reads texts as a SentencePiece model does.

transformers 5 reads every `spiece.model` of a T5 as Unigram without bytes for
unknown characters, and versions before it nearly so. Models that are otherwise
(BPE, byte fallback, pieces of the user's own, other normalisers) are written as
what Hugging Face's tokenizers library makes of them.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from fat5_jax.errors import UserError

_SPACE = "▁"  # SentencePiece's sign for it.
# Texts on which both must agree, beside the model's own pieces.
_PROBES = (
  "The quick brown fox jumps over the lazy dog.",
  "  two  spaces,\ttabs\nand lines ",
  "Ünïcödé: ﬁne — “quotes”, ½, Ⅷ, ａｂｃ; 日本語, русский, 😀!",
  "1,234.56 {a: [b]} <tag> C++ e-mail@x.org if x==1:return",
  "zzzzqqqqxxxx aaaaaaaaaa --------------------- ........",
)


def is_needed(content: bytes) -> bool:
  """Whether transformers' T5Tokenizer would read texts otherwise."""
  model = _parse(content)
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  is_t5_s = (
    trainer.model_type == trainer.UNIGRAM
    and not trainer.treat_whitespace_as_suffix
    and normalizer.precompiled_charsmap
    and normalizer.add_dummy_prefix
    and normalizer.remove_extra_whitespaces
  )
  kinds = model.SentencePiece
  own = (kinds.BYTE, kinds.USER_DEFINED)
  # T5Tokenizer cuts at spaces before anything else.
  return not is_t5_s or any(
    piece.type in own or _SPACE in piece.piece[1:] for piece in model.pieces
  )


def to_json(content: bytes, extra_ids: int) -> bytes:
  """The `tokenizer.json` of a SentencePiece model.

  Args:
    content: the serialised model.
    extra_ids: how many sentinels follow its pieces, `<extra_id_0>` the last.

  Raises:
    UserError: if tokenizers would read a text otherwise than SentencePiece.
  """
  model = _parse(content)
  if model.trainer_spec.model_type not in (
    model.trainer_spec.UNIGRAM,
    model.trainer_spec.BPE,
  ):
    raise UserError(
      "Hugging Face's tokenizers have neither 'word' nor 'char' models; train a"
      " unigram or bpe vocabulary"
    )
  count = len(model.pieces)
  sentinels = {f"<extra_id_{i}>": extra_ids - 1 - i for i in range(extra_ids)}
  special = model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN
  added = [
    _added(number, piece.piece, is_special=piece.type in special)
    for number, piece in enumerate(model.pieces)
    if piece.type in (*special, model.SentencePiece.USER_DEFINED)
  ]
  for text, place in sorted(sentinels.items(), key=lambda item: item[1]):
    added.append(_added(count + place, text, is_special=True))
  found = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
    "pre_tokenizer": None,
    "post_processor": _ends(model),
    "decoder": {"type": "Sequence", "decoders": _decoders(model)},
    "model": _model(model),
  }
  written = json.dumps(found, ensure_ascii=False).encode()
  _check(written, content)
  return written


def _parse(content: bytes) -> Any:
  from sentencepiece import sentencepiece_model_pb2 as spm

  return spm.ModelProto.FromString(content)


def _added(number: int, text: str, is_special: bool) -> dict[str, Any]:
  """A token that is looked for before all others.

  Special ones in the text as it is; the user's own in what the normaliser makes
  of it, so that the space before one is kept.
  """
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
  named = {"id": number, "content": text}
  return named | flags | {"normalized": not is_special, "special": is_special}


def _own(model: Any) -> list[str]:
  kind = model.SentencePiece.USER_DEFINED
  return [piece.piece for piece in model.pieces if piece.type == kind]


def _replace(content: str, **pattern: str) -> dict[str, Any]:
  return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizers(model: Any) -> list[dict[str, Any]]:
  spec = model.normalizer_spec
  result = []
  if spec.precompiled_charsmap:
    table = base64.b64encode(spec.precompiled_charsmap).decode()
    result.append({"type": "Precompiled", "precompiled_charsmap": table})
  if spec.remove_extra_whitespaces:
    result.append(_replace("", Regex=r"\A +| +\z"))
    result.append(_replace(" ", Regex=" {2,}"))
  result.append(_replace(_SPACE, String=" "))
  if spec.add_dummy_prefix:
    result.append({"type": "Prepend", "prepend": _SPACE})
    if own := _own(model):
      # tokenizers normalises these tokens too, and looks for the result.
      any_of = "|".join(re.escape(text) for text in own)
      result.append(_replace("", Regex=rf"\A{_SPACE}(?=(?:{any_of})\z)"))
  return result


def _ends(model: Any) -> dict[str, Any]:
  """`A </s>`, and `A </s> B </s>` of a pair."""
  text = model.trainer_spec.eos_piece
  numbers = [i for i, p in enumerate(model.pieces) if p.piece == text]
  end = {"SpecialToken": {"id": text, "type_id": 0}}

  def part(name):
    return {"Sequence": {"id": name, "type_id": 0}}

  return {
    "type": "TemplateProcessing",
    "single": [part("A"), end],
    "pair": [part("A"), end, part("B"), end],
    "special_tokens": {text: {"id": text, "ids": numbers, "tokens": [text]}},
  }


def _decoders(model: Any) -> list[dict[str, Any]]:
  result = [_replace(" ", String=_SPACE)]
  if model.trainer_spec.byte_fallback:
    result.append({"type": "ByteFallback"})
  result.append({"type": "Fuse"})
  if model.normalizer_spec.add_dummy_prefix:
    result.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  return result


def _model(model: Any) -> dict[str, Any]:
  pieces, kinds = model.pieces, model.SentencePiece
  (unknown,) = (i for i, p in enumerate(pieces) if p.type == kinds.UNKNOWN)
  has_bytes = model.trainer_spec.byte_fallback
  if model.trainer_spec.model_type == model.trainer_spec.BPE:
    return {
      "type": "BPE",
      "dropout": None,
      "unk_token": pieces[unknown].piece,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": has_bytes,
      "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
      "merges": _merges(model),
    }
  normal = [piece.score for piece in pieces if piece.type == kinds.NORMAL]
  # A byte's piece is found by its number, never by its text.
  scores = {kinds.NORMAL: None, kinds.BYTE: min(normal)}
  vocab = []
  for piece in pieces:
    score = scores.get(piece.type, 0.0)
    vocab.append([piece.piece, piece.score if score is None else score])
  return {
    "type": "Unigram",
    "unk_id": unknown,
    "vocab": vocab,
    "byte_fallback": has_bytes,
  }


def _merges(model: Any) -> list[str]:
  """Pairs of pieces, the ones that SentencePiece joins first first."""
  scores = {
    piece.piece: piece.score
    for piece in model.pieces
    if piece.type == model.SentencePiece.NORMAL
  }
  result = []
  for text in sorted(scores, key=scores.__getitem__, reverse=True):
    for cut in range(1, len(text)):
      left, right = text[:cut], text[cut:]
      if left in scores and right in scores:
        result.append(f"{left} {right}")
  return result


def _check(written: bytes, content: bytes) -> None:
  """Raises UserError unless tokenizers reads texts as SentencePiece does."""
  import sentencepiece
  import tokenizers

  theirs = tokenizers.Tokenizer.from_str(written.decode())
  processor = sentencepiece.SentencePieceProcessor(model_proto=content)
  model = _parse(content)
  normal = [
    piece.piece.replace(_SPACE, " ")
    for piece in model.pieces
    if piece.type == model.SentencePiece.NORMAL
  ]
  parts = [normal[i : i + 20] for i in range(0, len(normal), 20)][:1000]
  texts = [*_PROBES, *map(" ".join, parts)]
  texts += [f"{own} {_PROBES[0]}{own}" for own in _own(model)]
  unlike = [
    text
    for text in texts
    if theirs.encode(text, add_special_tokens=False).ids
    != processor.encode(text)
  ]
  # Of two ways of the same likelihood each may take another.
  if len(unlike) > 0.01 * len(texts):
    raise UserError(
      f"Hugging Face's tokenizers would read {unlike[0][:80]!r} otherwise than"
      " SentencePiece does; give the export a tokenizer of its own"
      " (tokenizer=...)"
    )
