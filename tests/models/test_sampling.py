"""Choosing tokens: the temperature, the nucleus and the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.models.sampling import Sampling, nucleus

LOGITS = 2 * jax.random.normal(jax.random.key(0), (3, 50))
KEYS = jax.random.split(jax.random.key(1), 3)


def sorted_nucleus(logits, top_p):
    """The nucleus by sorting, with NumPy in float64."""
    kept = np.zeros(logits.shape, bool)
    for row, own in zip(np.asarray(logits, np.float64), kept, strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-probabilities)
        count = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
        own[order[:count]] = True
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_holds_the_fewest_tokens_with_the_probability(top_p):
    np.testing.assert_array_equal(nucleus(LOGITS, top_p), sorted_nucleus(LOGITS, top_p))


def test_nucleus_keeps_ties_and_tokens_of_one_distribution():
    np.testing.assert_array_equal(nucleus(jnp.zeros((1, 8)), 0.3), np.ones((1, 8), bool))
    np.testing.assert_array_equal(nucleus(jnp.array([[0.0, 100.0, 0.0]]), 0.999), [[False, True, False]])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3])
def test_temperature_zero_and_near_it_choose_the_most_likely_token(temperature):
    found = Sampling(temperature)(LOGITS, KEYS)
    np.testing.assert_array_equal(found, np.argmax(LOGITS, axis=-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_tokens_have_the_frequencies_of_the_distribution(temperature, top_p):
    logits = jnp.array([[1.0, 0.0, -1.0, 2.0]])
    kept = sorted_nucleus(logits / temperature, top_p)
    expected = np.where(kept, np.exp(np.asarray(logits) / temperature), 0)[0]
    draws = jax.random.split(jax.random.key(2), 20_000)
    found = Sampling(temperature, top_p)(jnp.tile(logits, (len(draws), 1)), draws)
    np.testing.assert_allclose(np.bincount(found, minlength=4) / len(draws), expected / expected.sum(), atol=0.015)


def test_each_row_is_drawn_with_its_own_key():
    logits = jnp.zeros((3, 1000))
    together = Sampling(1.0)(logits, KEYS)
    assert len(set(together.tolist())) == 3
    np.testing.assert_array_equal(Sampling(1.0)(logits[:1], KEYS[1:2]), together[1:2])
