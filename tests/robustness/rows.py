"""Bad rows, from a seed: files that must be refused, or must not crash.

`nonsense` makes files whose every reading is wrong, `mutations` bytes that may
still be right. `read` is what a case runs.
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator
import dataclasses
import gzip
import io
import json
import lzma
import os
import random
import sys
import tempfile
from typing import Any

COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
# Columns a (text) and b (label).
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
  """A file, and the task that reads it.

  Attributes:
    what: is wrong, for whoever reads the failure.
    task: of `read`.
    name: of the file.
    content: of it; or what makes it, given its path.
  """

  what: str
  task: str
  name: str
  content: bytes | Callable[[str], Any]

  def write(self, folder) -> str:
    """Puts the file into a new folder; its path."""
    os.mkdir(folder)
    path = os.path.join(str(folder), self.name)
    if callable(self.content):
      self.content(path)
    else:
      with open(path, "wb") as file:
        file.write(self.content)
    return path


# ---- Good rows ---------------------------------------------------------------

_WORDS = "one two drei vier été naïve 五 русский tea 🙂 x".split()


def good_rows(rng: random.Random) -> Rows:
  text = lambda: " ".join(rng.choices(_WORDS, k=rng.randint(1, 6)))
  return [
    {"a": text(), "b": rng.choice(("yes", "no"))}
    for _ in range(rng.randint(3, 20))
  ]


def delimited(rows: Rows, sign: str = "\t", columns=("a", "b")) -> str:
  lines = [sign.join(columns)]
  lines += [sign.join(str(row[c]) for c in columns) for row in rows]
  return "\n".join(lines) + "\n"


def jsonl(rows: Rows) -> str:
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(rows: Rows, columns=None) -> bytes:
  import pyarrow as pa
  from pyarrow import parquet

  table = pa.Table.from_pylist(rows)
  if columns:
    table = table.rename_columns(columns)
  file = io.BytesIO()
  parquet.write_table(table, file)
  return file.getvalue()


def tfrecord(rows: Rows) -> bytes:
  import tensorflow as tf

  text = lambda x: tf.train.Feature(
    bytes_list=tf.train.BytesList(value=[str(x).encode()])
  )
  with tempfile.NamedTemporaryFile() as file:
    with tf.io.TFRecordWriter(file.name) as writer:
      for row in rows:
        feature = {name: text(value) for name, value in row.items()}
        features = tf.train.Features(feature=feature)
        writer.write(tf.train.Example(features=features).SerializeToString())
    return file.read()


def encoded(rows: Rows, kind: str) -> bytes:
  if kind in ("parquet", "tfrecord"):
    return parquet(rows) if kind == "parquet" else tfrecord(rows)
  if kind == "jsonl":
    return jsonl(rows).encode()
  return delimited(rows, "," if kind == "csv" else "\t").encode()


# ---- Files that must be refused ----------------------------------------------


def nonsense(rng: random.Random) -> Iterator[Case]:
  """Every kind of mistake once, at places that the seed draws."""
  yield from _text(rng)
  yield from _json(rng)
  yield from _parquet(rng)
  yield from _compressed(rng)
  yield from _paths(rng)
  yield from _labels(rng)
  yield from _tags(rng)
  yield from _spans(rng)


def _text(rng) -> Iterator[Case]:
  for kind, sign in (("tsv", "\t"), ("csv", ",")):
    rows = good_rows(rng)
    lines = delimited(rows, sign).splitlines()
    at = rng.randint(1, len(lines) - 1)

    def case(what, changed, kind=kind):
      text = changed if isinstance(changed, str) else "\n".join(changed)
      content = text if isinstance(text, bytes) else text.encode()
      return Case(what, "text", f"rows.{kind}", content)

    def with_line(line, at=at, lines=lines):
      return [*lines[:at], line, *lines[at + 1 :]]

    yield case("an empty file", "")
    yield case("a header alone", lines[:1])
    yield case("line ends alone", "\n" * rng.randint(1, 5))
    yield case("no column b", delimited(rows, sign, ("a",)))
    yield case("no header", lines[1:])
    yield case("a column twice", delimited(rows, sign, ("a", "b", "b")))
    yield case("one cell more", with_line(lines[at] + sign + "more"))
    yield case("one cell less", with_line(rows[at - 1]["a"]))
    # Not at the end, where it would be the last line's.
    yield case("an empty line", [*lines[:at], "", *lines[at:]])
    yield case("an empty cell", with_line(sign + "yes"))
    yield case("a blank cell", with_line("x" + sign + "  "))
    yield case("a zero byte", with_line("x\0y" + sign + "no"))
    yield case("carriage returns alone", "\r".join(lines))
    where = rng.randint(0, len("\n".join(lines).encode()))
    raw = "\n".join(lines).encode()
    for what, content in (
      ("no UTF-8", raw[:where] + b"\xff" + raw[where:]),
      ("UTF-16", "\n".join(lines).encode("utf-16")),
      ("UTF-16 unmarked", "\n".join(lines).encode("utf-16-le")),
      ("UTF-32", "\n".join(lines).encode("utf-32")),
      ("random bytes", rng.randbytes(rng.randint(1, 4000)) + b"\xff"),
    ):
      yield Case(what, "text", f"rows.{kind}", content)
    if kind == "csv":
      yield case("an open quote", with_line('"x,yes'))
      yield case("text after a quote", with_line('"x" y,yes'))
      yield case("a quoted file", '"' + "\n".join(lines))
  yield Case("an unknown ending", "text", "rows.docx", b"a\tb\nx\ty\n")
  yield Case("no ending", "text", "rows", b"a\tb\nx\ty\n")
  yield Case("a text file for columns", "text", "rows.txt", b"x y\n")


# Cells where text belongs; JSON's spelling.
_NO_TEXT = (
  *("null", "true", "false", "[]", "{}", '["x"]', '{"x": 1}', '""', '" "'),
  *("NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 5000),
  *('"\\ud800"', '"x\\udfffy"', '"\\udc00\\ud800"', '{"x": "\\ud900"}'),
)
# Lines that are no row at all.
_NO_ROW = (
  *("", " ", "null", "1", '"x"', "[]", '[{"a": "x", "b": "yes"}]', "true"),
  *("{", "}", "{}", '{"a": "x"}', "{'a': 'x', 'b': 'y'}", '{"a": x, "b": 1}'),
  *('{"a": "x", "b": "y",}', '{"a": "x", "b": "y"}{"a": "x", "b": "y"}'),
  *(
    '{"a": "x", "a": "z", "b": "y"}',
    '{"a": "x", "b": "y", "c": {"d": 1, "d": 2}}',
  ),
  *('{"a": "x\ty", "b": "y"}', '{"a": "x", "b": "y"} # note', "a\tb"),
  *('{"a": "\\ud800x", "b": "y"}', '{"a": "x", "b": "y", "\\udead": 1}'),
)


def _json(rng) -> Iterator[Case]:
  def case(what, line):
    lines = jsonl(good_rows(rng)).splitlines()
    lines.insert(rng.randint(0, len(lines)), line)
    # A file may end in a line end, and an empty line may not be told from it.
    return Case(
      what, "text", "rows.jsonl", "\n".join([*lines, lines[0]]).encode()
    )

  for cell in _NO_TEXT:
    key, other = rng.sample(("a", "b"), 2)
    yield case(f"cell {cell[:30]}", f'{{"{key}": {cell}, "{other}": "x"}}')
  for line in _NO_ROW:
    yield case(f"line {line[:40]!r}", line)
  depth = rng.randint(50_000, 150_000)
  for begin, end in (("[", "]"), ('{"a":', "}")):
    for whole in (False, True):
      cell = begin * depth + "1" + end * depth * whole
      what = f"{depth} deep in {begin} {'whole' if whole else 'cut'}"
      yield case(what, f'{{"a": {cell}, "b": "x"}}')
  text = jsonl(good_rows(rng))
  yield Case(
    "a cut line", "text", "rows.jsonl", text.encode()[: -rng.randint(3, 9)]
  )
  yield Case(
    "JSON over lines",
    "text",
    "rows.json",
    json.dumps([{"a": "x"}], indent=1).encode(),
  )


def _parquet(rng) -> Iterator[Case]:
  import datetime

  def case(what, content, name="rows.parquet"):
    return Case(what, "text", name, content)

  rows = good_rows(rng)
  whole = parquet(rows)
  yield case("cut", whole[: rng.randint(1, len(whole) - 1)])
  yield case("no beginning", whole[rng.randint(5, len(whole) - 1) :])
  yield case("empty", b"")
  yield case("text", b"a\tb\nx\ty\n")
  yield case("compressed", gzip.compress(whole), "rows.parquet.gz")
  yield case("no rows", parquet([{"a": "x", "b": "y"}])[:0] or _no_rows())
  yield case("a column less", parquet([{"a": row["a"]} for row in rows]))
  twice = [row | {"c": "x"} for row in rows]
  yield case("a column twice", parquet(twice, ["a", "b", "a"]))
  for cell in (
    *(b"bytes", True, None, float("nan"), float("inf"), ["x"], {"x": "y"}),
    *(datetime.timedelta(1), [[1]], [{"x": [b"y"]}], ""),
  ):
    changed = [row | {rng.choice("ab"): cell} for row in rows[:1]]
    yield case(f"cell {cell!r}", parquet(changed))
  yield case("text that is no UTF-8", _no_utf8())


def _no_rows() -> bytes:
  import pyarrow as pa
  from pyarrow import parquet

  file = io.BytesIO()
  names = ("a", "b")
  schema = pa.schema([(name, pa.string()) for name in names])
  parquet.write_table(schema.empty_table(), file)
  return file.getvalue()


def _no_utf8() -> bytes:
  import pyarrow as pa
  from pyarrow import parquet

  broken = pa.array([b"x", b"\xff\xfe"], pa.binary()).view(pa.string())
  file = io.BytesIO()
  parquet.write_table(pa.table({"a": broken, "b": ["y", "z"]}), file)
  return file.getvalue()


def _compressed(rng) -> Iterator[Case]:
  for ending, compress in COMPRESS.items():
    for kind in ("tsv", "csv", "jsonl"):
      rows = good_rows(rng)
      plain = encoded(rows, kind)
      whole = compress(plain)

      def case(what, content, name=f"rows.{kind}.{ending}"):
        return Case(what, "text", name, content)

      yield case("cut", whole[: rng.randint(1, len(whole) - 1)])
      yield case("not compressed", plain)
      other = rng.choice([e for e in COMPRESS if e != ending])
      yield case(f"it is {other}", COMPRESS[other](plain))
      yield case("other bytes behind", whole + b"x" * rng.randint(1, 99))
      yield case(
        "a cut second part", whole + whole[: rng.randint(4, len(whole) - 1)]
      )
      middle = len(whole) // 2
      yield case("no middle", whole[:middle] + whole[middle + 3 :])
      yield case("compressed twice", compress(whole))
      yield case("empty", compress(b""))


def _paths(rng) -> Iterator[Case]:
  def loop(path):
    os.symlink(path, path)

  def locked(path):
    os.mkdir(path)
    open(os.path.join(path, "train.tsv"), "w").close()

  case = lambda what, name, make: Case(what, "text", name, make)
  kind = rng.choice(("tsv", "csv", "jsonl", "parquet", "tsv.gz"))
  yield case("a folder", f"rows.{kind}", os.mkdir)
  yield case("a folder with files", f"rows.{kind}", locked)
  yield case("a pipe", f"rows.{kind}", os.mkfifo)
  yield case("a device", f"rows.{kind}", lambda p: os.symlink("/dev/zero", p))
  yield case("a link to itself", f"rows.{kind}", loop)
  yield case("a link to nothing", f"rows.{kind}", lambda p: os.symlink("no", p))
  yield case("nothing", f"rows.{kind}", lambda p: None)
  yield case("a pattern of nothing", f"r[aeiou]ws*.{kind}", lambda p: None)
  yield case("a long name", "x" * 5000 + ".tsv", lambda p: None)


def _labels(rng) -> Iterator[Case]:
  bad = {
    "classes": (
      '"maybe"',
      '"2"',
      "2",
      "0.5",
      "true",
      "null",
      '["yes"]',
      "{}",
      "-2",
      "1e30",
    ),
    "found": ("0.37", '["yes"]', '{"yes": 1}', "12345678901", "1e-3"),
    "many": (
      '"yes,maybe"',
      '["yes", "yes"]',
      "1",
      '{"yes": 1}',
      "null",
      '[["yes"]]',
    ),
    "number": (
      '"x"',
      '"nan"',
      '"inf"',
      '"1_0"',
      "true",
      "null",
      "[]",
      "1e300",
      "1" + "0" * 400,
    ),
    "numbers": ("[1]", "[1, 2, 3]", '[1, "x"]', "1", '"1,2,x"', "{}", "null"),
    "glue": ('"maybe"', "2", "null", "[]", "0.5"),
    "stsb": ('"x"', '"nan"', "null", "[]", "1e99"),
  }
  good = {"many": ["yes"], "number": 0.5, "numbers": [1, 2], "stsb": 2.5}
  for task, cells in bad.items():
    for cell in cells:
      rows = [row | {"b": good.get(task, row["b"])} for row in good_rows(rng)]
      if task == "found":
        rows = [row | {"b": rng.randint(0, 3)} for row in rows]
      lines = jsonl(rows).splitlines()
      at = rng.randint(0, len(lines))
      lines.insert(at, f'{{"a": "x", "b": {cell}}}')
      content = "\n".join(lines).encode()
      yield Case(f"label {cell[:30]}", task, "rows.jsonl", content)
  for value in ("2", "-1", "yes, no", "x"):
    rows = [row | {"b": "0"} for row in good_rows(rng)]
    rows[rng.randrange(len(rows))]["b"] = value
    yield Case(f"flag {value}", "flags", "rows.tsv", delimited(rows).encode())


def _tags(rng) -> Iterator[Case]:
  good = '{"words": ["x", "y"], "tags": ["O", "B"]}'
  for line in (
    '{"words": ["x"], "tags": ["O", "B"]}',
    '{"words": [], "tags": []}',
    '{"words": ["x"], "tags": ["I-NEW"]}',
    '{"words": ["x"], "tags": [7]}',
    '{"words": ["x"], "tags": [-1]}',
    '{"words": ["x"], "tags": [0.5]}',
    '{"words": ["x"], "tags": [true]}',
    '{"words": ["x"], "tags": [null]}',
    '{"words": ["x"], "tags": [["O"]]}',
    '{"words": ["x"], "tags": [99999999999999999999]}',
    '{"words": ["x"], "tags": {"O": 1}}',
    '{"words": ["x"], "tags": 1}',
    '{"words": ["x"], "tags": null}',
    '{"words": [null], "tags": ["O"]}',
    '{"words": [true], "tags": ["O"]}',
    '{"words": [{"x": 1}], "tags": ["O"]}',
    '{"words": {"x": 1}, "tags": ["O"]}',
    '{"words": 1, "tags": ["O"]}',
    '{"words": "x y z", "tags": "O B"}',
    '{"words": ["x"]}',
  ):
    lines = [good] * rng.randint(1, 9)
    lines.insert(rng.randint(0, len(lines)), line)
    for task in ("tags", "found_tags") if "I-NEW" not in line else ("tags",):
      yield Case(line, task, "rows.jsonl", "\n".join(lines).encode())
  words = [f"word{i}\tO" for i in range(rng.randint(3, 9))]
  at = rng.randrange(1, len(words))
  for what, line in (
    ("one column", "word"),
    ("spaces among tabs", "word O"),
    ("a column more", "word\tX\tO"),
    ("no word", "\tO"),
    ("no tag", "word\t"),
    ("a tag that is none", "word\tNEW"),
    ("a zero byte", "w\0rd\tO"),
  ):
    lines = [*words[:at], line, *words[at:]]
    yield Case(what, "conll", "rows.conll", "\n".join(lines).encode())
  yield Case("one column in all", "conll", "rows.conll", b"a\nb\n\nc\n")
  yield Case("empty lines", "conll", "rows.conll", b"\n\n\n")
  cut = gzip.compress("\n".join(words).encode())
  yield Case(
    "cut", "conll", "rows.conll.gz", cut[: rng.randint(1, len(cut) - 1)]
  )


def _spans(rng) -> Iterator[Case]:
  good = {
    "id": "1",
    "question": "who?",
    "context": "it was she",
    "answers": ["she"],
  }
  bad = (
    *(
      {"answers": "she"},
      {"answers": ["him"]},
      {"answers": [" "]},
      {"answers": 1},
    ),
    *({"answers": [1]}, {"answers": {"texts": ["she"]}}, {"answers": None}),
    {"answers": {"text": ["she"], "answer_start": [9999]}},
    {"answers": {"text": ["she"], "answer_start": [-7]}},
    {"answers": {"text": ["she"], "answer_start": ["x"]}},
    {"answers": {"text": ["she"], "answer_start": 7}},
    {"answers": {"text": "she", "answer_start": [7]}},
    {"answers": {"text": [["she"]], "answer_start": [7]}},
    *({"context": None}, {"context": ["it was she"]}, {"context": True}),
    *({"question": None}, {"question": {"x": 1}}, {"id": None}, {"id": [1]}),
  )
  for change in bad:
    rows = [good] * rng.randint(1, 5)
    rows.insert(rng.randint(0, len(rows)), good | change)
    yield Case(f"{change}", "spans", "rows.jsonl", jsonl(rows).encode())
  qa = {
    "id": "1",
    "question": "who?",
    "answers": [{"text": "she", "answer_start": 7}],
  }
  paragraph = {"context": "it was she", "qas": [qa]}
  layout = lambda p: {
    "version": "1.1",
    "data": [{"title": "x", "paragraphs": p}],
  }
  official = json.dumps(layout([paragraph]))
  wrong = [
    *([], "x", 1, None, {}, {"data": "x"}, {"data": {"x": 1}}, {"data": [1]}),
    *(
      {"data": []},
      {"data": ["paragraphs"]},
      {"data": [{"paragraphs": "qas"}]},
    ),
    *(layout([{"qas": [qa]}]), layout(["x"]), layout([None])),
    layout([paragraph | {"qas": {"id": 1}}]),
    *(
      layout([paragraph | {"context": cell}])
      for cell in (None, 1.5e300, ["x"], "")
    ),
    *(
      layout([paragraph | {"qas": [qa | change]}])
      for change in (
        *(
          {"answers": "she"},
          {"answers": ["she"]},
          {"answers": [{"text": "she"}]},
        ),
        *({"answers": {"text": "she"}}, {"question": None}, {"id": None}),
        {"answers": [{"text": "she", "answer_start": 10**9}]},
        {"answers": [{"text": 1, "answer_start": 7}]},
      )
    ),
  ]
  for value in wrong:
    content = json.dumps(value)
    if value == layout([paragraph | {"context": 1.5e300}]):
      continue  # A number is text.
    yield Case(content[:80], "squad", "rows.json", content.encode())
  cut = official[: rng.randint(1, len(official) - 1)]
  for what, content in (
    ("cut", cut),
    ("a key twice", official.replace('"title"', '"paragraphs"')),
    ("deep", official.replace('"x"', "[" * 100_000)),
    ("half a character", official.replace("who", "\\ud800")),
    ("NaN", official.replace("7", "NaN")),
    ("Latin-1", official.replace("who", "wh\xf8")),
  ):
    yield Case(what, "squad", "rows.json", content.encode("latin-1"))


# ---- Bytes that may still be right -------------------------------------------


def mutations(rng: random.Random, count: int) -> Iterator[Case]:
  """Good files of which some bytes are not what they were."""
  for number in range(count):
    kind = rng.choice(("tsv", "csv", "jsonl", "jsonl", "parquet", "tfrecord"))
    content = encoded(good_rows(rng), kind)
    name = f"rows.{kind}"
    if kind not in ("parquet", "tfrecord") and rng.random() < 0.5:
      ending = rng.choice(list(COMPRESS))
      content, name = COMPRESS[ending](content), f"{name}.{ending}"
    for _ in range(rng.randint(1, 4)):
      content = _mutated(rng, content)
    yield Case(
      f"mutation {number}", rng.choice(("text", "found")), name, content
    )


def _mutated(rng, content: bytes) -> bytes:
  at = rng.randint(0, len(content))
  end = min(len(content), at + rng.choice((1, 1, 1, 4, 30)))
  new = rng.choice(
    (
      rng.randbytes(end - at),
      b"",
      content[at:end] * 2,
      rng.choice(
        (b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b'"', b"\n", b"\\u")
      ),
      content[:at][-20:],
    )
  )
  return content[:at] + new + content[end:]


# ---- What a case runs --------------------------------------------------------


def read(task: str, path: str) -> None:
  """Reads all rows of a file as a task does that is about to train."""
  import seqio

  from fat5_jax.data import conll, head_tasks, sources, squad, tasks

  vocabulary = seqio.ByteVocabulary(0)
  kinds = {"conll": conll.Conll, "squad": squad.SquadFiles}
  source = kinds.get(task, sources.Files)({"train": path})
  classes = lambda names, problem="single_label", **more: (
    head_tasks.classification(
      source,
      "{a}",
      more.pop("label", "b"),
      vocabulary,
      names,
      problem if problem == "regression" else f"{problem}_classification",
      **more,
    )
  )
  make = {
    "text": lambda: tasks.text_to_text(source, "say {a}", "{b}", vocabulary),
    "classes": lambda: classes(("no", "yes")),
    "found": lambda: classes(()),
    "many": lambda: classes(("no", "yes"), "multi_label"),
    "flags": lambda: classes((), "multi_label", label=("b",)),
    "number": lambda: classes((), "regression"),
    "numbers": lambda: classes((), "regression", num_labels=2),
    "glue": lambda: tasks.glue("cola", vocabulary, source=_Glue(source)),
    "stsb": lambda: tasks.glue("stsb", vocabulary, source=_Glue(source)),
    "tags": lambda: head_tasks.tagging(
      source, vocabulary, tag_names=("O", "B")
    ),
    "found_tags": lambda: head_tasks.tagging(source, vocabulary),
    "conll": lambda: head_tasks.tagging(source, vocabulary, tag_names=("O",)),
    "spans": lambda: head_tasks.spans(source, vocabulary),
    "squad": lambda: head_tasks.spans(source, vocabulary),
  }[task]()
  count = 0
  for example in make.source.examples("train"):
    count += 1
    for key in ("inputs", "targets"):
      text = example.get(key, "")
      if isinstance(text, str):
        assert "\0" not in text and "{'" not in text and "b'" not in text, text
  print(f"{count} rows", file=sys.stdout)


class _Glue:
  """Columns a and b under the names that GLUE's tasks read."""

  def __init__(self, source):
    self._source, self.splits = source, source.splits

  def rows(self, split):
    for where, row in self._source.rows(split):
      yield (
        where,
        {
          "label": row["b"],
          **dict.fromkeys(("sentence", "sentence1", "sentence2"), row["a"]),
        },
      )

  def __getattr__(self, name):
    return getattr(self._source, name)


def _run(command: str, flags: list[str]) -> int:
  from fat5_jax.gin_config import cli

  status = cli.main(command, flags)
  sys.stdout.flush()
  return status


def infer_on_a_full_disk(flags: list[str]) -> None:
  """A file may have 40 bytes, what is said goes elsewhere."""
  import resource

  said, write_end = os.pipe()
  stderr = os.dup(2)
  os.dup2(write_end, 2)
  _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (40, most))
  status = _run("infer", flags)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
  os.dup2(stderr, 2)
  os.write(2, os.read(said, 10_000))
  raise SystemExit(status)


def infer_to_a_full_pipe(flags: list[str]) -> None:
  os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
  raise SystemExit(_run("infer", flags))


def measured(command: str, flags: list[str]) -> None:
  """Prints by how much memory grew, which a zygote does not see well."""
  import resource

  with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
  status = _run(command, flags)
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
  print(f"grew by {(most - before) >> 20} MiB")
  raise SystemExit(status)
