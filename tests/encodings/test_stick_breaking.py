"""Stick-breaking against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims, masked

DIMS = Dims(32, 4, 4, 8, 32)
MASK = jnp.tril(jnp.ones((9, 9), bool))


def weights(logits, mask=MASK):
    return encodings.build("stick_breaking", DIMS, nnx.Rngs(0)).weights(masked(logits, mask), mask)


def logits(scale):
    return scale * jax.random.normal(jax.random.key(0), (2, 4, 9, 9))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_weights_are_breaks_of_a_stick_and_its_rest(scale):
    z, found = np.asarray(logits(scale), np.float64), weights(logits(scale))
    expected = np.zeros_like(z)
    for i in range(9):
        left = np.ones((2, 4))
        for j in range(i - 1, -1, -1):
            share = 1 / (1 + np.exp(-z[..., i, j]))
            expected[..., i, j] = share * left
            left = left * (1 - share)
        expected[..., i, i] = left
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_weights_of_the_last_queries_are_those_of_all():
    np.testing.assert_allclose(weights(logits(1.0)[:, :, -3:], MASK[-3:]), weights(logits(1.0))[:, :, -3:], atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_weights_sum_to_one_with_finite_gradients(scale):
    found = weights(logits(scale))
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    assert (found >= 0).all()
    assert jnp.isfinite(jax.grad(lambda z: (weights(z) ** 2).sum())(logits(scale))).all()
