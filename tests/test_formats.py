"""Checkpoints of other libraries: found, read bit for bit, and refused."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile

from conftest import ROOT
import fat5_model
import hf_models
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import t5x_adafactor

from fat5_jax import optimizers, trees
from fat5_jax.checkpoints import load, optimizer_state, reference, writer
from fat5_jax.convert import (
  enct5,
  flash_t5,
  folders,
  formats,
  hf,
  hf_heads,
  mesh_tf,
  peft,
  t5x,
  table,
  tensor_files,
)
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.models import factory, layer_stack
from fat5_jax.models.config import HeadConfig, LoRAConfig, T5Config

CONFIG = T5Config(
  vocab_size=50,
  emb_dim=8,
  num_heads=2,
  head_dim=4,
  num_encoder_layers=2,
  num_decoder_layers=1,
  mlp_dim=12,
  mlp_activations=("gelu", "linear"),
  dtype="float32",
  attention_implementation="reference",
)


def random_leaves(config, dtype="float32", seed=0):
  """A made-up model under our names."""
  model = factory.create(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  inputs = [tokens] * (2 if model.config.is_language_model else 1)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
  rng = np.random.default_rng(seed)
  arrays = {
    k: rng.normal(size=x.shape).astype(dtype)
    for k, x in trees.flatten(shapes["params"]).items()
  }
  return model.config, {k: table.leaf_of(x) for k, x in arrays.items()}


def same(found, expected):
  assert found.keys() == expected.keys()
  for k, leaf in expected.items():
    a, b = found[k].read(), leaf.read()
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), k


# ---- Hugging Face and FAT5 ---------------------------------------------------

HEADS = [
  HeadConfig("sequence_classification", num_labels=3, body="encoder_decoder"),
  HeadConfig("sequence_classification", label_names=("no", "yes")),
  HeadConfig("sequence_classification", widths=(), pooling="first"),
  HeadConfig(
    "sequence_classification", num_labels=1, problem_type="regression"
  ),
  HeadConfig("token_classification", num_labels=5),
  HeadConfig("question_answering", body="encoder_decoder"),
  HeadConfig("question_answering"),
  HeadConfig("embedding"),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda h: f"{h.kind}-{h.body}")
def test_every_head_goes_there_and_back_in_both_formats(head, tmp_path):
  config, leaves = random_leaves(CONFIG.with_head(head))
  for name, write in (
    ("hf", hf.to_pretrained),
    ("flash_t5", flash_t5.to_folder),
  ):
    write(config, leaves, tmp_path / name)
    source = reference.find(str(tmp_path / name))
    assert source.kind == name
    found_config, found = reference.open_params(source)
    assert found_config.architecture() == config.architecture()
    assert found_config.head == head
    same(found, leaves)


@pytest.mark.parametrize(
  "head,class_name",
  [
    (HEADS[0], "T5ForSequenceClassification"),
    (HEADS[4], "T5ForTokenClassification"),
    (HEADS[5], "T5ForQuestionAnswering"),
  ],
)
def test_exported_heads_load_in_transformers(head, class_name, tmp_path):
  import torch
  import transformers

  config, leaves = random_leaves(CONFIG.with_head(head))
  hf.to_pretrained(config, leaves, tmp_path)
  theirs, info = getattr(transformers, class_name).from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys")), info
  assert theirs.config.num_labels == head.num_labels
  x = np.arange(2, 14).reshape(2, 6)
  x[:, -1] = 1
  output = theirs.eval()(input_ids=torch.tensor(x))
  if head.kind == "question_answering":
    expected = torch.stack([output.start_logits, output.end_logits], -1)
  else:
    expected = output.logits
  found = factory.create(config).apply({"params": table.read_all(leaves)}, x)
  expected = expected.detach().numpy()
  assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_encoder_alone_is_half_the_bytes_and_loads_in_transformers(
  tmp_path,
):
  import torch
  import transformers

  theirs = hf_models.make("t5_1_1", tmp_path / "hf")
  config, leaves = hf.open_model(tmp_path / "hf", without_decoder=True)
  config = config.with_head(HeadConfig("embedding"))
  hf.to_pretrained(config, leaves, tmp_path / "encoder")
  model, info = transformers.T5EncoderModel.from_pretrained(
    tmp_path / "encoder", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  x = torch.randint(2, 100, (2, 9))
  assert torch.equal(
    model(x).last_hidden_state, theirs.encoder.eval()(x).last_hidden_state
  )
  again, _ = hf.open_model(tmp_path / "encoder")
  assert again.num_decoder_layers == 0 and again.head.kind == "embedding"


def test_encoder_only_loading_reads_no_decoder_tensor(tmp_path, monkeypatch):
  hf_models.make("t5_1_1", tmp_path)
  read = []
  original = tensor_files.read_safetensors

  def spied(path):
    def spy(name, leaf):
      return table.Leaf(
        leaf.shape, leaf.dtype, lambda: (read.append(name), leaf.read())[1]
      )

    return {name: spy(name, leaf) for name, leaf in original(path).items()}

  monkeypatch.setattr(
    tensor_files,
    "read_folder",
    lambda folder: spied(os.path.join(folder, "model.safetensors")),
  )
  _, params = hf.from_pretrained(tmp_path, without_decoder=True)
  assert set(params) == {"token_embedder", "encoder"}
  assert "encoder.block.0.layer.0.SelfAttention.q.weight" in read
  assert not [name for name in read if name.startswith("decoder.")]


FLASH_NAMES = {
  # The names that flashT5's own modules give (users.md, section 3.3).
  "shared.weight",
  "encoder.block.0.self_attention_layer.self_attention.Wq.weight",
  "encoder.block.0.self_attention_layer.self_attention.Wk.weight",
  "encoder.block.0.self_attention_layer.self_attention.Wv.weight",
  "encoder.block.0.self_attention_layer.self_attention.o.weight",
  "encoder.block.0.self_attention_layer.self_attention.pe_encoding"
  ".relative_attention_bias.weight",
  "encoder.block.0.self_attention_layer.layer_norm.weight",
  "encoder.block.0.ff_layer.layer_norm.weight",
  "encoder.block.0.ff_layer.act.wi.weight",
  "encoder.block.0.ff_layer.wo.weight",
  "encoder.final_layer_norm.weight",
  "decoder.block.0.self_attention_layer.self_attention.Wq.weight",
  "decoder.block.0.self_attention_layer.self_attention.Wk.weight",
  "decoder.block.0.self_attention_layer.self_attention.Wv.weight",
  "decoder.block.0.self_attention_layer.self_attention.o.weight",
  "decoder.block.0.self_attention_layer.self_attention.pe_encoding"
  ".relative_attention_bias.weight",
  "decoder.block.0.self_attention_layer.layer_norm.weight",
  "decoder.block.0.cross_attention_layer.cross_attention.Wq.weight",
  "decoder.block.0.cross_attention_layer.cross_attention.Wk.weight",
  "decoder.block.0.cross_attention_layer.cross_attention.Wv.weight",
  "decoder.block.0.cross_attention_layer.cross_attention.o.weight",
  "decoder.block.0.cross_attention_layer.layer_norm.weight",
  "decoder.block.0.ff_layer.layer_norm.weight",
  "decoder.block.0.ff_layer.act.wi.weight",
  "decoder.block.0.ff_layer.wo.weight",
  "decoder.final_layer_norm.weight",
  "lm_head.weight",
}


def test_flash_t5_with_relu_has_fat5s_names_and_scale(tmp_path):
  config = CONFIG.replace(
    num_encoder_layers=1,
    mlp_activations=("relu",),
    attention_scale=2**-0.5,
  )
  config, leaves = random_leaves(config, ml_dtypes.bfloat16)
  flash_t5.to_folder(config, leaves, tmp_path / "flash")
  path = tmp_path / "flash" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  # Empty, and T5's: classes of transformers refuse the folder for it.
  assert tensors.pop("encoder.block.0.layer.0.layer_norm.weight").size == 0
  assert set(tensors) == FLASH_NAMES
  # Without attention_scale it is 1/sqrt(heads), and the default pad no token.
  hf_models.edit_config(
    tmp_path / "flash", attention_scale=None, pad_token_id=-100
  )
  found_config, found = flash_t5.open_model(tmp_path / "flash")
  assert found_config.attention_scale == pytest.approx(2**-0.5)
  assert found_config.pad_token_id == 0
  same(found, leaves)


def test_attention_scale_is_that_of_scaled_queries():
  config = CONFIG.replace(attention_scale=0.25)
  config, leaves = random_leaves(config)
  x = np.arange(2, 12).reshape(2, 5)
  params = table.read_all(leaves)
  scaled = jax.tree_util.tree_map_with_path(
    lambda p, v: v * 0.25 if "query" in str(p) else v, params
  )
  run = lambda c, p: factory.create(c).apply({"params": p}, x, x)
  np.testing.assert_allclose(
    run(config, params), run(CONFIG, scaled), rtol=1e-4, atol=1e-5
  )


FAT5_POSITIONS = {
  "ALiBi": dict(position_encoding="alibi", alibi_mode="asymmetric"),
  "RoPE": dict(position_encoding="rope", rotary_scope="everything"),
  "RoPE, half of xPos, neighbours": dict(
    position_encoding="rope",
    rotary_scope="everything",
    rotary_fraction=0.5,
    rotary_base=100,
    rotary_interleaved=True,
    rotary_scale_base=8,
    max_positions=10,
  ),
  # Queries on both sides of the threshold.
  "FIRE": dict(
    position_encoding="fire",
    fire_mlp_width=5,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=9,
    randomized_positions=True,
  ),
}


@pytest.mark.parametrize("name", FAT5_POSITIONS)
def test_fat5s_position_encodings_compute_what_fat5_does(name, tmp_path):
  config = CONFIG.replace(attention_scale=0.5, **FAT5_POSITIONS[name])
  config, leaves = random_leaves(config)
  flash_t5.to_folder(config, leaves, tmp_path / "flash")
  found_config, found = flash_t5.open_model(tmp_path / "flash")
  assert found_config.architecture() == config.architecture()
  assert found_config.randomized_positions == config.randomized_positions
  same(found, leaves)
  rng = np.random.default_rng(0)
  x, y = rng.integers(2, 50, 17), rng.integers(2, 50, 13)
  expected = fat5_model.logits(
    json.loads((tmp_path / "flash" / "config.json").read_text()),
    safetensors.numpy.load_file(tmp_path / "flash" / "model.safetensors"),
    *(x, y),
  )
  params = {"params": table.read_all(found)}
  [logits] = factory.create(found_config).apply(params, x[None], y[None])
  assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
  with pytest.raises(UserError, match="--to flash_t5"):
    hf.to_pretrained(config, leaves, tmp_path / "hf")
  hf_models.edit_config(tmp_path / "flash", position_encoding_type="CoPE")
  with pytest.raises(UserError, match="position_encoding_type is 'CoPE'"):
    flash_t5.open_model(tmp_path / "flash")


def test_a_fire_threshold_that_is_not_the_configs_is_refused(tmp_path):
  config, leaves = random_leaves(CONFIG.replace(**FAT5_POSITIONS["FIRE"]))
  flash_t5.to_folder(config, leaves, tmp_path)
  hf_models.edit_config(tmp_path, relative_attention_max_distance=64)
  with pytest.raises(UserError, match=r"init_L is \[9\]"):
    flash_t5.open_model(tmp_path)


def test_what_fat5_has_not_is_refused(tmp_path):
  for changes, match in (
    ({"scale_decoder_outputs": True}, "does not scale"),
    ({"relative_attention_per_layer": True}, "one position table"),
    ({"mlp_activations": ("silu", "linear")}, "no mlp_activations"),
    ({"position_encoding": "none"}, "position_encoding='none'"),
    ({"position_encoding": "rope"}, "rotary_scope='self_attention'"),
  ):
    config, leaves = random_leaves(CONFIG.replace(**changes))
    with pytest.raises(UserError, match=match):
      flash_t5.to_folder(config, leaves, tmp_path / "flash")
  assert not (tmp_path / "flash").exists()


def write_published(config, leaves, folder, **config_json):
  """A head on the encoder under FAT5's names, as we wrote it too."""
  tensors = table.to_foreign(hf.rows(config, published=True), leaves, "test")
  assert "shared.weight" in tensors
  labels = hf_heads.labels_json(config.head)
  found = hf.body_json(config) | labels | config_json
  folders.write_folder(folder, {"config.json": found}, tensors, None, 10**9)


@pytest.mark.parametrize("head", [HEADS[1], HEADS[2], HEADS[6]])
def test_exports_of_earlier_versions_are_read(head, tmp_path):
  config, leaves = random_leaves(CONFIG.with_head(head))
  write_published(config, leaves, tmp_path / "out")
  found_config, found = hf.open_model(tmp_path / "out")
  assert found_config.architecture() == config.architecture()
  assert found_config.head == config.head
  same(found, leaves)


def test_monologgs_enct5_is_an_encoder_read_at_its_first_token(tmp_path):
  head = HeadConfig(
    "sequence_classification", num_labels=3, widths=(), pooling="first"
  )
  config, leaves = random_leaves(CONFIG.with_head(head))
  # As their repository writes it.
  write_published(
    config,
    leaves,
    tmp_path,
    fat5_jax={},
    architectures=["EncT5ForSequenceClassification"],
  )
  found_config, found = hf.open_model(tmp_path)
  assert found_config.head.pooled == "first"
  assert found_config.head.kind == "sequence_classification"
  same(found, leaves)


@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_enct5_there_and_back(problem, tmp_path):
  head = HeadConfig(
    "enct5", num_labels=4, problem_type=f"{problem}_classification"
  )
  config, leaves = random_leaves(CONFIG.with_head(head))
  enct5.to_folder(config, leaves, tmp_path)
  source = reference.find(str(tmp_path))
  assert source.kind == "enct5"
  found_config, found = reference.open_params(source)
  assert found_config.head == head
  same(found, leaves)
  hf.to_pretrained(config, leaves, tmp_path / "hf")
  found_config, found = reference.open_params(
    reference.find(str(tmp_path / "hf"))
  )
  assert found_config.architecture() == config.architecture()
  assert found_config.head == config.head
  same(found, leaves)
  with pytest.raises(UserError, match="--to hf or enct5"):
    flash_t5.to_folder(config, leaves, tmp_path / "flash")


# ---- PEFT --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["language_model", "token_classification"])
def test_a_peft_round_trip_loads_in_peft_with_the_same_logits(kind, tmp_path):
  import peft as oracle
  import torch
  import transformers

  torch.manual_seed(0)
  if kind == "language_model":
    theirs = hf_models.make("t5_1_1", tmp_path / "hf")
    targets = ["q", "v", "wo"]
  else:
    theirs = transformers.T5ForTokenClassification(
      transformers.T5Config(**hf_models._DIMS, num_labels=3)
    )
    theirs.save_pretrained(tmp_path / "hf")
    targets = ["q", "k"]
  adapter = oracle.get_peft_model(
    theirs,
    oracle.LoraConfig(
      r=3,
      lora_alpha=7,
      lora_dropout=0.1,
      target_modules=targets,
      modules_to_save=None if kind == "language_model" else ["classifier"],
    ),
  ).eval()
  with torch.no_grad():
    for name, parameter in adapter.named_parameters():
      if "lora_B" in name or "modules_to_save" in name:
        # Of a trained adapter's size: rounding is not amplified.
        parameter.normal_(std=0.1)
  adapter.save_pretrained(tmp_path / "adapter")
  hf_models.edit_config(tmp_path / "hf")

  source = reference.CheckpointRef(
    "peft", str(tmp_path / "adapter"), base=str(tmp_path / "hf")
  )
  config, leaves = reference.open_params(source)
  assert (config.lora.rank, config.lora.alpha) == (3, 7)
  x, y = hf_models.tokens()
  inputs = (x, y) if kind == "language_model" else (x,)
  options = {
    "input_ids": torch.tensor(x),
    "attention_mask": torch.tensor(x != 0),
  }
  if kind == "language_model":
    options["decoder_input_ids"] = torch.tensor(y)
  expected = adapter(**options).logits.detach().numpy()
  found = factory.create(config).apply(
    {"params": table.read_all(leaves)}, *inputs
  )
  real = x != 0 if kind != "language_model" else np.ones_like(y, bool)
  error = np.abs(found - expected)[real].max()
  assert error < 1e-4 * np.abs(expected).max()

  # Ours, read by peft, on the same base.
  peft.to_peft(config, leaves, tmp_path / "ours", str(tmp_path / "hf"))
  base = type(theirs).from_pretrained(tmp_path / "hf")
  again = oracle.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
  np.testing.assert_allclose(
    again(**options).logits.detach().numpy(), expected, rtol=1e-5, atol=1e-5
  )
  # Ours, read by us: bit for bit, and the same short names of targets.
  found_config, found = formats.open_model(
    "peft", str(tmp_path / "ours"), base=str(tmp_path / "hf")
  )
  assert found_config.lora == config.lora
  same(found, leaves)


def test_an_adapters_card_leads_to_the_model_wherever_its_base_is(tmp_path):
  """The base that it names is no folder here: the card's command, its lines."""
  config, leaves = random_leaves(CONFIG.replace(lora=LoRAConfig()))
  plain = {k: x for k, x in leaves.items() if k[-1][:5] != "lora_"}
  hf.to_pretrained(config.replace(lora=None), plain, tmp_path / "hf")
  peft.to_peft(config, leaves, tmp_path / "adapter", "somebody/base")
  card = (tmp_path / "adapter" / "README.md").read_text()
  card = card.replace("/models/this", str(tmp_path / "adapter"))
  card = card.replace("MODEL_DIR", str(tmp_path / "run"))
  (command,) = re.findall(r"`python (tools/convert_checkpoint.*?)`", card)
  command = command.replace("BASE", str(tmp_path / "hf"))
  subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
  scope = {}
  exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1], scope)
  found = trees.flatten(scope["params"])
  assert found.keys() == leaves.keys()
  for path, leaf in leaves.items():
    assert np.array_equal(found[path], leaf.read()), path


def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path):
  config, leaves = random_leaves(CONFIG.replace(lora=LoRAConfig()))
  plain = {k: x for k, x in leaves.items() if k[-1][:5] != "lora_"}
  hf.to_pretrained(config.replace(lora=None), plain, tmp_path / "hf")
  peft.to_peft(config, leaves, tmp_path / "adapter")
  open_model = lambda: formats.open_model(
    "peft", str(tmp_path / "adapter"), base=str(tmp_path / "hf")
  )
  open_model()
  with pytest.raises(UserError, match="--base"):
    formats.open_model("peft", str(tmp_path / "adapter"))
  path = tmp_path / "adapter" / "adapter_config.json"
  adapter = json.loads(path.read_text())
  path.write_text(json.dumps(adapter | {"use_dora": True}))
  with pytest.raises(UserError, match="use_dora"):
    open_model()


# ---- T5X ---------------------------------------------------------------------


def legacy(leaves, slots=False):
  """T5X's tree before it is written: optimizer/target and its state."""
  target = table.read_all(leaves)
  state = {"step": np.int32(7), "param_states": {}}
  if slots:
    state["param_states"] = jax.tree.map(
      lambda x: {
        "m": np.zeros(1, "float32"),
        "v": np.square(x.astype("float32")),
        "v_row": np.zeros(1, "float32"),
        "v_col": np.zeros(1, "float32"),
      },
      target,
    )
  return {
    "version": 3,
    "optimizer": {"target": target, "state": state},
  }


def write_msgpack(tree, folder):
  from flax import serialization

  folder.mkdir(exist_ok=True)
  data = serialization.msgpack_serialize(tree)
  (folder / "checkpoint").write_bytes(data)


def write_zarr(path, array):
  import tensorstore as ts

  ts.open(
    {
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": f"{path}/"},
      "metadata": {
        "compressor": {"id": "gzip", "level": 1},
        "chunks": [max(1, n // 2) for n in array.shape],
      },
    },
    create=True,
    dtype=array.dtype,
    shape=array.shape,
  ).result().write(array).result()


def out_of_line(node, folder, leaf, path=()):
  """The tree with every target array in a folder beside, as T5X writes it."""
  if isinstance(node, dict):
    return {
      k: out_of_line(v, folder, leaf, (*path, k)) for k, v in node.items()
    }
  if "target" not in path:
    return node
  name = ".".join(path[path.index("target") :])
  write_zarr(folder / name, node)
  return leaf(name, node)


SPEC = lambda name, array: {
  "driver": "zarr",
  "dtype": str(array.dtype),
  "kvstore": {"driver": "gfile", "path": f"{name}/"},
  "metadata": {
    "chunks": list(array.shape),
    "compressor": {"id": "gzip", "level": 1},
    "shape": list(array.shape),
  },
}
PLACEHOLDER = lambda name, array: f"PLACEHOLDER://{name}"


@pytest.mark.parametrize("leaf", [None, SPEC, PLACEHOLDER])
def test_t5x_msgpack_with_arrays_inline_and_beside(leaf, tmp_path):
  config, leaves = random_leaves(CONFIG)
  tree = legacy(leaves)
  folder = tmp_path / "checkpoint_1007"
  folder.mkdir()
  if leaf is not None:
    tree = out_of_line(tree, folder, leaf)
  write_msgpack(tree, folder)
  for path in (folder, tmp_path):
    source = reference.find(str(path))
    assert (source.kind, source.step) == ("t5x", 1007)
    found_config, found = reference.open_params(source)
    same(found, leaves)
  expected = config.replace(dtype="bfloat16").architecture()
  assert found_config.architecture() == expected


def test_t5x_as_orbax_writes_it_now(tmp_path):
  import orbax.checkpoint as ocp

  _, leaves = random_leaves(CONFIG)
  tree = {
    "target": table.read_all(leaves),
    "state": {"step": np.int32(3), "param_states": {}},
  }
  folder = tmp_path / "checkpoint_3"
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)).save(
    folder / "state", tree
  )
  source = reference.find(str(folder))
  assert source.kind == "t5x"
  same(reference.open_params(source)[1], leaves)


def test_t5x_scanned_layers_with_heads_apart(tmp_path):
  """The scalable layout: layers along axis 1, heads and dimension apart."""
  config = CONFIG.replace(relative_attention_per_layer=True)
  _, leaves = random_leaves(config)
  arrays = {k: leaf.read() for k, leaf in leaves.items()}
  target = t5x_adafactor.scanned(arrays, config.head_dim)
  tree = {
    "version": 3,
    "optimizer": {"target": trees.nest(target), "state": {}},
  }
  write_msgpack(tree, tmp_path / "checkpoint_5")
  found_config, found = t5x.open_model(str(tmp_path / "checkpoint_5"))
  assert found_config.relative_attention_per_layer
  same(found, leaves)


def test_t5x_bfloat16_written_as_its_bits(tmp_path):
  _, leaves = random_leaves(CONFIG, ml_dtypes.bfloat16)
  tree = legacy(
    {k: table.leaf_of(x.read().view(np.uint16)) for k, x in leaves.items()}
  )
  write_msgpack(tree, tmp_path / "checkpoint_1")
  same(t5x.open_model(str(tmp_path / "checkpoint_1"))[1], leaves)


def test_what_shapes_do_not_tell_can_be_said(tmp_path):
  _, leaves = random_leaves(CONFIG)
  write_msgpack(legacy(leaves), tmp_path / "checkpoint_1")
  path = str(tmp_path / "checkpoint_1")
  config, _ = t5x.open_model(path, {"mlp_activations": ("silu", "linear")})
  assert config.mlp_activations == ("silu", "linear")
  with pytest.raises(UserError, match="mlp_activation"):
    t5x.open_model(path, {"mlp_activation": ("silu",)})


def test_adafactors_slots_come_along_and_training_goes_on(tmp_path):
  config, leaves = random_leaves(CONFIG)
  write_msgpack(legacy(leaves, slots=True), tmp_path / "checkpoint_7")
  source = reference.find(str(tmp_path / "checkpoint_7"))
  step, state = optimizer_state.adafactor_state(source, config)
  assert step == 7 and int(state[0].count) == 7
  writer.write_params(str(tmp_path / "run"), config, leaves, None, step, state)
  run = reference.find(str(tmp_path / "run"))
  assert run.step == 7 and run.has_optimizer
  optimizer = optimizers.adafactor(optimizers.create_learning_rate_scheduler())
  params = jax.tree.map(jnp.asarray, table.read_all(leaves))
  abstract = jax.eval_shape(optimizer.init, params)
  restored = optimizer_state.load_optimizer(
    run, abstract, params, Partitioner()
  )
  for k, leaf in leaves.items():
    np.testing.assert_array_equal(
      trees.flatten(restored[0].v)[k], np.square(leaf.read())
    )


class T5X:
  """A run of T5X's by the oracle: parameters of a layout, slots, step."""

  def __init__(self, config, scan, step=0, seed=1, **settings):
    config = config.replace(relative_attention_per_layer=scan)
    self.config, leaves = random_leaves(config)
    self.step, self.scan, self._settings = step, scan, settings
    self._rng = np.random.default_rng(seed)
    arrays = {k: x.read().astype(float) for k, x in leaves.items()}
    self.params = self.layout(arrays)
    self._kinds = {
      k: t5x_adafactor.standard_kinds(k, x.shape) if scan else None
      for k, x in self.params.items()
    }
    made = {k: settings[k] for k in ("beta1", "factored") if k in settings}
    self.slots = {
      k: t5x_adafactor.init(x.shape, self._kinds[k], **made)
      for k, x in self.params.items()
    }
    self.minimal = {k: x.shape for k, x in arrays.items()}

  def layout(self, minimal):
    if not self.scan:
      return minimal
    return t5x_adafactor.scanned(minimal, self.config.head_dim)

  def train(self, rate=0.01):
    """The gradients of a step, minimal, after taking it."""
    minimal = {
      k: self._rng.normal(size=shape) ** 3 for k, shape in self.minimal.items()
    }
    grads = self.layout(minimal)
    for k in self.params:
      self.params[k], self.slots[k] = t5x_adafactor.update(
        *(self.params[k], self.slots[k], grads[k], rate, self.step),
        self._kinds[k],
        **self._settings,
      )
    self.step += 1
    return minimal

  def write(self, folder):
    narrow = lambda x: np.asarray(x, np.float32)
    state = {
      k + (s,): narrow(x)
      for k, own in self.slots.items()
      for s, x in own.items()
    }
    tree = {
      "target": trees.nest({k: narrow(x) for k, x in self.params.items()}),
      "state": {"step": np.int32(self.step), "param_states": trees.nest(state)},
    }
    write_msgpack({"version": 3, "optimizer": tree}, folder)
    return str(folder)


WIDE = dict(emb_dim=136, num_heads=32, head_dim=4, mlp_dim=136, vocab_size=140)
CONTINUED = {
  # What T5X's rules factor in scanned layers, small as it is.
  "scanned": (CONFIG, True, dict(beta1=0.9, weight_decay_rate=0.01)),
  # By size: heads joined are narrower than the model, the MLP is square.
  "scanned-wide": (CONFIG.replace(**WIDE), True, {}),
  "minimal-wide": (CONFIG.replace(**WIDE), False, dict(beta1=0.9)),
  # T5X's unfactored scans take the RMS over all layers; here is but one.
  "unfactored": (
    CONFIG.replace(num_encoder_layers=1),
    True,
    dict(beta1=0.9, factored=False),
  ),
}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", CONTINUED)
def test_training_goes_on_where_t5x_left_off(name, scan, tmp_path):
  """Three steps by the oracle, written as T5X writes, five more by both."""
  config, theirs_scanned, settings = CONTINUED[name]
  theirs = T5X(config, theirs_scanned, step=1000, **settings)
  for _ in range(3):
    theirs.train()
  path = theirs.write(tmp_path / "checkpoint_1003")
  rules = None
  if name == "scanned":
    rules = optimizers.standard_logical_factor_rules()
  optimizer = optimizers.adafactor(0.01, logical_factor_rules=rules, **settings)
  config = theirs.config.replace(scan_layers=scan, dtype="bfloat16")
  lay = jax.jit(layer_stack.stack) if scan else lambda tree: tree
  shapes = {
    k: jax.ShapeDtypeStruct(x, "float32") for k, x in theirs.minimal.items()
  }
  abstract = jax.eval_shape(lay, trees.nest(shapes))
  partitioner = Partitioner(devices=jax.devices()[:1])
  params, source, _ = load.load_params(
    path, config, partitioner.place(abstract), partitioner
  )
  assert source.continues and reference.read_step(source) == 1003
  state = optimizer_state.load_optimizer(
    source,
    partitioner.place(jax.eval_shape(optimizer.init, abstract), abstract),
    abstract,
    partitioner,
  )
  assert int(state[0].count) == 1003
  # The converter writes the same slots.
  step, converted = optimizer_state.adafactor_state(source, theirs.config)
  assert step == 1003
  for a, b in zip(
    jax.tree.leaves(jax.jit(layer_stack.unstack)(state)),
    jax.tree.leaves(converted),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  update = jax.jit(optimizer.update)
  for _ in range(5):
    grads = theirs.train()
    grads = {k: jnp.asarray(x, jnp.float32) for k, x in grads.items()}
    grads = lay(trees.nest(grads))
    updates, state = update(grads, state, params)
    params = jax.tree.map(np.add, params, updates)
  found = trees.flatten(jax.jit(layer_stack.unstack)(params))
  found = theirs.layout({k: np.asarray(x, float) for k, x in found.items()})
  for k, wanted in theirs.params.items():
    error = np.abs(found[k] - wanted).max() / np.abs(wanted).max()
    assert error < 1e-5, (k, error)


def test_slots_that_are_not_one_a_layer_are_refused(tmp_path):
  """Without its rules, T5X once averaged over two of a kernel's three axes."""
  theirs = T5X(CONFIG, True)
  query = ("encoder", "encoder", "attention", "query", "kernel")
  # (width, layers, heads, dimension): the two largest are 0 and 3.
  theirs.slots[query] |= {
    "v_row": np.ones((8, 2, 2)),
    "v_col": np.ones((2, 2, 4)),
  }
  path = theirs.write(tmp_path / "checkpoint_3")
  with pytest.raises(UserError, match="query.*is not one a layer"):
    t5x.open_slots(path)


def test_another_optimizer_than_t5x_s_is_said_to_be_so(tmp_path):
  theirs = T5X(CONFIG, False)
  source = reference.find(theirs.write(tmp_path / "checkpoint_0"))
  shapes = {
    k: jax.ShapeDtypeStruct(x, "float32") for k, x in theirs.minimal.items()
  }
  abstract, partitioner = trees.nest(shapes), Partitioner()

  def restore(optimizer):
    state = jax.eval_shape(optimizer.init, abstract)
    return optimizer_state.load_optimizer(source, state, abstract, partitioner)

  restore(optimizers.adafactor(0.1, global_norm_clip_threshold=1.0))
  for optimizer, message in (
    (optimizers.adamw(0.1), "the run's is not"),
    (optimizers.adafactor(0.1, beta1=0.9), r"slot m .* \(1,\) in the check"),
    (optimizers.adafactor(0.1, min_dim_size_to_factor=4), r"is \(8, 8\) in"),
  ):
    with pytest.raises(optimizer_state.OtherOptimizerError, match=message):
      restore(optimizer)


def test_a_head_or_lora_on_a_t5x_checkpoint_begins_anew(tmp_path):
  """Neither its step nor its slots are the run's."""
  theirs = T5X(CONFIG, False, step=7)
  path = theirs.write(tmp_path / "checkpoint_7")
  same = theirs.config.replace(dtype="bfloat16")
  for config, continues in (
    (same, True),
    (same.replace(lora=LoRAConfig()), False),
    (same.with_head(HeadConfig("embedding")), False),
    (same.with_head(HeadConfig("enct5", num_labels=2)), False),
  ):
    config, leaves = random_leaves(config)
    shapes = {
      k: jax.ShapeDtypeStruct(x.shape, "float32") for k, x in leaves.items()
    }
    values = {"/".join(k): x.read() for k, x in leaves.items()}
    fresh = lambda names, values=values: {n: values[n] for n in names}
    partitioner = Partitioner()
    _, source, _ = load.load_params(
      *(path, config, partitioner.place(trees.nest(shapes)), partitioner),
      initialise=fresh,
    )
    assert source.continues == continues, config


# ---- Mesh TensorFlow ---------------------------------------------------------


def mtf_variables(leaves):
  """The names of the study's table 4.4."""
  projections = {"query": "q", "key": "k", "value": "v", "out": "o"}
  norms = {
    "pre_attention_layer_norm": 0,
    "pre_self_attention_layer_norm": 0,
    "pre_cross_attention_layer_norm": 1,
  }
  found = {}
  for k, leaf in leaves.items():
    if k == ("token_embedder", "embedding"):
      name = "shared/embedding"
    elif k == ("decoder", "logits_dense", "kernel"):
      name = "decoder/logits/kernel"
    elif k[1] == "relpos_bias":
      name = f"{k[0]}/block_000/layer_000/SelfAttention/relative_attention_bias"
    elif k[1].endswith("_norm"):
      name = f"{k[0]}/rms_norm/scale"
    else:
      block = f"{k[0]}/block_{int(k[1][7:]):03d}"
      last = 1 if k[0] == "encoder" else 2
      if k[2] == "mlp":
        name = f"{block}/layer_{last:03d}/DenseReluDense/{k[3]}/kernel"
      elif k[2].endswith("layer_norm"):
        name = f"{block}/layer_{norms.get(k[2], last):03d}/rms_norm/scale"
      elif k[2] == "encoder_decoder_attention":
        name = f"{block}/layer_001/EncDecAttention/{projections[k[3]]}"
      else:
        name = f"{block}/layer_000/SelfAttention/{projections[k[3]]}"
    found[name] = leaf.read()
  return found


def write_tensorflow(variables, path):
  import tensorflow as tf

  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    made = {
      n: tf.compat.v1.get_variable(n, initializer=x)
      for n, x in variables.items()
    }
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.train.Saver(made).save(
      session, str(path), write_meta_graph=False
    )


def test_mesh_tensorflow(tmp_path):
  config, leaves = random_leaves(CONFIG)
  variables = mtf_variables(leaves)
  saved = dict(variables) | {"global_step": np.int64(1000)}
  saved |= {
    f"{n}_slot_v": np.abs(x).astype("float32") for n, x in variables.items()
  }

  write_tensorflow(saved, tmp_path / "model.ckpt-1000")
  for path in (tmp_path, tmp_path / "model.ckpt-1000"):
    source = reference.find(str(path))
    assert source.kind == "mesh_tf"
    found_config, found = reference.open_params(source)
    same(found, leaves)
  assert found_config.architecture() == config.architecture()
  step, slots = mesh_tf.open_slots(str(tmp_path))
  assert step == 1000
  for k, leaf in leaves.items():
    np.testing.assert_array_equal(slots["v"][k].read(), np.abs(leaf.read()))

  odd = {"encoder/block_000/layer_000/Unknown/q": np.zeros(3)}
  write_tensorflow(odd, tmp_path / "odd-1")
  with pytest.raises(UserError, match="Unknown/q is not one of T5's"):
    mesh_tf.open_model(str(tmp_path / "odd-1"))


def test_mesh_tensorflow_s_rows_and_columns_are_turned_to_ours(tmp_path):
  """Its vr leaves out the largest axis, of equal ones the first."""
  rng = np.random.default_rng(0)
  names = {"SelfAttention/q": (8, 8), "DenseReluDense/wo/kernel": (12, 8)}
  variables, squares = {"global_step": np.int64(5)}, []
  for layer, (name, shape) in enumerate(names.items()):
    name = f"encoder/block_000/layer_{layer:03d}/{name}"
    square = np.square(rng.normal(size=shape)).astype("float32")
    squares.append(square)
    largest = int(np.argmax(shape))  # The first of equal ones.
    variables |= {
      name: np.zeros(shape, "float32"),
      f"{name}_slot_vr": square.mean(largest),
      f"{name}_slot_vc": square.mean(1 - largest),
    }
  write_tensorflow(variables, tmp_path / "model.ckpt-5")
  _, slots = mesh_tf.open_slots(str(tmp_path))
  layer = ("encoder", "layers_0")
  for path, square in zip(
    ((*layer, "attention", "query"), (*layer, "mlp", "wo")), squares
  ):
    path = (*path, "kernel")
    # Ours: the row goes along the smaller axis, of equal ones the first.
    small = int(np.argmin(square.shape))
    for slot, axis in (("v_row", 1 - small), ("v_col", small)):
      np.testing.assert_array_equal(slots[slot][path].read(), square.mean(axis))
    assert slots["v"][path].shape == (1,)


# ---- Wrong, damaged, hostile -------------------------------------------------


def change(tensors, how):
  name = next(n for n in sorted(tensors) if "Wq" in n or ".q." in n)
  if how == "missing":
    del tensors[name]
  elif how == "extra":
    tensors["one.more"] = np.zeros(3, "float32")
  elif how == "misshaped":
    tensors[name] = tensors[name][:-1]
  return tensors, name if how != "extra" else "one.more"


@pytest.mark.parametrize("how", ["missing", "extra", "misshaped"])
@pytest.mark.parametrize("kind", ["hf", "flash_t5", "enct5", "peft"])
def test_a_wrong_tensor_is_in_the_list(kind, how, tmp_path):
  config = CONFIG
  if kind == "enct5":
    config = config.with_head(HeadConfig("enct5"))
  if kind == "peft":
    config = config.replace(lora=LoRAConfig())
  config, leaves = random_leaves(config)
  plain = {k: x for k, x in leaves.items() if k[-1][:5] != "lora_"}
  write = {
    "hf": hf.to_pretrained,
    "flash_t5": flash_t5.to_folder,
    "enct5": enct5.to_folder,
    "peft": lambda c, x, f: (
      peft.to_peft(c, x, f),
      hf.to_pretrained(c.replace(lora=None), plain, tmp_path / "base"),
    ),
  }[kind]
  write(config, leaves, tmp_path / "it")
  file = "adapter_model" if kind == "peft" else "model"
  path = tmp_path / "it" / f"{file}.safetensors"
  tensors, name = change(dict(safetensors.numpy.load_file(path)), how)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError) as e:
    formats.open_model(kind, str(tmp_path / "it"), base=str(tmp_path / "base"))
  assert f"+ {name}" in str(e.value) or f"- {name}" in str(e.value)


@pytest.mark.parametrize("how", ["missing", "extra", "misshaped"])
def test_a_wrong_tensor_of_t5x_is_in_the_list(how, tmp_path):
  _, leaves = random_leaves(CONFIG)
  victim = ("encoder", "layers_1", "attention", "value", "kernel")
  leaves = dict(leaves)
  if how == "missing":
    del leaves[victim]
  elif how == "extra":
    victim = ("encoder", "layers_1", "adapter", "kernel")
    leaves[victim] = table.leaf_of(np.zeros((2, 2), "float32"))
  else:
    leaves[victim] = table.leaf_of(np.zeros((8, 7), "float32"))
  write_msgpack(legacy(leaves), tmp_path / "checkpoint_1")
  with pytest.raises(UserError) as e:
    t5x.open_model(str(tmp_path / "checkpoint_1"))
  assert "/".join(victim) in str(e.value)


def test_truncated_files_are_errors(tmp_path):
  config, leaves = random_leaves(CONFIG)

  def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])

  def refused(path):
    with pytest.raises(UserError) as e:
      found = reference.open_params(reference.find(str(path)))[1]
      table.read_all(found)
    assert len(str(e.value)) < 1500

  hf.to_pretrained(config, leaves, tmp_path / "hf")
  cut(tmp_path / "hf" / "model.safetensors")
  refused(tmp_path / "hf")

  write_msgpack(legacy(leaves), tmp_path / "checkpoint_1")
  cut(tmp_path / "checkpoint_1" / "checkpoint")
  refused(tmp_path / "checkpoint_1")

  folder = tmp_path / "checkpoint_2"
  folder.mkdir()
  write_msgpack(out_of_line(legacy(leaves), folder, SPEC), folder)
  chunk = next(
    p
    for p in (folder / "target.token_embedder.embedding").iterdir()
    if not p.name.startswith(".")
  )
  cut(chunk, 0.5)
  refused(folder)

  writer.write_params(str(tmp_path / "run"), config, leaves)
  files = [
    p
    for p in (tmp_path / "run").rglob("d/*")
    if p.is_file() and p.stat().st_size > 1000
  ]
  for file in files:
    cut(file, 0.3)
  refused(tmp_path / "run")


class Hostile:
  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("kind", ["hf", "flash_t5", "enct5"])
def test_a_hostile_pickle_executes_nothing(kind, tmp_path):
  marker = str(tmp_path / "executed")
  (tmp_path / "it").mkdir()
  with zipfile.ZipFile(tmp_path / "it" / "pytorch_model.bin", "w") as archive:
    data = pickle.dumps({"shared.weight": Hostile(marker)})
    archive.writestr("archive/data.pkl", data)
  model_type = {"hf": "t5"}.get(kind, kind)
  (tmp_path / "it" / "config.json").write_text(
    json.dumps({"model_type": model_type})
  )
  with pytest.raises(UserError, match="nothing was run"):
    reference.open_params(reference.find(str(tmp_path / "it")))
  assert not os.path.exists(marker)


def test_writing_over_something_else_is_refused(tmp_path):
  config, leaves = random_leaves(CONFIG.replace(lora=LoRAConfig()))
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="no Hugging Face folder"):
    peft.to_peft(config, leaves, tmp_path)
  assert sorted(os.listdir(tmp_path)) == ["notes.txt"]
