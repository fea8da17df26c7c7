"""Tasks of SeqIO's own in the store: what SeqIO itself gives, never of before.

The oracle is `seqio.Task.get_dataset`, in the same process.
"""

import functools
import linecache
import types

import numpy as np
import pytest
import seqio
import tensorflow as tf

from fat5_jax.data import opening, pipeline
from fat5_jax.errors import UserError

BYTES = seqio.ByteVocabulary(0)
LENGTHS = {"inputs": 48, "targets": 12}
TOKENIZE = seqio.preprocessors.tokenize
END = seqio.preprocessors.append_eos
END_AFTER_TRIM = seqio.preprocessors.append_eos_after_trim
PLACEHOLDER = seqio.CacheDatasetPlaceholder()


def both_sides(ds):
  return ds.map(lambda line: {"inputs": line, "targets": line})


def add(source, steps, features=None, name="own"):
  seqio.TaskRegistry.remove(name)
  features = features or {
    side: seqio.Feature(BYTES, add_eos=True) for side in ("inputs", "targets")
  }
  return seqio.TaskRegistry.add(
    name, source=source, preprocessors=steps, output_features=features
  )


def config_of(task, **changes):
  settings = {"batch_size": 2, "task_feature_lengths": LENGTHS}
  return pipeline.DatasetConfig(
    task, split="train", shuffle=False, **(settings | changes)
  )


def ours(task, **changes):
  """The inputs of the first batch, without their padding."""
  batches = pipeline.train_batches(config_of(task, **changes), 384)
  return [
    row[row > 0].tolist() for row in next(batches)["encoder_input_tokens"]
  ]


def seqios(task, count=2):
  rows = task.get_dataset(LENGTHS, "train", shuffle=False)
  return [r["inputs"].tolist() for r in rows.take(count).as_numpy_iterator()]


@pytest.fixture
def lines(tmp_path):
  path = tmp_path / "lines.txt"
  path.write_text("header\none\ntwo\nthree\n")
  return str(path)


# ---- What is prepared again --------------------------------------------------


class Shifted(seqio.ByteVocabulary):
  def __init__(self, by):
    super().__init__(0)
    self.by = by

  def _encode_tf(self, s):
    return super()._encode_tf(s) + self.by


def skipping(lines, number):
  source = seqio.TextLineDataSource({"train": lines}, skip_header_lines=number)
  return add(source, [both_sides, TOKENIZE, END])


def read_by(lines, number):
  read = lambda path: tf.data.TextLineDataset(path).map(
    lambda line: tf.strings.join([line, "ab"[number]])
  )
  source = seqio.FileDataSource(read, {"train": lines})
  return add(source, [both_sides, TOKENIZE, END])


def ended(lines, number):
  features = {
    side: seqio.Feature(BYTES, add_eos=bool(number))
    for side in ("inputs", "targets")
  }
  source = seqio.TextLineDataSource({"train": lines})
  return add(source, [both_sides, TOKENIZE, END], features)


def spoken_by(lines, number):
  features = {
    side: seqio.Feature(Shifted(50 * number)) for side in ("inputs", "targets")
  }
  source = seqio.TextLineDataSource({"train": lines})
  return add(source, [both_sides, TOKENIZE, END], features)


def step_of_a_notebook(body, name):
  """A function whose source lies in no file, as of a cell."""
  text = (
    "import tensorflow as tf\n"
    f"def helper(line):\n  return {body}\n"
    "def step(ds):\n"
    "  return ds.map(lambda line: {'inputs': helper(line), 'targets': line})\n"
  )
  linecache.cache[name] = (len(text), None, text.splitlines(True), name)
  module = types.ModuleType("__main__")
  exec(compile(text, name, "exec"), module.__dict__)
  return module.step


def typed(lines, number):
  body = ("tf.strings.lower(line)", "tf.strings.upper(line)")[number]
  step = step_of_a_notebook(body, f"/tmp/ipykernel_7/{number}.py")
  return add(seqio.TextLineDataSource({"train": lines}), [step, TOKENIZE, END])


def partly(lines, number):
  def joined(ds, tail):
    return ds.map(
      lambda line: {"inputs": tf.strings.join([line, tail]), "targets": line}
    )

  step = functools.partial(joined, tail="ab"[number])
  return add(seqio.TextLineDataSource({"train": lines}), [step, TOKENIZE, END])


@pytest.mark.parametrize(
  "make", [skipping, read_by, ended, spoken_by, typed, partly]
)
def test_another_source_step_or_vocabulary_prepares_again(make, lines):
  found, prints, keys = [], [], []
  for number in (0, 1, 0):
    task = make(lines, number)
    assert ours(task) == seqios(task)
    found.append(ours(task))
    prints.append(config_of(task).fingerprint())
    keys.append(opening.stores(config_of(task))[0].facts["key"])
  assert found[0] == found[2] != found[1]
  # A run that goes on is told, and what was there is used again.
  assert prints[0] == prints[2] != prints[1]
  assert keys[0] == keys[2] != keys[1] and None not in keys


def test_other_defaults_of_a_record_prepare_again(tmp_path):
  path = str(tmp_path / "rows.tfrecord")
  with tf.io.TFRecordWriter(path) as writer:
    for _ in range(3):
      writer.write(tf.train.Example().SerializeToString())

  def cast(ds):
    return ds.map(
      lambda row: {
        side: tf.cast(row["inputs"], tf.int32) for side in ("inputs", "targets")
      }
    )

  for default in (5, 12):
    fields = {
      "inputs": tf.io.FixedLenFeature([1], tf.int64, default_value=[default])
    }
    task = add(seqio.TFExampleDataSource({"train": path}, fields), [cast])
    assert ours(task) == [[default]] * 2


def test_a_position_in_other_data_is_told(tmp_path, capsys):
  """What a function makes is known by its number of examples alone."""
  task = lambda count: add(
    seqio.FunctionDataSource(
      lambda split,
      shuffle_files,
      seed=None: tf.data.Dataset.from_tensor_slices(
        [f"{i}" for i in range(count)]
      ),
      ["train"],
    ),
    [both_sides, TOKENIZE, END],
  )
  batches = pipeline.train_batches(config_of(task(9)), 384)
  next(batches)
  again = pipeline.train_batches(config_of(task(9)), 384, batches.position)
  assert (
    BYTES.decode(next(again)["encoder_input_tokens"][0][:1].tolist()) == "2"
  )
  again = pipeline.train_batches(config_of(task(7)), 384, batches.position)
  assert (
    BYTES.decode(next(again)["encoder_input_tokens"][0][:1].tolist()) == "0"
  )
  assert "had 9 examples" in capsys.readouterr().err


# ---- What comes out ----------------------------------------------------------


def with_more(**more):
  values = {name: tf.constant(value) for name, value in more.items()}
  return lambda ds: ds.map(
    lambda line: {"inputs": line, "targets": line} | values
  )


@pytest.mark.parametrize(
  "value,use",
  [
    (np.int32(3), lambda row: row["inputs"] + row["more"]),
    (np.float32(2), lambda row: row["inputs"] * tf.cast(row["more"], "int32")),
    (
      np.array([[10, 20], [30, 40]], np.int32),
      lambda row: row["more"][0] + tf.size(row["inputs"]),
    ),
    (np.zeros([0, 2], np.int32), lambda row: tf.shape(row["more"]) + 3),
    (
      b"\xff\xfe\x00\x80",
      lambda row: 3 + tf.cast(tf.io.decode_raw(row["more"], "uint8"), "int32"),
    ),
    (
      [["a", "bc"], ["d", ""]],
      lambda row: 3 + tf.reshape(tf.strings.length(row["more"]), [-1]),
    ),
    (["a", "bcd"], lambda row: 3 + tf.strings.length(row["more"])),
  ],
)
def test_features_come_back_as_they_were(value, use, lines):
  """Through the store, to a step that every epoch does."""

  @seqio.map_over_dataset
  def later(row):
    return {"inputs": use(row), "targets": row["targets"]}

  steps = [with_more(more=value), TOKENIZE, PLACEHOLDER, later, END_AFTER_TRIM]
  task = add(seqio.TextLineDataSource({"train": lines}), steps)
  assert ours(task) == seqios(task)


def test_text_that_is_kept_beside_tokens_is_whole(tmp_path):
  path = tmp_path / "long.txt"
  path.write_text("long " * 30_000 + "\n" + "short\n")
  task = add(
    seqio.TextLineDataSource({"train": str(path)}), [both_sides, TOKENIZE, END]
  )
  (store,) = opening.stores(config_of(task))
  kept = store.read([0])[0]["targets_pretokenized"]
  assert kept == b"long " * 30_000


# ---- What is refused, or told ------------------------------------------------


def fixed(**values):
  made = {name: tf.constant(value) for name, value in values.items()}
  return lambda ds: ds.map(lambda line: made)


@pytest.mark.parametrize(
  "steps,text",
  [
    ([fixed(inputs=[5.7], targets=[7])], "inputs is float32 after its steps"),
    ([fixed(inputs=[5])], "gives? inputs, and no 'targets'"),
    ([fixed(inputs=[-1], targets=[7])], "inputs holds token id -1"),
    ([fixed(inputs=[5], targets=[65_541])], "targets holds token id 65541"),
    (
      [
        lambda ds: ds.map(
          lambda line: {
            "inputs": tf.ragged.constant([[1], [2, 3]]),
            "targets": tf.constant([1]),
          }
        ),
        PLACEHOLDER,
      ],
      "inputs is ragged",
    ),
    (
      [
        both_sides,
        TOKENIZE,
        PLACEHOLDER,
        lambda ds: ds.filter(lambda row: tf.size(row["inputs"]) > 100),
      ],
      "leave none of its 4 examples",
    ),
  ],
)
def test_what_is_no_example_is_a_line(steps, text, lines):
  task = add(seqio.TextLineDataSource({"train": lines}), steps)
  with pytest.raises(UserError, match=text):
    ours(task)


def test_a_task_of_targets_alone_is_a_line(lines):
  task = add(
    seqio.TextLineDataSource({"train": lines}),
    [lambda ds: ds.map(lambda line: {"targets": line}), TOKENIZE, END],
    {"targets": seqio.Feature(BYTES)},
  )
  with pytest.raises(UserError, match="has no inputs"):
    ours(task, task_feature_lengths={"targets": 8})


def test_a_damaged_record_file_is_a_line(tmp_path):
  path = tmp_path / "rows.tfrecord"
  path.write_bytes(b"no record at all, but long enough")
  task = add(
    seqio.TFExampleDataSource(
      {"train": str(path)}, {"line": tf.io.FixedLenFeature([], tf.string)}
    ),
    [lambda ds: ds.map(lambda row: row["line"]), both_sides, TOKENIZE],
  )
  with pytest.raises(UserError, match="after 0 examples: corrupted record"):
    ours(task)


def test_what_is_drawn_without_a_seed_is_told(lines, capsys):
  draw = lambda line: {
    "inputs": tf.strings.as_string(tf.random.uniform([], 0, 99, tf.int32)),
    "targets": line,
  }
  steps = [lambda ds: ds.map(draw), TOKENIZE, END]
  ours(add(seqio.TextLineDataSource({"train": lines}), steps))
  assert "draws random numbers without a seed" in capsys.readouterr().err


def test_a_mixture_without_rates_is_a_line(lines):
  task = skipping(lines, 0)
  both = seqio.Mixture("nothing", [(task, 0.0)])
  with pytest.raises(UserError, match="none of its tasks has a rate above 0"):
    ours(both)
