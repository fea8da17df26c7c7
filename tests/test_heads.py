"""Heads against their oracles: Hugging Face's, and FAT5's documented maths."""

import dataclasses
import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from fat5_jax import objectives, trees
from fat5_jax.convert import hf, table
from fat5_jax.models import factory
from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config
from fat5_jax.objectives import losses

# One worker compiles what they share.
pytestmark = pytest.mark.xdist_group("heads")

TOLERANCE = 1e-4
IGNORED = -100
CONFIG = T5Config(
  vocab_size=101,
  emb_dim=16,
  num_heads=2,
  head_dim=8,
  num_encoder_layers=2,
  num_decoder_layers=2,
  mlp_dim=24,
  dtype="float32",
  # Compiles in half the time; the oracles' tests take the default.
  attention_implementation="reference",
)


def close(found, expected, tolerance=TOLERANCE):
  expected = np.asarray(expected)
  error = np.abs(np.asarray(found) - expected).max()
  assert error <= tolerance * np.abs(expected).max() + 1e-7


def init(config, **options):
  """A model and parameters that a test is not blind to."""
  model = factory.create(config, **options)
  tokens = jnp.zeros((1, 4), jnp.int32)
  inputs = [tokens] * (2 if model.config.is_language_model else 1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(1)

  def made(path, x):
    name = str(path[-1])
    value = rng.normal(size=x.shape).astype(np.float32)
    if "scale" in name:
      return 1 + 0.1 * value
    if "kernel" in name or "lora_a" in name:
      return value * np.float32(x.shape[0] ** -0.5)
    return 0.3 * value if "bias" in name or "lora_b" in name else value

  return model, jax.tree_util.tree_map_with_path(made, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(config, params, inputs):
  return factory.create(config).apply({"params": params}, *inputs)


def apply(model, params, *inputs):
  """What the model computes, compiled once a shape."""
  return np.asarray(_compiled(model.config, params, inputs))


def text(rows=4, length=21, eos_counts=(1, 2, 1, 1), seed=0):
  """Rows of tokens that end in </s>, some with another before, padded."""
  rng = np.random.default_rng(seed)
  x = rng.integers(2, 101, (rows, length))
  lengths = [length, length - 4, 7, 1]
  for row, (n, count) in enumerate(zip(lengths, eos_counts)):
    x[row, n:] = 0
    x[row, n - 1] = 1
    if count > 1:
      x[row, n // 2] = 1
  return x.astype(np.int32)


def loss_and_grads(model, params, batch, normaliser="NUM_REAL_TARGET_TOKENS"):
  def objective(params):
    objective = objectives.of(model.config, normalizing_factor=normaliser)
    weights, n = objective.weights_and_normalizer(batch)
    return objective.loss_and_sums(model, params, batch, weights, n, None)[0]

  return jax.jit(jax.value_and_grad(objective))(params)


def batch_of(tokens, labels):
  labels = jnp.asarray(labels)
  if labels.ndim == 1:
    labels = labels[:, None]
  return {
    "encoder_input_tokens": jnp.asarray(tokens),
    "labels": labels,
    "label_weights": jnp.ones(labels.shape, jnp.int32),
  }


def same_grads(config, grads, torch_model):
  """Every gradient, by its Hugging Face name."""
  ours = table.to_foreign(hf.rows(config), table.as_leaves(grads), "grads")
  theirs = {n: p.grad for n, p in torch_model.named_parameters()}
  largest_of_all = max(float(g.abs().max()) for g in theirs.values())
  for name, leaf in ours.items():
    expected = theirs[name].numpy()
    # Some are 0 but for rounding: the bias of what a softmax normalises.
    largest = max(np.abs(expected).max(), 1e-3 * largest_of_all)
    assert np.abs(leaf.read() - expected).max() < 1e-4 * largest, name


def hf_head(class_name, folder, num_labels=3, **changes):
  """A random HF head, saved and read."""
  torch.manual_seed(0)
  config = transformers.T5Config(
    **hf_models._DIMS,
    feed_forward_proj="gated-gelu",
    num_labels=num_labels,
    **changes,
  )
  model = getattr(transformers, class_name)(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "bias" in name:
        parameter.normal_()
      elif "SelfAttention" in name or "EncDecAttention" in name:
        parameter.mul_(2.0)
  model.save_pretrained(folder)
  return model, *hf.from_pretrained(folder)


@pytest.mark.parametrize(
  "problem,num_labels",
  [
    ("single_label_classification", 3),
    ("multi_label_classification", 4),
    ("regression", 1),
  ],
)
def test_hf_sequence_classification(problem, num_labels, tmp_path):
  """On both stacks, pooled at the last </s>; HF wants equal counts of them."""
  theirs, config, params = hf_head(
    "T5ForSequenceClassification",
    tmp_path,
    num_labels,
    problem_type=problem,
  )
  assert config.head.body == "encoder_decoder"
  assert config.head.problem_type == problem
  x = text(eos_counts=(1, 1, 1, 1))
  rng = np.random.default_rng(1)
  labels = {
    "single_label_classification": rng.integers(0, 3, 4),
    "multi_label_classification": rng.integers(0, 2, (4, 4)).astype("float32"),
    "regression": rng.normal(size=4).astype("float32"),
  }[problem]
  output = theirs(
    input_ids=torch.tensor(x).long(),
    attention_mask=torch.tensor(x != 0),
    labels=torch.tensor(labels),
  )
  output.loss.backward()
  model = factory.create(config)
  close(apply(model, params, x), output.logits.detach())
  loss, grads = loss_and_grads(model, params, batch_of(x, labels))
  close(loss, output.loss.item())
  same_grads(config, grads, theirs)


def test_hf_token_classification(tmp_path):
  theirs, config, params = hf_head("T5ForTokenClassification", tmp_path)
  x = text()
  labels = np.random.default_rng(1).integers(0, 3, x.shape)
  labels[:, ::3] = IGNORED
  labels[x == 0] = IGNORED
  output = theirs(
    input_ids=torch.tensor(x).long(),
    attention_mask=torch.tensor(x != 0),
    labels=torch.tensor(labels),
  )
  output.loss.backward()
  model = factory.create(config)
  logits = apply(model, params, x)
  close(logits[x != 0], output.logits.detach()[torch.tensor(x != 0)])
  loss, grads = loss_and_grads(model, params, batch_of(x, labels))
  close(loss, output.loss.item())
  same_grads(config, grads, theirs)


def test_hf_question_answering(tmp_path):
  """On both stacks. HF does not mask padding, so these rows have none."""
  theirs, config, params = hf_head("T5ForQuestionAnswering", tmp_path, 2)
  x = np.random.default_rng(0).integers(2, 101, (3, 15)).astype(np.int32)
  # The last row's answer is cut off: HF ignores what lies beyond the row.
  spans = np.array([[2, 5], [0, 14], [20, 25]])
  output = theirs(
    input_ids=torch.tensor(x).long(),
    start_positions=torch.tensor(spans[:, 0]),
    end_positions=torch.tensor(spans[:, 1]),
  )
  output.loss.backward()
  model = factory.create(config)
  logits = apply(model, params, x)
  close(logits[..., 0], output.start_logits.detach())
  close(logits[..., 1], output.end_logits.detach())
  loss, grads = loss_and_grads(model, params, batch_of(x, spans))
  close(loss, output.loss.item())
  same_grads(config, grads, theirs)


# ---- FAT5's encoder-only heads: their maths on Hugging Face's encoder --------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  """(HF's encoder, config, its parameters as a bare T5's)."""
  folder = tmp_path_factory.mktemp("hf")
  theirs = hf_models.make("t5_1_1", folder)
  config, params = hf.from_pretrained(folder)
  return theirs.encoder, config, params


def with_body(config, head, params):
  model, own = init(config, head=head)
  return model, own | {k: params[k] for k in ("token_embedder", "encoder")}


def linear(params, x):
  kernel, bias = (
    torch.tensor(np.asarray(params[k])) for k in ("kernel", "bias")
  )
  return x @ kernel + bias


def encoded(encoder, x):
  return encoder(
    input_ids=torch.tensor(x).long(), attention_mask=torch.tensor(x != 0)
  ).last_hidden_state


def pooled_by_hand(hidden, x, how):
  rows = []
  for h, ids in zip(hidden, x):
    real = ids != 0
    eos = np.flatnonzero((ids == 1) & real)
    last = eos[-1] if len(eos) else np.flatnonzero(real)[-1]
    rows.append(
      {"eos": h[last], "first": h[0], "mean": h[torch.tensor(real)].mean(0)}[
        how
      ]
    )
  return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["eos", "mean", "first"])
def test_fat5_sequence_classification(pooling, encoder):
  """Rows differ in their count of </s>; one lost it to truncation."""
  theirs, config, params = encoder
  head = HeadConfig("sequence_classification", num_labels=3, pooling=pooling)
  model, params = with_body(config, head, params)
  x = text()
  x[0, -1] = 7
  h = pooled_by_hand(encoded(theirs, x), x, pooling)
  expected = linear(
    params["classifier"], torch.tanh(linear(params["head"]["dense_0"], h))
  )
  close(apply(model, params, x), expected.detach())
  labels = np.array([0, 2, IGNORED, 1])
  loss, _ = loss_and_grads(model, params, batch_of(x, labels))
  close(
    loss,
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).item(),
  )


def test_fat5_token_classification(encoder):
  theirs, config, params = encoder
  head = HeadConfig("token_classification", num_labels=5)
  model, params = with_body(config, head, params)
  x = text()
  expected = linear(params["classifier"], encoded(theirs, x)).detach()
  found = apply(model, params, x)
  close(found[x != 0], expected[torch.tensor(x != 0)])


def test_fat5_question_answering_masks_padding(encoder):
  theirs, config, params = encoder
  head = HeadConfig("question_answering")
  model, params = with_body(config, head, params)
  x = text()
  expected = linear(params["classifier"], encoded(theirs, x))
  expected = expected.masked_fill(torch.tensor(x == 0)[..., None], -torch.inf)
  labels = np.array([[2, 5], [1, 1], [0, 3], [0, 0]])
  reference = sum(
    torch.nn.functional.cross_entropy(
      expected[..., i], torch.tensor(labels[:, i])
    )
    for i in (0, 1)
  )
  loss, grads = loss_and_grads(model, params, batch_of(x, labels))
  close(loss, reference.item() / 2)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_sentence_embeddings_are_the_normalised_mean(encoder):
  theirs, config, params = encoder
  model, params = with_body(config, HeadConfig("embedding"), params)
  x = text()
  h = pooled_by_hand(encoded(theirs, x), x, "mean")
  close(
    apply(model, params, x),
    torch.nn.functional.normalize(h, dim=-1).detach(),
  )


def test_embeddings_learn_to_find_their_partner_in_the_batch(encoder):
  _, config, params = encoder
  model, params = with_body(config, HeadConfig("embedding"), params)
  x, y = text(), text(seed=3)
  # A row that fills the batch is nobody's partner and nobody's wrong answer.
  x[3], y[3] = 0, 0
  batch = {"encoder_input_tokens": x, "decoder_target_tokens": y}
  loss, grads = loss_and_grads(model, params, batch)
  a = np.asarray(apply(model, params, x[:3]))
  b = np.asarray(apply(model, params, y[:3]))
  scores = torch.tensor(20 * a @ b.T)
  expected = torch.nn.functional.cross_entropy(scores, torch.arange(3))
  close(loss, expected.item())
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# ---- What every head keeps ---------------------------------------------------

HEADS = [
  HeadConfig("sequence_classification"),
  HeadConfig("sequence_classification", body="encoder_decoder"),
  HeadConfig("sequence_classification", pooling="mean", widths=(6, 5)),
  HeadConfig("token_classification", num_labels=3),
  HeadConfig("question_answering"),
  HeadConfig("embedding"),
  HeadConfig("enct5"),
  HeadConfig("enct5", num_labels=4, problem_type="multi_label_classification"),
]


named = pytest.mark.parametrize(
  "head", HEADS, ids=lambda h: f"{h.kind}-{h.body}-{h.pooled}"
)


@named
def test_padding_changes_nothing(head):
  model, params = init(CONFIG, head=head)
  x = text()
  wide = np.pad(x, ((0, 0), (0, 9)))
  together = apply(model, params, wide)
  for i in (1, 2):
    expected = apply(model, params, x[i : i + 1, : (x[i] != 0).sum()])
    found = together[i : i + 1]
    if head.kind in ("token_classification", "question_answering"):
      found = found[:, : expected.shape[1]]
    close(found, expected, 1e-5)


@pytest.mark.parametrize("head", HEADS[2:6] + HEADS[-1:], ids=lambda h: h.kind)
def test_a_row_of_padding_alone_is_finite(head):
  model, params = init(CONFIG, head=head)
  x = np.zeros((2, 6), np.int32)

  def total(params):
    return model.apply({"params": params}, x).sum()

  value, grads = jax.jit(jax.value_and_grad(total))(params)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_layers_looped_and_scanned_agree():
  from fat5_jax.models import layer_stack

  for head in (HEADS[1], HEADS[-1]):
    model, params = init(CONFIG, head=head)
    scanned = factory.create(CONFIG.replace(scan_layers=True), head)
    close(
      apply(scanned, jax.jit(layer_stack.stack)(params), text()),
      apply(model, params, text()),
      1e-5,
    )


def test_encoder_only_heads_have_no_decoder():
  config = factory.create(CONFIG, HeadConfig("token_classification")).config
  assert config.num_decoder_layers == 0
  _, params = init(CONFIG, head=HeadConfig("token_classification"))
  assert set(params) == {"token_embedder", "encoder", "classifier"}


def test_a_module_of_ones_own_takes_the_place_of_the_hidden_layers():
  import flax.linen as nn

  class Own(nn.Module):
    @nn.compact
    def __call__(self, x, *, enable_dropout):
      return jnp.sin(nn.Dense(7)(x))

  for head in (HeadConfig("sequence_classification"), None):
    model, params = init(CONFIG, head=head, head_layers=Own())
    assert params["head"]["Dense_0"]["kernel"].shape == (16, 7)
    width = "classifier" if head else "decoder"
    kernel = params[width]
    kernel = kernel if head else kernel["logits_dense"]
    assert kernel["kernel"].shape[0] == 7


def test_layers_on_the_language_model_head_train_through_the_chunked_loss():
  head = HeadConfig("language_model", widths=(9,), activation="gelu")
  model, params = init(CONFIG, head=head)
  x, y = hf_models.tokens()
  batch = {
    "encoder_input_tokens": x,
    "decoder_input_tokens": np.pad(y, ((0, 0), (1, 0)))[:, :-1],
    "decoder_target_tokens": y,
    "decoder_loss_weights": (y != 0).astype(np.int32),
  }
  loss, grads = loss_and_grads(model, params, batch)
  logits = apply(model, params, x, batch["decoder_input_tokens"], y)
  loss_BL, _ = losses.cross_entropy(logits, y)
  close(loss, losses.weighted_sum(loss_BL, y != 0) / (y != 0).sum())
  assert np.abs(grads["head"]["dense_0"]["kernel"]).max() > 0
  tied = CONFIG.replace(logits_via_embedding=True)
  with pytest.raises(ValueError, match="must end in emb_dim"):
    factory.create(tied, head)


# ---- LoRA --------------------------------------------------------------------


@pytest.mark.parametrize(
  "targets",
  [("query", "value"), ("wi", "wo", "out"), ("logits_dense", "key")],
)
def test_lora_apart_and_merged_compute_the_same(targets):
  from fat5_jax.convert import lora

  config = CONFIG.replace(lora=LoRAConfig(rank=3, alpha=5, targets=targets))
  model, params = init(config)
  x, y = hf_models.tokens()
  plain, leaves = lora.merged(config, table.as_leaves(params))
  merged = table.read_all(leaves)
  assert not any("lora" in str(k) for k in leaves) and plain.lora is None
  run = lambda config, params: apply(factory.create(config), params, x, y)
  close(run(plain, merged), run(config, params), 1e-5)
  without = jax.tree_util.tree_map_with_path(
    lambda p, v: v * 0 if "lora_b" in str(p) else v, params
  )
  change = np.abs(run(config, without) - run(config, params)).max()
  assert change > 1e-3, "the matrices do nothing"
  close(
    factory.create(config).output_kernel(params),
    factory.create(plain).output_kernel(merged),
    1e-6,
  )


def test_fresh_lora_changes_nothing():
  model = factory.create(CONFIG, lora=LoRAConfig())
  x, y = hf_models.tokens()
  params = jax.jit(model.init)(jax.random.key(0), x, y)["params"]
  flat = {
    k: v for k, v in trees.flatten(params).items() if k[-1][:5] != "lora_"
  }
  base = apply(factory.create(CONFIG), trees.nest(flat), x, y)
  np.testing.assert_array_equal(apply(model, params, x, y), base)


def test_lora_dropout_is_on_its_own_branch_alone():
  config = CONFIG.replace(lora=LoRAConfig(dropout_rate=0.5))
  model, params = init(config, head=HeadConfig("embedding"))
  x = text()
  run = lambda params, seed: model.apply(
    {"params": params},
    x,
    enable_dropout=True,
    rngs={"dropout": jax.random.key(seed)},
  )
  assert np.abs(run(params, 0) - run(params, 1)).max() > 1e-4
  quiet = jax.tree_util.tree_map_with_path(
    lambda p, v: v * 0 if "lora_b" in str(p) else v, params
  )
  np.testing.assert_array_equal(run(quiet, 0), run(quiet, 1))
  with pytest.raises(ValueError, match="dropout_rate = 0"):
    CONFIG.replace(lora=LoRAConfig(dropout_rate=0.5, targets=("logits_dense",)))


# ---- Configs that cannot be --------------------------------------------------


@pytest.mark.parametrize(
  "options,match",
  [
    ({"kind": "sequence"}, "kind='sequence'"),
    ({"kind": "embedding", "body": "encoder_decoder"}, "no body"),
    ({"kind": "token_classification", "pooling": "mean"}, "does not pool"),
    ({"kind": "question_answering", "problem_type": "regression"}, "problem"),
    ({"kind": "enct5", "num_labels": 0}, "num_labels"),
    ({"kind": "enct5", "label_names": ("a", "b", "c")}, "3 label_names"),
    ({"kind": "enct5", "dropout_rate": 1.0}, "dropout_rate"),
  ],
)
def test_a_head_that_cannot_be_says_why(options, match):
  with pytest.raises(ValueError, match=match):
    HeadConfig(**options)


def test_enct5_keeps_no_more_decoder_layers_than_there_are():
  with pytest.raises(ValueError, match="the model has 2"):
    factory.create(CONFIG, HeadConfig("enct5", decoder_layers=3))


def test_a_config_survives_json():
  import json

  head = HeadConfig("enct5", label_names=("no", "yes"))
  config = CONFIG.replace(head=head, lora=LoRAConfig())
  again = T5Config(**json.loads(json.dumps(dataclasses.asdict(config))))
  assert again == config
