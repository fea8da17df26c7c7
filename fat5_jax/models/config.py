"""The one description of a model: architecture and run-time choices.

Axis legend of the models: `B` batch, `L` length, `Q`/`K` query/key length, `M`
model width, `H` heads, `D` head dimension, `F` MLP width, `V` vocabulary, `N`
position buckets. Arrays with two or more axes carry them in their names.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, Literal

import numpy as np

from fat5_jax.models.checks import (
  MOST,
  as_tuple,
  check_choice,
  check_flag,
  check_ints,
  check_rate,
  check_real,
  told,
)

# Names as in T5X; "gelu" is the tanh approximation (HF's "gelu_new").
ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "linear")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "gathered", "full")
HEAD_KINDS = (
  "language_model",
  "sequence_classification",
  "token_classification",
  "question_answering",
  "embedding",
  "enct5",
)
POSITION_ENCODINGS = ("t5", "alibi", "rope", "fire", "none")
# HF's names and meaning.
PROBLEM_TYPES = (
  "single_label_classification",
  "multi_label_classification",
  "regression",
)
# Fields that change how a model runs, not which function it is.
RUN_TIME_FIELDS = (
  "dtype",
  "dropout_rate",
  "scan_layers",
  "remat_policy",
  "attention_implementation",
  "randomized_positions",
)


_PROJECTIONS = (
  *("query", "key", "value", "out"),
  *("wi", "wi_0", "wi_1", "wo", "logits_dense"),
)
# What a tuple as remat_policy may name: outputs of projections, of attention.
SAVEABLE = ("attention", *_PROJECTIONS[:-1])


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  """What makes a T5 something else than a language model.

  Attributes:
    kind: `language_model` only adds `widths` before T5's own projection; the
      next three are the heads of FAT5 and Hugging Face; `embedding` is
      sentence embeddings; `enct5` is EncT5 (arXiv:2110.08426).
    num_labels: outputs a sequence or token; spans and embeddings ignore it.
    problem_type: what a sequence's labels are.
    body: what the head stands on: the encoder alone (FAT5), or both stacks
      (HF's sequence classification and question answering).
    pooling: the vector of a sequence: at its last end-of-sequence token (its
      last real token where truncation took that), the mean over real tokens,
      or the first. None is what the kind is published with.
    widths: of the hidden layers before the output; None is what the kind is
      published with.
    activation: of the hidden layers.
    dropout_rate: on what the head reads, and after each hidden layer.
    decoder_layers: EncT5's: how many of T5's decoder layers it keeps.
    label_names: of the outputs, in order; empty where they have none.
    similarity_scale: an embedding's: cosine times this is the logit of its
      in-batch softmax.
    max_answer_tokens: longest span that question answering predicts.

  Raises:
    ValueError: for a value that no head can have.
  """

  kind: str
  num_labels: int = 2
  problem_type: str = "single_label_classification"
  body: Literal["encoder", "encoder_decoder"] = "encoder"
  pooling: Literal["eos", "mean", "first"] | None = None
  widths: tuple[int, ...] | None = None
  activation: str = "tanh"
  dropout_rate: float = 0.0
  decoder_layers: int = 1
  label_names: tuple[str, ...] = ()
  similarity_scale: float = 20.0
  max_answer_tokens: int = 30

  def __post_init__(self):
    for field, kind in (("widths", numbers.Integral), ("label_names", str)):
      if getattr(self, field) is not None:
        as_tuple(self, field, kind)
    check_choice(self, "kind", HEAD_KINDS)
    check_choice(self, "problem_type", PROBLEM_TYPES)
    check_choice(self, "body", ("encoder", "encoder_decoder"))
    check_choice(self, "pooling", (None, "eos", "mean", "first"))
    check_choice(self, "activation", (*ACTIVATIONS, "tanh"))
    counts = ("num_labels", "decoder_layers", "max_answer_tokens")
    check_ints(self, counts, 1)
    if any(not 0 < width <= MOST for width in self.widths or ()):
      raise ValueError(f"widths={self.widths} must be positive")
    check_rate(self, "dropout_rate")
    check_real(self, "similarity_scale")
    if self.label_names is None:
      object.__setattr__(self, "label_names", ())
    if self.label_names and len(self.label_names) != self.num_labels:
      raise ValueError(
        f"{len(self.label_names)} label_names for num_labels={self.num_labels}"
      )
    allowed = {
      "sequence_classification": ("encoder", "encoder_decoder"),
      "question_answering": ("encoder", "encoder_decoder"),
    }.get(self.kind)
    if allowed is None and self.body != "encoder":
      raise ValueError(f"kind={self.kind!r} has no body={self.body!r}")
    if self.pooling is not None and self.kind not in (
      "sequence_classification",
      "embedding",
    ):
      raise ValueError(f"kind={self.kind!r} does not pool: leave pooling None")
    if self.problem_type != PROBLEM_TYPES[0] and self.kind not in (
      "sequence_classification",
      "enct5",
    ):
      raise ValueError(
        f"kind={self.kind!r} has no problem_type={self.problem_type!r}"
      )
    if self.kind == "embedding" and self.widths:
      raise ValueError("kind='embedding' has no layers: leave widths None")
    if self.kind == "question_answering":
      object.__setattr__(self, "num_labels", 2)

  def architecture(self) -> dict[str, Any]:
    """The fields that fix the function, with defaults of the kind resolved."""
    fields = {"kind": self.kind}
    if self.kind not in ("language_model", "embedding"):
      fields |= {"num_labels": self.num_labels, "body": self.body}
      fields["problem_type"] = self.problem_type
    if self.kind in ("sequence_classification", "embedding"):
      fields["pooling"] = self.pooled
    if self.kind == "enct5":
      fields["decoder_layers"] = self.decoder_layers
    if self.kind != "embedding":
      fields |= {"widths": self.widths, "activation": self.activation}
    return fields

  @property
  def prompts(self) -> int:
    """Rows of EncT5's own embedding."""
    many = self.problem_type == "multi_label_classification"
    return self.num_labels if many else 1

  @property
  def pooled(self) -> str:
    """`pooling`, or what the kind is published with."""
    return self.pooling or ("mean" if self.kind == "embedding" else "eos")

  def hidden_widths(self, emb_dim: int) -> tuple[int, ...]:
    """`widths`, or what the kind is published with."""
    if self.widths is not None:
      return self.widths
    return (emb_dim,) if self.kind == "sequence_classification" else ()


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank updates of chosen projections (LoRA, arXiv:2106.09685).

  Attributes:
    rank: r; the update of a kernel is `alpha / rank * A @ B`.
    alpha: see rank.
    dropout_rate: on what the update reads; the kernel reads all of it.
    targets: projections by the end of their name: `query`, `wi_0`,
      `self_attention/out`, `logits_dense`.

  Raises:
    ValueError: for an impossible value.
  """

  rank: int = 8
  alpha: float = 16.0
  dropout_rate: float = 0.0
  targets: tuple[str, ...] = ("query", "value")

  def __post_init__(self):
    as_tuple(self, "targets", str)
    check_ints(self, ("rank",), 1)
    check_real(self, "alpha")
    if not self.targets:
      raise ValueError("LoRA needs at least one of targets")
    for target in self.targets:
      if target.split("/")[-1] not in _PROJECTIONS:
        raise ValueError(
          f"targets={self.targets}: {target!r} ends in no projection of T5;"
          f" those are {', '.join(_PROJECTIONS)}"
        )
    check_rate(self, "dropout_rate")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def applies_to(self, path: str) -> bool:
    """Whether the projection "encoder/layers_0/attention/query" has one."""
    return any(f"/{path}".endswith(f"/{name}") for name in self.targets)


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Hyper-parameters of a T5-family encoder-decoder.

  Raises:
    ValueError: for a value that no T5 can have, float16 among them.
  """

  vocab_size: int
  emb_dim: int = 512
  num_heads: int = 8
  head_dim: int = 64
  num_encoder_layers: int = 6
  # 0 in an encoder alone.
  num_decoder_layers: int = 6
  mlp_dim: int = 2048
  # One activation a branch; two branches are multiplied ("gelu", "linear").
  mlp_activations: tuple[str, ...] = ("relu",)
  # Whether the output projection is the embedding (T5 1.0).
  logits_via_embedding: bool = False
  # Divide the decoder's output by sqrt(emb_dim) before the projection; None
  # means where the embedding is shared, which is T5's rule.
  scale_decoder_outputs: bool | None = None
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  # umT5 learns a position table in every layer, the others share the first.
  relative_attention_per_layer: bool = False
  # Where a token learns its place: T5's buckets; ALiBi (arXiv:2108.12409);
  # rotary embeddings (arXiv:2104.09864); FIRE (arXiv:2310.04418), whose
  # threshold starts at relative_attention_max_distance; or nowhere.
  position_encoding: Literal["t5", "alibi", "rope", "fire", "none"] = "t5"
  # Asymmetric: half of the heads see no later key, half no earlier one.
  alibi_mode: Literal["symmetric", "asymmetric"] = "symmetric"
  # Of the head dimension, what turns; the rest has no position.
  rotary_fraction: float = 1.0
  rotary_base: float = 10_000.0
  # Whether neighbours turn together, or the two halves.
  rotary_interleaved: bool = False
  # xPos (arXiv:2212.10554): scores shrink over about as many tokens, and grow
  # toward later keys, so it is for what is causal. None is none; xPos's is 512.
  rotary_scale_base: float | None = None
  # Queries and keys of self-attention; or, as FAT5, values too, and those of
  # cross-attention.
  rotary_scope: Literal["self_attention", "everything"] = "self_attention"
  # Hidden units of FIRE's network.
  fire_mlp_width: int = 32
  # In training tokens stand at random places below max_positions, in their
  # order (arXiv:2305.16843); elsewhere they count up by one.
  randomized_positions: bool = False
  # FAT5's max_sequence_length; xPos leaves as it is what stands at half of it.
  max_positions: int = 1024
  # Of queries times keys; T5 folds 1/sqrt(head_dim) into the query's
  # initialiser instead, FAT5 may scale.
  attention_scale: float = 1.0
  layer_norm_epsilon: float = 1e-6
  dropout_rate: float = 0.0
  pad_token_id: int = 0
  eos_token_id: int = 1
  decoder_start_token_id: int = 0
  # The Hugging Face family that an export declares.
  model_type: Literal["t5", "mt5", "umt5"] = "t5"
  # Compute type; parameters are float32.
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  # One scanned layer instead of a loop: compiles in constant time.
  scan_layers: bool = False
  # What the backward pass recomputes: nothing; all but products with parameters
  # and attention's output; everything; or all but what is named here, of
  # SAVEABLE: ("attention", "wi_0", "wi_1").
  remat_policy: (
    Literal["none", "minimal", "gathered", "full"] | tuple[str, ...]
  ) = "none"
  # Attention backend by name; None lets pallas_kernels choose.
  attention_implementation: str | None = None
  # None is the language model that T5 is.
  head: HeadConfig | None = None
  lora: LoRAConfig | None = None

  def __post_init__(self):
    as_tuple(self, "mlp_activations", str)
    if not isinstance(self.dtype, str):
      # T5X's gin files say jnp.bfloat16.
      try:
        object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
      except TypeError:
        pass  # no dtype; refused below
    if self.dtype == "float16":
      raise ValueError(
        "dtype='float16': T5's feed-forward outputs exceed 65504, the largest"
        " float16, and become inf. Use 'bfloat16' (same size, same speed) or"
        " 'float32'."
      )
    # From the JSON beside a checkpoint.
    for field, described_by in (("head", HeadConfig), ("lora", LoRAConfig)):
      if isinstance(getattr(self, field), dict):
        value = described_by(**getattr(self, field))
        object.__setattr__(self, field, value)
      value = getattr(self, field)
      if value is not None and not isinstance(value, described_by):
        raise ValueError(f"{told(field, value)} is no {described_by.__name__}")
    check_choice(self, "dtype", DTYPES)
    if isinstance(self.remat_policy, str):
      check_choice(self, "remat_policy", REMAT_POLICIES)
    else:
      as_tuple(self, "remat_policy", str)
      for name in self.remat_policy:
        if name not in SAVEABLE:
          raise ValueError(
            f"remat_policy={self.remat_policy}: {name!r} is not one of"
            f" {', '.join(SAVEABLE)}"
          )
    check_choice(self, "model_type", ("t5", "mt5", "umt5"))
    self._check_positions()
    if not self.mlp_activations:
      raise ValueError("mlp_activations is empty")
    for activation in self.mlp_activations:
      if activation not in ACTIVATIONS:
        raise ValueError(
          f"mlp_activations={self.mlp_activations}: {activation!r} is not one"
          f" of {', '.join(ACTIVATIONS)}"
        )
    check_rate(self, "dropout_rate")
    self._check_numbers()
    self._check_encoding()
    if (
      self.head is not None
      and self.head.kind == "language_model"
      and self.head.widths
      and self.logits_via_embedding
      and self.head.widths[-1] != self.emb_dim
    ):
      raise ValueError(
        f"widths={self.head.widths} of the head must end in emb_dim ="
        f" {self.emb_dim}, because the embedding is the output projection"
      )
    if (
      self.lora is not None
      and self.lora.dropout_rate
      and self.lora.applies_to("decoder/logits_dense")
    ):
      # The loss projects with the merged kernel, where nothing can be dropped.
      raise ValueError("LoRA of logits_dense needs its dropout_rate = 0")
    # Half of the buckets of a direction are for one distance each, the others
    # grow up to the largest distance; an encoder has two directions.
    buckets = self.relative_attention_num_buckets
    single = buckets // (2 if self.num_decoder_layers else 4)
    has_buckets = self.position_encoding == "t5"
    if has_buckets and self.relative_attention_max_distance <= single:
      raise ValueError(
        "relative_attention_max_distance="
        f"{self.relative_attention_max_distance} must be more than {single},"
        f" with relative_attention_num_buckets={buckets}"
      )

  def _check_positions(self) -> None:
    """What says where a token stands."""
    check_choice(self, "position_encoding", POSITION_ENCODINGS)
    check_choice(self, "alibi_mode", ("symmetric", "asymmetric"))
    check_choice(self, "rotary_scope", ("self_attention", "everything"))
    for field in ("rotary_interleaved", "randomized_positions"):
      check_flag(self, field)
    check_ints(self, ("fire_mlp_width", "max_positions"), 1)
    check_real(self, "rotary_fraction")
    if not 0 < self.rotary_fraction <= 1:
      raise ValueError(
        f"rotary_fraction={self.rotary_fraction} is not in (0, 1]"
      )
    check_real(self, "rotary_base")
    if not self.rotary_base > 1:
      raise ValueError(f"rotary_base={self.rotary_base} must be more than 1")
    if self.rotary_scale_base is not None:
      check_real(self, "rotary_scale_base")
      if not self.rotary_scale_base > 0:
        raise ValueError(
          f"rotary_scale_base={self.rotary_scale_base} must be > 0, or None"
        )

  def _check_encoding(self) -> None:
    """What one field of the positions asks of another."""
    encoding = self.position_encoding
    dims = self.rotary_dims
    if encoding == "rope" and (dims < 2 or dims % 2):
      raise ValueError(
        f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim}"
        f" turns {dims} numbers, which are no pairs"
      )
    asymmetric = encoding == "alibi" and self.alibi_mode == "asymmetric"
    if asymmetric and self.num_heads % 2:
      raise ValueError(
        f"alibi_mode='asymmetric' halves the heads: num_heads={self.num_heads}"
      )
    if not self.randomized_positions:
      return
    if encoding == "none":
      raise ValueError(
        "randomized_positions=True: position_encoding='none' has no positions"
      )
    if encoding == "rope" and self.rotary_scope == "everything":
      raise ValueError(
        "randomized_positions=True: rotary_scope='everything' reads positions"
        " of cross-attention, whose two sides are drawn apart"
      )

  def _check_numbers(self) -> None:
    """Types and ranges of sizes, ids and flags."""
    sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim")
    check_ints(self, (*sizes, "num_encoder_layers"), 1)
    ids = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    check_ints(self, ("num_decoder_layers", *ids), 0)
    for field in ids:
      if getattr(self, field) >= self.vocab_size:
        raise ValueError(
          f"{field}={getattr(self, field)} is no row of the embedding:"
          f" vocab_size={self.vocab_size}"
        )
    for field in ("attention_scale", "layer_norm_epsilon"):
      check_real(self, field)
    if not 0 < self.layer_norm_epsilon < 1:
      raise ValueError(
        f"layer_norm_epsilon={self.layer_norm_epsilon} is not between 0 and 1;"
        " T5's is 1e-6"
      )
    if not self.attention_scale > 0:
      raise ValueError(f"attention_scale={self.attention_scale} must be > 0")
    check_ints(self, ("relative_attention_num_buckets",), 4)
    check_ints(self, ("relative_attention_max_distance",), 1)
    for field in ("logits_via_embedding", "relative_attention_per_layer"):
      check_flag(self, field)
    check_flag(self, "scan_layers")
    check_flag(self, "scale_decoder_outputs", unset=True)
    name = self.attention_implementation
    if name is not None and not isinstance(name, str):
      raise ValueError(f"{told('attention_implementation', name)} is no name")

  @property
  def rotary_dims(self) -> int:
    """Numbers of a head that rotary embeddings turn."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def scales_decoder_outputs(self) -> bool:
    if self.scale_decoder_outputs is None:
      return self.logits_via_embedding
    return self.scale_decoder_outputs

  def replace(self, **changes: Any) -> T5Config:
    return dataclasses.replace(self, **changes)

  @property
  def is_language_model(self) -> bool:
    return self.head is None or self.head.kind == "language_model"

  def with_head(self, head: HeadConfig | None) -> T5Config:
    """This T5 under a head, without the decoder layers that it leaves out."""
    config = self.replace(head=head)
    if config.is_language_model or head.body == "encoder_decoder":
      return config
    layers = 0
    if head.kind == "enct5":
      layers = head.decoder_layers
      if layers > self.num_decoder_layers:
        raise ValueError(
          f"decoder_layers={layers} of the head, and the model has"
          f" {self.num_decoder_layers}"
        )
    return config.replace(num_decoder_layers=layers)

  def architecture(self) -> dict[str, Any]:
    """The fields that fix the function, without the run-time choices."""
    fields = dataclasses.asdict(self)
    fields["scale_decoder_outputs"] = self.scales_decoder_outputs
    if self.head is not None:
      fields["head"] = self.head.architecture()
    if self.lora is not None:
      del fields["lora"]["dropout_rate"]
    return {k: v for k, v in fields.items() if k not in RUN_TIME_FIELDS}
