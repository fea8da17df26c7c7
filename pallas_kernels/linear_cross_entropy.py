"""Cross-entropy of a linear projection, whose logits never exist whole.

A chunk of tokens at a time: logits, loss and, in the same pass, the gradients
of the inputs and the kernel; three matrix products and no recomputation (the
scheme of Liger Kernel, arXiv:2410.10989). Plain XLA: what a kernel could save
is the traffic of the chunk's logits, and it would have to match XLA's matrix
products to do so (README.md has the figures).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.bfloat16_product import laid_out, sum_of_rows
from pallas_kernels.manual_axes import vary_together

# float32 logits of one chunk take at most this many bytes.
_CHUNK_BYTES = 2**27


class LossSums(NamedTuple):
  """Sums over tokens, float32 scalars; `loss` alone has a gradient.

  Attributes:
    loss: cross_entropy + z_loss.
    cross_entropy: weighted, with label smoothing.
    z_loss: weighted, times its coefficient.
    unweighted: cross_entropy with every weight that is not 0 as 1.
    correct: tokens of weight not 0 whose greatest logit is the target.
  """

  loss: jax.Array
  cross_entropy: jax.Array
  z_loss: jax.Array
  unweighted: jax.Array
  correct: jax.Array


def linear_cross_entropy(
  x_NM: jax.Array,
  kernel_MV: jax.Array,
  targets_N: jax.Array,
  weights_N: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
  chunk: int | None = None,
  vocab_axis: str | None = None,
) -> LossSums:
  """Sums of `weights * cross_entropy(x @ kernel, targets)` over tokens.

  Label smoothing is T5X's: probability `label_smoothing` spread over the other
  V - 1 tokens, less the entropy of that distribution, so a perfect prediction
  costs 0. z-loss is `z_loss * log(Z)^2` (Mesh TensorFlow).

  Differentiable in x and the kernel, through `loss`.

  Args:
    x_NM: (N, M) hidden states, any float type; products are in it, sums in
      float32.
    kernel_MV: (M, V), cast to x's type.
    targets_N: token ids, clipped into the vocabulary.
    weights_N: 0 leaves a token out, whatever its logits; None is all ones.
    z_loss: coefficient.
    label_smoothing: in [0, 1).
    chunk: tokens at a time; None keeps a chunk's logits at 128 MiB.
    vocab_axis: under shard_map, the mesh axis over which V is sharded: the
      kernel is this shard's columns, targets count over all of them.

  Returns:
    LossSums.

  Raises:
    ValueError: if shapes do not fit together.
  """
  tokens, width = x_NM.shape
  if kernel_MV.shape[0] != width or targets_N.shape != (tokens,):
    raise ValueError(
      f"linear_cross_entropy: x_NM {x_NM.shape}, kernel_MV {kernel_MV.shape} "
      f"and targets_N {targets_N.shape} do not fit together"
    )
  if weights_N is None:
    weights_N = jnp.ones((tokens,), jnp.float32)
  vocab = kernel_MV.shape[1]
  if chunk is None:
    chunk = max(8, _CHUNK_BYTES // (4 * vocab) // 8 * 8)
  chunk = min(chunk, tokens)
  missing = -tokens % chunk
  x_NM = jnp.pad(x_NM, ((0, missing), (0, 0)))
  targets_N = jnp.pad(targets_N, (0, missing))
  weights_N = jnp.pad(weights_N.astype(jnp.float32), (0, missing))
  operands = vary_together((x_NM, kernel_MV, targets_N, weights_N))
  settings = (z_loss, label_smoothing, chunk, vocab_axis)
  sums = _sums(settings, *operands)
  if vocab_axis is not None:
    # Every shard has the whole sum; this makes it one that they share.
    size = lax.axis_size(vocab_axis)
    sums = [lax.psum(x / size, vocab_axis) for x in sums]
  loss, *statistics = sums
  return LossSums(loss, *map(lax.stop_gradient, statistics))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(settings, x_NM, kernel_MV, targets_N, weights_N):
  sums, _ = _run(settings, x_NM, kernel_MV, targets_N, weights_N, False)
  return sums


def _forward(settings, x_NM, kernel_MV, targets_N, weights_N):
  return _run(settings, x_NM, kernel_MV, targets_N, weights_N, True)


def _backward(settings, residuals, cotangents):
  dx_NM, dkernel_MV, dtypes = residuals
  # Of `loss`; the public function stops the gradients of the others.
  scale, axis = cotangents[0], settings[3]
  if axis is not None:
    # A shard's kernel moves the sums of all shards.
    scale = lax.psum(scale, axis)
  return (
    (dx_NM * scale).astype(dtypes[0].dtype),
    (dkernel_MV * scale).astype(dtypes[1].dtype),
    None,
    None,
  )


_sums.defvjp(_forward, _backward)


def _run(settings, x_NM, kernel_MV, targets_N, weights_N, need_gradient):
  """(sums, (dx, dkernel, dtypes)); one pass over chunks of tokens."""
  z_loss, smoothing, chunk, axis = settings
  width, columns = kernel_MV.shape
  kernel = laid_out(kernel_MV.astype(x_NM.dtype))
  first, vocab = 0, columns
  if axis is not None:
    first = lax.axis_index(axis) * columns
    vocab = columns * lax.axis_size(axis)
  total = (lambda x: lax.psum(x, axis)) if axis else (lambda x: x)
  low = smoothing / (vocab - 1)
  entropy = 0.0
  if smoothing:
    confidence = 1.0 - smoothing
    entropy = -(
      confidence * jnp.log(confidence)
      + (vocab - 1) * low * jnp.log(low + 1e-20)
    )
  # loss = log Z - on * target logit - low * (sum of logits) - entropy.
  on = 1.0 - smoothing - low
  precision = (
    lax.Precision.HIGHEST
    if x_NM.dtype == jnp.float32
    else lax.Precision.DEFAULT
  )
  dot = functools.partial(
    lax.dot_general, precision=precision, preferred_element_type=jnp.float32
  )

  def one_chunk(carry, part):
    sums, dkernel = carry
    x_CM, target_C, weight_C = part
    logits_CV = dot(x_CM, kernel, (((1,), (0,)), ((), ())))
    target_C = jnp.clip(target_C, 0, vocab - 1) - first
    is_target_CV = target_C[:, None] == jnp.arange(columns)
    top_C = logits_CV.max(axis=1)
    if axis:
      top_C = lax.pmax(top_C, axis)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    log_z_C = top_C + jnp.log(total(exp_CV.sum(axis=1)))
    target_logit_C = total(jnp.where(is_target_CV, logits_CV, 0).sum(axis=1))
    loss_C = log_z_C - on * target_logit_C
    if smoothing:
      loss_C -= low * total(logits_CV.sum(axis=1)) + entropy
    real_C = weight_C != 0
    weighted = lambda x: jnp.sum(jnp.where(real_C, x, 0.0))
    # The first of equal maxima counts. XLA's CPU argmax takes longer than all
    # of this.
    is_before_CV = jnp.arange(columns) < target_C[:, None]
    beaten_CV = is_before_CV & (logits_CV == top_C[:, None])
    beaten_C = total(beaten_CV.any(axis=1).astype(jnp.int32)) > 0
    correct_C = (target_logit_C == top_C) & ~beaten_C
    z_C = z_loss * jnp.square(log_z_C)
    new = (
      weighted((loss_C + z_C) * weight_C),
      weighted(loss_C * weight_C),
      weighted(z_C * weight_C),
      weighted(loss_C),
      weighted(correct_C.astype(jnp.float32)),
    )
    sums = tuple(a + b for a, b in zip(sums, new))
    if not need_gradient:
      return (sums, dkernel), None
    p_CV = jnp.exp(logits_CV - log_z_C[:, None])
    dlogits_CV = p_CV * (1.0 + 2.0 * z_loss * log_z_C[:, None])
    dlogits_CV -= jnp.where(is_target_CV, on + low, low)
    dlogits_CV = jnp.where(
      real_C[:, None], dlogits_CV * weight_C[:, None], 0.0
    ).astype(x_CM.dtype)
    # A token that is left out may hold anything, and 0 * NaN is NaN.
    x_CM = jnp.where(real_C[:, None], x_CM, 0)
    dkernel += sum_of_rows(x_CM, dlogits_CV, precision)
    # Of this shard's columns; whoever shares x sums over shards.
    dx_CM = dot(dlogits_CV, kernel, (((1,), (1,)), ((), ())))
    return (sums, dkernel), dx_CM.astype(x_CM.dtype)

  parts = jax.tree.map(
    lambda x: x.reshape(-1, chunk, *x.shape[1:]), (x_NM, targets_N, weights_N)
  )
  zero = jnp.zeros((), jnp.float32)
  dkernel = jnp.zeros((width, columns), jnp.float32) if need_gradient else None
  start = vary_together(((zero,) * 5, dkernel), like=parts)
  if parts[0].shape[0] == 1:
    (sums, dkernel), dx = one_chunk(start, jax.tree.map(lambda x: x[0], parts))
  else:
    (sums, dkernel), dx = lax.scan(one_chunk, start, parts)
  if not need_gradient:
    return sums, None
  dtypes = tuple(jnp.zeros((0,), x.dtype) for x in (x_NM, kernel_MV))
  return sums, (dx.reshape(x_NM.shape), dkernel, dtypes)
