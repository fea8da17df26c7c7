"""T5 with a head of fat5_jax, on transformers' own T5, mT5 and umT5 stacks.

This file lies in every folder whose head transformers has no class for; what
loads it is in the folder's README.md. It is tested with transformers 4.37.1 and
5. `config.fat5_jax["head"]` says which head it is, `config.t5` which T5.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
import transformers
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
  BaseModelOutput,
  QuestionAnsweringModelOutput,
  Seq2SeqLMOutput,
  SequenceClassifierOutput,
  TokenClassifierOutput,
)
from transformers.models.mt5.modeling_mt5 import MT5Stack
from transformers.models.t5.modeling_t5 import T5Stack
from transformers.models.umt5.modeling_umt5 import UMT5Stack

_FAMILIES = {
  "t5": (transformers.T5Config, T5Stack),
  "mt5": (transformers.MT5Config, MT5Stack),
  "umt5": (transformers.UMT5Config, UMT5Stack),
}
_ACTIVATIONS = {
  "relu": F.relu,
  "gelu": lambda x: F.gelu(x, approximate="tanh"),
  "gelu_exact": F.gelu,
  "silu": F.silu,
  "linear": lambda x: x,
  "tanh": torch.tanh,
}
# Logit of what cannot be chosen.
_MASKED = -1e9


class Fat5JaxConfig(PretrainedConfig):
  """`t5` is the config of the T5 below, `fat5_jax["head"]` the head."""

  model_type = "fat5_jax"

  def __init__(self, t5=None, fat5_jax=None, **kwargs):
    self.t5 = t5 or {}
    self.fat5_jax = fat5_jax or {}
    super().__init__(**kwargs)

  @classmethod
  def get_config_dict(cls, *args, **kwargs):
    found, kwargs = super().get_config_dict(*args, **kwargs)
    if "t5" not in found and "fat5_jax" in found:
      # A folder that other classes read as well: all keys on one level.
      family = found.get("model_type")
      found["t5"] = dict(found) | {
        "family": family if family in _FAMILIES else "t5"
      }
      for key in ("auto_map", "architectures", "fat5_jax", "model_type"):
        found["t5"].pop(key, None)
      found["model_type"] = cls.model_type
      # What stock classes are kept away by.
      found["feed_forward_proj"] = "see-README.md"
    return found, kwargs


class _Body(nn.Module):
  """The embedding, the encoder, and the decoder layers that the head keeps."""

  def __init__(self, config: Fat5JaxConfig):
    super().__init__()
    options = dict(config.t5)
    config_class, stack = _FAMILIES[options.pop("family")]
    t5 = config_class(**options)
    head = config.fat5_jax["head"]
    self.t5 = t5
    self.shared = nn.Embedding(t5.vocab_size, t5.d_model)
    self.encoder = self._stack(stack, t5, t5.num_layers, is_decoder=False)
    if t5.num_decoder_layers:
      depth = t5.num_decoder_layers
      self.decoder = self._stack(stack, t5, depth, is_decoder=True)
      if head["kind"] == "enct5":
        # What the decoder reads in place of tokens.
        prompts = head["num_labels"] if _is_multi_label(head) else 1
        self.decoder.embed_tokens = nn.Embedding(prompts, t5.d_model)

  @staticmethod
  def _stack(stack, t5, depth: int, is_decoder: bool) -> nn.Module:
    config = copy.deepcopy(t5)
    config.is_decoder = is_decoder
    config.is_encoder_decoder = False
    config.use_cache = False
    config.num_layers = depth
    found = stack(config)
    # Embedded vectors are given to it; transformers 5 makes a table unasked.
    found.embed_tokens = None
    return found

  def forward(
    self, input_ids, attention_mask=None, return_dict=True, **inner_states
  ):
    """The encoder's output; `generate` asks for it by this signature."""
    _refuse(inner_states)
    mask = _mask(input_ids, attention_mask, self.t5)
    x = self.encoder(inputs_embeds=self.shared(input_ids), attention_mask=mask)[
      0
    ]
    return BaseModelOutput(last_hidden_state=x) if return_dict else (x,)

  def decode(self, embedded, encoded, mask, decoder_mask=None):
    return self.decoder(
      inputs_embeds=embedded,
      attention_mask=decoder_mask,
      encoder_hidden_states=encoded,
      encoder_attention_mask=mask,
    )[0]

  def shifted_right(self, input_ids):
    shifted = torch.full_like(input_ids, self.t5.decoder_start_token_id)
    shifted[:, 1:] = input_ids[:, :-1]
    return shifted.masked_fill(shifted == -100, self.t5.pad_token_id)


def _mask(input_ids, attention_mask, t5):
  """Real tokens; without a mask, all but padding."""
  if attention_mask is None:
    attention_mask = input_ids != t5.pad_token_id
  return attention_mask.long()


def _refuse(inner_states):
  """`generate` says of attentions and hidden states that it wants none."""
  asked = [name for name, value in inner_states.items() if value]
  if asked:
    raise ValueError(f"this model gives no {', '.join(asked)}")


def _is_multi_label(head) -> bool:
  return head["problem_type"] == "multi_label_classification"


def _linear(layer: nn.Linear, x):
  """In float32, whatever the weights are stored in."""
  bias = None if layer.bias is None else layer.bias.float()
  return F.linear(x.float(), layer.weight.float(), bias)


class _HiddenLayers(nn.Module):
  """`dense_0`, `dense_1` ...; `width` is what comes out."""

  def __init__(self, head, d_model: int):
    super().__init__()
    widths = head["widths"]
    if widths is None:
      is_sequence = head["kind"] == "sequence_classification"
      widths = (d_model,) if is_sequence else ()
    self.width = d_model
    self.depth = len(widths)
    self.activation = _ACTIVATIONS[head["activation"]]
    self.dropout = nn.Dropout(head["dropout_rate"])
    for i, width in enumerate(widths):
      setattr(self, f"dense_{i}", nn.Linear(self.width, width))
      self.width = width

  def forward(self, x):
    x = self.dropout(x.float())
    for i in range(self.depth):
      x = _linear(getattr(self, f"dense_{i}"), x)
      x = self.dropout(self.activation(x))
    return x


class _PromptHead(_HiddenLayers):
  """EncT5's, under hackyon's names."""

  def __init__(self, head, d_model: int):
    super().__init__(head, d_model)
    if _is_multi_label(head):
      size = (head["num_labels"], self.width)
      self.weights = nn.Parameter(torch.zeros(size))
      self.biases = nn.Parameter(torch.zeros(head["num_labels"]))
    else:
      self.out_proj = nn.Linear(self.width, head["num_labels"])

  def forward(self, x):
    x = super().forward(x)
    if hasattr(self, "out_proj"):
      return _linear(self.out_proj, x[:, 0])
    return (x * self.weights.float()).sum(-1) + self.biases.float()


class _Model(PreTrainedModel):
  config_class = Fat5JaxConfig
  base_model_prefix = ""
  # Where there is no decoder, this is empty: what keeps stock classes away.
  _keys_to_ignore_on_load_unexpected = [r"decoder\.final_layer_norm\.weight"]

  def __init__(self, config: Fat5JaxConfig):
    super().__init__(config)
    head = config.fat5_jax["head"]
    self.head_config = head
    self.transformer = _Body(config)
    if head["kind"] == "enct5":
      self.classification_head = _PromptHead(head, self.transformer.t5.d_model)
    else:
      self.head = _HiddenLayers(head, self.transformer.t5.d_model)
      if head["kind"] != "language_model":
        self.classifier = nn.Linear(self.head.width, head["num_labels"])
    self.post_init()

  def _init_weights(self, module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
      module.weight.data.normal_(0.0, 0.02)
      if getattr(module, "bias", None) is not None:
        module.bias.data.zero_()

  def get_input_embeddings(self):
    return self.transformer.shared

  def set_input_embeddings(self, value):
    self.transformer.shared = value

  def hidden_states(self, input_ids, mask):
    """What the head reads: of the encoder, or as HF of both stacks."""
    body = self.transformer
    x = body(input_ids, mask).last_hidden_state
    if self.head_config["body"] == "encoder_decoder":
      x = body.decode(body.shared(body.shifted_right(input_ids)), x, mask)
    return x.float()

  def logits_of_tokens(self, input_ids, mask):
    return _linear(
      self.classifier, self.head(self.hidden_states(input_ids, mask))
    )


class Fat5ForSequenceClassification(_Model):
  """A label, labels or numbers a row: `logits` (B, num_labels)."""

  def forward(
    self, input_ids, attention_mask=None, labels=None, return_dict=None
  ):
    mask = _mask(input_ids, attention_mask, self.transformer.t5)
    if self.head_config["kind"] == "enct5":
      logits = self.classification_head(self._prompted(input_ids, mask))
    else:
      x = self._pooled(self.hidden_states(input_ids, mask), input_ids, mask)
      logits = _linear(self.classifier, self.head(x))
    loss = None
    if labels is not None:
      problem = self.head_config["problem_type"]
      if problem == "regression":
        loss = F.mse_loss(logits, labels.float().view_as(logits))
      elif problem == "multi_label_classification":
        loss = F.binary_cross_entropy_with_logits(logits, labels.float())
      else:
        loss = F.cross_entropy(logits, labels.view(-1))
    return _output(SequenceClassifierOutput(loss, logits), return_dict)

  def _pooled(self, x, input_ids, mask):
    how = self.head_config["pooling"] or "eos"
    if how == "first":
      return x[:, 0]
    real = mask != 0
    if how == "mean":
      total = (x * real[..., None]).sum(1)
      return total / real.sum(1, keepdim=True).clamp(min=1)
    # The last </s>; where truncation took it, the last real token.
    position = torch.arange(x.shape[1], device=x.device)
    is_eos = (input_ids == self.transformer.t5.eos_token_id) & real
    eos = torch.where(is_eos, position, -1).amax(1)
    last = torch.where(real, position, 0).amax(1)
    index = torch.where(eos >= 0, eos, last)
    return x[torch.arange(len(x), device=x.device), index]

  def _prompted(self, input_ids, mask):
    body = self.transformer
    encoded = body(input_ids, mask).last_hidden_state
    prompts = body.decoder.embed_tokens.weight.expand(len(input_ids), -1, -1)
    n = prompts.shape[1]
    if int(transformers.__version__.split(".")[0]) < 5:
      visible = mask.new_ones((len(mask), n, n))
    else:
      # Four axes are taken as they are: nothing is hidden.
      visible = encoded.new_zeros((len(mask), 1, n, n))
    return body.decode(prompts, encoded, mask, visible).float()


class Fat5ForTokenClassification(_Model):
  """A label a token: `logits` (B, L, num_labels)."""

  def forward(
    self, input_ids, attention_mask=None, labels=None, return_dict=None
  ):
    mask = _mask(input_ids, attention_mask, self.transformer.t5)
    logits = self.logits_of_tokens(input_ids, mask)
    loss = None
    if labels is not None:
      loss = F.cross_entropy(logits.flatten(0, 1), labels.view(-1))
    return _output(TokenClassifierOutput(loss, logits), return_dict)


class Fat5ForQuestionAnswering(_Model):
  """`start_logits` and `end_logits` (B, L); padding cannot be chosen."""

  def forward(
    self,
    input_ids,
    attention_mask=None,
    start_positions=None,
    end_positions=None,
    return_dict=None,
  ):
    mask = _mask(input_ids, attention_mask, self.transformer.t5)
    logits = self.logits_of_tokens(input_ids, mask)
    logits = logits.masked_fill(mask[..., None] == 0, _MASKED)
    start, end = logits.unbind(-1)
    loss = None
    if start_positions is not None and end_positions is not None:
      loss = F.cross_entropy(start, start_positions.view(-1))
      loss = (loss + F.cross_entropy(end, end_positions.view(-1))) / 2
    return _output(QuestionAnsweringModelOutput(loss, start, end), return_dict)


class Fat5ForConditionalGeneration(_Model, GenerationMixin):
  """A T5 with hidden layers before its projection. It generates anew from the
  start for every token: there is no cache."""

  main_input_name = "input_ids"

  def __init__(self, config: Fat5JaxConfig):
    super().__init__(config)
    if not config.fat5_jax["logits_via_embedding"]:
      t5, width = self.transformer.t5, self.head.width
      self.transformer.lm_head = nn.Linear(width, t5.vocab_size, bias=False)
    self.post_init()

  def get_encoder(self, *unused):
    return self.transformer

  def get_output_embeddings(self):
    # Nothing is tied by the library: what is shared is used in place.
    return None

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    decoder_input_ids=None,
    decoder_attention_mask=None,
    encoder_outputs=None,
    labels=None,
    return_dict=None,
    **inner_states,
  ):
    _refuse(inner_states)
    body = self.transformer
    if attention_mask is None and input_ids is not None:
      attention_mask = _mask(input_ids, None, body.t5)
    if encoder_outputs is None:
      encoder_outputs = body(input_ids, attention_mask)
    if decoder_input_ids is None:
      decoder_input_ids = body.shifted_right(labels)
    x = body.decode(
      body.shared(decoder_input_ids),
      encoder_outputs[0],
      attention_mask,
      decoder_attention_mask,
    )
    dtype = x.dtype
    x = self.head(x)
    if self.config.fat5_jax["scale_decoder_outputs"]:
      x = x * body.t5.d_model**-0.5
    projection = getattr(body, "lm_head", body.shared).weight
    logits = F.linear(x.to(dtype), projection).float()
    loss = None
    if labels is not None:
      loss = F.cross_entropy(logits.flatten(0, 1), labels.view(-1))
    return _output(Seq2SeqLMOutput(loss, logits), return_dict)

  def prepare_inputs_for_generation(
    self, input_ids, attention_mask=None, encoder_outputs=None, **unused
  ):
    return {
      "decoder_input_ids": input_ids,
      "attention_mask": attention_mask,
      "encoder_outputs": encoder_outputs,
    }


def _output(output, return_dict):
  return output.to_tuple() if return_dict is False else output
