"""Attention logits and entropies, against NumPy, closed forms, and attention that computes all logits at once."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from posenc_jax.attention.dense import attention_logits, dense
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.evaluation import attention_stats
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import abstract_model, build_model
from tests.encodings.test_contract import one_of_each_kind, perturbed
from tests.small import run_config, split, tokens, transformer


def layers(model, text, *others):
    graphdef, params, constants = split(model)
    return np.asarray(_layers(graphdef, params, constants, text, *others), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _layers(graphdef, params, constants, *arguments):
    return attention_stats.layers(nnx.merge(graphdef, params, constants), *arguments)


def in_numpy(params, text, name):
    """The largest logit and mean entropy of each layer, for one window and a small transformer with RoPE or ALiBi."""

    def normed(x, own):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * own["scale"]

    def heads(x, own):
        return (x @ own["kernel"]).reshape(len(x), 4, 8)

    def rotated(x):
        waves = np.exp(1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(4) / 4))[:, None]
        pairs = (x[..., :4] + 1j * x[..., 4:]) * waves
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    T, x, found = len(text), params["embedding"][text] * math.sqrt(32), []
    distance = np.arange(T)[:, None] - np.arange(T)
    bias = -(4.0 ** -np.arange(1, 5))[:, None, None] * distance if name == "alibi" else 0
    for own in (params["block_0"], params["block_1"]):
        h, attention = normed(x, own["attention_norm"]), own["attention"]
        q, k, v = (heads(h, attention[letter]) for letter in "qkv")
        q, k = (rotated(q), rotated(k)) if name == "rope" else (q, k)
        z = np.where(distance >= 0, np.einsum("thd,shd->hts", q, k) / math.sqrt(8) + bias, -np.inf)
        weights = np.exp(z - z.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        found.append([z.max(), -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).mean()])
        x = x + np.einsum("hts,shd->thd", weights, v).reshape(T, 32) @ attention["out"]["kernel"]
        h, forward = normed(x, own["feed_forward_norm"]), own["feed_forward"]
        gate = h @ forward["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ forward["up"]["kernel"])) @ forward["down"]["kernel"]
    return np.array(found)


@pytest.mark.parametrize("name", ["rope", "alibi"])
def test_largest_logits_and_entropies_equal_those_computed_in_numpy(name):
    model, text = perturbed(transformer(name)), np.asarray(tokens(length=41))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])
    expected = np.stack([in_numpy(params, row[:-1], name) for row in text], axis=1)
    np.testing.assert_allclose(layers(model, text), expected, rtol=1e-4)


def still(model):
    """The model with all queries set to zero."""
    for layer in range(model.num_layers):
        kernel = model.block(layer).attention.q.kernel
        kernel[...] = jnp.zeros_like(kernel[...])
    return model


@pytest.mark.parametrize("window", [0, 40])
def test_uniform_attention_has_the_entropy_of_the_number_of_keys_seen(window):
    """The number of queries is larger than a block, and not a multiple of it."""
    found = layers(still(transformer("none", max_length=300, window=window)), tokens(1, 301))
    seen = np.minimum(np.arange(1, 301), window or 300)
    np.testing.assert_allclose(found, np.broadcast_to([0, np.log(seen).mean()], (2, 1, 2)), rtol=1e-5)


def test_of_an_encoder_every_key_counts():
    found = layers(still(transformer("none", causal=False, max_length=150)), tokens(1, 151))
    np.testing.assert_allclose(found, np.broadcast_to([0, math.log(150)], (2, 1, 2)), rtol=1e-5)


def test_entropy_is_of_the_weights_that_an_encoding_makes_of_logits():
    """With logits of 0, stick-breaking gives each key half of the rest, and the remainder to the query's own key."""
    found = layers(still(transformer("stick_breaking")), tokens(1, 33))
    expected = (math.log(2) * (2 - 2.0 ** (1 - np.arange(32)))).mean()
    np.testing.assert_allclose(found, np.broadcast_to([0, expected], (2, 1, 2)), rtol=1e-5)


@one_of_each_kind
def test_finite_and_equal_to_those_of_all_logits_at_once(name):
    """The second of the two layers has no encoding."""
    graphdef, params, constants = split(perturbed(transformer(name, pattern="EN")))
    text = tokens(length=33)

    @jax.jit
    def both(params, constants):
        model, found = nnx.merge(graphdef, params, constants), []

        def attend(encoding, *others):
            logits, mask = attention_logits(encoding, *others)
            weights = encoding.weights(logits, mask)
            entropy = -jnp.where(weights > 0, weights * jnp.log(weights), 0).sum(axis=-1)
            found.append(jnp.stack([jnp.where(mask, logits, -1e30).max(axis=(1, 2, 3)), entropy.mean(axis=(1, 2))], -1))
            return dense(encoding, *others)

        for layer in range(2):
            model.block(layer).attention.attend = attend
        token_losses(model, text)
        return attention_stats.layers(nnx.merge(graphdef, params, constants), text), jnp.stack(found)

    found, expected = both(params, constants)
    assert jnp.isfinite(found).all()
    assert (found[..., 1] > 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def watched(devices, encoding="rope", **changes):
    config = run_config(encoding, **changes)
    mesh = sharding.make_mesh(devices, jax.devices()[:devices])
    arrays = jax.jit(lambda seed: split(build_model(config, seed))[1:])(jnp.zeros((), jnp.uint32))
    return attention_stats.AttentionStats(abstract_model(config)[0], mesh), config, *sharding.replicate(arrays, mesh)


WINDOWS = np.random.default_rng(0).integers(0, 256, (7, 33), dtype=np.int32)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_few_windows_are_read_however_many_devices_share_them(devices):
    own, config, params, constants = watched(devices, model__remat=True)
    found = own(config, params, constants, WINDOWS)
    expected = layers(nnx.merge(own.graphdef, params, constants), WINDOWS[[0, 2, 4, 6]])
    np.testing.assert_allclose(found["attention_logit_max"], expected[..., 0].max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["attention_entropy"], expected[..., 1].mean(axis=1), rtol=1e-5)


def test_what_is_not_finite_is_given_and_told(caplog):
    own, config, params, constants = watched(1, model__remat=True)
    kernel = params["block_1"]["attention"]["q"]["kernel"]
    broken = {**params, "block_1": jax.tree.map(lambda x: x * jnp.nan if x is kernel else x, params["block_1"])}
    with caplog.at_level(logging.WARNING):
        found = own(config, broken, constants, WINDOWS)
    assert np.isnan([found["attention_logit_max"][1], found["attention_entropy"][1]]).all()
    assert np.isfinite([found["attention_logit_max"][0], found["attention_entropy"][0]]).all()
    assert [record.getMessage() for record in caplog.records] == [
        "attention_logit_max of layer 1 is nan",
        "attention_entropy of layer 1 is nan",
    ]


def test_a_recurrent_model_has_nothing_to_watch():
    config = RunConfig.from_mapping(recurrent.get_config("size=smoke,cell=gru").to_dict())
    arrays = split(build_model(config, jnp.zeros((), jnp.uint32)))[1:]
    own = attention_stats.AttentionStats(abstract_model(config)[0], sharding.make_mesh(1, jax.devices()[:1]))
    assert own(config, *arrays, WINDOWS) == {}
