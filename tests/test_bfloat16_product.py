"""Products of bfloat16 on a CPU: right, and of the forms that are fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bfloat16_product

SHAPE = 70, 33, 41
ROUNDED = 2.0**-8  # What bfloat16 moves a number by, at most, of it.


def operands(scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  n, m, f = SHAPE
  x, kernel, dy = (
    jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)
    for shape in ((n, m), (m, f), (n, f))
  )
  return x, kernel, dy


def exact(*arrays):
  """x @ kernel and its gradients, float64."""
  x, kernel, dy = (np.asarray(a, np.float64) for a in arrays)
  return x @ kernel, dy @ kernel.T, x.T @ dy


def ours(x, kernel, dy, output=jnp.bfloat16):
  product = lambda x, k: bfloat16_product.matmul(x, k, output)
  y, back = jax.vjp(product, x, kernel)
  return (y, *back(dy.astype(output)))


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("output", [jnp.bfloat16, jnp.float32])
def test_a_product_and_its_gradients_are_rounded_once(output, scale):
  found = ours(*operands(scale), output)
  # Sums of float32 products of bfloat16 numbers, which are exact.
  sizes = exact(*map(jnp.abs, operands(scale)))
  for name, a, b, size in zip(
    ("y", "dx", "dk"), found, exact(*operands(scale)), sizes
  ):
    inside = 2.0**-24 * max(SHAPE) * size
    whole = name == "y" and output == jnp.float32
    bound = inside + (0 if whole else ROUNDED * np.abs(b))
    assert a.dtype == (jnp.float32 if whole else jnp.bfloat16)
    assert (np.abs(np.asarray(a, np.float64) - b) <= bound).all(), name


def test_a_float32_gradient_of_the_result_is_rounded_first():
  x, kernel, _ = operands()
  dy = jnp.asarray(
    np.random.default_rng(1).normal(size=SHAPE[::2]), jnp.float32
  )
  _, back = jax.vjp(
    lambda x, k: bfloat16_product.matmul(x, k, jnp.float32), x, kernel
  )
  rounded = dy.astype(jnp.bfloat16)
  for a, b in zip(back(dy), ours(x, kernel, rounded)[1:]):
    np.testing.assert_array_equal(a, b)


def test_no_product_of_a_training_step_is_of_float32():
  """Operands are bfloat16, the left one contracted in its last axis."""

  def loss(x, kernel):
    y = bfloat16_product.matmul(x, kernel, jnp.bfloat16)
    return jnp.sum(y.astype(jnp.float32) ** 2)

  text = jax.jit(jax.grad(loss, (0, 1))).lower(*operands()[:2]).as_text()
  products = re.findall(
    r"dot_general .*contracting_dims = \[(\d)\].* : \(tensor<\w+x(\w+)>,"
    r" tensor<\w+x(\w+)>\) -> tensor<\w+x(\w+)>",
    text,
  )
  assert len(products) == text.count("stablehlo.dot_general") == 3
  assert set(products) == {("1", "bf16", "bf16", "f32")}


def test_float32_is_left_as_it_is():
  x, kernel, _ = (a.astype(jnp.float32) for a in operands())
  a = jax.jit(lambda: bfloat16_product.matmul(x, kernel, jnp.float32))()
  np.testing.assert_array_equal(a, jax.jit(lambda: x @ kernel)())


@pytest.mark.parametrize("how", ["vmap", "scan", "checkpoint"])
def test_it_is_transformed_as_any_product(how):
  x, kernel, _ = operands()
  square = kernel[:, : SHAPE[1]]
  one = lambda x, k: bfloat16_product.matmul(x, k, jnp.bfloat16)

  def once(product, x, k):
    if how == "vmap":
      return jax.vmap(product, (0, None))(jnp.stack([x, -x]), k)[0]
    if how == "checkpoint":
      return jax.checkpoint(product)(x, k)
    return jax.lax.scan(lambda c, _: (product(c, k), None), x, length=1)[0]

  def gradient(product):
    loss = lambda x, k: once(product, x, k).astype(jnp.float32).sum()
    return jax.jit(jax.grad(loss, (0, 1)))(x, square)

  plain = jax.grad(lambda *xk: one(*xk).astype(jnp.float32).sum(), (0, 1))
  for a, b in zip(gradient(one), plain(x, square)):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2 * ROUNDED
    )
