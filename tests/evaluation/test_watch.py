"""What is told of attention, against closed forms and attention computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import recurrent
from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.evaluation.watch import AttentionWatch, statistics
from posenc_jax.models.recurrent import Recurrent
from posenc_jax.training import sharding
from posenc_jax.training.step import build_model
from tests.small import split, tokens, transformer

LENGTH = 32


def without_queries(encoding, **changes):
    """A model all of whose queries are zero, so that its logits are the bias alone."""
    graphdef, params, constants = split(transformer(encoding, **changes))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if "'q'" in jax.tree_util.keystr(path) else x, params
    )
    return graphdef, params, constants


def entropies(logits):
    """Of causal softmax over numpy logits [..., T, T], the mean over rows."""
    rows = []
    for i in range(logits.shape[-1]):
        p = np.exp(logits[..., i, : i + 1] - logits[..., i, : i + 1].max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        rows.append(-(p * np.log(np.maximum(p, 1e-300))).sum(-1))
    return np.mean(rows)


def test_equal_logits_spread_over_all_tokens_seen():
    largest, entropy = statistics(*without_queries("none"), tokens(length=LENGTH))
    np.testing.assert_allclose(largest, 0, atol=1e-6)
    np.testing.assert_allclose(entropy, np.mean(np.log(np.arange(1, LENGTH + 1))), rtol=1e-5)


def test_a_window_is_seen():
    _, entropy = statistics(*without_queries("none", window=4), tokens(length=LENGTH))
    np.testing.assert_allclose(entropy, np.mean(np.log(np.minimum(np.arange(1, LENGTH + 1), 4))), rtol=1e-5)


def test_the_bias_is_in_the_logits():
    largest, entropy = statistics(*without_queries("alibi"), tokens(length=LENGTH))
    slopes = 2.0 ** -np.array([2, 4, 6, 8])
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    np.testing.assert_allclose(largest, 0, atol=1e-6)
    np.testing.assert_allclose(entropy, entropies(-slopes[:, None, None] * distance), rtol=1e-5)


@pytest.mark.parametrize("encoding", ["rope", "kerple"])
def test_the_first_layer_is_as_computed_by_hand(encoding):
    model, read = transformer(encoding), tokens(length=LENGTH)
    largest, entropy = statistics(*split(model), read)
    places, block = jnp.arange(LENGTH)[None], model.block(0)
    q, k, _ = block.attention.project(block.attention_norm(model.embed(read)))
    q, k = model.encoding().rotate(q, k, places, places, (None, None))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    bias = model.encoding().bias(q, k, logits, places, places, (None, None))
    logits = np.asarray(logits if bias is None else logits + bias, np.float64)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    np.testing.assert_allclose(largest[0], logits[..., seen].max(), rtol=1e-4)
    np.testing.assert_allclose(entropy[0], entropies(logits), rtol=1e-4)


@pytest.mark.parametrize("name", encodings.names())
def test_every_encoding_is_watched_in_every_layer(name):
    found = jax.jit(statistics, static_argnums=0)(*split(transformer(name, pattern="EN", remat=True)), tokens())
    assert found.shape == (2, 2)
    assert np.isfinite(found).all()
    assert (found[1] >= 0).all()
    assert (found[1] <= math.log(32)).all()


def test_what_is_no_number_is_told_as_such():
    graphdef, params, constants = split(transformer("rope"))
    params["block_1"]["attention"]["q"]["kernel"] = params["block_1"]["attention"]["q"]["kernel"] * jnp.nan
    largest, entropy = statistics(graphdef, params, constants, tokens())
    assert np.isfinite([largest[0], entropy[0]]).all()
    assert np.isnan([largest[1], entropy[1]]).all()


@pytest.mark.parametrize("devices", [1, 8])
def test_layers_have_names_and_devices_a_window_each(devices):
    mesh = sharding.make_mesh(8, jax.devices()[:devices])
    graphdef, params, constants = split(transformer("t5"))
    windows = np.asarray(tokens(batch=3, length=LENGTH + 1))
    found = AttentionWatch(graphdef, mesh)(params, constants, windows)
    names = [f"attention_{name}/layer_{i}" for name in ("logit_max", "entropy") for i in range(2)]
    assert list(found) == names
    read = jnp.asarray(np.resize(windows, (devices, LENGTH + 1))[:, :-1])
    expected = statistics(graphdef, params, constants, read)
    np.testing.assert_allclose(list(found.values()), expected.ravel(), rtol=1e-5)


def test_there_is_nothing_to_tell_of_a_model_without_attention():
    config = RunConfig.from_mapping(recurrent.get_config("cell=gru,size=smoke").to_dict())
    model = build_model(config, jnp.zeros((), jnp.uint32))
    assert isinstance(model, Recurrent)
    graphdef, params, constants = split(model)
    assert AttentionWatch(graphdef, sharding.make_mesh(8))(params, constants, np.zeros((8, 33), np.int32)) == {}
