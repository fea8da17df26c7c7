"""EncT5 against hackyon's, as it runs on transformers 4.37.1.

There it is a T5Model whose decoder's embedding is replaced; 5.x ties that
embedding and makes the multi-label mask causal, so it is no oracle. The oracle
runs in a process of its own, on the copy that `make test` puts in
`.venv/oracle-4.37`.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_heads import apply, batch_of, close, loss_and_grads, text

from fat5_jax.checkpoints import load, reference
from fat5_jax.convert import enct5, table
from fat5_jax.models import factory, initial

# One worker: the oracle runs once.
pytestmark = pytest.mark.xdist_group("enct5")

ORACLE = os.path.join(sys.prefix, "oracle-4.37")
needs_oracle = pytest.mark.skipif(
  not os.path.isdir(ORACLE),
  reason="transformers 4.37 is put there by make test",
)

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, transformers
from transformers import T5Config, T5Model

assert transformers.__version__.startswith("4.37")
from safetensors.torch import save_file


def answer(folder, problem, labels, naming):
    torch.manual_seed(0)
    prompts = labels if problem.startswith("multi") else 1
    config = T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                      num_decoder_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    body = T5Model(config)
    body.get_decoder().set_input_embeddings(torch.nn.Embedding(prompts, 32))
    head = torch.nn.Module()
    if problem.startswith("multi"):
        head.weights = torch.nn.Parameter(torch.randn(labels, 32) * 0.2)
        head.biases = torch.nn.Parameter(torch.randn(labels))
    else:
        head.out_proj = torch.nn.Linear(32, labels)
    model = torch.nn.Module()
    model.transformer, model.classification_head = body, head
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_()
            elif "Attention" in name:
                parameter.mul_(2.0)
    ids = torch.tensor(np.load(folder + "/x.npy")).long()
    y = torch.tensor(np.load(folder + "/y.npy"))
    decoder = torch.arange(prompts).repeat(len(ids), 1)
    mask = None
    if problem.startswith("multi"):
        mask = torch.ones(len(ids), prompts, prompts, dtype=torch.long)
    h = body(input_ids=ids, attention_mask=(ids != 0).long(),
             decoder_input_ids=decoder, decoder_attention_mask=mask)[0]
    if problem.startswith("multi"):
        logits = (h * head.weights).sum(-1) + head.biases
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
    elif problem == "regression":
        logits = head.out_proj(h)[:, 0]
        loss = torch.nn.functional.mse_loss(logits.squeeze(-1), y)
    else:
        logits = head.out_proj(h)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, y.long())
    loss.backward()
    tensors = {n: t for n, t in model.state_dict().items()}
    names = ["transformer.encoder.embed_tokens.weight"]
    if naming == "alias":
        tensors["decoder_embeddings.weight"] = tensors.pop(
            "transformer.decoder.embed_tokens.weight")
    for name in names:
        tensors.pop(name, None)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()},
              folder + "/model.safetensors", metadata={"format": "pt"})
    known = config.to_dict()
    keep = ("vocab_size d_model d_kv d_ff num_layers num_decoder_layers"
            " num_heads feed_forward_proj layer_norm_epsilon").split()
    json.dump({k: known[k] for k in keep} | {
        "model_type": "enct5", "problem_type": problem,
        "decoder_vocab_size": prompts,
        "tie_word_embeddings": False, "classifier_dropout": 0.0},
        open(folder + "/config.json", "w"))
    np.savez(folder + "/out.npz", logits=logits.detach().numpy(),
             loss=loss.item(),
             **{"grad/" + n: p.grad.numpy() for n, p in model.named_parameters()
                if p.grad is not None})


for case in json.loads(sys.argv[2]):
    answer(*case)
"""


CASES = [
  ("single_label_classification", 3, "published"),
  ("regression", 1, "alias"),
  ("multi_label_classification", 5, "published"),
  ("multi_label_classification", 4, "alias"),
]


def made_up_labels(problem, num_labels):
  rng = np.random.default_rng(1)
  if problem == "regression":
    return rng.normal(size=4).astype("float32")
  if problem == "single_label_classification":
    return rng.integers(0, num_labels, 4)
  return rng.integers(0, 2, (4, num_labels)).astype("float32")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """The oracle's folder of every case, answers beside its weights."""
  root = tmp_path_factory.mktemp("enct5")
  jobs = []
  for problem, num_labels, naming in CASES:
    folder = root / f"{problem}-{num_labels}"
    folder.mkdir()
    np.save(folder / "x.npy", text())
    np.save(folder / "y.npy", made_up_labels(problem, num_labels))
    jobs.append((str(folder), problem, num_labels, naming))
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, ORACLE, json.dumps(jobs)],
    env=os.environ | {"USE_TF": "0", "USE_FLAX": "0"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return root


@needs_oracle
@pytest.mark.parametrize("problem,num_labels,naming", CASES)
def test_logits_loss_and_gradients(problem, num_labels, naming, theirs):
  folder = theirs / f"{problem}-{num_labels}"
  x, y = text(), made_up_labels(problem, num_labels)
  expected = np.load(folder / "out.npz")

  config, leaves = enct5.open_model(folder)
  assert config.head.problem_type == problem
  assert config.head.decoder_layers == 2
  params = table.read_all(leaves)
  model = factory.create(config)
  close(apply(model, params, x), expected["logits"])
  loss, grads = loss_and_grads(model, params, batch_of(x, y))
  close(loss, expected["loss"])
  ours = table.to_foreign(enct5._rows(config), table.as_leaves(grads), "grads")
  largest_of_all = max(
    np.abs(expected[k]).max() for k in expected if k.startswith("grad/")
  )
  for name, leaf in ours.items():
    reference = expected[f"grad/{name}"]
    largest = max(np.abs(reference).max(), 1e-3 * largest_of_all)
    assert np.abs(leaf.read() - reference).max() < 1e-4 * largest, name

  # There and back, bit for bit.
  enct5.to_folder(config, leaves, folder / "again")
  again_config, again = enct5.open_model(folder / "again")
  assert again_config == config
  assert all(np.array_equal(again[k].read(), leaves[k].read()) for k in leaves)


def test_later_prompts_are_seen_from_bucket_0():
  """Full visibility with unidirectional buckets: the study's item 4."""
  from test_heads import CONFIG, init

  from fat5_jax.models.config import HeadConfig

  head = HeadConfig(
    "enct5", num_labels=3, problem_type="multi_label_classification"
  )
  model, params = init(CONFIG, head=head)
  x = jnp.asarray(text())

  def first_label(prompts):
    changed = params | {"prompt_embedder": {"embedding": prompts}}
    return model.apply({"params": changed}, x)[:, 0].sum()

  gradient = jax.jit(jax.grad(first_label))(
    params["prompt_embedder"]["embedding"]
  )
  assert np.abs(gradient[2]).max() > 1e-6, "label 0 must see label 2"


def test_weights_from_a_t5_are_upstreams_choice(tmp_path):
  """The first decoder layers, cross-attention and the final norm come along;
  prompt and classifier are fresh; the other layers and lm_head are left."""
  import hf_models
  import optax

  from fat5_jax.distributed.sharding import Partitioner
  from fat5_jax.models.config import HeadConfig
  from fat5_jax.training.program import Program

  hf_models.make("t5_1_1", tmp_path / "hf", num_decoder_layers=3)
  source = reference.find(str(tmp_path / "hf"))
  config, leaves = reference.open_params(source)
  t5 = table.read_all(leaves)
  model = factory.create(config, HeadConfig("enct5", decoder_layers=2))
  program = Program(model, Partitioner(), optax.sgd(0.1), seed=0)
  params, _, fresh = load.load_params(
    source.path,
    model.config,
    program.abstract_state.params,
    initialise=program.fresh_params,
  )
  assert sorted(fresh) == [
    "classifier/bias",
    "classifier/kernel",
    "prompt_embedder/embedding",
  ]
  for part in ("token_embedder", "encoder"):
    jax.tree.map(np.testing.assert_array_equal, params[part], t5[part])
  assert set(params["decoder"]) == set(t5["decoder"]) - {
    "layers_2",
    "logits_dense",
  }
  for part in params["decoder"]:
    jax.tree.map(
      np.testing.assert_array_equal,
      params["decoder"][part],
      t5["decoder"][part],
    )
  own = jax.jit(initial.init_params, static_argnums=(0, 1))(model, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    params["prompt_embedder"],
    own["prompt_embedder"],
  )
