"""The pre-trained checkpoint that ships, tests/data/fat5_small.

tools/from_scratch.py has made it: UL2's denoisers, 2.8M parameters, in the
format of Hugging Face.
"""

import os
import re

from conftest import ROOT
import numpy as np
import pytest

import fat5_jax

FOLDER = os.path.join(ROOT, "tests", "data", "fat5_small")
# (asked, what stands there)
SPANS = [
  ("[S] She opened the door and <extra_id_0>", "went into the room."),
  ("[S] He did not know <extra_id_0>", "what to do with it."),
  ("[S] I have never seen him <extra_id_0>", "in the whole of my life."),
  ("[S] They sat at the table <extra_id_0>", "and looked at each other."),
  ("[S] It was one of the <extra_id_0>", "most beautiful in the world."),
  ("[S] There were a great many <extra_id_0>", "people in the street."),
]
ASKED = [text for text, _ in SPANS]


def targets(words):
  return [f"<extra_id_0> {answer}" for answer in words]


ANSWERS = targets(answer for _, answer in SPANS)


@pytest.fixture(scope="module")
def model():
  return fat5_jax.load(FOLDER, dtype="float32")


def test_it_is_small_enough_to_ship():
  files = [os.path.join(FOLDER, name) for name in os.listdir(FOLDER)]
  assert sum(map(os.path.getsize, files)) < 15e6


def test_transformers_gives_answers_the_same_likelihood(model):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(
    FOLDER, dtype=torch.float32
  ).eval()
  expected = []
  for text, answer in zip(ASKED, ANSWERS):
    ids = tokenizer(answer, return_tensors="pt").input_ids
    asked = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
      loss = theirs(**asked, labels=ids).loss
    expected.append(-float(loss) * ids.numel())
  np.testing.assert_allclose(model.score(ASKED, ANSWERS), expected, rtol=1e-4)


def test_the_lines_of_its_card_fill_a_gap(capsys):
  pytest.importorskip("torch")
  with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as file:
    (lines,) = re.findall(r"```python\n(import torch.*?)```", file.read(), re.S)
  exec(lines.replace("/models/this", FOLDER), {})
  assert "<extra_id_0>" in capsys.readouterr().out


def test_it_has_learnt_the_order_of_words(model):
  """The same words in another order are less likely, in five of six."""
  right = model.score(ASKED, ANSWERS)
  rng = np.random.default_rng(0)
  for _ in range(3):
    mixed = [" ".join(rng.permutation(answer.split())) for _, answer in SPANS]
    wrong = model.score(ASKED, targets(mixed))
    assert (right > wrong).mean() > 0.8 and right.sum() > wrong.sum()


def test_it_is_fine_tuned_and_answers(model, tmp_path):
  rows = [
    {"text": f"{word} {i}", "label": label}
    for i in range(16)
    for word, label in (("good", "yes"), ("bad", "no"))
  ]
  run = model.fine_tune(
    rows,
    inputs="{text}",
    targets="{label}",
    validation=rows[:8],
    epochs=20,
    learning_rate=0.01,
    metrics=["exact_match"],
    run_folder=str(tmp_path / "run"),
  )
  assert run.results["exact_match"] == 100
