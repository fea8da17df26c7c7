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

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
assert transformers.__version__.startswith("4.37")
model, info = AutoModelForSeq2SeqLM.from_pretrained(
    sys.argv[2], output_loading_info=True)
assert not any(info.values()), info
inputs = {k: torch.tensor(v).long()
          for k, v in np.load(sys.argv[2] + "/inputs.npz").items()}
np.save(sys.argv[2] + "/logits.npy", model(**inputs).logits.detach().numpy())
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
print(json.dumps(tokenizer("hello world <extra_id_0>").input_ids))
"""


def logits_and_tokens(folder):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, ORACLE, str(folder)],
    env=os.environ | {"USE_TF": "0", "USE_FLAX": "0"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return np.load(folder / "logits.npy"), json.loads(done.stdout.split("\n")[-2])


@pytest.mark.skipif(
  not os.path.isdir(ORACLE),
  reason="transformers 4.37 is put there by make test",
)
@pytest.mark.parametrize("family", ["t5_1_0", "t5_1_1", "mt5", "umt5_tied"])
def test_exports_load_in_transformers_4_37(family, tmp_path):
  hf_models.make(family, tmp_path / "hf")
  config, params = hf.from_pretrained(tmp_path / "hf")
  hf.to_pretrained(
    config, params, tmp_path / "out", tokenizer=seqio.ByteVocabulary(125)
  )
  x, y = hf_models.tokens()
  decoder = np.pad(y, ((0, 0), (1, 0)))[:, :-1]
  np.savez(
    tmp_path / "out" / "inputs.npz",
    input_ids=x,
    attention_mask=x != 0,
    decoder_input_ids=decoder,
  )
  found, tokens = logits_and_tokens(tmp_path / "out")
  run = jax.jit(lambda p: Transformer(config).apply({"params": p}, x, decoder))
  expected = run(params)
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
  assert tokens == [b + 3 for b in b"hello world "] + [259, 1]
