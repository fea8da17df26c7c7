"""Our T5 computes what transformers computes, and gives checkpoints back."""

import functools
import json
import os
import pickle
import zipfile

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from fat5_jax.convert import hf, table
from fat5_jax.errors import UserError
from fat5_jax.inference import decoding
from fat5_jax.models.t5 import Transformer
from fat5_jax.objectives import losses

ALL = list(hf_models.FAMILIES)


def ours_and_theirs(family, folder, **changes):
  model = hf_models.make(family, folder)
  config, params = hf.from_pretrained(folder)
  return model, config.replace(**changes), params


def shift_right(targets):
  return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def theirs(model, x, y):
  return model(
    input_ids=torch.tensor(x).long(),
    attention_mask=torch.tensor(x != 0).long(),
    decoder_input_ids=torch.tensor(shift_right(y)).long(),
    labels=torch.tensor(np.where(y == 0, -100, y)).long(),
  )


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("family", ALL)
def test_logits_loss_and_gradients(family, implementation, tmp_path):
  model, config, params = ours_and_theirs(
    family, tmp_path, attention_implementation=implementation
  )
  x, y = hf_models.tokens()
  expected = theirs(model, x, y)
  expected.loss.backward()

  def objective(params):
    logits = Transformer(config).apply({"params": params}, x, shift_right(y), y)
    loss_BL, _ = losses.cross_entropy(logits, y)
    return losses.weighted_sum(loss_BL, y != 0) / (y != 0).sum(), logits

  (loss, logits), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
    params
  )
  reference = expected.logits.detach().numpy()
  error = np.abs(logits - reference)[y != 0].max()
  assert error < 1e-4 * np.abs(reference).max()
  assert abs(loss - expected.loss.item()) < 1e-4 * abs(expected.loss.item())
  theirs_by_name = {n: p.grad.numpy() for n, p in model.named_parameters()}
  leaves = table.as_leaves(jax.device_get(grads))
  named = table.to_foreign(hf.rows(config), leaves, "grads")
  ours = {name: leaf.read() for name, leaf in named.items()}
  assert set(ours) == set(theirs_by_name)
  for name, grad in ours.items():
    reference = theirs_by_name[name]
    assert np.abs(grad - reference).max() <= 1e-4 * np.abs(reference).max(), (
      name
    )


@pytest.mark.parametrize("family", ALL)
def test_greedy_output_is_that_of_generate(family, tmp_path):
  """Looped and scanned layers, against one run of theirs."""
  from fat5_jax.models import layer_stack

  model, config, params = ours_and_theirs(family, tmp_path)
  x, _ = hf_models.tokens(rows=6)
  expected = model.generate(
    torch.tensor(x).long(),
    attention_mask=torch.tensor(x != 0).long(),
    max_new_tokens=40,
    do_sample=False,
    num_beams=1,
  ).numpy()[:, 1:]
  for layers in (params, layer_stack.stack(params)):
    scans = layers is not params
    ours = Transformer(config.replace(scan_layers=scans))
    generate = functools.partial(decoding.generate, ours, max_length=40)
    found = jax.jit(generate)(layers, x).tokens[:, 0]
    assert np.array_equal(found[:, : expected.shape[1]], expected), scans
    assert not found[:, expected.shape[1] :].any(), scans
  assert len(np.unique(expected)) > 5, "the example decodes to nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALL)
def test_round_trip_is_bit_for_bit(family, dtype, tmp_path):
  model = hf_models.make(family, tmp_path / "theirs").to(dtype)
  model.save_pretrained(tmp_path / "theirs")
  config, params = hf.from_pretrained(tmp_path / "theirs")
  hf.to_pretrained(config, params, tmp_path / "ours")
  again, info = type(model).from_pretrained(
    tmp_path / "ours", dtype=dtype, output_loading_info=True
  )
  assert not any(info.values())
  before, after = model.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  for name in before:
    assert torch.equal(before[name], after[name]), name
  x, y = hf_models.tokens()
  assert torch.equal(theirs(model, x, y).logits, theirs(again, x, y).logits)


@pytest.mark.parametrize("family", ["t5_1_0", "t5_1_1", "umt5"])
def test_shards_and_bin_files_read_the_same(family, tmp_path):
  model = hf_models.make(family, tmp_path / "one")
  _, whole = hf.from_pretrained(tmp_path / "one")
  model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
  os.makedirs(tmp_path / "bin")
  with open(tmp_path / "bin" / "config.json", "w") as file:
    json.dump(model.config.to_dict(), file)
  torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
  for folder in ("shards", "bin"):
    _, params = hf.from_pretrained(tmp_path / folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, whole)), folder


def test_export_in_shards_reads_back(tmp_path):
  hf_models.make("t5_1_1", tmp_path / "hf")
  config, params = hf.from_pretrained(tmp_path / "hf")
  hf.to_pretrained(config, params, tmp_path / "out", max_shard_bytes=20_000)
  assert (tmp_path / "out" / "model.safetensors.index.json").exists()
  _, again = hf.from_pretrained(tmp_path / "out")
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
  transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_transformers_4_configs_say_by_the_tie_whether_to_scale(tmp_path):
  """4.x: tied and scaled or neither; 5.x adds a key of its own for T5."""
  hf_models.make("t5_1_1", tmp_path)
  hf_models.edit_config(
    tmp_path,
    tie_word_embeddings=False,
    scale_decoder_outputs=None,
    transformers_version="4.37.1",
  )
  config = hf.read_config(tmp_path)
  assert not config.logits_via_embedding and not config.scales_decoder_outputs
  hf_models.edit_config(tmp_path, tie_word_embeddings=True)
  assert hf.read_config(tmp_path).scales_decoder_outputs
  hf_models.edit_config(tmp_path, scale_decoder_outputs=False)
  assert not hf.read_config(tmp_path).scales_decoder_outputs


@pytest.mark.parametrize("family", ALL)
def test_export_tells_transformers_4_the_truth(family, tmp_path):
  """4.x ties and scales by one flag, so the flag must be what is true of both.

  umT5 and mT5 as transformers 5 makes them (scaled but untied) have no
  expression in 4.x; the export warns of those.
  """
  hf_models.make(family, tmp_path / "hf")
  config, params = hf.from_pretrained(tmp_path / "hf")
  hf.to_pretrained(config, params, tmp_path / "out")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert written["tie_word_embeddings"] == config.scales_decoder_outputs
  if family != "umt5":
    assert written["tie_word_embeddings"] != ("lm_head.weight" in tensors)


def edit_tensors(folder, edit):
  path = os.path.join(folder, "model.safetensors")
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_missing_and_extra_tensors_are_listed(tmp_path):
  hf_models.make("t5_1_1", tmp_path)
  gone = "decoder.block.1.layer.1.EncDecAttention.k.weight"

  def edit(tensors):
    tensors["encoder.adapter.weight"] = tensors.pop(gone)

  edit_tensors(tmp_path, edit)
  with pytest.raises(UserError) as error:
    hf.from_pretrained(tmp_path)
  assert f"- {gone}" in str(error.value)
  assert "+ encoder.adapter.weight" in str(error.value)


def test_a_tensor_of_another_shape_is_named(tmp_path):
  hf_models.make("t5_1_0", tmp_path)
  hf_models.edit_config(tmp_path, d_ff=50)
  with pytest.raises(UserError, match=r"wi.weight \(50, 32\)"):
    hf.from_pretrained(tmp_path)


def test_a_truncated_file_is_an_error(tmp_path):
  hf_models.make("t5_1_0", tmp_path)
  path = tmp_path / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match="not a complete safetensors"):
    hf.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
  model = hf_models.make("t5_1_0", tmp_path / "one")
  model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  os.remove(sorted((tmp_path / "shards").glob("*.safetensors"))[1])
  with pytest.raises(UserError, match="model-00002-of"):
    hf.from_pretrained(tmp_path / "shards")


class _Hostile:
  def __reduce__(self):
    return os.mkdir, ("hostile_was_here",)


def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  hf_models.make("t5_1_0", tmp_path / "hf")
  os.remove(tmp_path / "hf" / "model.safetensors")
  with zipfile.ZipFile(tmp_path / "hf" / "pytorch_model.bin", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps(_Hostile()))
  with pytest.raises(UserError, match="nothing was run"):
    hf.from_pretrained(tmp_path / "hf")
  assert not os.path.exists("hostile_was_here")


def test_a_truncated_bin_is_an_error(tmp_path):
  model = hf_models.make("t5_1_0", tmp_path)
  os.remove(tmp_path / "model.safetensors")
  path = tmp_path / "pytorch_model.bin"
  torch.save(model.state_dict(), path)
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(UserError, match="truncated"):
    hf.from_pretrained(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
  with pytest.raises(UserError, match="model.safetensors"):
    hf.from_pretrained(tmp_path)


def test_export_refuses_parameters_of_another_model(tmp_path):
  hf_models.make("t5_1_1", tmp_path / "hf")
  config, params = hf.from_pretrained(tmp_path / "hf")
  del params["encoder"]["layers_1"]["mlp"]["wo"]
  with pytest.raises(UserError, match="- encoder/layers_1/mlp/wo/kernel"):
    hf.to_pretrained(config, params, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_export_does_not_replace_a_folder_of_something_else(tmp_path):
  hf_models.make("t5_1_1", tmp_path / "hf")
  config, params = hf.from_pretrained(tmp_path / "hf")
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "cat.jpg").write_text("meow")
  with pytest.raises(UserError, match="no Hugging Face folder"):
    hf.to_pretrained(config, params, tmp_path / "photos")
  assert (tmp_path / "photos" / "cat.jpg").exists()


def test_bfloat16_weights_compute_in_bfloat16(tmp_path):
  model = hf_models.make("t5_1_1", tmp_path).to(torch.bfloat16)
  model.save_pretrained(tmp_path)
  config, params = hf.from_pretrained(tmp_path)
  assert config.dtype == "bfloat16"
  assert params["token_embedder"]["embedding"].dtype == jnp.bfloat16
