"""The largest of many numbers are those of numpy's stable sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from fat5_jax.inference.search import top


def largest(x, count):
  places = np.argsort(-x, axis=1, kind="stable")[:, :count]
  return np.take_along_axis(x, places, 1), places


@pytest.mark.parametrize("columns", [1, 5, 128, 129, 1000, 32128])
@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("kind", ["any", "few values", "few finite"])
def test_the_largest_are_those_of_a_stable_sort(columns, count, kind):
  rng = np.random.default_rng(columns)
  count = min(count, columns)
  x = rng.normal(size=(7, columns)).astype(np.float32)
  if kind == "few values":
    x = np.round(x) + 0.0  # No zero below zero.
  if kind == "few finite":
    x[rng.random(x.shape) < 0.99] = -np.inf
  values, places = top.top_k(jnp.asarray(x), count)
  expected = largest(x, count)
  np.testing.assert_array_equal(values, expected[0])
  np.testing.assert_array_equal(places, expected[1])
  if count == 1:
    np.testing.assert_array_equal(top.argmax(jnp.asarray(x)), x.argmax(1))
