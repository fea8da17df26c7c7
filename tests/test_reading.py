"""Which example comes next: prepared once, in an order of its own, resumed.

The oracles are SeqIO's own tokeniser and feature converter, and counting.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time

from conftest import ROOT
import numpy as np
import pytest
import seqio
import tensorflow as tf

from fat5_jax.data import (
  examples,
  files,
  head_tasks,
  pipeline,
  seqio_source,
  seqio_tasks,
  sources,
  tasks,
)
from fat5_jax.data.reading import buckets, order, packing, prepare, store
from fat5_jax.errors import UserError

BYTES = seqio.ByteVocabulary(0)
LENGTHS = {"inputs": 48, "targets": 12}
SHARD = "examples-00000.array_record"


def rows(count, seed=0, most=40):
  rng = np.random.default_rng(seed)
  return [
    {"text": "x" * int(rng.integers(1, most)) + f" {i}", "label": f"l{i}"}
    for i in range(count)
  ]


def text_task(folder, count=300, name="reading", seed=0, **options):
  path = folder / f"{name}.jsonl"
  text = "".join(json.dumps(r) + "\n" for r in rows(count, seed))
  # Another process may be reading it.
  if not path.exists() or path.read_text() != text:
    path.write_text(text)
  return tasks.text_to_text(
    sources.Files({"train": str(path)}),
    "{text}",
    "{label}",
    BYTES,
    name=name,
    **options,
  )


def classes_task(folder, count=300):
  path = folder / "classes.jsonl"
  rng = np.random.default_rng(1)
  made = [
    {
      "a": "x" * int(rng.integers(1, 60)),
      "b": f"{i}",
      "y": "no yes".split()[i % 2],
    }
    for i in range(count)
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in made))
  return head_tasks.classification(
    sources.Files({"train": str(path)}),
    ("{a}", "{b}"),
    "y",
    BYTES,
    ("yes", "no"),
    name="reading_classes",
  )


def random_task(folder, count=300):
  """A task of SeqIO's own, whose last step draws random numbers."""
  path = folder / "lines.txt"
  path.write_text("".join(f"{'y' * (i % 30)}{i}\n" for i in range(count)))

  @seqio.map_over_dataset(num_seeds=1)
  def noise(row, seed):
    kept = tf.random.stateless_uniform(tf.shape(row["inputs"]), seed) < 0.7
    return {
      "inputs": tf.boolean_mask(row["inputs"], kept),
      "targets": row["targets"],
    }

  seqio.TaskRegistry.remove("reading_noise")
  return seqio.TaskRegistry.add(
    "reading_noise",
    source=seqio.TextLineDataSource({"train": str(path)}),
    preprocessors=[
      lambda ds: ds.map(lambda line: {"inputs": line, "targets": line}),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      noise,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={
      name: seqio.Feature(BYTES, add_eos=True) for name in ("inputs", "targets")
    },
  )


def dataset(task, **changes):
  settings = {
    "mixture_or_task_name": task,
    "task_feature_lengths": LENGTHS,
    "split": "train",
    "batch_size": 8,
    "shuffle": True,
    "pack": True,
  }
  return pipeline.DatasetConfig(**{**settings, **changes})


def equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    assert np.array_equal(a[key], b[key]), key


def texts_of(batch):
  """The numbers of the rows that a batch holds, by their targets."""
  found = []
  segments = batch.get("decoder_segment_ids")
  for i, row in enumerate(batch["decoder_target_tokens"]):
    ids = segments[i] if segments is not None else (row > 0).astype(int)
    for part in range(1, ids.max(initial=0) + 1):
      text = BYTES.decode(row[ids == part].tolist())
      found.append(int(text.removeprefix("l")))
  return found


# ---- What an example is ------------------------------------------------------


@pytest.mark.parametrize("length", [4, 48, None])
def test_examples_are_those_of_seqio(length, tmp_path):
  """Our own tokens and cuts against SeqIO's tokeniser and its end."""
  task = text_task(tmp_path, 50)
  lengths = length and {"inputs": length, "targets": length}
  oracle = tf.data.Dataset.from_generator(
    lambda: iter(
      {"inputs": r["text"], "targets": r["label"]} for r in rows(50)
    ),
    output_signature=seqio_source.TEXT_TO_TEXT,
  )
  for step in (
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ):
    kwargs = {
      "sequence_length": lengths,
      "output_features": task.output_features,
    }
    step = seqio.utils.add_kwargs_to_transform(step, **kwargs)
    oracle = step(oracle)
  expected = list(oracle.as_numpy_iterator())
  ours = list(examples.cut_to(task, "train", lengths))
  through_seqio = list(
    task.get_dataset(lengths, "train", shuffle=False).as_numpy_iterator()
  )
  assert len(ours) == len(expected) == len(through_seqio) == 50
  for a, b, c in zip(ours, expected, through_seqio):
    for name in ("inputs", "targets"):
      assert a[name].tolist() == b[name].tolist() == c[name].tolist()
      assert a[f"{name}_pretokenized"].encode() == b[f"{name}_pretokenized"]
      assert b[f"{name}_pretokenized"] == c[f"{name}_pretokenized"]


def test_sentencepiece_ids_are_those_of_seqio(shared_data):
  path = os.path.join(shared_data, "vocab_t5", "spiece.model")
  vocabulary = seqio.SentencePieceVocabulary(path, 100)
  folder = os.path.join(shared_data, "sum_orangesum_fr")
  texts = ["", " ", "a  b", "é\u00a0!", "<extra_id_0> x", "\u200b", "日本 語"]
  for name in sorted(os.listdir(folder))[:4]:
    with open(os.path.join(folder, name), "rb") as file:
      texts += file.read(20_000).decode("utf-8", "ignore").split("\n")
  from fat5_jax.data import layouts

  expected = [vocabulary.encode_tf(text).numpy().tolist() for text in texts]
  assert layouts.encode_all(vocabulary, texts) == expected


def test_a_packed_row_is_what_seqio_packs(tmp_path):
  """Each row of ours alone through SeqIO's converter, one row of its."""
  task = text_task(tmp_path)
  config = dataset(task)
  found = {
    int(e["targets_pretokenized"][1:]): e
    for e in examples.cut_to(task, "train", LENGTHS)
  }
  batch = next(pipeline.train_batches(config, 384))
  for number in range(8):
    one = {key: value[number : number + 1] for key, value in batch.items()}
    group = [{name: found[i][name] for name in LENGTHS} for i in texts_of(one)]
    assert len(group) > 1 or len(group[0]["inputs"]) > 20
    spec = {name: tf.TensorSpec([None], tf.int32) for name in LENGTHS}
    ds = tf.data.Dataset.from_generator(
      lambda group=group: iter(group), output_signature=spec
    )
    convert = seqio.EncDecFeatureConverter(pack=True)
    (expected,) = convert(ds, LENGTHS).as_numpy_iterator()
    assert expected.keys() == one.keys()
    for key in one:
      assert np.array_equal(one[key][0], expected[key]), key


def test_a_padded_row_is_what_seqio_pads(tmp_path):
  task = text_task(tmp_path)
  batch = next(pipeline.train_batches(dataset(task, pack=False), 384))
  found = {
    int(e["targets_pretokenized"][1:]): e
    for e in examples.cut_to(task, "train", LENGTHS)
  }
  group = [{name: found[i][name] for name in LENGTHS} for i in texts_of(batch)]
  spec = {name: tf.TensorSpec([None], tf.int32) for name in LENGTHS}
  ds = tf.data.Dataset.from_generator(
    lambda: iter(group), output_signature=spec
  )
  expected = list(
    seqio.EncDecFeatureConverter(pack=False)(ds, LENGTHS).as_numpy_iterator()
  )
  for number, row in enumerate(expected):
    assert row.keys() == batch.keys()
    for key in row:
      assert np.array_equal(batch[key][number], row[key]), key


# ---- The order ---------------------------------------------------------------


@pytest.mark.parametrize("table", [True, False])
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(
  table, monkeypatch
):
  count = 20_000
  monkeypatch.setattr(order, "_TABLE", count if table else 0)
  one = order.Order(count, seed=3)
  chunks = [one.chunk(k) for k in range(3 * count // order.CHUNK + 1)]
  epochs = np.concatenate([epochs for epochs, _ in chunks])
  numbers = np.concatenate([numbers for _, numbers in chunks])
  ranks = []
  for epoch in range(3):
    part = numbers[epochs == epoch][:count]
    assert np.array_equal(np.sort(part), np.arange(count))
    ranks.append(np.argsort(part))
  # Of independent orders it is 1 / sqrt(count).
  for a, b in itertools.combinations([np.arange(count), *ranks], 2):
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(count)


@pytest.mark.parametrize("count", [*range(2, 9), 63, 64, 65, 1000])
def test_a_permutation_without_a_table_is_one(count):
  keys = np.random.default_rng(count).integers(
    1 << 63, size=10, dtype=np.uint64
  )
  found = order.shuffled(np.arange(count), count, keys)
  assert np.array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("table", [True, False])
def test_a_row_comes_at_every_place_equally_often(table, monkeypatch):
  """Chi-square over 500 epochs: of a row's places, and of who follows whom."""
  count, epochs = 1 << 10, 500
  monkeypatch.setattr(order, "_TABLE", count if table else 0)
  one = order.Order(count, seed=1)
  found = np.stack([one.chunk(k)[1] for k in range(epochs)])
  places = np.argsort(found, axis=1)
  for values in (
    places[:, :64] * 16 // count,
    # The distance to the row that is next in the file.
    (places[:, 1:65] - places[:, :64]) % count * 16 // count,
  ):
    seen = np.bincount(values.ravel(), minlength=16)
    expected = values.size / 16
    # 15 degrees of freedom; 50 is passed once in 100,000.
    assert ((seen - expected) ** 2 / expected).sum() < 50


def test_two_tasks_of_one_length_have_orders_of_their_own(tmp_path):
  one, two = text_task(tmp_path, 200), text_task(tmp_path, 200, "reading_2")
  both = seqio.Mixture("reading_twice", [(one, 1.0), (two, 1.0)])
  batches = pipeline.train_batches(dataset(both, pack=False), 384)
  seen = [texts_of(next(batches)) for _ in range(20)]
  pairs = np.array(seen).reshape(-1, 2)
  assert (pairs[:, 0] == pairs[:, 1]).mean() < 0.1


def test_without_a_seed_the_order_is_the_files():
  epochs, numbers = order.Order(10, None).chunk(0)
  assert numbers[:12].tolist() == [*range(10), 0, 1]
  assert epochs[:12].tolist() == [0] * 10 + [1, 1]


@pytest.mark.parametrize("rates", [[3, 1], [5.5, 2.25, 0.01], [1, 1, 1, 1]])
def test_turns_keep_to_their_rates(rates):
  turns = order.Turns(rates)
  found = np.concatenate([turns.chunk(k) for k in range(40)])
  for number, rate in enumerate(rates):
    share = rate / sum(rates)
    seen = np.cumsum(found == number)
    expected = share * np.arange(1, len(found) + 1)
    # Never more than a turn or two of each behind.
    assert np.abs(seen - expected).max() <= len(rates)


@pytest.mark.parametrize("how", ["pack", "pad", "buckets"])
def test_hosts_share_out_the_same_batches(how, tmp_path):
  task = text_task(tmp_path)
  config = dataset(
    task, pack=how == "pack", buckets=3 if how == "buckets" else None
  )
  make = lambda own: pipeline.train_batches(config, 384, own=own, multiple=4)
  whole = make(None)
  for hosts in (2, 4):
    parts = [
      make(lambda n, h=host, of=hosts: (n * h // of, n * (h + 1) // of))
      for host in range(hosts)
    ]
    whole = make(None)
    for _ in range(30):
      batch, shares = next(whole), [next(part) for part in parts]
      assert {part.rows for part in parts} == {whole.rows}
      joined = {
        key: np.concatenate([share[key] for share in shares]) for key in batch
      }
      equal(batch, joined)
      positions = [json.dumps(part.position) for part in parts]
      assert set(positions) == {json.dumps(whole.position)}


# ---- To go on ----------------------------------------------------------------


def configs(folder):
  """One of every sort, by name."""
  one = text_task(folder)
  other = text_task(folder, 37, "reading_other", 5)
  mixture = seqio.Mixture("reading_both", [(one, 3.0), (other, 1.0)])
  classes = classes_task(folder)
  return {
    "packed": dataset(one),
    "padded": dataset(one, pack=False),
    "bucketed": dataset(one, pack=False, buckets=4),
    "given buckets": dataset(one, pack=False, buckets=[16, (32, 8)]),
    "mixture": dataset(mixture),
    "mixture in buckets": dataset(mixture, pack=False, buckets=4),
    "noise": dataset(random_task(folder)),
    "stream": dataset(one, stream=True),
    "stream in order": dataset(one, stream=True, shuffle=False),
    "head": dataset(classes, pack=False, task_feature_lengths={"inputs": 64}),
    "head in buckets": dataset(
      classes, pack=False, buckets=4, task_feature_lengths={"inputs": 64}
    ),
  }


NAMES = (
  *("packed", "padded", "bucketed", "given buckets", "mixture"),
  *("mixture in buckets", "noise", "stream", "stream in order", "head"),
  "head in buckets",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_where_it_was(name, tmp_path):
  """From ten random batches of an uncut stream, over several epochs."""
  config = configs(tmp_path)[name]
  whole = pipeline.train_batches(config, 384)
  batches, positions = [], []
  for _ in range(120):
    batches.append(next(whole))
    # As a checkpoint keeps it.
    positions.append(json.dumps(whole.position))
  assert config.stream or max(whole.epochs.values()) > 2
  rng = np.random.default_rng(0)
  for start in rng.integers(0, 110, 10):
    again = pipeline.train_batches(config, 384, json.loads(positions[start]))
    for number in range(start + 1, start + 8):
      equal(batches[number], next(again))
      assert json.dumps(again.position) == positions[number]


@pytest.mark.parametrize("name", ["packed", "padded", "bucketed"])
def test_every_example_is_read_once_an_epoch(name, tmp_path):
  """But for the few that wait for their row when the epoch ends."""
  config = configs(tmp_path)[name]
  batches = pipeline.train_batches(config, 384)
  counts = np.zeros(300, int)
  while batches.epochs.get("reading", 0) < 5:
    for number in texts_of(next(batches)):
      counts[number] += 1
  assert counts.min() >= 4 and counts.max() <= 6 and counts.sum() >= 1400


def _lines(batch):
  ids, targets = batch["decoder_segment_ids"], batch["decoder_target_tokens"]
  for segments, row in zip(ids, targets):
    for part in range(1, segments.max(initial=0) + 1):
      yield BYTES.decode(row[segments == part].tolist())


def test_noise_is_another_in_every_epoch(tmp_path):
  config = dataset(
    random_task(tmp_path, 20), pack=False, shuffle=False, batch_size=20
  )
  batches = pipeline.train_batches(config, 384)
  first, second = next(batches), next(batches)
  key = "decoder_target_tokens"
  assert sorted(map(tuple, first[key])) == sorted(map(tuple, second[key]))
  key = "encoder_input_tokens"
  assert sorted(map(tuple, first[key])) != sorted(map(tuple, second[key]))


def test_without_a_placeholder_random_steps_are_done_again(tmp_path):
  """SeqIO would cache none of it; we keep what is the same in every epoch."""
  task = random_task(tmp_path, 20)
  steps = [s for s in task.preprocessors if not hasattr(s, "required")]
  assert len(steps) == len(task.preprocessors) - 1
  seqio.TaskRegistry.remove("reading_bare")
  bare = seqio.TaskRegistry.add(
    "reading_bare",
    source=task.source,
    preprocessors=steps,
    output_features=task.output_features,
  )
  once, again = seqio_tasks.split_steps(bare)
  assert (once, again) == (steps[:2], steps[2:])
  batches = [
    next(pipeline.train_batches(dataset(t, batch_size=4), 384))
    for t in (task, bare)
  ]
  equal(*batches)


def test_a_step_that_is_changed_prepares_again(tmp_path, monkeypatch):
  """Its module's text counts, of what a decorator wraps too."""
  (tmp_path / "lines.txt").write_text("one\ntwo\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  found = []
  for number, helper in enumerate(["x + 'a'", "x + 'b'"]):
    name = f"reading_steps_{number}"
    (tmp_path / f"{name}.py").write_text(
      "import seqio\n"
      f"def helper(x):\n  return {helper}\n"
      "@seqio.map_over_dataset\n"
      "def step(x):\n  return {'inputs': helper(x), 'targets': x}\n"
    )
    seqio.TaskRegistry.remove("reading_steps")
    task = seqio.TaskRegistry.add(
      "reading_steps",
      source=seqio.TextLineDataSource({"train": str(tmp_path / "lines.txt")}),
      preprocessors=[
        importlib.import_module(name).step,
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
      ],
      output_features={
        n: seqio.Feature(BYTES, add_eos=True) for n in ("inputs", "targets")
      },
    )
    config = dataset(task, pack=False, shuffle=False, batch_size=2)
    batch = next(pipeline.train_batches(config, 384))
    row = batch["encoder_input_tokens"][0]
    found.append(BYTES.decode(row[row > 1].tolist()))
  assert found == ["onea", "oneb"]


# ---- What goes together ------------------------------------------------------


def fill(plans, lengths, feature=0):
  """The share of real tokens of a feature."""
  used = room = 0
  for plan in plans:
    room += len(plan.rows) * plan.lengths[feature]
    used += sum(place[3 + feature] for row in plan.rows for place in row)
  return used / room


def plans_of(planner, sizes):
  for number, size in enumerate(sizes):
    planner.add((0, 0, number), size)
    while (plan := planner.take()) is not None:
      yield plan
  yield from planner.rest()


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_too_full_and_none_is_lost(seed):
  rng = np.random.default_rng(seed)
  sizes = np.stack(
    [rng.integers(1, 100, 3000), rng.geometric(0.1, 3000).clip(1, 30)], 1
  )
  shapes = buckets.with_rows(buckets.choose(sizes, (99, 30), 5), 4096, 4)
  for planner in (
    packing.Packing((99, 30), 16),
    packing.Padding((99, 30), 16),
    packing.Buckets(shapes),
  ):
    seen = []
    for plan in plans_of(planner, sizes):
      for row in plan.rows:
        used = np.sum([place[3:] for place in row], axis=0)
        assert (used <= plan.lengths).all()
        seen += [place[2] for place in row]
    assert sorted(seen) == list(range(3000))


def test_buckets_of_other_sizes_go_on_and_lose_nothing():
  """As after a mesh has changed: the rows of a batch are a multiple of it."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 41, (3000, 1))
  lengths = [(10,), (20,), (40,)]
  few, seen = packing.Buckets([(n, 31) for n in lengths]), []
  for number, size in enumerate(sizes.tolist()):
    if number in (1000, 2000):
      state = json.loads(json.dumps(few.state()))
      rows = 16 if number == 1000 else 64
      few = packing.Buckets([(n, rows) for n in lengths])
      few.restore(state)
    few.add((0, 0, number), size)
    while (plan := few.take()) is not None:
      seen += [place[2] for row in plan.rows for place in row]
  seen += [p[2] for plan in few.rest() for row in plan.rows for p in row]
  assert sorted(seen) == list(range(3000))
  assert few.take() is None


@pytest.mark.parametrize(
  "given,text",
  [
    (0, "from 1 to 64"),
    (True, "from 1 to 64"),
    (65, "from 1 to 64"),
    (2.5, "from 1 to 64"),
    ("4", "from 1 to 64"),
    ([], "from 1 to 64"),
    ([16.5], "16.5 must be a number of tokens or a pair"),
    ([-3], "-3 must be"),
    ([(32, 8, 4)], r"\(32, 8, 4\) must be"),
    ([100], "100 is more than TASK_FEATURE_LENGTHS"),
  ],
)
def test_buckets_that_are_none_are_told(given, text, tmp_path):
  config = dataset(text_task(tmp_path), pack=False, buckets=given)
  with pytest.raises(UserError, match=text):
    pipeline.train_batches(config, 384)


def test_a_pair_is_no_bucket_of_a_head(tmp_path):
  config = dataset(
    classes_task(tmp_path),
    pack=False,
    buckets=[(16, 4)],
    task_feature_lengths={"inputs": 64},
  )
  with pytest.raises(UserError, match=r"\(16, 4\) must be a number of tokens$"):
    pipeline.train_batches(config, 384)


def test_a_bucket_that_is_given_twice_is_one(tmp_path):
  config = dataset(text_task(tmp_path), pack=False, buckets=[16, (16, 12)])
  stream = pipeline.train_batches(config, 384)
  assert "batches of 2 shapes" in stream.about[-1]


def test_packing_fills_rows():
  rng = np.random.default_rng(0)
  sizes = rng.integers(20, 300, 20_000)[:, None]
  assert fill(plans_of(packing.Packing((512,), 64), sizes), None) > 0.97


def test_a_lonely_example_does_not_wait_for_ever():
  """Rows that nothing fits into are closed before one that something might."""
  planner = packing.Packing((100,), 1, patience=5000)
  planner.add((0, 0, 0), (10,))
  seen = []
  for number in range(1, 5100):
    planner.add((0, 0, number), (95,))
    while (plan := planner.take()) is not None:
      seen += [place[2] for row in plan.rows for place in row]
  assert 0 in seen


def test_bucket_shapes_are_near_the_best_that_there_is():
  """One feature, so that the best is found by dynamic programming."""
  rng = np.random.default_rng(0)
  sizes = np.minimum(rng.lognormal(3.3, 0.6, 5000).astype(int) + 2, 128)
  found = buckets.choose(sizes[:, None], (128,), 4)
  assert found[-1] == (128,) and len(found) <= 4
  ends = [length for (length,) in found]
  cost = sum(min(e for e in ends if e >= s) for s in sizes)
  candidates = list(range(8, 129, 8))
  best = {0: 0}
  for _ in range(4):
    best = {
      end: min(
        total + end * int(((sizes > begin) & (sizes <= end)).sum())
        for begin, total in best.items()
        if begin < end or begin == end == 0
      )
      for end in [*candidates]
      if any(begin < end for begin in best)
    } | {0: 0}
  assert cost <= 1.03 * best[128]


@pytest.mark.parametrize(
  "given,text",
  [
    ({"pack": True, "buckets": 3}, "BUCKETS takes the place of PACK"),
    ({"pack": False, "buckets": 3, "batch_size": 1}, "raise BATCH_SIZE"),
  ],
)
def test_settings_that_do_not_fit_are_told(given, text, tmp_path):
  config = dataset(text_task(tmp_path), **given)
  with pytest.raises(UserError, match=text):
    pipeline.train_batches(config, 384, multiple=64 if "raise" in text else 1)


# ---- The store ---------------------------------------------------------------


def stores(folder):
  return sorted(name for name in os.listdir(folder) if name[0] != ".")


def test_a_split_is_prepared_once_and_again_when_it_is_another(tmp_path):
  cache = tmp_path / "cache"
  config = dataset(text_task(tmp_path), cache_dir=str(cache))
  next(pipeline.train_batches(config, 384))
  (name,) = stores(cache)
  changed = os.stat(cache / name / "index.json").st_mtime_ns
  again = dataset(text_task(tmp_path), cache_dir=str(cache), pack=False)
  next(pipeline.train_batches(again, 384))
  assert stores(cache) == [name]
  assert os.stat(cache / name / "index.json").st_mtime_ns == changed
  # Another template, other rows, another vocabulary.
  tasks.text_to_text(
    sources.Files({"train": str(tmp_path / "reading.jsonl")}),
    "say {text}",
    "{label}",
    BYTES,
    name="reading",
  )
  for task in (
    seqio.get_mixture_or_task("reading"),
    text_task(tmp_path, 301),
  ):
    next(pipeline.train_batches(dataset(task, cache_dir=str(cache)), 384))
  assert len(stores(cache)) == 3


def test_a_large_file_is_hashed_once_and_again_when_it_changes(
  tmp_path, monkeypatch
):
  """Its size and times may stay: another content is another file."""
  monkeypatch.setenv("FAT5_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(files, "_KEPT_HASH_BYTES", 1)
  read = []
  content = files._hash_of_content
  monkeypatch.setattr(
    files, "_hash_of_content", lambda *a: read.append(a) or content(*a)
  )

  def in_another_process():
    files._hash.cache_clear()
    return files.file_record(str(path))["sha256"]

  path = tmp_path / "rows.txt"
  path.write_text("one")
  first = in_another_process()
  assert in_another_process() == first and len(read) == 1
  state = path.stat()
  path.write_text("two")
  os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
  assert in_another_process() != first and len(read) == 2


def test_what_a_function_makes_is_not_taken_for_known(tmp_path):
  made = rows(40)
  task = tasks.text_to_text(
    sources.Function({"train": lambda: made}),
    "{text}",
    "{label}",
    BYTES,
    name="reading_function",
  )
  config = dataset(task, pack=False, shuffle=False, cache_dir=str(tmp_path))
  first = next(pipeline.train_batches(config, 384))
  made[0] = {"text": "changed", "label": "l0"}
  second = next(pipeline.train_batches(config, 384))
  text = lambda batch: BYTES.decode(batch["encoder_input_tokens"][0].tolist())
  assert text(first) != text(second) == "changed"


PREPARES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import pathlib, test_reading
from fat5_jax.data import pipeline
folder = pathlib.Path({folder!r})
task = test_reading.text_task(folder, 60_000)
print("begun", flush=True)
config = test_reading.dataset(task, cache_dir=str(folder / sys.argv[1]))
next(pipeline.train_batches(config, 384))
"""


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_that_is_half_used(tmp_path):
  """kill -9 at seven moments, then to the end: the bytes of an uncut one."""
  program = PREPARES.format(
    root=ROOT, tests=os.path.join(ROOT, "tests"), folder=str(tmp_path)
  )

  def start(cache):
    return subprocess.Popen(
      [sys.executable, "-c", program, cache], stdout=subprocess.PIPE
    )

  whole = start("whole")
  whole.stdout.readline()
  begin = time.monotonic()
  assert whole.wait() == 0
  seconds = time.monotonic() - begin
  (name,) = stores(tmp_path / "whole")
  killed = 0
  for share in np.random.default_rng(0).uniform(0, 1, 7):
    process = start("cut")
    process.stdout.readline()
    time.sleep(share * seconds)
    process.kill()
    killed += process.wait() != 0
    if os.path.exists(tmp_path / "cut"):
      for found in stores(tmp_path / "cut"):
        assert (tmp_path / "cut" / found / "index.json").exists()
  assert killed >= 2
  assert start("cut").wait() == 0
  assert stores(tmp_path / "cut") == [name]
  halves = [n for n in os.listdir(tmp_path / "cut") if n.startswith(".half")]
  assert not halves
  for file in sorted(os.listdir(tmp_path / "whole" / name)):
    paths = [tmp_path / where / name / file for where in ("whole", "cut")]
    assert paths[0].read_bytes() == paths[1].read_bytes(), file


@pytest.mark.slow
def test_two_that_prepare_at_once_make_one_store(tmp_path):
  program = PREPARES.format(
    root=ROOT, tests=os.path.join(ROOT, "tests"), folder=str(tmp_path)
  )
  text_task(tmp_path, 60_000)
  both = [
    subprocess.Popen(
      [sys.executable, "-c", program, "one"], stderr=subprocess.PIPE
    )
    for _ in range(2)
  ]
  said = [process.communicate()[1].decode() for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert len(stores(tmp_path / "one")) == 1
  assert sum("waiting for another process" in text for text in said) <= 1


def test_a_damaged_store_is_a_line(tmp_path):
  cache = tmp_path / "cache"
  config = dataset(text_task(tmp_path), cache_dir=str(cache))
  next(pipeline.train_batches(config, 384))
  (name,) = stores(cache)
  shard = cache / name / SHARD
  data = bytearray(shard.read_bytes())
  shard.write_bytes(data[:-10])
  with pytest.raises(UserError, match=r"delete the folder"):
    next(pipeline.train_batches(config, 384))
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(64)
  shard.write_bytes(data)
  with pytest.raises(UserError, match=r"delete the folder"):
    batches = pipeline.train_batches(config, 384)
    for _ in range(50):
      next(batches)


def _without_skipped(folder):
  path = folder / "index.json"
  index = json.loads(path.read_text())
  del index["skipped"]
  path.write_text(json.dumps(index))


def _short(folder):
  path = folder / "inputs.lengths.npy"
  np.save(path, np.load(path)[:-1])


def _longer(folder):
  path = folder / "inputs.lengths.npy"
  np.save(path, np.load(path) + 1)


@pytest.mark.parametrize("damage", [_without_skipped, _short, _longer])
def test_a_store_that_does_not_hold_together_is_a_line(damage, tmp_path):
  config = dataset(text_task(tmp_path), cache_dir=str(tmp_path / "cache"))
  next(pipeline.train_batches(config, 384))
  (name,) = stores(tmp_path / "cache")
  damage(tmp_path / "cache" / name)
  with pytest.raises(UserError, match=r"delete the folder"):
    next(pipeline.train_batches(config, 384))


def test_a_full_disk_is_a_line_and_leaves_no_store(tmp_path, monkeypatch):
  def full(self, record):
    raise RuntimeError("No space left on device; writing examples-00000")

  config = dataset(text_task(tmp_path), cache_dir=str(tmp_path / "cache"))
  with monkeypatch.context() as patch:
    patch.setattr(store.array_record_module.ArrayRecordWriter, "write", full)
    with pytest.raises(UserError, match="cache.*: No space left on device$"):
      next(pipeline.train_batches(config, 384))
  assert stores(tmp_path / "cache") == []
  next(pipeline.train_batches(config, 384))


def test_a_task_that_no_other_process_can_have_is_a_line(tmp_path):
  lock = threading.Lock()

  def made():
    with lock:
      yield from rows(20)

  task = tasks.text_to_text(
    sources.Function({"train": made}), "{text}", "{label}", BYTES, name="locked"
  )
  next(pipeline.train_batches(dataset(task), 384))
  with pytest.raises(UserError, match="NUM_WORKERS = 2: .*lock.*set it to 0"):
    pipeline.train_batches(dataset(task, num_workers=2), 384)


def test_a_bad_row_leaves_no_store(tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"text": "a", "label": "b"}\n{"text": "", "label": "b"}\n')
  task = tasks.text_to_text(
    sources.Files({"train": str(path)}), "{text}", "{label}", BYTES, name="bad"
  )
  cache = tmp_path / "cache"
  with pytest.raises(UserError, match="bad.jsonl, row 2"):
    pipeline.train_batches(dataset(task, cache_dir=str(cache)), 384)
  assert stores(cache) == []
  assert not [n for n in os.listdir(cache) if n.startswith(".half")]


def test_where_nothing_can_be_written_another_folder_is_asked_for(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="CACHE_DIR"):
    prepare.cache_folder(str(tmp_path / "file" / "cache"))


def test_seqios_own_cache_is_read(tmp_path):
  """What SeqIO's cache job wrote, in the place of the rows."""
  task = random_task(tmp_path, 50)
  folder = tmp_path / "seqio" / task.name
  folder.mkdir(parents=True)
  path = str(folder / "train.tfrecord-00000-of-00001")
  with tf.io.TFRecordWriter(path) as writer:
    for i in range(50):
      ids = BYTES.encode(f"cached {i}")
      value = tf.train.Feature(int64_list=tf.train.Int64List(value=ids))
      example = tf.train.Example(
        features=tf.train.Features(feature={"inputs": value, "targets": value})
      )
      writer.write(example.SerializeToString())
  spec = {"shape": [None], "dtype": "int32"}
  (folder / "info.train.json").write_text(
    json.dumps(
      {
        "features": {"inputs": spec, "targets": spec},
        "num_shards": 1,
        "seqio_version": "0.0.20",
      }
    )
  )
  (folder / "stats.train.json").write_text(json.dumps({"examples": 50}))
  (folder / "COMPLETED").write_text("")
  seqio.add_global_cache_dirs([str(tmp_path / "seqio")])
  try:
    batches = pipeline.train_batches(dataset(task, use_cached=True), 384)
    assert all(text.startswith("cached ") for text in _lines(next(batches)))
  finally:
    seqio.set_global_cache_dirs([])
