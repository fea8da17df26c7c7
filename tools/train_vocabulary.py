"""Trains a SentencePiece vocabulary of T5's kind from texts of your own.

  python tools/train_vocabulary.py OUTPUT.model FILES... \\
    [--pieces 32000] [--column text ...] [--mode_tokens '[R]' '[S]' '[X]']

FILES are .txt (one text a line), .jsonl, .parquet, .tsv or .csv, also
compressed, with a column of text (of several names that --column gives, the
first that a row has); patterns are allowed. <pad>, </s> and <unk>
have T5's ids 0, 1 and 2; characters that have no piece are spelled in bytes, so
that no text is unknown. The sentinels (<extra_id_0>, ...) are not pieces: SeqIO
adds them, VOCAB_EXTRA_IDS = 100 of them, and the model's vocab_size is the sum,
rounded up to 128.

Mode tokens are UL2's, as FAT5 has them, and there unless you say otherwise
(--mode_tokens, with none after it, leaves them out); a text that spells one has
it too.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# SentencePiece leaves out longer sentences, in bytes.
_LONGEST = 16_384


def main() -> int:
  from fat5_jax import interrupts

  with interrupts.watched("train_vocabulary"):
    return _main(interrupts)


class _Help(
  argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
):
  pass


def _flags() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
  parser.add_argument("output", help="the model file, spiece.model for example")
  parser.add_argument("files", nargs="+")
  parser.add_argument("--column", nargs="+", default=["text"], help="of texts")
  parser.add_argument("--pieces", type=int, default=32_000, help="how many")
  parser.add_argument(
    "--mode_tokens",
    nargs="*",
    default=["[R]", "[S]", "[X]"],
    help="pieces of their own",
  )
  parser.add_argument(
    "--kind", choices=("unigram", "bpe"), default="unigram", help="of model"
  )
  parser.add_argument(
    "--normalization",
    default="nmt_nfkc",
    help="SentencePiece's rule; identity keeps every character",
  )
  parser.add_argument("--character_coverage", type=float, default=0.9995)
  parser.add_argument(
    "--sentences", type=int, default=1_000_000, help="drawn of all lines"
  )
  parser.add_argument(
    "--no_byte_fallback", dest="byte_fallback", action="store_false"
  )
  return parser.parse_args()


def _main(interrupts) -> int:
  flags = _flags()
  from fat5_jax.errors import UserError

  held_out: list[str] = []
  try:
    _write(flags.output, _train(flags, held_out))
    _tell(flags.output, held_out)
  except (UserError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  except BaseException:
    status = interrupts.ending("; nothing is written")
    if status is None:
      raise
    return status
  return 0


def _train(flags: argparse.Namespace, held_out: list[str]) -> bytes:
  import sentencepiece

  from fat5_jax.errors import UserError

  model, failed = io.BytesIO(), []
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_kept(_lines(flags, held_out), failed),
      model_writer=model,
      model_type=flags.kind,
      vocab_size=flags.pieces,
      character_coverage=flags.character_coverage,
      normalization_rule_name=flags.normalization,
      byte_fallback=flags.byte_fallback,
      user_defined_symbols=flags.mode_tokens,
      **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
      **dict(pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>"),
      input_sentence_size=flags.sentences,
      shuffle_input_sentence=True,
      max_sentence_length=_LONGEST,
      minloglevel=1,
    )
  except RuntimeError as e:
    if failed:
      raise failed[0] from None
    said = str(e).split("] ")[-1].strip()
    if "Vocabulary size" in said:
      said += " That is --pieces: the texts are few, or more are to be had"
    raise UserError(f"SentencePiece: {said}") from None
  return model.getvalue()


def _kept(lines, failed: list[BaseException]):
  """The lines; an error, which SentencePiece turns into its own, is kept."""
  try:
    yield from lines
  except Exception as e:
    failed.append(e)
    raise


def _write(path: str, model: bytes) -> None:
  from fat5_jax.convert import plain_files

  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  plain_files.replace_with(path, model)


def _lines(flags: argparse.Namespace, held_out: list[str]):
  """The lines of all texts; every thousandth is held out of them."""
  from fat5_jax import console

  with console.without_native_lines():
    from fat5_jax.data import preprocessors, sources
  from fat5_jax.data.files import Unread
  from fat5_jax.errors import UserError

  number = 0
  for pattern in flags.files:
    paths = sorted(glob.glob(pattern)) or [pattern]
    for path in paths:
      for where, row in sources.read_file(path):
        if isinstance(row, Unread):
          raise UserError(f"{where}: {row.reason}")
        # A .txt has lines, whatever the columns of the others.
        names = [*flags.column, *(["text"] if list(row) == ["text"] else [])]
        there = [name for name in names if sources.has_column(row, name)]
        try:
          text = preprocessors.text_of(row, (there or names)[0])
        except UserError as e:
          raise UserError(f"{where}: {e}; --column names others") from None
        for line in text.splitlines():
          number += 1
          if not number % 1000 and len(held_out) < 2000:
            held_out.append(line)
          elif line.strip():
            yield from _short(line)
  if not number:
    raise UserError(f"{', '.join(flags.files)}: no text")


def _short(line: str):
  """A line in parts that SentencePiece does not leave out."""
  size = _LONGEST // 4  # A character has at most four bytes.
  for begin in range(0, len(line), size):
    yield line[begin : begin + size]


def _tell(path: str, held_out: list[str]) -> None:
  """What a person should know of the model, as it is read again."""
  import seqio

  vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=100)
  size = -(-vocabulary.vocab_size // 128) * 128
  print(
    f"{path}: {vocabulary.vocab_size - 100:,} pieces; with 100 sentinels"
    f" {vocabulary.vocab_size:,} tokens (vocab_size = {size})"
  )
  ids = [vocabulary.encode(line) for line in held_out]
  tokens, unknown = sum(map(len, ids)), sum(x.count(2) for x in ids)
  if tokens:
    size = sum(len(line.encode()) for line in held_out)
    words = sum(len(line.split()) for line in held_out)
    print(
      f"of {len(held_out):,} lines that it has not seen: {size / tokens:.2f}"
      f" bytes a token, {tokens / max(words, 1):.2f} tokens a word,"
      f" {unknown / tokens:.2%} unknown"
    )


if __name__ == "__main__":
  sys.exit(main())
