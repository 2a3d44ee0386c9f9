"""Temperatures against their formulas, through the whole layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import TemperatureConfig


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


@pytest.mark.parametrize("form", ["ssmax", "llama4"])
def test_queries_keep_their_dtype(form):
    assert temperature(form)(queries("bfloat16"), jnp.arange(20)[None], None).dtype == jnp.bfloat16
