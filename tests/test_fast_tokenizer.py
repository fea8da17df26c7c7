"""Exported vocabularies read texts in transformers as SentencePiece does."""

import glob
import io
import json
import os
import subprocess
import sys

from conftest import ROOT
import pytest
import seqio
import transformers

from fat5_jax.convert import fast_tokenizer, tokenizers
from fat5_jax.data import vocabularies
from fat5_jax.errors import UserError

ORACLE = os.path.join(sys.prefix, "oracle-4.37")
MODES = ["[R]", "[S]", "[X]"]
KINDS = {
  "bytes": {"byte_fallback": True},
  "modes": {"user_defined_symbols": MODES},
  "both": {"byte_fallback": True, "user_defined_symbols": MODES},
  "bpe": {"model_type": "bpe"},
  "bpe both": {
    "model_type": "bpe",
    "byte_fallback": True,
    "user_defined_symbols": MODES,
  },
  "as they are": {"normalization_rule_name": "identity", "byte_fallback": True},
  "spaces": {"remove_extra_whitespaces": False, "byte_fallback": True},
}
ODD = [
  "[R] a text <extra_id_0> of it",
  "a[S]b [X][R] c",
  "  [S] two  spaces, and\ttabs ",
  "日本語 é 😀 x😀y Ⅷ ﬁne ½",
  "\u200bzero\u200bwidth\u00a0",
  "if x == {'a': [1]}: return 🤖",
  "",
  "é",
]


def lines():
  """Prose and code of this repository."""
  result = []
  for path in sorted(glob.glob(os.path.join(ROOT, "docs/guides/*.md"))):
    with open(path, encoding="utf-8") as file:
      result += [line.strip("\n") for line in file]
  # A special token's text is that token to Hugging Face, and text to
  # SentencePiece; T5's own differ there too.
  return [line for line in result if "</s>" not in line and "<ext" not in line]


LINES = lines()


def train(**options):
  import sentencepiece

  model = io.BytesIO()
  t5_s = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, vocab_size=1000)
  t5_s |= dict(pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES[::2]),
    model_writer=model,
    minloglevel=2,
    **(t5_s | options),
  )
  return model.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("tokenizers")
  for kind, options in KINDS.items():
    (root / f"{kind}.model").write_bytes(train(**options))
    (root / kind).mkdir()
    tokenizers.write(
      seqio.SentencePieceVocabulary(str(root / f"{kind}.model"), extra_ids=64),
      str(root / kind),
    )
  return root


def expected(root, kind):
  """SentencePiece's ids, with a sentinel's where its text stands."""
  vocabulary = seqio.SentencePieceVocabulary(str(root / f"{kind}.model"), 64)
  sentinel = vocabulary.vocab_size - 1
  result = []
  for text in (*ODD, *LINES):
    first, *others = text.split("<extra_id_0>")
    ids = list(vocabulary.encode(first))
    for part in others:
      ids += [sentinel, *vocabulary.encode(part)]
    result.append([*ids, 1])
  return result


def assert_same(found, wanted):
  texts = (*ODD, *LINES)
  assert len(found) == len(wanted) == len(texts)
  for text, ids, right in zip(texts[: len(ODD)], found, wanted):
    assert ids == right, text
  # Two ways through a line can be of one likelihood, to the last bit.
  unlike = [t for t, x, y in zip(texts, found, wanted) if x != y]
  assert len(unlike) <= 0.002 * len(texts), unlike


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_sentencepiece_reads(kind, folders):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folders / kind)
  read = tokenizer([*ODD, *LINES])
  # T5 takes no token_type_ids.
  assert set(read) == {"input_ids", "attention_mask"}
  assert_same(read["input_ids"], expected(folders, kind))
  pair = tokenizer("one", "two").input_ids
  assert pair == tokenizer("one").input_ids + tokenizer("two").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_text_again(kind, folders):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folders / kind)
  vocabulary = seqio.SentencePieceVocabulary(str(folders / f"{kind}.model"))
  for text in LINES:
    ids = list(vocabulary.encode(text))
    if 2 not in ids:
      assert tokenizer.decode(ids) == vocabulary.decode(ids)
  assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == 1063
  assert tokenizer.convert_tokens_to_ids("<extra_id_63>") == 1000
  assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import transformers
assert transformers.__version__.startswith("4.37")
texts = json.load(sys.stdin)
print(json.dumps({
  folder: transformers.AutoTokenizer.from_pretrained(folder)(texts).data
  for folder in sys.argv[2:]
}))
"""


@pytest.mark.skipif(
  not os.path.isdir(ORACLE),
  reason="transformers 4.37 is put there by make test",
)
def test_transformers_4_37_does_too(folders):
  names = {kind: str(folders / kind) for kind in KINDS}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, ORACLE, *names.values()],
    input=json.dumps([*ODD, *LINES]),
    env=os.environ | {"USE_TF": "0", "USE_FLAX": "0"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  for kind, name in names.items():
    assert set(found[name]) == {"input_ids", "attention_mask"}
    assert_same(found[name]["input_ids"], expected(folders, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_hugging_face_has_saved_comes_back(
  kind, folders, tmp_path
):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folders / kind)
  tokenizer.save_pretrained(tmp_path)
  assert not (tmp_path / "spiece.model").exists()
  back = vocabularies.from_hf(str(tmp_path))
  assert back.extra_ids == 64
  wanted = expected(folders, kind)
  texts = [text.replace("<extra_id_0>", "") for text in (*ODD, *LINES)]
  unlike = [
    text
    for text, right in zip(texts, wanted)
    if 1063 not in right and [*back.encode(text), 1] != right
  ]
  assert len(unlike) <= 0.002 * len(texts), unlike


def test_t5_s_own_kind_keeps_its_class(tmp_path):
  (tmp_path / "own.model").write_bytes(train())
  tokenizers.write(str(tmp_path / "own.model"), str(tmp_path))
  assert not (tmp_path / "tokenizer.json").exists()
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert config["tokenizer_class"] == "T5Tokenizer"


def test_what_hugging_face_would_read_otherwise_is_no_export(tmp_path):
  odd = train(split_by_whitespace=False, treat_whitespace_as_suffix=True)
  (tmp_path / "odd.model").write_bytes(odd)
  with pytest.raises(UserError, match="odd.model: .* otherwise than"):
    tokenizers.write(str(tmp_path / "odd.model"), str(tmp_path))
  with pytest.raises(UserError, match="neither 'word' nor 'char'"):
    fast_tokenizer.to_json(train(model_type="char"), 100)


MORE = {
  "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
  "lines kept": {"normalization_rule_name": "nfkc"},
}


@pytest.mark.parametrize("kind", MORE)
def test_marks_and_ends_of_lines_are_as_the_normaliser_has_them(kind, tmp_path):
  (tmp_path / "m.model").write_bytes(train(byte_fallback=True, **MORE[kind]))
  tokenizers.write(str(tmp_path / "m.model"), str(tmp_path))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  vocabulary = seqio.SentencePieceVocabulary(str(tmp_path / "m.model"), 100)
  for text in (
    "E\u0301cole A\u030angstro\u0308m",
    "ﻻ\u064b Ａ\u0301 ½\u0301",
    "a\nb\tc\r\nd",
    "Straße ﬁne ΣΑΣ",
  ):
    found = tokenizer(text, add_special_tokens=False).input_ids
    assert found == list(vocabulary.encode(text)), text
  # Exported once more from what Hugging Face saves, it is of the same kind.
  tokenizer.save_pretrained(tmp_path / "saved")
  back = vocabularies.from_hf(str(tmp_path / "saved"))
  with open(back.sentencepiece_model_file, "rb") as file:
    again = json.loads(fast_tokenizer.to_json(file.read(), 100))
  first = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
  assert again["normalizer"] == first["normalizer"]


def test_a_mode_token_before_a_sentinel_keeps_its_space(folders):
  for kind in ("both", "bpe both"):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / kind)
    found = tokenizer.tokenize("[R] <extra_id_0> is here")
    assert found[:3] == ["▁", "[R]", "<extra_id_0>"]


def test_decoding_leaves_the_text_as_it_is(folders):
  text = "it 's ok , do n't . Yes"
  for kind in KINDS:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / kind)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
  "options,names",
  [
    (
      {"eos_piece": "<eos>", "pad_piece": "[PAD]", "unk_piece": "[UNK]"},
      ("[PAD]", "<eos>", "[UNK]"),
    ),
    ({"unk_id": 0, "pad_id": 2}, ("<pad>", "</s>", "<unk>")),
  ],
)
def test_special_tokens_are_the_model_s_own(options, names, tmp_path):
  (tmp_path / "m.model").write_bytes(train(**options))
  tokenizers.write(str(tmp_path / "m.model"), str(tmp_path))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  vocabulary = seqio.SentencePieceVocabulary(str(tmp_path / "m.model"), 100)
  found = tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token
  assert found == names
  assert tokenizer.pad_token_id == options.get("pad_id", 0)
  ids = tokenizer("red 日 square").input_ids
  assert ids == [*vocabulary.encode("red 日 square"), vocabulary.eos_id]
  assert vocabulary.unk_id in ids


@pytest.mark.parametrize(
  "options,said",
  [
    ({"pad_id": -1}, "no piece for padding"),
    ({"eos_id": -1}, "no piece for ends"),
    ({"user_defined_symbols": ["  "]}, "has a space"),
    ({"user_defined_symbols": ["New York"]}, "has a space"),
    ({"user_defined_symbols": ["①"]}, "otherwise than"),
  ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(options, said, tmp_path):
  (tmp_path / "m.model").write_bytes(train(**options))
  (tmp_path / "out").mkdir()
  with pytest.raises(UserError, match=said):
    tokenizers.write(str(tmp_path / "m.model"), str(tmp_path / "out"))
  assert not os.listdir(tmp_path / "out")


def test_another_vocabulary_leaves_no_tokenizer_of_the_one_before(tmp_path):
  for name, options in (("a", {"byte_fallback": True}), ("b", {})):
    (tmp_path / f"{name}.model").write_bytes(train(**options))
  out = tmp_path / "out"
  out.mkdir()
  tokenizers.write(str(tmp_path / "a.model"), str(out))
  tokenizers.write(str(tmp_path / "b.model"), str(out))
  assert not (out / "tokenizer.json").exists()
