"""flashT5's forward pass, in numpy and float64: the oracle of its folders.

Written from what catie-aq/flashT5 computes, under its own names, for one row
without padding. Rotary embeddings are products of complex numbers.
"""

import numpy as np


def logits(config, tensors, inputs, targets):
  """(L, V) of one row's tokens, by a config.json and a folder's tensors."""
  model = _Model(config, {k: np.float64(v) for k, v in tensors.items()})
  encoded = model.stack("encoder", inputs)
  return model.stack("decoder", targets, encoded) @ model["lm_head"].T


def turned(x_LHD, positions_L, dims, base, interleaved, exponents_L=None):
  """The first `dims` of every head turned, in float64."""
  x = np.array(x_LHD, np.float64)
  share_P = np.arange(0, dims, 2) / dims
  angle_LP = positions_L[:, None] * base**-share_P
  factor_LP = np.exp(1j * angle_LP)
  if exponents_L is not None:
    factor_LP = factor_LP * ((share_P + 0.4) / 1.4) ** exponents_L[:, None]
  if interleaved:
    first, second = slice(0, dims, 2), slice(1, dims, 2)
  else:
    first, second = slice(0, dims // 2), slice(dims // 2, dims)
  pairs_LHP = (x[..., first] + 1j * x[..., second]) * factor_LP[:, None]
  x[..., first], x[..., second] = pairs_LHP.real, pairs_LHP.imag
  return x


class _Model:
  def __init__(self, config, tensors):
    self.config, self.tensors = config, tensors

  def __getitem__(self, name):
    return self.tensors[f"{name}.weight"]

  def stack(self, stack, tokens, encoded=None):
    x_LM = self["shared"][tokens]
    for i in range(
      self.config[f"num_{'decoder_' * (encoded is not None)}layers"]
    ):
      block = f"{stack}.block.{i}"
      for part in ("self", "cross")[: 1 + (encoded is not None)]:
        layer = f"{block}.{part}_attention_layer"
        h_LM = self.norm(f"{layer}.layer_norm", x_LM)
        memory = encoded if part == "cross" else h_LM
        x_LM = x_LM + self.attention(stack, layer, part, h_LM, memory)
      h_LM = self.norm(f"{block}.ff_layer.layer_norm", x_LM)
      x_LM = x_LM + self.feed_forward(f"{block}.ff_layer", h_LM)
    return self.norm(f"{stack}.final_layer_norm", x_LM)

  def norm(self, name, x_LM):
    variance = (x_LM**2).mean(axis=-1, keepdims=True)
    return x_LM / np.sqrt(variance + 1e-6) * self[name]

  def feed_forward(self, layer, h_LM):
    a = h_LM @ self[f"{layer}.act.wi_0"].T
    gelu = a * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3))) / 2
    return (gelu * (h_LM @ self[f"{layer}.act.wi_1"].T)) @ self[f"{layer}.wo"].T

  def attention(self, stack, layer, part, x_QM, memory_KM):
    config, name = self.config, f"{layer}.{part}_attention"
    heads = lambda x, w: (x @ self[f"{name}.{w}"].T).reshape(
      len(x), config["num_heads"], -1
    )
    q, k, v = heads(x_QM, "Wq"), heads(memory_KM, "Wk"), heads(memory_KM, "Wv")
    if config["position_encoding_type"] == "RoPE":
      q, k, v = self.rotary(q, 1), self.rotary(k, -1), self.rotary(v, -1)
    s_HQK = np.einsum("qhd,khd->hqk", q, k) * config["attention_scale"]
    if part == "self":
      s_HQK = s_HQK + self.bias(stack, len(q), len(k))
      if stack == "decoder":
        s_HQK = np.where(np.tri(len(q), len(k)) > 0, s_HQK, -np.inf)
    e_HQK = np.exp(s_HQK - s_HQK.max(axis=-1, keepdims=True))
    p_HQK = e_HQK / e_HQK.sum(axis=-1, keepdims=True)
    o_QI = np.einsum("hqk,khd->qhd", p_HQK, v).reshape(len(q), -1)
    return o_QI @ self[f"{name}.o"].T

  def rotary(self, x_LHD, sign):
    config, positions_L = self.config, np.arange(len(x_LHD))
    exponents_L = None
    if config["rotary_scale_base"] is not None:
      centred_L = positions_L - config["max_sequence_length"] // 2
      exponents_L = sign * centred_L / config["rotary_scale_base"]
    return turned(
      x_LHD,
      positions_L,
      int(config["d_kv"] * config["rotary_emb_fraction"]),
      config["rotary_base"],
      config["rotary_interleaved"],
      exponents_L,
    )

  def bias(self, stack, queries, keys):
    config, heads = self.config, self.config["num_heads"]
    back_QK = np.arange(queries)[:, None] - np.arange(keys)
    if config["position_encoding_type"] == "RoPE":
      return 0.0
    if config["position_encoding_type"] == "ALiBi":
      # The asymmetric mode, two heads.
      bias = -(2.0**-8) * np.abs(back_QK) * np.ones((heads, 1, 1))
      bias[0, back_QK < 0] = bias[1, back_QK > 0] = -np.inf
      return bias
    own = f"{stack}.block.0.self_attention_layer.self_attention.pe_encoding"
    get = lambda name: self.tensors[f"{own}.{name}"]
    threshold = abs(get("L_multiplier") * get("init_L"))
    log = lambda x: np.log(np.abs(get("c") * x) + 1)
    normaliser_Q = log(np.maximum(np.arange(queries), threshold)) + 1e-6
    part_QK = np.sign(back_QK) * log(back_QK) / normaliser_Q[:, None]
    hidden = part_QK[..., None] * get("mlp.0.weight")[:, 0] + get("mlp.0.bias")
    bias = np.maximum(hidden, 0) @ get("mlp.2.weight").T + get("mlp.2.bias")
    return np.moveaxis(bias, -1, 0)
