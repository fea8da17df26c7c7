"""Claims that need eight devices; test_sharding.py runs them where there are.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python -m pytest tests/on_eight_devices.py
"""

import functools

import jax
import numpy as np
import optax
import pytest

from fat5_jax import checkpoints, optimizers, trees
from fat5_jax.checkpoints import (
  checkpointer,
  load,
  optimizer_state,
  reference,
  run_record,
)
from fat5_jax.distributed.sharding import (
  Partitioner,
  standard_logical_axis_rules,
)
from fat5_jax.errors import UserError
from fat5_jax.inference.decoding import make_predict_step
from fat5_jax.models import factory, layer_stack, partitioning
from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config
from fat5_jax.planning import cost
from fat5_jax.training.program import Program

ROWS, LENGTH, VOCAB = 8, 16, 64
CONFIG = T5Config(
  vocab_size=VOCAB,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  num_encoder_layers=2,
  num_decoder_layers=2,
  mlp_dim=64,
  mlp_activations=("gelu", "linear"),
  dtype="float32",
  dropout_rate=0.1,
  attention_implementation="reference",
)
MESHES = {
  "data": {"data": 8},
  "fsdp": {"fsdp": 8},
  "model": {"data": 2, "model": 4},
  "2x2x2": {"data": 2, "fsdp": 2, "model": 2},
  "sequence": {"data": 2, "sequence": 4},
  "all": {"fsdp": 2, "sequence": 2, "model": 2},
}
ADAFACTOR = optimizers.adafactor(0.01, min_dim_size_to_factor=16)
ADAMW = optimizers.adamw(0.01, global_norm_clip_threshold=1.0)


def batch_of(config, lora=None):
  """A batch with padding, packing, and labels as the head wants them."""
  rng = np.random.default_rng(0)
  tokens = lambda: rng.integers(2, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  inputs = tokens()
  inputs[2, 9:] = 0
  head = config.head
  if config.is_language_model:
    weights_BL = np.ones((ROWS, LENGTH), np.int32)
    weights_BL[3, 5:] = 0
    segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)).astype(np.int32))
    return {
      "encoder_input_tokens": inputs,
      "decoder_input_tokens": tokens(),
      "decoder_target_tokens": tokens(),
      "decoder_loss_weights": weights_BL,
      "encoder_segment_ids": np.where(inputs == 0, 0, segments),
      "decoder_segment_ids": segments,
    }
  if head.kind == "embedding":
    return {"encoder_input_tokens": inputs, "decoder_target_tokens": tokens()}
  per_row = {"token_classification": LENGTH, "question_answering": 2}
  count = per_row.get(head.kind, 1)
  labels = rng.integers(0, head.num_labels, (ROWS, count)).astype(np.int32)
  if head.problem_type == "multi_label_classification":
    labels = rng.integers(0, 2, (ROWS, head.num_labels)).astype(np.float32)
  return {
    "encoder_input_tokens": inputs,
    "labels": labels,
    "label_weights": np.ones_like(labels, np.int32),
  }


def keeping_first_gradients(optimizer):
  """The optimizer, its state with the gradients of the first step beside."""

  def init(params):
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    return optimizer.init(params), (jax.numpy.int32(0), zeros)

  def update(gradients, state, params):
    inner, (step, first) = state
    first = jax.tree.map(
      lambda g, f: jax.numpy.where(step == 0, g, f), gradients, first
    )
    updates, inner = optimizer.update(gradients, inner, params)
    return updates, (inner, (step + 1, first))

  return optax.GradientTransformation(init, update)


def train(config, mesh, optimizer, steps=3, devices=8, microbatches=None):
  """(losses, state) of a few steps on a mesh; one device where it is None."""
  partitioner = Partitioner(
    mesh=mesh, devices=jax.devices()[: devices if mesh else 1]
  )
  partitioner.check(config, ROWS, {"inputs": LENGTH}, microbatches)
  program = Program(
    factory.create(config),
    partitioner,
    optimizer,
    z_loss=1e-4 if config.is_language_model else 0.0,
    loss_normalizing_factor="NUM_REAL_TARGET_TOKENS",
    num_microbatches=microbatches,
  )
  state = program.init_state()
  batch = partitioner.to_devices(batch_of(config), 0, ROWS)
  losses = []
  for _ in range(steps):
    state, sums = program.train_step(state, batch)
    losses.append(float(sums["loss"]))
  return losses, state


@functools.cache
def on_one_device(config, optimizer, **options):
  """(losses, gradients of the first step); many meshes are held against it."""
  losses, state = train(
    config, None, keeping_first_gradients(optimizer), **options
  )
  return losses, jax.tree.map(np.asarray, state.opt_state[1][1])


def assert_same_step(config, mesh, optimizer, **options):
  """The mesh's losses, and gradients, are one device's but for rounding.

  Losses over three steps of the optimizer; gradients of the first step against
  each tensor's largest (a bias that a softmax cancels has but rounding: against
  a hundredth of the model's largest).
  """
  wanted, expected = on_one_device(config, optimizer, **options)
  losses, state = train(
    config, mesh, keeping_first_gradients(optimizer), **options
  )
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  least = 0.01 * max(np.abs(y).max() for y in jax.tree.leaves(expected))
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(state.opt_state[1][1]),
    jax.tree.leaves(expected),
    strict=True,
  ):
    worst = np.abs(np.asarray(x) - y).max() / max(least, np.abs(y).max())
    assert worst < 1e-5, (path, worst)


@pytest.mark.parametrize(
  "mesh,optimizer,scan", [("2x2x2", ADAMW, True), ("all", ADAFACTOR, False)]
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(mesh, optimizer, scan):
  layers = 2 if scan else 1
  config = CONFIG.replace(
    scan_layers=scan, num_encoder_layers=layers, num_decoder_layers=layers
  )
  if scan:
    config = config.replace(remat_policy="gathered")
  assert_same_step(config, MESHES[mesh], optimizer)


@pytest.mark.parametrize("length", [4, 256], ids=["exchanged", "gathered"])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "model": 2}])
def test_an_embedding_split_over_the_width_gives_rows_and_gradients(
  mesh, length
):
  """Its rows go round, or with many tokens the table."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(VOCAB, 32)).astype(np.float32)
  tokens = rng.integers(0, VOCAB + 2, (ROWS, length)).astype(np.int32)
  factor = rng.normal(size=(ROWS, length, 32)).astype(np.float32)

  def rows(table, tokens):
    x = partitioning.embed(table, tokens, "float32")
    return jax.numpy.sum(jax.numpy.where(jax.numpy.isnan(x), 0, x * factor)), x

  step = jax.value_and_grad(rows, has_aux=True)
  (_, expected), expected_gradient = jax.jit(step)(table, tokens)
  partitioner = Partitioner(mesh=mesh, devices=jax.devices())
  lies = partitioner.parameter_sharding("token_embedder/embedding", table.shape)
  placed = jax.device_put(table, lies)
  compiled = partitioner.jit(step, out_shardings=None)
  (_, x), gradient = compiled(placed, tokens)
  np.testing.assert_array_equal(x, expected)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
  text = compiled.lower(placed, tokens).compile().as_text()
  assert ("all-to-all" in text) == (length == 4)


def test_kernels_are_gathered_once_where_they_are_kept():
  config = CONFIG.replace(
    scan_layers=True,
    dropout_rate=0.0,
    num_encoder_layers=1,
    num_decoder_layers=1,
  )

  def gathers(policy):
    program = Program(
      factory.create(config.replace(remat_policy=policy)),
      Partitioner(mesh={"fsdp": 8}, devices=jax.devices()),
      optax.sgd(0.1),
    )
    batch = program.partitioner.to_devices(batch_of(CONFIG), 0, ROWS)
    lowered = program.train_step.lower(program.abstract_state, batch)
    traffic = cost.traffic(lowered.compile().as_text())
    return traffic.collectives["all-gather"][0]

  # A layer of 7 kernels, and one of 11.
  assert gathers("minimal") - gathers("gathered") == 7 + 11


@pytest.mark.slow
@pytest.mark.parametrize(
  "optimizer,scan",
  [(ADAFACTOR, True), (ADAMW, False)],
  ids=["adafactor-scan", "adamw-loop"],
)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_optimizer_and_layout(mesh, optimizer, scan):
  config = CONFIG.replace(
    scan_layers=scan,
    remat_policy="full" if scan else "none",
    attention_implementation="chunked",
  )
  assert_same_step(config, MESHES[mesh], optimizer)


@pytest.mark.slow
def test_positions_are_split_with_rows_lengths_and_heads():
  # At random, from the start of packed segments, and FIRE's heads.
  config = CONFIG.replace(
    num_encoder_layers=1,
    num_decoder_layers=1,
    attention_implementation="chunked",
    position_encoding="fire",
    randomized_positions=True,
    max_positions=64,
  )
  assert_same_step(config, MESHES["all"], ADAFACTOR)


@pytest.mark.slow
def test_microbatches_take_rows_of_every_device():
  assert_same_step(
    CONFIG.replace(logits_via_embedding=True, scan_layers=True),
    {"data": 2, "fsdp": 2},
    ADAFACTOR,
    microbatches=2,
    devices=4,
  )


HEADS = [
  HeadConfig("sequence_classification", num_labels=3),
  HeadConfig("enct5", num_labels=3, problem_type="multi_label_classification"),
  HeadConfig("sequence_classification", body="encoder_decoder"),
  HeadConfig("token_classification", num_labels=5),
  HeadConfig("question_answering"),
  HeadConfig("embedding"),
  HeadConfig("language_model", widths=(16,)),
]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS, ids=lambda h: f"{h.kind}-{h.body}")
def test_heads_on_a_mesh(head):
  mesh = "all" if head.body == "encoder_decoder" else "2x2x2"
  assert_same_step(CONFIG.with_head(head), MESHES[mesh], ADAMW)


@pytest.mark.slow
def test_an_embedding_contrasts_with_the_rows_of_all_devices():
  """In-batch negatives are the whole batch's, on any mesh."""
  config = CONFIG.with_head(HeadConfig("embedding"))
  assert_same_step(config, MESHES["fsdp"], ADAMW)


@pytest.mark.slow
def test_lora_on_a_mesh():
  targets = ("query", "out", "wi_0", "wo", "logits_dense")
  config = CONFIG.replace(lora=LoRAConfig(rank=4, targets=targets))
  assert_same_step(config, MESHES["2x2x2"], ADAMW)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "model": 2}, {"sequence": 8}])
def test_greedy_decoding_on_a_mesh_gives_the_same_tokens(mesh):
  model = factory.create(CONFIG)
  batch = {"encoder_input_tokens": batch_of(CONFIG)["encoder_input_tokens"]}

  def decode(mesh):
    partitioner = Partitioner(
      mesh=mesh, devices=jax.devices()[: 8 if mesh else 1]
    )
    params = Program(model, partitioner, ADAMW).init_state().params
    placed = partitioner.to_devices(batch, 0, ROWS)
    predict = make_predict_step(model, partitioner, 6)
    return np.asarray(predict(params, placed).tokens[:, 0])

  np.testing.assert_array_equal(decode(mesh), decode(None))


def test_fsdp_leaves_a_device_an_eighth_of_the_state():
  _, state = train(CONFIG, MESHES["fsdp"], ADAMW, steps=1)
  for tree in (state.params, state.opt_state):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      here = x.addressable_shards[0].data.size
      if "rel_embedding" not in str(path) and x.ndim:
        assert here * 8 == x.size, path


def test_compensation_and_momentum_lie_as_their_parameters_do():
  """bfloat16 parameters from float32 ones, under Muon."""
  model = factory.create(CONFIG.replace(scan_layers=True))
  partitioner = Partitioner(mesh=MESHES["2x2x2"])
  params = Program(model, partitioner, ADAMW).init_state().params
  exact = jax.tree.map(np.asarray, params)
  kahan = optimizers.Compensated(optimizers.muon(0.01))
  state = Program(model, partitioner, kahan).state_from(7, params)
  wanted = {
    trees.path_keys(path): x.sharding
    for path, x in jax.tree_util.tree_leaves_with_path(state.params)
  }
  assert not any(x.is_fully_replicated for k, x in wanted.items() if "mlp" in k)
  seen = set()
  for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
    keys = trees.path_keys(path)
    for start in range(len(keys)):
      if keys[start:] in wanted:
        assert x.sharding.is_equivalent_to(wanted[keys[start:]], x.ndim), keys
        seen.add(keys[:start])
  assert seen == {
    ("compensation",),
    ("inner", "0", "matrices", "0", "mu"),
    ("inner", "0", "others", "0", "mu"),
    ("inner", "0", "others", "0", "nu"),
  }
  for x, p, c in zip(
    *map(jax.tree.leaves, (exact, state.params, state.opt_state.compensation))
  ):
    assert p.dtype == c.dtype == "bfloat16"
    kept = np.asarray(p).astype(float) + np.asarray(c).astype(float)
    assert (np.abs(kept - x) <= 2.0**-17 * np.abs(x)).all()


def test_a_checkpoint_goes_from_one_mesh_and_layout_to_another(tmp_path):
  def made(mesh, scan):
    config = CONFIG.replace(scan_layers=scan)
    partitioner = Partitioner(mesh=mesh, devices=jax.devices())
    return Program(factory.create(config), partitioner, ADAFACTOR)

  program = made(MESHES["2x2x2"], True)
  state = program.init_state()
  saver = checkpointer.Checkpointer(
    str(tmp_path), checkpoints.SaveCheckpointConfig()
  )
  saver.save(3, state.params, state.opt_state, {"batches": 3})
  saver.wait()
  for mesh, scan in ((MESHES["fsdp"], False), (MESHES["model"], True)):
    other = made(mesh, scan)
    abstract = other.abstract_state
    params, opt_state, data = saver.restore(
      3, abstract.params, abstract.opt_state, other.partitioner
    )
    assert data == {"batches": 3}
    for tree, original in (
      (params, state.params),
      (opt_state, state.opt_state),
    ):
      if not scan:
        original = layer_stack.unstack(original)
      jax.tree.map(np.testing.assert_array_equal, tree, original)
    wanted = jax.tree.map(lambda x: x.sharding, abstract.params)
    found = jax.tree.map(lambda x: x.sharding, params)
    assert jax.tree.all(
      jax.tree.map(
        lambda a, b, x: a.is_equivalent_to(b, x.ndim), found, wanted, params
      )
    )
  saver.close()


def test_bad_meshes_and_sizes_are_one_clear_error():
  def check(mesh, config=CONFIG, rows=ROWS, length=LENGTH, rules=()):
    partitioner = Partitioner(
      mesh=mesh, logical_axis_rules=standard_logical_axis_rules(rules)
    )
    partitioner.check(config, rows, {"inputs": length})
    return partitioner.device_mesh

  with pytest.raises(
    UserError, match="MESH: fsdp 3 makes 3, and the number of devices is 8"
  ):
    check({"fsdp": 3})
  with pytest.raises(UserError, match="'fdsp'. Did you mean 'fsdp'"):
    check({"fdsp": 8})
  with pytest.raises(
    UserError, match="num_heads = 4 does not divide over the 8"
  ):
    check({"model": 8})
  with pytest.raises(UserError, match="BATCH_SIZE = 12 .* nearest .* 16"):
    check({"fsdp": 8}, rows=12)
  with pytest.raises(UserError, match=r"LENGTHS\['inputs'\] = 12 .* 16"):
    check({"sequence": 8}, length=12)
  with pytest.raises(UserError, match="vocab_size = 63 .*'vocab', None"):
    check({"model": 2}, CONFIG.replace(vocab_size=63))
  check({"model": 2}, CONFIG.replace(vocab_size=63), rules=[("vocab", None)])
  with pytest.raises(UserError, match="NUM_PARTITIONS asks for 2"):
    Partitioner(mesh={"model": 4}, num_partitions=2).sizes  # noqa: B018
  with pytest.raises(UserError, match="coordinates"):
    Partitioner(model_parallel_submesh=(2, 1, 1, 1)).device_mesh  # noqa: B018


def test_names_of_t5x_make_the_same_mesh():
  assert Partitioner(num_partitions=4).sizes == {
    "data": 2,
    "fsdp": 1,
    "sequence": 1,
    "model": 4,
  }


def test_weights_from_disk_lie_where_the_run_wants_them(tmp_path):
  config = CONFIG.replace(scan_layers=True)
  program = Program(factory.create(config), Partitioner(), ADAMW)
  state = program.init_state()
  saver = checkpointer.Checkpointer(
    str(tmp_path), checkpoints.SaveCheckpointConfig()
  )
  saver.save(0, state.params, state.opt_state, {})
  saver.wait()
  saver.close()
  run_record.write(str(tmp_path), config, None)
  partitioner = Partitioner(mesh=MESHES["2x2x2"])
  abstract = Program(program.model, partitioner, ADAMW).abstract_state
  params, _, fresh = load.load_params(
    str(tmp_path), config, abstract.params, partitioner
  )
  assert not fresh
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  kernel = params["encoder"]["layers"]["mlp"]["wo"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 32, 16)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_t5x_s_slots_go_onto_a_mesh(scan, tmp_path):
  """They lie as their parameters do; put together they are T5X's."""
  from test_formats import T5X

  theirs = T5X(CONFIG, True, beta1=0.9, factored=False)
  theirs.train()
  source = reference.find(theirs.write(tmp_path / "checkpoint_1"))
  partitioner = Partitioner(mesh=MESHES["2x2x2"])
  program = Program(
    factory.create(theirs.config.replace(scan_layers=scan)),
    partitioner,
    optimizers.adafactor(0.01, beta1=0.9, factored=False),
  )
  abstract = program.abstract_state
  state = optimizer_state.load_optimizer(
    source, abstract.opt_state, abstract.params, partitioner
  )
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
    lambda x: x.sharding, abstract.opt_state
  )
  split = [x for x in jax.tree.leaves(state[0].m) if not x.is_fully_replicated]
  assert split
  for slot in ("m", "v"):
    tree = layer_stack.unstack(getattr(state[0], slot))
    found = {k: np.asarray(x) for k, x in trees.flatten(tree).items()}
    for k, x in theirs.layout(found).items():
      np.testing.assert_array_equal(x, theirs.slots[k][slot].astype("float32"))
