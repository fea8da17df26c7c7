"""Exports load in transformers 4.37 too, with the same logits and tokens.

Runs in a process of its own, on the copy that `make test` puts in
`.venv/oracle-4.37`.
"""

import json
import os
import subprocess
import sys

import hf_models
import jax
import numpy as np
import pytest
import seqio

from fat5_jax.convert import hf
from fat5_jax.models.t5 import Transformer

ORACLE = os.path.join(sys.prefix, "oracle-4.37")

FAMILIES = ("t5_1_0", "t5_1_1", "mt5", "umt5_tied")

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
assert transformers.__version__.startswith("4.37")
for folder in sys.argv[2:]:
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs = {k: torch.tensor(v).long()
              for k, v in np.load(folder + "/inputs.npz").items()}
    logits = model(**inputs).logits.detach().numpy()
    np.save(folder + "/logits.npy", logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(folder + "/tokens.json", "w") as file:
        json.dump(tokenizer("hello world <extra_id_0>").input_ids, file)
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
  """The folder of every family, with theirs and our logits and tokens in it."""
  root = tmp_path_factory.mktemp("hf_4_37")
  x, y = hf_models.tokens()
  decoder = np.pad(y, ((0, 0), (1, 0)))[:, :-1]
  for family in FAMILIES:
    hf_models.make(family, root / f"{family}-theirs")
    config, params = hf.from_pretrained(root / f"{family}-theirs")
    folder = root / family
    hf.to_pretrained(
      config, params, folder, tokenizer=seqio.ByteVocabulary(125)
    )
    np.savez(
      folder / "inputs.npz",
      input_ids=x,
      attention_mask=x != 0,
      decoder_input_ids=decoder,
    )
    ours = jax.jit(Transformer(config).apply)({"params": params}, x, decoder)
    np.save(folder / "ours.npy", ours)
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, ORACLE, *(root / f for f in FAMILIES)],
    env=os.environ | {"USE_TF": "0", "USE_FLAX": "0"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return root


@pytest.mark.skipif(
  not os.path.isdir(ORACLE),
  reason="transformers 4.37 is put there by make test",
)
@pytest.mark.xdist_group("hf_4_37")
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_load_in_transformers_4_37(family, answered):
  found = np.load(answered / family / "logits.npy")
  expected = np.load(answered / family / "ours.npy")
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
  tokens = json.loads((answered / family / "tokens.json").read_text())
  assert tokens == [b + 3 for b in b"hello world "] + [259, 1]
