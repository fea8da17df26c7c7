"""A curriculum of lengths: its batches, where a run goes on, its refusals."""

import json
import types

import numpy as np
import pytest
import seqio
from test_train import (  # noqa: F401
  TRAIN,
  assert_equal_bit_for_bit,
  fails,
  final_state,
  folder,
  trains,
)

from fat5_jax.data import (
  curriculum,
  opening,
  pipeline,
  pretraining,
  sources,
  tasks,
)
from fat5_jax.data.reading import streams
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.training.batches import RunBatches

BYTES = seqio.ByteVocabulary(100)
WHOLE = {"inputs": 48, "targets": 16}
SHORT = {3: {"inputs": 12, "targets": 8}, 7: {"inputs": 24}}


def rows(count):
  return sources.Function(
    {"train": lambda: ({"text": f"number {i}"} for i in range(count))}
  )


def pairs(count=400):
  return tasks.text_to_text(
    rows(count), "{text}", "{text}", BYTES, name="numbers"
  )


def texts():
  def lines():
    rng = np.random.default_rng(0)
    for _ in range(50):
      yield {"text": "".join(map(chr, rng.integers(97, 123, 150)))}

  source = sources.Function({"train": lines})
  return pretraining.text(source, BYTES, "span_corruption")


def config(task=None, table=SHORT, **options):
  return pipeline.DatasetConfig(
    task or pairs(),
    WHOLE,
    "train",
    4,
    shuffle=True,
    curriculum=table,
    **options,
  )


def batches(cfg, count, step=0, position=None, multiple=1):
  """[(arrays, position)] of a run, from a step on."""
  run = types.SimpleNamespace(
    train_dataset_cfg=cfg,
    partitioner=Partitioner(),
    row_multiple=multiple,
    last_step=lambda begin_step, step: begin_step + 100,
    model=types.SimpleNamespace(
      config=types.SimpleNamespace(vocab_size=BYTES.vocab_size)
    ),
  )
  begin = types.SimpleNamespace(
    step=100 + step, begin_step=100, data={"position": position}
  )
  data, found = RunBatches(run, begin), []
  for _ in range(count):
    batch = {k: np.asarray(v) for k, v in next(data).items()}
    found.append((batch, json.loads(json.dumps(data.position))))
  data.close()
  return found


@pytest.mark.parametrize("steps,told", [(7, True), (8, False), (None, False)])
def test_a_run_that_ends_before_its_curriculum_is_told(steps, told):
  lines = curriculum.describe(curriculum.stages(config()), steps)
  assert len(lines) == 1 + told
  assert not told or "ends at step 7" in lines[1]


@pytest.mark.parametrize("multiple", [1, 2])
def test_every_step_has_its_stages_lengths_and_no_more_tokens(multiple):
  shapes = [
    (b["encoder_input_tokens"].shape, b["decoder_target_tokens"].shape)
    for b, _ in batches(config(), 10, multiple=multiple)
  ]
  # 256 tokens a batch: 12 rows of 20, 6 of 40, 4 of 64.
  expected = [((12, 12), (12, 8))] * 3 + [((6, 24), (6, 16))] * 4
  assert shapes == expected + [((4, 48), (4, 16))] * 3


@pytest.mark.parametrize("how", ["padded", "packed", "texts", "stream"])
def test_a_run_goes_on_at_any_step_as_if_uncut(how, monkeypatch):
  monkeypatch.setattr(streams, "_SHUFFLED_ROWS", 40)
  task = texts() if how in ("texts", "stream") else pairs()
  cfg = config(task, pack=how != "padded", stream=how == "stream")
  whole = batches(cfg, 10)
  for step, (_, position) in enumerate(whole[:-1], 1):
    rest = batches(cfg, 10 - step, step, position)
    for (a, _), (b, _) in zip(whole[step:], rest, strict=True):
      assert a.keys() == b.keys()
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_a_later_stage_takes_what_comes_next_in_the_data():
  """None of 80 rows comes twice in an epoch, nor waits for the next one."""
  found = [
    BYTES.decode(row.tolist()).rstrip()
    for batch, _ in batches(config(pairs(80)), 9)
    for row in batch["encoder_input_tokens"]
  ]
  # 3 x 12 + 4 x 6 + 2 x 4.
  assert len(found) == 68 and len(set(found)) == 68


def test_texts_go_on_at_the_same_share_of_them():
  cfg = config(texts(), {2: {"inputs": 16, "targets": 8}}, pack=True)
  (_, before), (_, after) = batches(cfg, 3)[1:]
  stages = [stage.config for stage in curriculum.stages(cfg)]
  shares = []
  for stage, position in zip(stages, (before, after)):
    (stream,) = opening.open_streams(stage)
    shares.append(stream.epochs(*position["cursors"][0]))
  # A batch further, of 50 texts of 150 tokens.
  assert shares[0] < shares[1] < shares[0] + 0.1


def test_a_run_is_stopped_and_goes_on_to_the_same_bits(trains):  # noqa: F811
  table = "--gin.CURRICULUM={4: {'inputs': 20}}"
  flags = (table, "--gin.TRAIN_STEPS=6")
  text = trains("whole", *flags)
  assert "a curriculum of lengths: 6 x 20/16 until step 4, 4 x 40/16" in text
  # At its end: the next step is of the other one.
  trains("cut", table, "--gin.TRAIN_STEPS=4")
  trains("cut", *flags)
  assert_equal_bit_for_bit(final_state("whole", 6), final_state("cut", 6))


@pytest.mark.parametrize(
  "table, said",
  [
    ({3: {"inputs": 49}}, "step 3: 49 tokens of inputs must be from 1 to"),
    ({3: {"input": 9}}, "'input' is none of TASK_FEATURE_LENGTHS' inputs"),
    ({0: {"inputs": 9}}, "a whole number of steps"),
    ({3: 9}, "must be a table of tokens"),
  ],
)
def test_a_table_that_is_none_says_what_one_is(table, said):
  with pytest.raises(UserError) as error:
    curriculum.stages(config(table=table))
  assert said in str(error.value)


def test_buckets_and_a_curriculum_are_one_too_many():
  with pytest.raises(UserError, match="set one"):
    curriculum.stages(config(buckets=3))


def test_more_short_rows_than_there_are_examples_are_told(
  fails,  # noqa: F811
):
  message = fails(
    *TRAIN,
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 400, 'targets': 400}",
    "--gin.CURRICULUM={4: {'inputs': 20, 'targets': 20}}",
  )
  assert "60 rows" in message
