"""The loss of an example is one number, however it came into a batch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_reading import BYTES, classes_task, dataset, text_task

from fat5_jax.data import pipeline
from fat5_jax.models import factory, initial
from fat5_jax.models.config import HeadConfig, T5Config
from fat5_jax.objectives import losses, totals
from fat5_jax.training import steps

CONFIG = T5Config(
  vocab_size=384,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  mlp_dim=32,
  num_encoder_layers=2,
  num_decoder_layers=2,
  dtype="float32",
  dropout_rate=0.0,
)
# A sum over real targets: the mean of a batch is over as many.
NORM = "NUM_REAL_TARGET_TOKENS"
HOW = {
  "padded": {"pack": False},
  "packed": {"pack": True},
  "bucketed": {"pack": False, "buckets": 4},
  "given buckets": {"pack": False, "buckets": [(16, 4), 32]},
}


@functools.cache
def model_and_params(head):
  model = factory.create(CONFIG, head)
  params = initial.init_params(model, 0)
  # Biases by position that matter: at their beginning they are small.
  grow = lambda path, x: x * 20 if "rel_embedding" in str(path) else x
  return model, jax.tree_util.tree_map_with_path(grow, params)


@functools.cache
def logits_of(head):
  model, params = model_and_params(head)
  return jax.jit(lambda batch: model.apply({"params": params}, **batch))


def by_target(batch):
  """{text of the targets: the sum of its tokens' losses}."""
  weights = batch.pop("decoder_loss_weights")
  targets = batch["decoder_target_tokens"]
  loss = np.asarray(losses.cross_entropy(logits_of(None)(batch), targets)[0])
  segments = batch.get("decoder_segment_ids", (targets > 0).astype(int))
  found = {}
  for row in range(len(targets)):
    for segment in range(1, segments[row].max(initial=0) + 1):
      own = (segments[row] == segment) & (weights[row] > 0)
      name = BYTES.decode([int(t) for t in targets[row][own]])
      value = loss[row][own].astype(np.float64).sum()
      # Twice in a batch where an epoch ends: it is the same there.
      np.testing.assert_allclose(
        value, found.setdefault(name, value), rtol=1e-5
      )
  return found


def first_epoch(config, losses_of):
  batches = pipeline.train_batches(config, CONFIG.vocab_size)
  found = {}
  while len(found) < 100:
    # An example of the next epoch may come before the last of this one.
    found = losses_of(next(batches)) | found
  return found


@pytest.mark.parametrize("how", [n for n in HOW if n != "padded"])
def test_an_example_has_the_loss_that_it_has_in_a_padded_row(how, tmp_path):
  config = dataset(text_task(tmp_path, 100), **HOW["padded"])
  expected = first_epoch(config, by_target)
  found = first_epoch(dataclasses.replace(config, **HOW[how]), by_target)
  assert found.keys() == expected.keys() == {f"l{i}" for i in range(100)}
  names = sorted(expected)
  np.testing.assert_allclose(
    [found[n] for n in names], [expected[n] for n in names], rtol=1e-5
  )
  # It depends on the inputs, and on where in the row a token is.
  assert np.std(list(expected.values())) > 0.01


def test_so_has_a_row_with_a_label(tmp_path):
  head = HeadConfig("sequence_classification", label_names=("yes", "no"))

  def by_inputs(batch):
    labels = {k: v for k, v in batch.items() if k.startswith("encoder_")}
    logits = np.asarray(logits_of(head)(labels))
    names = [
      BYTES.decode([int(t) for t in row if t > 1])
      for row in batch["encoder_input_tokens"]
    ]
    return dict(zip(names, logits))

  config = dataset(
    classes_task(tmp_path, 100),
    pack=False,
    task_feature_lengths={"inputs": 72},
  )
  expected = first_epoch(config, by_inputs)
  found = first_epoch(dataclasses.replace(config, buckets=4), by_inputs)
  assert found.keys() == expected.keys() and len(found) == 100
  for name, logits in expected.items():
    np.testing.assert_allclose(found[name], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_the_loss_of_an_evaluation_is_that_of_all_its_rows(how, tmp_path):
  """However they are put into batches, of which the last are not full."""
  head = HeadConfig("sequence_classification", label_names=("yes", "no"))
  cases = [(None, text_task(tmp_path, 97), {})]
  if not HOW[how].get("pack") and how != "given buckets":
    lengths = {"task_feature_lengths": {"inputs": 72}}
    cases.append((head, classes_task(tmp_path, 97), lengths))
  for kind, task, more in cases:
    model, params = model_and_params(kind)
    step = jax.jit(steps.make_eval_step(model, loss_normalizing_factor=NORM))
    found = {}
    for name in ("padded", how):
      config = dataset(task, **HOW[name], **more)
      total = {}
      batches = pipeline.eval_batches(config, CONFIG.vocab_size, None)
      for batch in batches:
        totals.add(total, step(params, batch))
      found[name] = totals.scalars(total)
    mean = found["padded"]["loss_per_nonpadding_target_token"]
    for name in found:
      for metric in ("loss", "cross_ent_loss"):
        np.testing.assert_allclose(found[name][metric], mean, rtol=1e-5)


def test_an_evaluation_without_lengths_takes_the_longest(tmp_path):
  for task, more in (
    (text_task(tmp_path, 30), ("decoder_target_tokens",)),
    (classes_task(tmp_path, 30), ()),
  ):
    config = dataset(task, pack=False, task_feature_lengths=None)
    lengths = {name: set() for name in ("encoder_input_tokens", *more)}
    real = dict.fromkeys(lengths, 0)
    for batch in pipeline.eval_batches(config, CONFIG.vocab_size, None):
      for name, seen in lengths.items():
        seen.add(batch[name].shape[1])
        real[name] = max(real[name], (batch[name] > 0).sum(axis=1).max())
    assert lengths == {name: {longest} for name, longest in real.items()}
