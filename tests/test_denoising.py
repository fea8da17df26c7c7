"""Pre-training: what is asked about a text, and that nothing of it is lost.

The oracles are T5's own code (golden_t5_text), a slow version of it written
here, and the mathematics of what is drawn.
"""

import collections
import functools
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import seqio

from fat5_jax.data import (
  checks,
  denoising,
  pipeline,
  pretraining,
  records,
  sources,
  t5_preprocessors,
)
from fat5_jax.data.reading import streams
from fat5_jax.errors import UserError
from fat5_jax.models.config import T5Config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BYTES = seqio.ByteVocabulary(100)
SENTINELS = denoising.sentinels(BYTES)
LENGTHS = {"inputs": 64, "targets": 40}
EVERY = [
  *denoising.OBJECTIVES["ul2"],
  denoising.SpanCorruption(),
  denoising.SpanCorruption(0.9, 1.0),
  denoising.SpanCorruption(0.5, 1.0),
  denoising.PrefixLM(),
  denoising.PrefixLM(0.0),
  denoising.PrefixLM(1.0),
]


def chi_square(observed, expected):
  """Of how many standard deviations the counts are off, by Wilson-Hilferty."""
  observed, expected = np.asarray(observed), np.asarray(expected)
  value = ((observed - expected) ** 2 / expected).sum()
  degrees = len(observed) - 1
  spread = 2 / (9 * degrees)
  return ((value / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def slow(tokens, mask, sentinels):
  """Token by token: (inputs, targets) of a mask of noise."""
  sides = [], []
  for hidden, side in ((True, sides[0]), (False, sides[1])):
    spans, inside = 0, False
    for token, noise in zip(tokens, mask):
      if noise != hidden:
        side.append(int(token))
      elif not inside:
        side.append(int(sentinels[spans]))
        spans += 1
      inside = noise == hidden
  return sides


def rebuilt(inputs, targets, sentinels):
  """The text of a pair: what stands after each sentinel is put in its place."""
  order = {int(s): i for i, s in enumerate(sentinels)}
  answers, number = collections.defaultdict(list), None
  for token in targets:
    if int(token) in order:
      number = order[int(token)]
    else:
      answers[number].append(int(token))
  found = []
  for token in inputs:
    found += answers.pop(order[int(token)]) if int(token) in order else [token]
  # What has no place follows: a language model's.
  return [int(x) for x in found + answers.pop(None, [])]


def texts(count=40, most=400, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(3, 150, n) for n in rng.integers(2, most, count)]


# ---- The same as T5's code, and as counting by hand --------------------------


def test_given_the_same_mask_tokens_are_those_of_t5(shared_data):
  path = os.path.join(shared_data, "golden_t5_text", "span_corruption.jsonl")
  ids = 32099 - np.arange(100, dtype=np.int32)
  with open(path) as file:
    rows = [json.loads(line) for line in file]
  assert len(rows) == 100
  for row in rows:
    tokens = np.array(row["tokens"], np.int32)
    mask = np.array(row["noise_mask"], bool)
    for key, hidden in (("inputs", mask), ("targets", ~mask)):
      found = denoising.span_to_unique_sentinel(tokens, hidden, ids)
      assert found.tolist() == row[key]
    # As many tokens and spans as T5 drew in a text of this length.
    noise, spans = denoising.span_counts(
      np.array([len(tokens)]), row["noise_density"], row["mean_span"], 1000
    )
    drawn = int(np.sum(mask[1:] & ~mask[:-1]) + mask[0])
    assert (int(noise[0]), int(spans[0])) == (int(mask.sum()), drawn)


def test_the_length_of_a_text_that_fills_the_inputs_is_that_of_t5(shared_data):
  path = os.path.join(
    shared_data, "golden_t5_text", "random_spans_helper.jsonl"
  )
  with open(path) as file:
    rows = [json.loads(line) for line in file]
  for row in rows:
    asked = (row["inputs_length"], row["noise_density"], row["mean_span"])
    found = denoising.random_spans_helper(*asked)
    assert found == (row["tokens_length"], row["targets_length"]), asked


def test_a_span_objective_takes_texts_as_long_as_t5_does():
  for inputs, density, mean in ((512, 0.15, 3.0), (128, 0.15, 8.0)):
    length, targets = denoising.random_spans_helper(inputs, density, mean)
    limits = {"inputs": inputs, "targets": targets}
    one = denoising.SpanCorruption(density, mean)
    objective = denoising.Objective([one], BYTES, limits)
    assert objective.longest.tolist() == [length]


@pytest.mark.parametrize("seed", range(3))
def test_any_mask_is_applied_as_token_by_token(seed):
  rng = np.random.default_rng(seed)
  for length in (1, 2, 3, 17, 90):
    tokens = rng.integers(3, 150, length)
    for share in (0.0, 0.3, 0.8, 1.0):
      mask = rng.random(length) < share
      found = [
        denoising.span_to_unique_sentinel(tokens, hidden, SENTINELS).tolist()
        for hidden in (mask, ~mask)
      ]
      assert found == list(slow(tokens, mask, SENTINELS))


@pytest.mark.parametrize("denoiser", EVERY, ids=str)
def test_sizes_are_known_before_and_both_sides_rebuild_the_text(denoiser):
  objective = denoising.Objective([denoiser], BYTES, LENGTHS)
  prefix = BYTES.encode(denoiser.prefix)
  given = texts()
  lengths = np.array([len(text) for text in given])
  segments = objective.cut(lengths, [7], np.zeros(len(lengths)))
  covered = [np.zeros(n, int) for n in lengths]
  for number in range(len(segments)):
    text = int(segments.texts[number])
    begin, end = segments.begins[number], segments.ends[number]
    covered[text][begin:end] += 1
    found = objective.example(given[text], segments, number, [7])
    inputs, targets = found["inputs"].tolist(), found["targets"].tolist()
    assert [len(inputs), len(targets)] == segments.sizes_N2[number].tolist()
    assert len(inputs) <= LENGTHS["inputs"]
    assert len(targets) <= LENGTHS["targets"]
    assert inputs[: len(prefix)] == prefix
    assert inputs[-1] == targets[-1] == BYTES.eos_id
    middle = inputs[len(prefix) : -1]
    part = given[text][begin:end].tolist()
    assert rebuilt(middle, targets[:-1], SENTINELS) == part
  for text, times in enumerate(covered):
    # Every token once; a single one at an end may be left out.
    assert times.max() <= 1 and times.sum() >= len(times) - 2, text
    assert times[1:-1].all(), text


def test_texts_fill_what_they_can():
  """No shorter text than needed: one token more would not fit."""
  for denoiser in EVERY:
    objective = denoising.Objective([denoiser], BYTES, LENGTHS)
    length = int(objective.longest[0])
    prefix = len(BYTES.encode(denoiser.prefix))
    draws = [0.0, np.nextafter(1.0, 0.0)]
    sides = [
      denoiser.sizes(np.array([length + 1]), np.array([draw]), SENTINELS)
      for draw in draws
    ]
    assert any(
      asked[0] + prefix + 1 > LENGTHS["inputs"]
      or answered[0] + 1 > LENGTHS["targets"]
      for asked, answered in sides
    ), denoiser


# ---- What is drawn -----------------------------------------------------------


def test_all_masks_are_equally_likely():
  """8 tokens, 4 of noise in 2 spans: 3 ways each to cut both, 9 masks."""
  seen = collections.Counter()
  for i in range(9000):
    rng = np.random.default_rng([1, i])
    mask = denoising.random_spans_noise_mask(8, 4, 2, rng)
    assert mask.sum() == 4 and not mask[0] and mask[-1]
    seen[tuple(mask)] += 1
  assert len(seen) == 9
  assert chi_square(list(seen.values()), [1000] * 9) < 4


def test_the_seven_of_fat5_are_drawn_at_its_rates_with_its_noise():
  denoisers = denoising.find("ul2")
  assert [
    (d.mean_noise_span_length, d.noise_density, d.prefix)
    for d in denoisers
    if isinstance(d, denoising.SpanCorruption)
  ] == [
    *((3.0, 0.15, "[R]"), (8.0, 0.15, "[R]"), (3.0, 0.5, "[X]")),
    *((8.0, 0.15, "[X]"), (64.0, 0.15, "[X]"), (64.0, 0.5, "[X]")),
  ]
  rates = np.array([0.165, 0.165, 0.34, 0.0825, 0.0825, 0.0825, 0.0825])
  limits = {"inputs": 512, "targets": 512}
  objective = denoising.Objective(denoisers, BYTES, limits)
  # Short texts, so that each is one example.
  lengths = np.full(40_000, 300)
  segments = objective.cut(lengths, [3])
  assert len(segments) == 40_000
  counts = np.bincount(segments.kinds, minlength=7)
  assert chi_square(counts, 40_000 * rates) < 4
  text = np.random.default_rng(0).integers(3, 150, 300)
  ids = set(SENTINELS.tolist())
  for kind, denoiser in enumerate(denoisers):
    number = int(np.flatnonzero(segments.kinds == kind)[0])
    found = objective.example(text, segments, number, [3])
    spans = sum(int(t) in ids for t in found["inputs"])
    noise = len(found["targets"]) - 1 - spans
    if isinstance(denoiser, denoising.PrefixLM):
      assert (spans, noise) == (1, 225)
    else:
      assert noise == round(300 * denoiser.noise_density)
      assert spans == max(1, round(noise / denoiser.mean_noise_span_length))


def test_the_beginnings_of_t5s_prefix_lm_are_of_any_length():
  objective = denoising.Objective([denoising.PrefixLM()], BYTES, LENGTHS)
  segments = objective.cut(np.full(20_000, 11), [0])
  given = segments.sizes_N2[:, 0] - 1
  counts = np.bincount(given, minlength=11)[1:]
  assert given.min() == 1 and given.max() == 10
  assert chi_square(counts, [2000] * 10) < 4


def test_a_long_text_is_cut_elsewhere_every_time():
  objective = denoising.Objective(denoising.find("ul2"), BYTES, LENGTHS)
  begins = [
    tuple(objective.cut(np.array([5000]), [0, k]).begins[:3]) for k in range(20)
  ]
  assert len(set(begins)) == 20


# ---- As training reads it ----------------------------------------------------

WORDS = "the quick brown fox jumps over the lazy dog and runs away".split()


def lines(count=60, seed=0):
  rng = np.random.default_rng(seed)
  return [
    " ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 60, count)
  ]


def config(rows, objective="ul2", text_length=None, **options):
  given = [{"text": line} for line in rows]
  source = sources.Function(
    {"train": lambda: given, "validation": lambda: given[:7]}
  )
  how = {"name": "corpus", "text_length": text_length}
  task = pretraining.text(source, BYTES, objective, **how)
  settings = {"split": "train", "batch_size": 4, "shuffle": True, "pack": True}
  return pipeline.DatasetConfig(task, LENGTHS, **settings | options)


def batches(dataset, count, position=None, **options):
  stream = pipeline.train_batches(dataset, 384, position, **options)
  found = list(itertools.islice(stream, count))
  position = stream.position
  stream.close()
  return found, json.loads(json.dumps(position))


def same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize(
  "how, stream",
  [("pack", False), ("pad", False), ("buckets", False), ("pack", True)],
)
def test_a_run_goes_on_where_it_was_stopped(how, stream, monkeypatch):
  monkeypatch.setattr(streams, "_SHUFFLED_ROWS", 100)
  options = {
    "pack": {"pack": True},
    "pad": {"pack": False},
    "buckets": {"pack": False, "buckets": 2},
  }[how] | {"stream": stream}
  whole, _ = batches(config(lines(), **options), 30)
  first, position = batches(config(lines(), **options), 11)
  rest, _ = batches(config(lines(), **options), 19, position)
  same(whole, first + rest)


def test_two_hosts_read_the_rows_of_one():
  from fat5_jax.data.reading.reader import Share

  whole, _ = batches(config(lines()), 5)
  halves = [
    batches(config(lines()), 5, own=Share(i, i + 1, 2))[0] for i in range(2)
  ]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*halves)
  ]
  same(whole, joined)


def pairs(batch):
  """(inputs, targets) of every example of a packed batch."""
  for row in range(len(batch["encoder_input_tokens"])):
    for part in range(1, batch["encoder_segment_ids"][row].max() + 1):
      yield tuple(
        batch[tokens][row][batch[ids][row] == part].tolist()
        for tokens, ids in (
          ("encoder_input_tokens", "encoder_segment_ids"),
          ("decoder_target_tokens", "decoder_segment_ids"),
        )
      )


def without_prefix(inputs):
  for mode in ("[R]", "[S]", "[X]"):
    ids = BYTES.encode(mode)
    if inputs[: len(ids)] == ids:
      return inputs[len(ids) :]
  raise AssertionError(inputs)


def test_packed_rows_hold_the_corpus_every_epoch_with_other_noise():
  rows = sorted(set(lines(50)))
  rows = [row for row in rows if len(row) < 30]
  assert len(rows) > 5
  dataset = config(rows, split="train", batch_size=1)
  stream = pipeline.train_batches(dataset, 384)
  seen, asked = collections.Counter(), collections.defaultdict(set)
  while stream.epochs.get("corpus", 0) < 40:
    for inputs, targets in pairs(next(stream)):
      assert inputs[-1] == targets[-1] == 1
      inner = without_prefix(inputs[:-1])
      text = BYTES.decode(rebuilt(inner, targets[:-1], SENTINELS))
      seen[text] += 1
      asked[text].add((tuple(inputs), tuple(targets)))
  stream.close()
  assert set(seen) == set(rows)
  # What is still in open rows has not come yet.
  assert min(seen.values()) >= 36 and max(seen.values()) <= 42
  assert all(len(asked[row]) > 5 for row in rows if len(row) > 10)


def test_an_evaluation_is_the_same_every_time_and_sees_every_text():
  dataset = config(lines(), split="validation", shuffle=False)
  first = list(pipeline.eval_batches(dataset, 384, None))
  same(first, list(pipeline.eval_batches(dataset, 384, None)))
  found = "".join(
    BYTES.decode(rebuilt(without_prefix(a[:-1]), b[:-1], SENTINELS))
    for batch in first
    for a, b in pairs(batch)
  )
  given = "".join(lines()[:7])
  assert len(found) >= len(given) - 7 and not (
    collections.Counter(found) - collections.Counter(given)
  )


def test_lines_that_are_one_text_are_cut_without_regard_to_them():
  given = [{"text": "abcd"}] * 20
  source = sources.Function({"train": lambda: given})
  task = pretraining.text(source, BYTES, "causal_lm", name="joined", join=True)
  dataset = pipeline.DatasetConfig(
    task, LENGTHS, "train", 1, shuffle=False, pack=False
  )
  (batch, *_), _ = batches(dataset, 1)
  targets = batch["decoder_target_tokens"][0]
  text = BYTES.decode(targets[targets > 1].tolist())
  assert len(text) > 30 and text in "abcd" * 20


def test_changing_the_objective_prepares_nothing_again(tmp_path):
  for objective in ("span_corruption", "ul2"):
    (tmp_path / "train.txt").write_text("\n".join(lines()))
    source = sources.Files({"train": str(tmp_path / "train.txt")})
    task = pretraining.text(source, BYTES, objective, name="kept")
    dataset = pipeline.DatasetConfig(
      task, LENGTHS, "train", 4, pack=True, cache_dir=str(tmp_path / "cache")
    )
    batches(dataset, 1)
    prints = records.fingerprint(dataset.record())
    names = [n for n in os.listdir(tmp_path / "cache") if n.startswith("kept")]
    assert len(names) == 1
    if objective == "span_corruption":
      before = prints
  assert prints != before, "a run that goes on must see that it is another"


def test_shorter_texts_fill_packed_rows_better():
  fills = []
  for most in (None, 16):
    dataset = config(lines(400), text_length=most)
    (*found,), _ = batches(dataset, 40)
    for batch in found:
      for inputs, targets in pairs(batch):
        text = rebuilt(without_prefix(inputs[:-1]), targets[:-1], SENTINELS)
        assert len(text) <= (most or 1000)
    filled = [np.mean(b["encoder_input_tokens"] != 0) for b in found]
    fills.append(np.mean(filled))
  assert fills[1] > fills[0] + 0.1


# ---- T5's own tasks, and SeqIO ----------------------------------------------


def seqio_task(step, name, vocabulary=BYTES):
  def dataset(split, shuffle_files, seed=None):
    import tensorflow as tf

    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"text": lines(200)})

  seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=("train",)),
    preprocessors=[
      functools.partial(
        seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}
      ),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      step,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={
      side: seqio.Feature(vocabulary, add_eos=True)
      for side in ("inputs", "targets")
    },
    metric_fns=[],
  )


def test_t5s_task_fills_its_rows_and_cuts_none():
  inputs = 128
  _, targets = denoising.random_spans_helper(inputs, 0.15, 3.0)
  task = seqio_task(t5_preprocessors.span_corruption, "c4_like")
  limits = {"inputs": inputs, "targets": targets}
  found = list(
    task.get_dataset(limits, "train", shuffle=False, seed=1).as_numpy_iterator()
  )
  sizes = {(len(x["inputs"]), len(x["targets"])) for x in found}
  # Two groups of texts are joined, and each has a rest.
  assert len(sizes - {(inputs, targets)}) <= 2 and len(found) > 20
  text = []
  for x in found:
    assert x["inputs"][-1] == x["targets"][-1] == 1
    text += rebuilt(x["inputs"][:-1], x["targets"][:-1], SENTINELS)
  given = [i for line in lines(200) for i in BYTES.encode(line)]
  assert collections.Counter(text) == collections.Counter(given)


@pytest.mark.parametrize(
  "step", [t5_preprocessors.span_corruption, t5_preprocessors.prefix_lm]
)
def test_such_a_task_is_trained_on_with_other_noise_every_epoch(step):
  task = seqio_task(step, "c4_like")
  dataset = pipeline.DatasetConfig(
    task, {"inputs": 64, "targets": 64}, "train", 2, shuffle=True, pack=False
  )
  stream = pipeline.train_batches(dataset, 384)
  inputs = collections.Counter(
    row.tobytes()
    for batch in itertools.islice(stream, 600)
    for row in batch["encoder_input_tokens"]
  )
  stream.close()
  assert stream.epochs["c4_like"] > 1.9 and len(inputs) > 900


def test_t5s_smaller_steps_do_what_their_names_say():
  import tensorflow as tf

  tokens = np.arange(3, 1003, dtype=np.int32)
  texts = tf.data.Dataset.from_tensors({"targets": tokens}).repeat(300)
  with seqio.utils.map_seed_manager(0):
    chunks = t5_preprocessors.select_random_chunk(texts, max_length=400)
    first = [int(x["targets"][0]) for x in chunks.as_numpy_iterator()]
    split = t5_preprocessors.split_tokens(texts.take(50), 100, 10)
    parts = [x["targets"] for x in split.as_numpy_iterator()]
  counts = collections.Counter(first)
  assert set(counts) == {3, 403, 803}
  assert chi_square(list(counts.values()), [100] * 3) < 4
  sizes = [len(part) for part in parts]
  assert min(sizes) < 30 and max(sizes) > 70 and max(sizes) <= 100
  np.testing.assert_array_equal(np.concatenate(parts), np.tile(tokens, 50))
  rng = np.random.default_rng(0)
  mask = t5_preprocessors.iid_noise_mask(40_000, 0.3, rng)
  assert abs(mask.mean() - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5
  for lengths in (None, {"inputs": 100}):
    with pytest.raises(UserError, match="set max_length"):
      t5_preprocessors.select_random_chunk(texts, None, lengths)


def test_a_task_of_ours_is_one_of_seqios_too():
  task = config(lines()).task()
  found = list(
    task.get_dataset(LENGTHS, "validation", shuffle=False).as_numpy_iterator()
  )
  text = "".join(
    BYTES.decode(
      rebuilt(
        without_prefix(x["inputs"][:-1].tolist()), x["targets"][:-1], SENTINELS
      )
    )
    for x in found
  )
  assert len(text) >= len("".join(lines()[:7])) - 7


# ---- What people get wrong ---------------------------------------------------


@pytest.mark.parametrize(
  "objective, said",
  [
    ("ul3", "Did you mean 'ul2'"),
    ([{"noise_densty": 0.1}], "noise_density"),
    ([{"noise_density": 0.0}], "between 0 and 1"),
    ([{"noise_density": "0.15"}], "must be a number"),
    ([{"kind": "mlm"}], "span_corruption"),
    ([{"rate": -1}], "above 0"),
    ([{"max_spans": 0}], "at least 1"),
    ([{"max_spans": "3"}], "whole number"),
    ([{"kind": "prefix_lm", "prefix_share": 1.5}], "between 0 and 1"),
    ([{"kind": ["span_corruption"]}], "is not one of"),
    ([{1: 2}], "has no 1"),
    ([{"prefix": 5}], "no text"),
    ([], "no denoiser"),
    (5, "no denoiser"),
  ],
)
def test_an_objective_that_is_none_says_what_one_is(objective, said):
  with pytest.raises(UserError, match=said):
    config(lines(), objective)


@pytest.mark.parametrize(
  "lengths, said",
  [
    ({"inputs": 4, "targets": 4}, "too short"),
    ({"inputs": 90_000, "targets": 90_000}, "piece_length"),
  ],
)
def test_what_has_no_room_is_said(lengths, said):
  source = sources.Function({"train": lambda: [{"text": "a b c"}]})
  task = pretraining.text(source, BYTES, name="corpus")
  dataset = pipeline.DatasetConfig(task, lengths, "train", 1)
  with pytest.raises(UserError, match=said):
    pipeline.train_batches(dataset, 384)


def test_blank_lines_are_no_texts_and_other_things_are_errors(tmp_path):
  (tmp_path / "train.txt").write_text("one\n\n  \ntwo\n")
  source = sources.Files({"train": str(tmp_path / "train.txt")})
  task = pretraining.text(source, BYTES, "causal_lm", name="corpus")
  assert [e["inputs"] for e in task.source.examples("train")] == ["one", "two"]
  with pytest.raises(UserError, match="no column 'body'"):
    list(
      pretraining.text(
        source, BYTES, column="body", name="corpus"
      ).source.examples("train")
    )


# ---- tools/train_vocabulary.py -----------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vocabulary")
  rows = [json.dumps({"body": line}) for line in lines(3000)]
  (folder / "a.jsonl").write_text("\n".join(rows[1000:]))
  # Other files have other names for it, and a .txt has none.
  (folder / "b.tsv").write_text("said\n" + "\n".join(lines(500)))
  (folder / "c.txt").write_text("\n".join(lines(500)))
  command = [sys.executable, os.path.join(ROOT, "tools/train_vocabulary.py")]
  command += [str(folder / "spiece.model"), str(folder / "[abc].*")]
  command += ["--column", "body", "said", "--pieces", "300"]
  found = subprocess.run(command, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  return str(folder / "spiece.model"), found.stdout


@pytest.mark.xdist_group("vocabulary")
def test_a_vocabulary_has_t5s_ids_and_knows_every_text(trained):
  path, said = trained
  assert "0.00% unknown" in said and "vocab_size = 512" in said
  pieces = sentencepiece.SentencePieceProcessor(path)
  assert pieces.get_piece_size() == 300
  assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2)
  vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=100)
  for text in ("the quick dog", "naïve 東京 🙂 ~`\\"):
    ids = vocabulary.encode(text)
    assert 2 not in ids and vocabulary.decode(ids) == text


@pytest.mark.xdist_group("vocabulary")
def test_mode_tokens_are_as_in_a_text_and_sentinels_count_down(trained):
  vocabulary = seqio.SentencePieceVocabulary(trained[0], extra_ids=100)
  limits = {"inputs": 512, "targets": 512}
  one = denoising.SpanCorruption(prefix="[X]")
  objective = denoising.Objective([one], vocabulary, limits)
  text = np.array(vocabulary.encode(lines()[1]), np.int32)
  segments = objective.cut(np.array([len(text)]), [0])
  inputs = objective.example(text, segments, 0, [0])["inputs"]
  # What whoever asks the model in these words will send.
  asked = sentencepiece.SentencePieceProcessor(trained[0]).encode("[X] a text")
  assert inputs[:2].tolist() == asked[:2]
  assert vocabulary.tokenizer.id_to_piece(int(inputs[1])) == "[X]"
  found = [int(t) for t in inputs if t >= 300]
  assert found == list(range(399, 399 - len(found), -1))


@pytest.mark.xdist_group("vocabulary")
def test_spans_that_sentinels_cannot_tell_apart_are_told_as_they_are(trained):
  few = seqio.SentencePieceVocabulary(trained[0], extra_ids=10)
  objective = denoising.Objective(
    [denoising.SpanCorruption()], few, {"inputs": 512, "targets": 114}
  )
  length = int(objective.longest[0])
  text = np.full(length, 70, np.int32)
  segments = objective.cut(np.array([length]), [0])
  answer = objective.example(text, segments, 0, [0])["targets"]
  mean = (answer == 70).sum() / 10
  assert f"in 10 spans at most, so of {mean:.1f} tokens" in objective.describe()


@pytest.mark.parametrize(
  "ids,message",
  [
    ({}, "end in id 2.*tools/train_vocabulary"),
    ({"eos_id": 1, "bos_id": -1}, "unknown.* id 0, which is padding"),
  ],
)
def test_a_vocabulary_of_sentencepieces_own_ids_is_refused(
  ids, message, tmp_path
):
  """Its <unk> is 0, T5's padding, and its texts end in 2, not in 1."""
  path = str(tmp_path / "own")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines()),
    model_prefix=path,
    vocab_size=100,
    hard_vocab_limit=False,
    **ids,
  )
  (tmp_path / "a.txt").write_text("a text\n")
  task = pretraining.text(
    sources.Files({"train": str(tmp_path / "a.txt")}),
    seqio.SentencePieceVocabulary(f"{path}.model", extra_ids=100),
  )
  config = pipeline.DatasetConfig(task, LENGTHS, "train", 2)
  with pytest.raises(UserError, match=message):
    checks.check_task(config, T5Config(vocab_size=256))


@pytest.mark.xdist_group("vocabulary")
def test_a_vocabulary_without_sentinels_says_what_it_needs(trained):
  vocabulary = seqio.SentencePieceVocabulary(trained[0], extra_ids=0)
  with pytest.raises(UserError, match="VOCAB_EXTRA_IDS"):
    denoising.Objective(denoising.find("ul2"), vocabulary, LENGTHS)
  task = denoising.Objective(denoising.find("causal_lm"), vocabulary, LENGTHS)
  assert task.longest.tolist() == [LENGTHS["targets"] - 1]
