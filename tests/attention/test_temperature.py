"""Attention temperatures against their formulas, through the whole layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import TemperatureConfig
from posenc_jax.encodings.base import masked
from tests.encodings.test_contract import attention_inputs, perturbed
from tests.small import DIMS


def temperature(form, scale=0.1, floor=8):
    return Temperature(TemperatureConfig(form, scale, floor, "EN"), num_heads=3, max_length=64)


def queries(dtype="float32"):
    return jax.random.normal(jax.random.key(0), (2, 20, 3, 4), dtype)


@pytest.mark.parametrize("window", [None, 5])
def test_ssmax_multiplies_by_the_logarithm_of_the_keys_seen(window):
    module = temperature("ssmax")
    module.s[...] = jnp.asarray([0.5, 1.0, 2.0])
    scaled = module(queries(), jnp.arange(20)[None] + 7, window)
    for t in (0, 3, 19):
        for h, s in enumerate((0.5, 1.0, 2.0)):
            factor = s * np.log(min(t + 1, window or 20))
            np.testing.assert_allclose(scaled[:, t, h], queries()[:, t, h] * factor, rtol=1e-5, atol=1e-6)


def test_ssmax_begins_as_plain_attention_at_the_training_length():
    assert temperature("ssmax").s[...] * np.log(64) == pytest.approx(np.ones(3), rel=1e-6)


@pytest.mark.parametrize(("scale", "floor"), [(0.1, 8), (0.5, 3)])
def test_llama4_grows_with_every_floor_of_positions(scale, floor):
    scaled = temperature("llama4", scale, floor)(queries(), jnp.arange(20)[None] + 30, None)
    for t in (0, 3, 19):
        factor = scale * np.log((t + 30 + 1) // floor + 1) + 1
        np.testing.assert_allclose(scaled[:, t], queries()[:, t] * factor, rtol=1e-5)


@pytest.mark.parametrize(("window", "seen"), [(None, 120), (80, 80), (8, 8)])
def test_logn_grows_with_the_keys_seen_past_the_training_length(window, seen):
    """Qwen's table: math.log(i, seq_length) if i > seq_length else 1, for i = 1, 2, 3 .. keys."""
    q = jnp.ones((1, 20, 3, 4))
    scaled = temperature("logn")(q, jnp.arange(20)[None], window, earlier=100)
    expected = [math.log(n, 64) if n > 64 else 1 for n in np.minimum(np.arange(101, 121), seen)]
    np.testing.assert_allclose(scaled[0, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", encodings.names())
def test_biases_made_of_the_query_or_of_logits_are_scaled_and_no_others(name):
    encoding = perturbed(encodings.build(name, DIMS, nnx.Rngs(3)))
    x, q, k, _ = attention_inputs()
    places, seen = jnp.arange(32)[None], jnp.tri(32, dtype=bool)
    ctx = encoding.prepare(x, places)
    q, k = encoding.rotate(q, k, places, places, ctx)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)

    def bias(q):
        logits = masked(encoding.scores(q, k, ctx), seen)
        found = encoding.bias(q, k, logits, places, places, ctx)
        return jnp.zeros(()) if found is None else jnp.where(seen, found, 0)

    plain, scaled = bias(q), bias(2 * q)
    if name == "shaw":
        np.testing.assert_allclose(scaled, 2 * plain, atol=1e-5)
    elif name in ("cope", "dape", "dape_v2", "deberta"):
        assert jnp.abs(scaled - plain).max() > 1e-3
    else:
        np.testing.assert_array_equal(scaled, plain)


@pytest.mark.parametrize("form", ["ssmax", "llama4", "logn"])
def test_queries_keep_their_dtype(form):
    assert temperature(form)(queries("bfloat16"), jnp.arange(20)[None], None).dtype == jnp.bfloat16
