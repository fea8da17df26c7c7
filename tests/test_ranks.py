"""How likely a text is, and the likeliest of some: against transformers."""

import csv
import json
import math
import os

import hf_models
import jax
import numpy as np
import pytest
from test_run_folder import run
import torch

import fat5_jax
from fat5_jax.errors import UserError
from fat5_jax.inference import decoding, loading

CHOICES = ["entailment", "not_entailment", "it does not follow, or so it seems"]
HANDFUL = [
  {
    "sentence1": f"{'On the other hand, ' * (i % 5)}A saw {i} of B.",
    "sentence2": f"B was seen{' again' * (i % 3)}.",
    "label": CHOICES[i % 2],
  }
  for i in range(40)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(folder, transformers' model): tiny, random, of bytes."""
  folder = tmp_path_factory.mktemp("ranks") / "hf"
  folder.mkdir()
  made = hf_models.make("byt5", folder, vocab_size=384)
  config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder, made


def text_of(row):
  return f"rte sentence1: {row['sentence1']} sentence2: {row['sentence2']}"


@pytest.fixture(params=["a handful", "RTE"])
def rows(request):
  if request.param == "a handful":
    return HANDFUL
  path = os.path.join(
    request.getfixturevalue("shared_data"), "glue", "RTE", "dev.tsv"
  )
  with open(path, encoding="utf-8") as file:
    found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  return found[:60]


def log_likelihood(model, text, target):
  """The sum over the target's bytes and its end, in a teacher-forced pass."""
  ids = lambda text: torch.tensor([[b + 3 for b in text.encode()] + [1]])
  y = ids(target)
  with torch.no_grad():
    logits = model(input_ids=ids(text), labels=y).logits.double()
  log_p = torch.log_softmax(logits, -1)
  return float(log_p.gather(2, y[:, :, None]).sum())


def test_the_likeliest_answer_is_that_of_a_hand_written_loop(
  model, rows, tmp_path, monkeypatch, capfd
):
  folder, theirs = model
  monkeypatch.chdir(tmp_path)
  asked = [{"inputs": text_of(row), "label": row["label"]} for row in rows]
  with open("rows.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in asked)
  run(
    capfd,
    "infer",
    f"--gin.MODEL_DIR='{folder}'",
    "--gin.INPUT=rows.jsonl",
    "--gin.OUTPUT=out.jsonl",
    "--gin.MODE=rank",
    f"--gin.ALLOWED_OUTPUTS={CHOICES!r}",
    "--gin.DTYPE=float32",
  )
  with open("out.jsonl", encoding="utf-8") as file:
    found = [json.loads(line) for line in file]
  assert [row["inputs"] for row in found] == [row["inputs"] for row in asked]
  wanted = [
    {c: log_likelihood(theirs, row["inputs"], c) for c in CHOICES}
    for row in asked
  ]
  for row, scores in zip(found, wanted):
    assert row["scores"].keys() == scores.keys()
    for choice, value in scores.items():
      assert math.isclose(row["scores"][choice], value, rel_tol=1e-5)
    assert row["prediction"] == max(scores, key=scores.get)
  # So is the accuracy, and Python says the same.
  right = np.mean(
    [one["prediction"] == row["label"] for one, row in zip(found, rows)]
  )
  by_hand = np.mean(
    [max(s, key=s.get) == row["label"] for s, row in zip(wanted, rows)]
  )
  assert right == by_hand
  ours = fat5_jax.load(folder, dtype="float32")
  again = ours.rank([row["inputs"] for row in asked], CHOICES, batch_size=7)
  for row, one in zip(found, again):
    assert row["prediction"] == one["prediction"]


def test_scores_and_perplexity_are_those_of_a_teacher_forced_pass(
  model, tmp_path, monkeypatch, capfd
):
  folder, theirs = model
  monkeypatch.chdir(tmp_path)
  pairs = [
    (text_of(row), row["label"] * (1 + i % 3)) for i, row in enumerate(HANDFUL)
  ]
  with open("rows.jsonl", "w", encoding="utf-8") as file:
    for text, target in pairs:
      file.write(json.dumps({"inputs": text, "targets": target}) + "\n")
  done = run(
    capfd,
    "infer",
    f"--gin.MODEL_DIR='{folder}'",
    "--gin.INPUT=rows.jsonl",
    "--gin.OUTPUT=out.jsonl",
    "--gin.MODE=score",
    "--gin.INFER_BATCH_SIZE=8",
    "--gin.DTYPE=float32",
  )
  with open("out.jsonl", encoding="utf-8") as file:
    found = [json.loads(line) for line in file]
  wanted = [log_likelihood(theirs, *pair) for pair in pairs]
  counts = [len(target.encode()) + 1 for _, target in pairs]
  np.testing.assert_allclose([row["score"] for row in found], wanted, rtol=1e-5)
  assert [row["tokens"] for row in found] == counts
  perplexity = math.exp(-sum(wanted) / sum(counts))
  assert f"perplexity {perplexity:.4g}" in done.err, done.err


@pytest.mark.parametrize("family", ["t5_1_0", "umt5"])
def test_weights_that_lie_as_they_are_used_change_no_bit(family, tmp_path):
  hf_models.make(family, tmp_path)
  found = {}
  for is_trained in (True, False):
    loaded = loading.load_model(
      str(tmp_path), dtype="bfloat16", is_trained=is_trained
    )
    x = np.random.default_rng(0).integers(2, 90, (4, 12), np.int32)
    batch = {
      "encoder_input_tokens": x,
      "decoder_target_tokens": x[:, :7],
      "decoder_input_tokens": np.pad(x[:, :6], ((0, 0), (1, 0))),
    }
    logits = jax.jit(loaded.model.apply)({"params": loaded.params}, **batch)
    answers = jax.jit(
      lambda p, x, model=loaded.model: decoding.generate(model, p, x, 9)
    )(loaded.params, x)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    found[is_trained] = np.asarray(logits), *map(np.asarray, answers), size
  for a, b in zip(found[True][:-1], found[False][:-1]):
    assert np.array_equal(a, b)
  assert found[False][-1] < 0.55 * found[True][-1]


def test_a_dtype_beside_another_model_s_is_a_line(model):
  given = loading.load_model(str(model[0]), dtype="bfloat16").model
  with pytest.raises(UserError, match="'float32'.*computes in bfloat16"):
    loading.load_model(str(model[0]), given, dtype="float32")
