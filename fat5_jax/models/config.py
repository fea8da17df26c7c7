"""The one description of a model: architecture and run-time choices.

Axis legend of the models: `B` batch, `L` length, `Q`/`K` query/key length, `M`
model width, `H` heads, `D` head dimension, `F` MLP width, `V` vocabulary, `N`
position buckets. Arrays with two or more axes carry them in their names.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

# Names as in T5X; "gelu" is the tanh approximation (HF's "gelu_new").
ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "linear")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")
# Fields that change how a model runs, not which function it is.
RUN_TIME_FIELDS = (
  "dtype",
  "dropout_rate",
  "scan_layers",
  "remat_policy",
  "attention_implementation",
)


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
  # What the backward pass recomputes: nothing, all but matrix products with
  # parameters, or everything.
  remat_policy: Literal["none", "minimal", "full"] = "none"
  # Attention backend by name; None lets pallas_kernels choose.
  attention_implementation: str | None = None

  def __post_init__(self):
    object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
    if not isinstance(self.dtype, str):
      # T5X's gin files say jnp.bfloat16.
      object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
    if self.dtype == "float16":
      raise ValueError(
        "dtype='float16': T5's feed-forward outputs exceed 65504, the largest"
        " float16, and become inf. Use 'bfloat16' (same size, same speed) or"
        " 'float32'."
      )
    self._check_choice("dtype", DTYPES)
    self._check_choice("remat_policy", REMAT_POLICIES)
    self._check_choice("model_type", ("t5", "mt5", "umt5"))
    for activation in self.mlp_activations:
      if activation not in ACTIVATIONS:
        raise ValueError(
          f"mlp_activations={self.mlp_activations}: {activation!r} is not one"
          f" of {', '.join(ACTIVATIONS)}"
        )
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(f"dropout_rate={self.dropout_rate} is not in [0, 1)")
    for field in (
      "vocab_size",
      "emb_dim",
      "num_heads",
      "head_dim",
      "num_encoder_layers",
      "num_decoder_layers",
      "mlp_dim",
    ):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

  def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(self, field)
    if value not in choices:
      raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}")

  @property
  def scales_decoder_outputs(self) -> bool:
    if self.scale_decoder_outputs is None:
      return self.logits_via_embedding
    return self.scale_decoder_outputs

  def replace(self, **changes: Any) -> T5Config:
    return dataclasses.replace(self, **changes)

  def architecture(self) -> dict[str, Any]:
    """The fields that fix the function, without the run-time choices."""
    fields = dataclasses.asdict(self)
    fields["scale_decoder_outputs"] = self.scales_decoder_outputs
    return {k: v for k, v in fields.items() if k not in RUN_TIME_FIELDS}
