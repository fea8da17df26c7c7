# ruff: noqa: F811 (fixtures are imported)
"""The table of T5X's bindings, its flags, and what lies on Google Cloud."""

import importlib
import inspect
import os
import re
import shutil

from conftest import ROOT
import fsspec
import pytest
from t5x_user import TINY, clean_gin, folder, refused, translated  # noqa: F401

from fat5_jax.errors import UserError
from fat5_jax.gin_config import t5x
from fat5_jax.gin_config.t5x import cloud, flags, reading, shipped, table

# ---- What lies on Google Cloud -----------------------------------------------


def _vocabulary(path, extra):
  import sentencepiece

  text = iter(["the boat goes over the lake, the bird goes over it"] * 20)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=text,
    model_prefix=str(path).removesuffix(".model"),
    vocab_size=200,
    hard_vocab_limit=False,
    user_defined_symbols=[f"<extra_id_{i}>" for i in reversed(range(extra))],
    minloglevel=2,
  )


def test_a_vocabulary_has_the_sentinels_of_its_name_once(folder):
  name = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
  bare = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"
  _vocabulary(folder / "with.model", 100)
  _vocabulary(folder / "without.model", 0)
  found = lambda path, extra, file: cloud.vocabulary(
    path, extra, str(folder / file), [], "x"
  )[1]
  # As T5X's own files are, and as Hugging Face's.
  assert found(name, 0, "with.model") == 0
  assert found(name, 0, "without.model") == 100
  assert found(bare, 100, "without.model") == 100
  assert found(bare, 100, "with.model") == 0
  assert found(bare, 0, "without.model") == 0
  # By its name, in a folder.
  inside = folder / "vocabs" / "cc_all.32000.100extra"
  inside.mkdir(parents=True)
  shutil.copy(folder / "with.model", inside / "sentencepiece.model")
  path, _, _ = cloud.vocabulary(name, 0, None, ["data", str(folder)], "x")
  assert path == str(inside / "sentencepiece.model")
  # Another vocabulary beside is none of that name.
  shutil.copy(folder / "with.model", folder / "data" / "spiece.model")
  with pytest.raises(UserError, match="--gin.VOCAB_FILE=it"):
    cloud.vocabulary(name, 0, None, ["data"], "x")


@pytest.mark.parametrize(
  "path, hub",
  [
    ("t5x/t5_1_1_small/checkpoint_1000000", "google/t5-v1_1-small"),
    ("t5x/mt5_xl/checkpoint_1000000", "google/mt5-xl"),
    ("t5x/byt5_base/checkpoint_1000000", "google/byt5-base"),
    ("t5x/umt5_xxl/checkpoint_1000000", "google/umt5-xxl"),
    ("t5x/t5_1_1_lm100k_large/checkpoint_1100000", "google/t5-large-lm-adapt"),
    ("t5x/flan_t5_xl/checkpoint_1138000", "google/flan-t5-xl"),
    ("t5x/t5_base/checkpoint_999900", "google-t5/t5-base"),
  ],
)
def test_a_checkpoint_on_google_cloud_is_answered_with_how_to_get_it(
  folder, path, hub
):
  path = f"gs://t5-data/pretrained_models/{path}"
  told = refused(
    ["mine.gin"],
    ["MODEL_DIR = 'r'", f"INITIAL_CHECKPOINT_PATH = {path!r}"],
  )
  assert f"gcloud storage cp -r {path} ." in told
  assert (
    f"INITIAL_CHECKPOINT_PATH=hf://{hub}" in told
    and "TRAIN_STEPS_RELATIVE" in told
  )


def test_other_addresses_are_read_where_they_lie(folder):
  """A bucket of one's own, as in files of ours; fsspec's memory is one here."""
  own = "gs://mine/pretrained/checkpoint_5"
  text, _ = translated(
    ["mine.gin"], ["MODEL_DIR = 'r'", f"INITIAL_CHECKPOINT_PATH = {own!r}"]
  )
  assert f"'{own}'" in text
  _vocabulary(folder / "with.model", 100)
  memory = fsspec.filesystem("memory")
  memory.pipe("/v/spiece.model", (folder / "with.model").read_bytes())
  name = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
  path, extra, told = cloud.vocabulary(
    name, 0, "memory://v/spiece.model", [], "x"
  )
  assert extra == 0 and "memory://v/spiece.model" in told
  with open(path, "rb") as file:
    assert file.read() == (folder / "with.model").read_bytes()


# ---- Flags -------------------------------------------------------------------


def test_flags_of_t5x_are_taken_and_said():
  rest, found = t5x.take_flags(
    "train",
    [
      "--gin_file=a.gin",
      "--alsologtostderr",
      "--tfds_data_dir=/tfds",
      "--run_mode=train",
      "--seqio_additional_cache_dirs",
      "/a,/b",
      "--multiprocess_gpu",
      "--nologtostderr",
      "--dry_run",
    ],
  )
  assert rest == ["--gin_file=a.gin", "--dry_run"]
  assert found.tfds_data_dir == "/tfds" and found.cache_dirs == ["/a", "/b"]
  assert len(found.notes) == 6


@pytest.mark.parametrize(
  "flag, told",
  [
    ("--run_mode=eval", "python -m fat5_jax.eval"),
    ("--run_mode=export", "convert_checkpoint"),
    ("--run_mode=precompile", "fat5_jax.plan"),
    ("--fdl_config=x", "Fiddle"),
    ("--shard_id=3", "leave it out"),
    ("--tfds_data_dir", "write --tfds_data_dir=VALUE"),
  ],
)
def test_flags_that_ask_for_something_else_are_refused(flag, told):
  with pytest.raises(UserError, match=re.escape(told)):
    t5x.take_flags("train", [flag])


def test_seqio_is_told_where_data_lies(monkeypatch):
  import seqio

  told = {}
  monkeypatch.setattr(
    seqio, "set_tfds_data_dir_override", lambda path: told.update(tfds=path)
  )
  monkeypatch.setattr(
    seqio, "add_global_cache_dirs", lambda paths: told.update(cache=paths)
  )
  flags.to_seqio(flags.Flags([], "/tfds", ["/a"]))
  assert told == {"tfds": "/tfds", "cache": ["/a"]}


# ---- The table ---------------------------------------------------------------

# reference/t5x_gin.md: what T5X's own files bind.
BOUND = {
  "__main__.train": "model model_dir train_dataset_cfg train_eval_dataset_cfg"
  " infer_eval_dataset_cfg checkpoint_cfg partitioner total_steps"
  " relative_steps eval_steps eval_period stats_period random_seed trainer_cls"
  " inference_evaluator_cls run_eval_before_training actions"
  " summarize_config_fn use_hardware_rng train_eval_get_dataset_fn",
  "__main__.evaluate": "model dataset_cfg restore_checkpoint_cfg output_dir"
  " partitioner inference_evaluator_cls",
  "__main__.infer": "mode model dataset_cfg restore_checkpoint_cfg output_dir"
  " checkpoint_period shard_id num_shards partitioner",
  "__main__.precompile": "model model_dir train_dataset_cfg partitioner"
  " random_seed",
  "seqio.Evaluator": "num_examples use_memory_cache logger_cls",
  "seqio.JSONLogger": "write_n_results",
  "t5x.utils.DatasetConfig": "mixture_or_task_name task_feature_lengths split"
  " batch_size shuffle seed use_cached pack module use_custom_packing_ops",
  "t5x.utils.CheckpointConfig": "save restore",
  "t5x.utils.SaveCheckpointConfig": "period keep dtype save_dataset"
  " keep_dataset_checkpoints checkpoint_steps",
  "t5x.utils.RestoreCheckpointConfig": "path mode dtype assignment_map strict"
  " fallback_to_scratch",
  "t5x.utils.create_learning_rate_scheduler": "factors base_learning_rate"
  " warmup_steps",
  "t5x.partitioning.PjitPartitioner": "num_partitions model_parallel_submesh"
  " logical_axis_rules params_on_devices backend",
  "t5x.partitioning.standard_logical_axis_rules": (
    "activation_partitioning_dims parameter_partitioning_dims"
  ),
  "t5x.models.EncoderDecoderModel": "module input_vocabulary"
  " output_vocabulary optimizer_def decode_fn z_loss label_smoothing"
  " loss_normalizing_factor",
  "t5x.models.EncoderDecoderModel.predict_batch_with_aux": "num_decodes"
  " return_all_decodes",
  "t5x.decoding.temperature_sample": "temperature topk topp",
  "t5x.decoding.beam_search": "alpha",
  "t5x.adafactor.Adafactor": "decay_rate step_offset beta1 factored"
  " weight_decay_rate global_norm_clip_threshold logical_factor_rules",
  "t5x.optimizers.chain": "transformations",
  "t5x.trainer.Trainer": "learning_rate_fn num_microbatches",
  "t5x.examples.t5.network.T5Config": "vocab_size dtype emb_dim num_heads"
  " num_encoder_layers num_decoder_layers head_dim mlp_dim mlp_activations"
  " dropout_rate logits_via_embedding",
  "t5x.examples.scalable_t5.network.T5Config": "scan_layers remat_policy"
  " vocab_size",
  "t5x.examples.t5.network.Transformer": "config",
  "seqio.SentencePieceVocabulary": "sentencepiece_model_file extra_ids",
}


def test_every_binding_of_t5x_files_is_in_the_table():
  for configurable, names in BOUND.items():
    for name in names.split():
      row = table.TABLE[configurable][name]
      assert row.about and row.kind in (
        "honoured",
        "honoured where it can be, else refused",
        "neutral, said",
        "refused",
      )
      assert "refused" not in row.kind or row.instead, (configurable, name)
  for refused_name in ("t5x.export_lib", "t5x.models.DecoderOnlyModel"):
    assert reading.refused_module(refused_name)


def test_every_target_of_the_table_is_a_parameter_of_ours():
  targets = [*table.OWN_MACROS.values()]
  for parameters_of in table.TABLE.values():
    for row in parameters_of.values():
      targets += [row.to] if isinstance(row.to, str) else row.to.values()
  for target in filter(None, targets):
    function, _, parameter = target.rpartition(".")
    module, _, name = function.rpartition(".")
    made = getattr(importlib.import_module(module), name)
    assert parameter in inspect.signature(made).parameters, target


def test_the_documentation_has_the_table():
  with open(os.path.join(ROOT, "docs", "t5x.md"), encoding="utf-8") as file:
    assert table.markdown() in file.read(), (
      "write it again: python -m fat5_jax.gin_config.t5x.table"
    )


# ---- The real files ----------------------------------------------------------


def bindings_of(name, paths):
  found = reading.Files(paths)
  found.add(name)
  # The last one wins, in whatever order a block has them.
  return {b[:3]: b.value for b in found.bindings}


def test_what_is_shipped_for_t5x_files_says_what_they_say(
  shared_data, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  real = [os.path.join(shared_data, "t5x_gin")]
  compared = 0
  for name in shipped.names():
    if os.path.exists(os.path.join(real[0], name)):
      assert bindings_of(name, real) == bindings_of(name, []), name
      compared += 1
  assert compared == 7


def test_sizes_that_are_shipped_are_the_published_ones(folder):
  for name, emb_dim, layers in (
    ("t5_1_0/11B", 1024, 24),
    ("t5_1_1/xxl", 4096, 24),
    ("mt5/small", 512, 8),
    ("byt5/base", 1536, 18),
    ("mt5/tiny", 8, 2),
  ):
    found = reading.Files([])
    found.add(f"t5x/examples/t5/{name}.gin")
    values = {b.parameter: b.value for b in found.bindings if b.parameter}
    assert values["emb_dim"] == emb_dim, name
    assert values["num_encoder_layers"] == layers, name
    assert (values["vocab_size"] == 250112) == (name == "mt5/small")


# What each of the eleven files needs besides itself, and what comes of it.
X, RUNS = "t5x/examples/t5/t5_1_1/", "t5x/configs/runs/"
SCRATCH = ["--gin.INITIAL_CHECKPOINT_PATH=None", "--gin.EVAL_STEPS=1"]
WMT = ["--gin.MIXTURE_OR_TASK_NAME=wmt_t2t_ende_v003"]
NO_DROPOUT = ["--gin.DROPOUT_RATE=0.0"]
ONE_DEVICE = ["--gin.partitioning.PjitPartitioner.num_partitions=1"]
LENGTHS = ['--gin.TASK_FEATURE_LENGTHS={"inputs": 16, "targets": 16}']
OF_TRAINING = ["--gin.BATCH_SIZE=4", "--gin.TRAIN_STEPS=3", *LENGTHS]
READ = ["--gin.CHECKPOINT_PATH=first"]
ELEVEN = [
  ("train", "first", ["examples/small_wmt_finetune"], SCRATCH, None),
  ("train", "x", ["examples/base_wmt14enfr_finetune"], SCRATCH, None),
  ("train", "x", ["tiny", "finetune"], SCRATCH + WMT, None),
  ("train", "x", ["base", "finetune"], SCRATCH + WMT, None),
  ("train", "x", ["small", "pretrain"], WMT + NO_DROPOUT, None),
  ("eval", "x", ["examples/base_wmt_eval"], READ, "num_partitions=1"),
  ("eval", "x", ["examples/base_wmt_eval"], READ + ONE_DEVICE, None),
  ("eval", "x", ["small", "eval"], READ + WMT + NO_DROPOUT, None),
  ("infer", "x", ["examples/base_wmt_infer"], READ + LENGTHS, None),
  ("infer", "x", ["tiny", "infer"], READ + LENGTHS + WMT + NO_DROPOUT, None),
]


@pytest.mark.slow
def test_the_eleven_files_train_evaluate_and_predict(
  shared_data, folder, zygote
):
  for task, other in (("wmt_t2t_ende_v003", "de"), ("wmt14_enfr_v003", "fr")):
    (folder / "data" / task).mkdir()
    for split in ("train", "val", "test"):
      for code in ("en", other):
        shutil.copy(
          folder / "data" / f"{split}.{'en' if code == 'en' else 'de'}",
          folder / "data" / task / f"{split}.{code}",
        )
  out = {"train": "MODEL_DIR", "eval": "EVAL_OUTPUT_DIR"}
  for number, (command, name, files, given, told) in enumerate(ELEVEN):
    folder_flag = out.get(command, "INFER_OUTPUT_DIR")
    arguments = [
      f"--gin_search_paths={shared_data}/t5x_gin",
      f"--gin.VOCAB_FILE={shared_data}/vocab_t5/spiece.model",
      "--gin.DATA_DIR=data",
      f"--gin.{folder_flag}={name if name == 'first' else f'out{number}'}",
      *given,
      *(OF_TRAINING if command == "train" else ()),
      *TINY,
    ]
    for file in files:
      is_run = file in ("finetune", "pretrain", "eval", "infer")
      path = f"{RUNS if is_run else X}{file}.gin"
      arguments.append(f"--gin_file={path}")
    for dry_run in (["--dry_run"], []):
      done = zygote.run(command, arguments + dry_run, str(folder), seconds=300)
      said = done.stdout + done.stderr
      assert done.crash() is None, said
      if told is None:
        assert done.status == 0, (files, said)
      else:
        assert done.status == 1 and told in said, (files, said)
