"""What decides a task's content decides its store: SeqIO's own rows tell.

Each case makes a task twice, with something changed between; where SeqIO then
gives other rows, the store must be another.
"""

import functools
import importlib
import linecache
import random
import sys
import types

import pytest
import seqio
import tensorflow as tf
from test_seqio_tasks import BYTES, END, LENGTHS, TOKENIZE, add, seqios

from fat5_jax.data import head_tasks, identity, pipeline, sources
from fat5_jax.data.reading import prepare
from fat5_jax.errors import UserError

STEP = """
import tensorflow as tf
def step(ds):
  return ds.map(lambda x: {"inputs": tf.strings.join([x, %s]), "targets": x})
"""
MAKER = """
import tensorflow as tf
def make(it):
  def step(ds):
    return ds.map(lambda x: {"inputs": tf.strings.join([x, %s]), "targets": x})
  return step
"""


class World:
  """A folder with modules of a person's own, and a file of rows."""

  def __init__(self, folder, monkeypatch):
    self.folder, self._env, self.names = folder, monkeypatch, set()
    monkeypatch.syspath_prepend(str(folder))
    (folder / "lines.txt").write_text("one\ntwo\n")

  def module(self, name, text):
    self.names.add(name)
    (self.folder / f"{name}.py").write_text(text)
    linecache.clearcache()
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    # Two contents within a second may share a file of bytecode.
    self._env.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module(name)

  def cell(self, text):
    """A module as a notebook has it: its text lies in no file."""
    name = f"<ipython-{random.random()}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    module = types.ModuleType("__main__")
    exec(compile(text, name, "exec"), module.__dict__)
    return module

  def file(self, name, text):
    (self.folder / name).write_text(text)
    return str(self.folder / name)

  def env(self, value):
    self._env.setenv("FAT5_JAX_TEST_WORD", value)

  def task(self, step, source=None, vocabulary=BYTES):
    features = {
      side: seqio.Feature(vocabulary, add_eos=True)
      for side in ("inputs", "targets")
    }
    path = str(self.folder / "lines.txt")
    source = source or seqio.TextLineDataSource({"train": path})
    return add(source, [step, TOKENIZE, END], features)


@pytest.fixture
def world(tmp_path, monkeypatch):
  found = World(tmp_path, monkeypatch)
  yield found
  for name in found.names:
    sys.modules.pop(name, None)


HELPER = (
  "import tensorflow as tf\ndef f(x):\n  return tf.strings.join([x, '%s'])"
)


def imported_function(world, word):
  world.module("helper", HELPER % word)
  return world.module("mytask", "from helper import f\n" + STEP % "f(x)").step


def imported_module(world, word):
  world.module("helper", HELPER % word)
  return world.module("mytask", "import helper\n" + STEP % "helper.f(x)").step


def module_of_a_cell(world, word):
  world.module("helper", HELPER % word)
  return world.cell("import helper\n" + STEP % "helper.f(x)").step


def global_from_outside(world, word):
  module = world.module("mytask", "W = ''\n" + STEP % "W")
  module.W = word
  return module.step


def environment_at_import(world, word):
  world.env(word)
  text = "import os\nW = os.environ['FAT5_JAX_TEST_WORD']\n"
  return world.module("mytask", text + STEP % "W").step


def environment_inside(world, word):
  world.env(word)
  text = "import os\n" + STEP % "os.environ['FAT5_JAX_TEST_WORD']"
  return world.module("mytask", text).step


def file_by_a_path_made_up(world, word):
  world.file("word.txt", word)
  text = "import os\n" + STEP % (
    f"open(os.path.join('{world.folder}', 'word.txt')).read()"
  )
  return world.module("mytask", text).step


def base_class(world, word):
  world.module("helper", f"class Base:\n  def word(self): return '{word}'\n")
  text = "import helper\nclass Step(helper.Base):\n  def __call__(self, ds):\n"
  text += "    return ds.map(lambda x: {'inputs': x + self.word(),"
  return world.module("mytask", text + " 'targets': x})\n").Step()


def class_of_a_cell(world, word):
  text = "class Step:\n  def __call__(self, ds):\n    return ds.map("
  text += f"lambda x: {{'inputs': x + '{word}', 'targets': x}})\n"
  return world.cell(text).Step()


def long_chain_in_a_cell(world, word):
  text = f"def f0(x): return x + '{word}'\n"
  text += "".join(f"def f{i + 1}(x): return f{i}(x)\n" for i in range(20))
  text += "def step(ds):\n  return ds.map("
  text += "lambda x: {'inputs': f20(x), 'targets': x})\n"
  return world.cell(text).step


def order_of_arguments(world, word):
  first, second = ("a", "b") if word == "x" else ("b", "a")
  text = f"def h(x, {first}, {second}): return x + {first}\ndef step(ds):\n"
  text += "  return ds.map(lambda x: {'inputs': h(x, a='1', b='2'),"
  return world.cell(text + " 'targets': x})\n").step


def bound_builtin(world, word):
  module = world.module("mytask", MAKER % "it('k')")
  return module.make({"k": word}.get)


def tensor(world, word):
  return world.module("mytask", MAKER % "it").make(tf.constant(word))


def generator_of_random_numbers(world, word):
  class Step:
    def __init__(self):
      self.draw = random.Random(word)

    def __call__(self, ds):
      state = self.draw.getstate()
      found = str(self.draw.random())
      self.draw.setstate(state)
      return ds.map(lambda x: {"inputs": x + found, "targets": x})

  return Step()


class Words(list):
  pass


def list_with_more(world, word):
  found = Words(["a"])
  found.word = word
  return world.module("mytask", MAKER % "it.word").make(found)


def cached_function(world, word):
  text = "import functools\n@functools.lru_cache\n"
  helper = world.module("helper", f"{text}def word(): return '{word}'\n")
  return world.module("mytask", MAKER % "it()").make(helper.word)


def keyword(world, word):
  text = "def step(ds, word=''):\n  return ds.map("
  text += "lambda x: {'inputs': x + word, 'targets': x})\n"
  return functools.partial(world.module("mytask", text).step, word=word)


CASES = (
  *(imported_function, imported_module, module_of_a_cell, global_from_outside),
  *(environment_at_import, environment_inside, file_by_a_path_made_up),
  *(base_class, class_of_a_cell, long_chain_in_a_cell, order_of_arguments),
  *(bound_builtin, tensor, generator_of_random_numbers, list_with_more),
  *(cached_function, keyword),
)


def key_of(task):
  return prepare._key(task, "train", LENGTHS, False)


@pytest.mark.parametrize("make", CASES)
def test_other_rows_are_another_store(make, world):
  found, keys = [], []
  for word in ("x", "y", "x"):
    task = world.task(make(world, word))
    found.append(seqios(task))
    keys.append(key_of(task))
  assert found[0] == found[2] != found[1]
  assert keys[0] == keys[2] != keys[1] and None not in keys


def test_a_vocabulary_s_own_helper_is_a_part_of_it(world):
  keys = []
  for by in (0, 1):
    world.module("helper", f"BY = {by}\n")
    text = "import helper, seqio\nclass V(seqio.ByteVocabulary):\n"
    text += "  def _encode_tf(self, s):\n"
    text += "    return super()._encode_tf(s) + helper.BY\n"
    vocabulary = world.module("mytask", text).V(0)
    step = world.module("steps", STEP % "''").step
    keys.append(key_of(world.task(step, vocabulary=vocabulary)))
  assert keys[0] != keys[1]


def test_what_does_not_show_itself_is_prepared_for_this_process_alone(world):
  make = world.module("mytask", MAKER % "it.lookup(x)").make
  table = tf.lookup.StaticHashTable(
    tf.lookup.KeyValueTensorInitializer(["one"], ["1"]), "?"
  )
  assert key_of(world.task(make(table))) is None
  # Nor does a chain that has no end.
  text = "".join(f"def f{i + 1}(x): return f{i}(x)\n" for i in range(900))
  text = "def f0(x): return x\n" + text + STEP % "f900(x)"
  assert key_of(world.task(world.cell(text).step)) is None
  # A logger beside the code of a file is no reason.
  text = "import logging\nlog = logging.getLogger()\nimport threading\n"
  text += "lock = threading.Lock()\n" + STEP % "str(lock is None)"
  assert key_of(world.task(world.module("other", text).step)) is not None


def test_a_function_that_renames_columns_is_a_part_of_the_task(world):
  path = world.file("rows.tsv", "t\tu\tlabel\none\teins\tyes\ntwo\tzwei\tno\n")

  def task(column):
    def rename(row_fn):
      return lambda row: row_fn({"text": row[column], "label": row["label"]})

    return head_tasks.classification(
      sources.Files({"train": path}),
      "{text}",
      "label",
      BYTES,
      ("yes", "no"),
      name="renamed",
      rename=rename,
    )

  inputs = []
  for column in ("t", "u", "t"):
    config = pipeline.DatasetConfig(
      task(column), {"inputs": 16}, "train", 2, shuffle=False
    )
    batch = next(pipeline.train_batches(config, 384))
    inputs.append(BYTES.decode(batch["encoder_input_tokens"][0].tolist()))
  assert inputs == ["one", "eins", "one"]


def test_a_file_that_changes_while_it_is_prepared_is_a_line(
  world, monkeypatch, tmp_path
):
  path = world.file("lines.txt", "one\ntwo\n")
  task = world.task(world.module("mytask", STEP % "''").step)
  whole = prepare._write

  def write(*arguments):
    whole(*arguments)
    with open(path, "a") as file:
      file.write("three\n")

  monkeypatch.setattr(prepare, "_write", write)
  cache = str(tmp_path / "cache")
  with pytest.raises(UserError, match="changed while they were prepared"):
    prepare.prepared(task, "train", cache, LENGTHS)
  monkeypatch.undo()
  store = prepare.prepared(task, "train", cache, LENGTHS)
  assert len(store) == 3


def test_a_factory_s_missing_arguments_are_named():
  with pytest.raises(UserError, match="classification needs inputs and label"):
    head_tasks.classification(source=None, vocabulary=BYTES)


def test_an_object_that_is_made_of_a_class_of_iterators_is_known():
  class Counting:
    def __iter__(self):
      return self

    def __next__(self):
      return 1

  class Holder:
    def __reduce_ex__(self, _):
      return Counting, ()

  assert identity.of(Holder()) == identity.of(Holder())
