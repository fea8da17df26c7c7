"""The rows of the table that are of the model, its vocabulary and optimizer."""

from __future__ import annotations

from typing import Any

from fat5_jax.gin_config.t5x import ours
from fat5_jax.gin_config.t5x.rows import (
  REQUIRED,
  Reference,
  Row,
  built,
  neutral,
  only,
  refused,
  same,
)

NETWORKS = (
  "t5x.examples.t5.network",
  "t5x.examples.scalable_t5.network",
  "t5x.contrib.gpu.t5.network",
)
_SCHEDULE = "t5x.utils.create_learning_rate_scheduler"
_ADAFACTOR = "t5x.adafactor.Adafactor"
_VOCABULARY_TO = {
  "train": f"{ours.DATA}.vocabulary",
  "eval": f"{ours.DATA}.vocabulary",
  "infer": f"{ours.INFER}.vocabulary",
}


def _is_own(value: Any) -> bool:
  """Whether it is built by what is not T5X's."""
  return isinstance(value, Reference) and value.name.split(".")[0] not in (
    *("t5x", "t5"),
  )


def _is_optimizer(value: Any) -> bool:
  return isinstance(value, Reference) and (
    value.name in (_ADAFACTOR, "t5x.optimizers.chain")
    or value.name.startswith("optax.")
    or value.name.startswith("fat5_jax.")
  )


def _is_schedule(value: Any) -> bool:
  return isinstance(value, Reference) and not value.name.startswith("t5x.opt")


def _network_rows(module: str) -> dict[str, dict[str, Row]]:
  defaults = {
    "vocab_size": REQUIRED,
    "dtype": "float32",
    "emb_dim": 512,
    "num_heads": 8,
    "num_encoder_layers": 6,
    "num_decoder_layers": 6,
    "head_dim": 64,
    "mlp_dim": 2048,
    "mlp_activations": ("relu",),
    "dropout_rate": 0.1,
    "logits_via_embedding": False,
  }
  rows = {
    name: same(f"{ours.CONFIG}.{name}", default=value)
    for name, value in defaults.items()
  }
  rows["float32_attention_logits"] = neutral(
    "attention's softmax is always float32"
  )
  rows["scale_attn_logits"] = only(
    *(False, None),
    about="False: no checkpoint of Google's was trained so",
    instead="leave it False: the query's initialiser has the scale, and"
    " Google's checkpoints are trained so",
  )
  if "scalable" in module:
    rows["scan_layers"] = same(
      {"train": f"{ours.CONFIG}.scan_layers"},
      "the same; predicting needs none",
      default=True,
    )
    rows["remat_policy"] = same(
      {"train": f"{ours.CONFIG}.remat_policy"},
      "the same; predicting needs none",
      default="none",
    )
    rows["param_scan_axis"] = neutral("checkpoints hold a layer each")
  return {
    f"{module}.T5Config": rows,
    f"{module}.Transformer": {
      "config": built(f"{module}.T5Config", to=f"{ours.MODEL}.config"),
    },
  }


_ELSEWHERE = (
  "set decode_fn, predict_batch_with_aux.num_decodes, and what"
  " decoding.beam_search or decoding.temperature_sample take"
)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


MODEL_ROWS: dict[str, dict[str, Row]] = {
  "t5x.models.EncoderDecoderModel": {
    "module": built(
      *(f"{module}.Transformer" for module in NETWORKS),
      about="a T5; its config is ours",
    ),
    "input_vocabulary": Row(
      "SeqIO's, or one of your own",
      _VOCABULARY_TO,
      holds=_is_own,
      instead="VOCABULARY = @seqio.SentencePieceVocabulary()",
    ),
    "output_vocabulary": Row(
      "the same as input_vocabulary; else refused",
      holds=_is_own,
      instead="VOCABULARY = @seqio.SentencePieceVocabulary()",
    ),
    "optimizer_def": Row(
      "adafactor.Adafactor, optimizers.chain and optax's",
      {"train": f"{ours.TRAIN}.optimizer"},
      holds=_is_optimizer,
      instead="take adafactor.Adafactor, optimizers.chain or one of optax's;"
      " TRAINABLE and FROZEN name parameters that train",
    ),
    "decode_fn": built(
      "t5x.decoding.beam_search",
      "t5x.decoding.temperature_sample",
      about="the same: Decoding.beam_rule = 't5x', or sampling",
      default=Reference("", "t5x.decoding.beam_search", False),
    ),
    "z_loss": same({"train": f"{ours.TRAIN}.z_loss"}, default=0.0),
    "label_smoothing": same(
      {"train": f"{ours.TRAIN}.label_smoothing"}, default=0.0
    ),
    "loss_normalizing_factor": same(
      {"train": f"{ours.TRAIN}.loss_normalizing_factor"}, default=None
    ),
    "feature_converter_cls": only(
      None, about="the task's", instead="leave it out"
    ),
    "default_decoder_params": only(
      *(None, {}), about="None", instead=_ELSEWHERE
    ),
  },
  # What becomes of these: differences.decoding.
  "t5x.models.EncoderDecoderModel.predict_batch_with_aux": {
    "num_decodes": Row(
      "beams, or samples",
      holds=_is_count,
      instead="a whole number of 1 or more",
      default=1,
    ),
    "return_all_decodes": Row(
      "Decoding.num_return_sequences; metrics see the best",
      holds=lambda v: isinstance(v, bool),
      instead="True or False",
      default=False,
    ),
    "decoder_params": only(*(None, {}), about="None", instead=_ELSEWHERE),
    "prompt_with_targets": only(False, about="False", instead="leave it out"),
  },
  "t5x.decoding.beam_search": {
    "alpha": Row(
      "Decoding.length_penalty",
      holds=_is_number,
      instead="a number",
      default=0.6,
    ),
    "num_decodes": Row("predict_batch_with_aux.num_decodes goes first"),
    "max_decode_len": refused(
      "leave it out: predictions end at the length of the targets"
    ),
  },
  "t5x.decoding.temperature_sample": {
    "temperature": Row(
      "the same; 0 is greedy",
      holds=lambda v: _is_number(v) and v >= 0,
      instead="a number, 0 or more",
      default=1.0,
    ),
    "topk": Row(
      "the same; 1, T5X's default, is greedy, and 0 draws among all",
      holds=lambda v: _is_count(v) or v == 0,
      instead="a whole number, 0 or more",
      default=1,
    ),
    "topp": Row(
      "the same; 0 is none",
      holds=lambda v: _is_number(v) and 0 <= v <= 1,
      instead="a number from 0 to 1",
      default=0.0,
    ),
    "num_decodes": Row("predict_batch_with_aux.num_decodes goes first"),
    "rescale_log_probs": only(
      *(True, False), about="scores are the model's own", instead="leave it out"
    ),
  },
  **_network_rows(NETWORKS[0]),
  **_network_rows(NETWORKS[1]),
  **_network_rows(NETWORKS[2]),
  "t5x.trainer.Trainer": {
    "num_microbatches": same(
      f"{ours.TRAIN}.num_microbatches",
      "the same; 0 is None",
      ours=lambda v: None if v == 0 else v,
    ),
    "learning_rate_fn": Row(
      "Adafactor's; optax's have their own, as in T5X",
      {"train": f"{ours.OPTIMIZERS}.adafactor.learning_rate"},
      holds=_is_schedule,
      instead="@utils.create_learning_rate_scheduler() or one of optax's",
    ),
    "weight_metrics_computer": Row(
      "norms of single weights are not logged",
      tells=lambda v: (
        "weight_metrics_computer: norms of single weights are not logged"
        if v is not None
        else None
      ),
    ),
  },
  _SCHEDULE: {
    name: same(f"{ours.OPTIMIZERS}.create_learning_rate_scheduler.{name}")
    for name in (
      *("factors", "base_learning_rate", "warmup_steps", "decay_factor"),
      *("steps_per_decay", "steps_per_cycle", "step_offset"),
      "min_learning_rate",
    )
  },
  _ADAFACTOR: {
    **{
      name: same(f"{ours.OPTIMIZERS}.adafactor.{name}")
      for name in (
        *("factored", "multiply_by_parameter_scale", "beta1", "decay_rate"),
        *("step_offset", "clipping_threshold", "weight_decay_rate"),
        *("min_dim_size_to_factor", "epsilon1", "epsilon2"),
        *("weight_decay_rate_lr_exponent", "global_norm_clip_threshold"),
        *("max_parameter_scale", "skip_nan_updates"),
      )
    },
    "logical_factor_rules": same(
      f"{ours.OPTIMIZERS}.adafactor.logical_factor_rules",
      "the same: of scanned layers; T5X too goes by size in all others",
    ),
    "learning_rate": neutral("that of Trainer.learning_rate_fn counts"),
    "dtype_momentum": only(
      *("float32", None), about="'float32'", instead="leave it 'float32'"
    ),
  },
  "t5x.adafactor.standard_logical_factor_rules": {
    "rules": only(
      *(None, (), {}),
      about="the standard ones",
      instead="bind logical_factor_rules to a table by axis",
    ),
  },
  "t5x.adafactor.HParamMap": {
    "rules": same(f"{ours.OPTIMIZERS}.HParamMap.rules"),
  },
  "t5x.optimizers.chain": {
    "transformations": same(f"{ours.CHAIN}.transformations"),
  },
  "seqio.SentencePieceVocabulary": {
    "sentencepiece_model_file": same(
      "seqio.SentencePieceVocabulary.sentencepiece_model_file",
      "the same; gs://t5-data/vocabs is looked for here, VOCAB_FILE goes first",
    ),
    "extra_ids": same(
      "seqio.SentencePieceVocabulary.extra_ids",
      "the same, with those that a file of that name has and yours has not",
    ),
    "reverse_extra_ids": same(
      "seqio.SentencePieceVocabulary.reverse_extra_ids"
    ),
    "normalizer_spec_overrides": same(
      "seqio.SentencePieceVocabulary.normalizer_spec_overrides"
    ),
  },
}

# What T5X's configurables are here, where a reference names them.
OURS = {
  "t5x.models.EncoderDecoderModel": ours.MODEL,
  "t5x.utils.DatasetConfig": ours.DATA,
  "t5x.utils.CheckpointConfig": f"{ours.CHECKPOINTS}.CheckpointConfig",
  "t5x.utils.SaveCheckpointConfig": f"{ours.CHECKPOINTS}.SaveCheckpointConfig",
  "t5x.utils.RestoreCheckpointConfig": (
    f"{ours.CHECKPOINTS}.RestoreCheckpointConfig"
  ),
  "t5x.partitioning.PjitPartitioner": f"{ours.SHARDING}.Partitioner",
  "t5x.partitioning.standard_logical_axis_rules": (
    f"{ours.SHARDING}.standard_logical_axis_rules"
  ),
  _SCHEDULE: f"{ours.OPTIMIZERS}.create_learning_rate_scheduler",
  _ADAFACTOR: f"{ours.OPTIMIZERS}.adafactor",
  "t5x.adafactor.standard_logical_factor_rules": (
    f"{ours.OPTIMIZERS}.standard_logical_factor_rules"
  ),
  "t5x.adafactor.HParamMap": f"{ours.OPTIMIZERS}.HParamMap",
  "t5x.optimizers.chain": ours.CHAIN,
  **{f"{module}.T5Config": ours.CONFIG for module in NETWORKS},
}
