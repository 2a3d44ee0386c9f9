"""Cached decoding equals the full forward pass, for every encoding and kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.encodings.test_contract import forms, perturbed
from tests.small import split, tokens, transformer

FIRST, CHUNK, STEPS = 9, 4, 5
TEXT = tokens(length=FIRST + CHUNK + STEPS)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(graphdef, params, constants, text, positions=None):
    """Logits of the whole text, and those of its first tokens, a chunk and single tokens with a cache."""
    model = nnx.merge(graphdef, params, constants)
    whole, x = model(text, None if positions is None else positions[..., : text.shape[1]]), model.embed(text)
    cache = model.new_cache(capacity=text.shape[1] + 7)
    first, chunk = (
        model.states(x[:, own], positions, cache=cache) for own in (slice(FIRST), slice(FIRST, FIRST + CHUNK))
    )

    def step(cache, x):
        cache = [layer.grown(text.shape[1] + 7) for layer in cache]
        return cache, model.states(x[:, None], positions, cache=cache)[:, 0]

    _, singles = jax.lax.scan(step, cache, x[:, FIRST + CHUNK :].swapaxes(0, 1))
    return whole, model.unembed(jnp.concatenate([first, chunk, singles.swapaxes(0, 1)], axis=1))


def assert_decodes(model, positions=None, atol=1e-4):
    whole, decoded = both_ways(*split(model), TEXT, positions)
    np.testing.assert_allclose(decoded, whole, atol=atol)


@pytest.mark.parametrize(("name", "hyperparameters"), list(forms()))
def test_every_form(name, hyperparameters):
    model = perturbed(transformer(name, num_layers=1, num_kv_heads=2, hyperparameters=hyperparameters))
    assert_decodes(model)
