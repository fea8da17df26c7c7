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

# Of float32, about.
_LARGEST = 3e38
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
)


_PROJECTIONS = (
  *("query", "key", "value", "out"),
  *("wi", "wi_0", "wi_1", "wo", "logits_dense"),
)
# What a tuple as remat_policy may name: outputs of projections, of attention.
SAVEABLE = ("attention", *_PROJECTIONS[:-1])


# Counts go into int32 arithmetic.
_MOST = 2**31 - 1


def _told(field: str, value: Any) -> str:
  """`field=value`, short."""
  text = repr(value)
  return f"{field}={text if len(text) <= 80 else text[:77] + '...'}"


def _check_choice(where: Any, field: str, choices: tuple[Any, ...]) -> None:
  value = getattr(where, field)
  if value not in choices:
    raise ValueError(
      f"{_told(field, value)} is not one of {', '.join(map(str, choices))}"
    )


def _check_ints(where: Any, fields: tuple[str, ...], least: int) -> None:
  for field in fields:
    value = getattr(where, field)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      raise ValueError(f"{_told(field, value)} is no integer")
    if value < least:
      raise ValueError(f"{field}={value} must be at least {least}")
    if value > _MOST:
      raise ValueError(f"{field} must be at most {_MOST}")


def _check_real(where: Any, field: str) -> None:
  value = getattr(where, field)
  if (
    isinstance(value, bool)
    or not isinstance(value, numbers.Real)
    or not -_LARGEST < value < _LARGEST
  ):
    raise ValueError(f"{_told(field, value)} is no finite number")


def _check_rate(where: Any, field: str) -> None:
  _check_real(where, field)
  if not 0.0 <= getattr(where, field) < 1.0:
    raise ValueError(f"{field}={getattr(where, field)} is not in [0, 1)")


def _check_flag(where: Any, field: str, unset: bool = False) -> None:
  value = getattr(where, field)
  if not isinstance(value, bool) and not (unset and value is None):
    raise ValueError(f"{_told(field, value)} is neither True nor False")


def _as_tuple(where: Any, field: str, kind: type) -> None:
  """Makes a tuple of a list, of one kind of thing."""
  value = getattr(where, field)
  if not isinstance(value, (list, tuple)) or not all(
    isinstance(x, kind) and not isinstance(x, bool) for x in value
  ):
    what = "texts" if kind is str else "integers"
    raise ValueError(f"{_told(field, value)} is no list of {what}")
  object.__setattr__(where, field, tuple(value))


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
        _as_tuple(self, field, kind)
    _check_choice(self, "kind", HEAD_KINDS)
    _check_choice(self, "problem_type", PROBLEM_TYPES)
    _check_choice(self, "body", ("encoder", "encoder_decoder"))
    _check_choice(self, "pooling", (None, "eos", "mean", "first"))
    _check_choice(self, "activation", (*ACTIVATIONS, "tanh"))
    counts = ("num_labels", "decoder_layers", "max_answer_tokens")
    _check_ints(self, counts, 1)
    if any(not 0 < width <= _MOST for width in self.widths or ()):
      raise ValueError(f"widths={self.widths} must be positive")
    _check_rate(self, "dropout_rate")
    _check_real(self, "similarity_scale")
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
    _as_tuple(self, "targets", str)
    _check_ints(self, ("rank",), 1)
    _check_real(self, "alpha")
    if not self.targets:
      raise ValueError("LoRA needs at least one of targets")
    for target in self.targets:
      if target.split("/")[-1] not in _PROJECTIONS:
        raise ValueError(
          f"targets={self.targets}: {target!r} ends in no projection of T5;"
          f" those are {', '.join(_PROJECTIONS)}"
        )
    _check_rate(self, "dropout_rate")

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
  # FAT5's other choice that depends on the distance alone.
  position_encoding: Literal["t5", "alibi"] = "t5"
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
    _as_tuple(self, "mlp_activations", str)
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
        raise ValueError(f"{_told(field, value)} is no {described_by.__name__}")
    _check_choice(self, "dtype", DTYPES)
    if isinstance(self.remat_policy, str):
      _check_choice(self, "remat_policy", REMAT_POLICIES)
    else:
      _as_tuple(self, "remat_policy", str)
      for name in self.remat_policy:
        if name not in SAVEABLE:
          raise ValueError(
            f"remat_policy={self.remat_policy}: {name!r} is not one of"
            f" {', '.join(SAVEABLE)}"
          )
    _check_choice(self, "model_type", ("t5", "mt5", "umt5"))
    _check_choice(self, "position_encoding", ("t5", "alibi"))
    if not self.mlp_activations:
      raise ValueError("mlp_activations is empty")
    for activation in self.mlp_activations:
      if activation not in ACTIVATIONS:
        raise ValueError(
          f"mlp_activations={self.mlp_activations}: {activation!r} is not one"
          f" of {', '.join(ACTIVATIONS)}"
        )
    _check_rate(self, "dropout_rate")
    self._check_numbers()
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
    if self.relative_attention_max_distance <= single:
      raise ValueError(
        "relative_attention_max_distance="
        f"{self.relative_attention_max_distance} must be more than {single},"
        f" with relative_attention_num_buckets={buckets}"
      )

  def _check_numbers(self) -> None:
    """Types and ranges of sizes, ids and flags."""
    sizes = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim")
    _check_ints(self, (*sizes, "num_encoder_layers"), 1)
    ids = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    _check_ints(self, ("num_decoder_layers", *ids), 0)
    for field in ids:
      if getattr(self, field) >= self.vocab_size:
        raise ValueError(
          f"{field}={getattr(self, field)} is no row of the embedding:"
          f" vocab_size={self.vocab_size}"
        )
    for field in ("attention_scale", "layer_norm_epsilon"):
      _check_real(self, field)
    if not 0 < self.layer_norm_epsilon < 1:
      raise ValueError(
        f"layer_norm_epsilon={self.layer_norm_epsilon} is not between 0 and 1;"
        " T5's is 1e-6"
      )
    if not self.attention_scale > 0:
      raise ValueError(f"attention_scale={self.attention_scale} must be > 0")
    _check_ints(self, ("relative_attention_num_buckets",), 4)
    _check_ints(self, ("relative_attention_max_distance",), 1)
    for field in ("logits_via_embedding", "relative_attention_per_layer"):
      _check_flag(self, field)
    _check_flag(self, "scan_layers")
    _check_flag(self, "scale_decoder_outputs", unset=True)
    name = self.attention_implementation
    if name is not None and not isinstance(name, str):
      raise ValueError(f"{_told('attention_implementation', name)} is no name")

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
