"""A `tokenizer.json` that reads texts as a SentencePiece model does.

transformers 5 reads every `spiece.model` of a T5 as Unigram without bytes for
unknown characters, and versions before it nearly so. Models that are otherwise
(BPE, byte fallback, pieces of the user's own, other normalisers) are written as
what Hugging Face's tokenizers library makes of them.

What stays unlike: the text of a special token is that token to Hugging Face; a
text that is one mode token and nothing else has no space before it; rows of
combining marks that are in no order of Unicode's; a line of more than 10,000
characters, along which SentencePiece adds likelihoods in float32; and of bytes
that are no whole character, Hugging Face's decoder gives up the neighbours.
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
  "E\u0301cole, A\u030angstro\u0308m\r\n",
  "1,234.56 {a: [b]} <tag> C++ e-mail@x.org if x==1:return",
  "zzzzqqqqxxxx aaaaaaaaaa --------------------- ........",
)


def is_needed(content: bytes) -> bool:
  """Whether transformers' T5Tokenizer would read texts otherwise."""
  model = _parse(content)
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  kinds = model.SentencePiece
  is_t5_s = (
    trainer.model_type == trainer.UNIGRAM
    and (trainer.pad_id, trainer.eos_id, trainer.unk_id) == (0, 1, 2)
    and special_tokens(content) == ("<pad>", "</s>", "<unk>")
    and not trainer.treat_whitespace_as_suffix
    and normalizer.name in ("nmt_nfkc", "precompiled")
    and normalizer.precompiled_charsmap
    and normalizer.add_dummy_prefix
    and normalizer.remove_extra_whitespaces
  )
  # T5Tokenizer cuts at spaces before anything else.
  return not is_t5_s or any(
    piece.type in (kinds.BYTE, kinds.USER_DEFINED) or _SPACE in piece.piece[1:]
    for piece in model.pieces
  )


def special_tokens(content: bytes) -> tuple[str, str, str]:
  """The pieces for padding, ends and what is unknown.

  Raises:
    UserError: if the model has none for one of them.
  """
  model = _parse(content)
  trainer = model.trainer_spec
  numbers = (trainer.pad_id, trainer.eos_id, trainer.unk_id)
  for name, number in zip(("padding", "ends", "unknown"), numbers):
    if not 0 <= number < len(model.pieces):
      raise UserError(
        f"the vocabulary has no piece for {name}, which T5 needs"
        " (tools/train_vocabulary.py makes them)"
      )
  return tuple(model.pieces[number].piece for number in numbers)


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
  for text in _own(model):
    if any(sign == _SPACE or sign.isspace() for sign in text):
      raise UserError(
        f"its piece {text!r} has a space, and Hugging Face's tokenizers find no"
        " token with one where SentencePiece does"
      )
  count = len(model.pieces)
  special = model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN
  added = [
    _added(number, piece.piece, is_special=piece.type in special)
    for number, piece in enumerate(model.pieces)
    if piece.type in (*special, model.SentencePiece.USER_DEFINED)
  ]
  for i in range(extra_ids):
    text = f"<extra_id_{extra_ids - 1 - i}>"
    added.append(_added(count + i, text, is_special=True))
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
    # tokenizers applies the table to a letter and takes its marks away with it:
    # they are one character before, where there is one of both.
    if "nfkc" in spec.name:
      result.append({"type": "NFKC"})
    if spec.name.endswith("_cf"):
      result.append({"type": "Lowercase"})
    if spec.name.startswith("nmt"):
      result.append(_replace("  ", String="\r\n"))
    table = base64.b64encode(spec.precompiled_charsmap).decode()
    result.append({"type": "Precompiled", "precompiled_charsmap": table})
  prefix = _SPACE if spec.add_dummy_prefix else ""
  if prefix:
    result.append({"type": "Prepend", "prepend": prefix})
    if own := _own(model):
      # tokenizers normalises these tokens too, and looks for the result.
      any_of = "|".join(re.escape(text) for text in own)
      result.append(_replace("", Regex=rf"\A{prefix}(?=(?:{any_of})\z)"))
  if spec.remove_extra_whitespaces:
    result.append(_replace("", Regex=rf"\A{prefix} *\z"))
    result.append(_replace(prefix, Regex=rf"\A{prefix} +"))
    result.append(_replace("", Regex=r" +\z"))
    result.append(_replace(" ", Regex=" {2,}"))
  result.append(_replace(_SPACE, String=" "))
  return result


def _ends(model: Any) -> dict[str, Any]:
  """`A </s>`, and `A </s> B </s>` of a pair."""
  number = model.trainer_spec.eos_id
  text = model.pieces[number].piece
  end = {"SpecialToken": {"id": text, "type_id": 0}}

  def part(name):
    return {"Sequence": {"id": name, "type_id": 0}}

  return {
    "type": "TemplateProcessing",
    "single": [part("A"), end],
    "pair": [part("A"), end, part("B"), end],
    "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
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
  of_byte = min(normal)

  def score(piece):
    if piece.type == kinds.NORMAL:
      return piece.score
    return of_byte if piece.type == kinds.BYTE else 0.0

  vocab = [[piece.piece, score(piece)] for piece in pieces]
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
  for own in _own(model):
    texts += [f"{own} {_PROBES[0]}{own}", f"a{own}b  {own}{own} {own}"]

  def likelihood(ids):
    return sum(model.pieces[number].score for number in ids)

  for text in texts:
    expected = processor.encode(text)
    try:
      found = theirs.encode(text, add_special_tokens=False).ids
    except BaseException as e:
      if isinstance(e, (KeyboardInterrupt, SystemExit)):
        raise
      found = None  # Rust's own panic is no Exception.
    if found == expected:
      continue
    # Of two ways of the same likelihood each may take another.
    is_tie = (
      found is not None
      and model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
      and theirs.decode(found) == theirs.decode(expected)
      and abs(likelihood(found) - likelihood(expected))
      <= 1e-5 * abs(likelihood(expected))
    )
    if not is_tie:
      raise UserError(
        f"Hugging Face's tokenizers would read {text[:80]!r} otherwise than"
        " SentencePiece does; give the export a tokenizer of its own"
        " (tokenizer=...)"
      )
