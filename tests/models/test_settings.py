"""Settings that published models need: each changes what it says, and nothing at its default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax.attention import dispatch
from posenc_jax.attention.canon import Canon
from posenc_jax.attention.dense import dense
from posenc_jax.encodings.base import AttentionMask
from posenc_jax.schema import ConfigError
from tests.small import run_config, transformer

TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 64)


def states(model, layer, x):
    """The output of one block, with the encoding and mask of its layer."""
    mask = AttentionMask(True, model.windows[layer] or None, True)
    return model.block(layer)(model.encoding(layer), x, jnp.arange(x.shape[1])[None], mask, None)


def hidden(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 12, 32))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_eps_is_that_of_every_norm(norm):
    model = transformer("rope", norm=norm, norm_eps=0.5, qk_norm=True, branch_norm=True, embedding_norm=True)
    block = model.block(0)
    norms = [model.norm, model.embedding_norm, block.attention.q_norm, block.attention.k_norm, block.attention_norm]
    norms += [block.feed_forward_norm, block.attention_out_norm, block.feed_forward_out_norm]
    assert [own.epsilon for own in norms] == [0.5] * 8
    x = hidden()
    centred = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(model.norm(x), expected, atol=1e-5)


def test_parallel_branches_read_the_same_input():
    model, x = transformer("rope", parallel_residual=True), hidden()
    block = model.block(0)
    attended = block.attention(model.encoding(0), block.attention_norm(x), jnp.arange(12)[None])
    fed = block.feed_forward(block.feed_forward_norm(x).reshape(-1, 32)).reshape(x.shape)
    np.testing.assert_allclose(states(model, 0, x), x + attended + fed, atol=1e-5)


def test_branch_norms_normalize_the_output_of_each_branch():
    model, x = transformer("rope", branch_norm=True), hidden()
    block = model.block(0)
    block.attention_out_norm.scale[...] = jnp.full(32, 2.0)
    attended = block.attention(model.encoding(0), block.attention_norm(x), jnp.arange(12)[None])
    attended = 2 * attended / np.sqrt((attended**2).mean(-1, keepdims=True) + 1e-6)
    after = x + attended
    fed = block.feed_forward(block.feed_forward_norm(after).reshape(-1, 32)).reshape(x.shape)
    fed = fed / np.sqrt((fed**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(states(model, 0, x), after + fed, atol=1e-5)


def test_embeddings_are_scaled_or_not_and_normalized_on_request():
    scaled, plain = transformer("rope"), transformer("rope", scale_embeddings=False)
    np.testing.assert_allclose(scaled.embed(TOKENS), np.sqrt(32) * plain.embed(TOKENS), rtol=1e-6)
    np.testing.assert_array_equal(plain.embed(TOKENS), plain.embedding[...][TOKENS])
    normalized = transformer("rope", embedding_norm=True, norm="layer")
    larger = transformer("rope", embedding_norm=True, norm="layer")
    larger.embedding[...] *= 100  # the norm takes out the size of the embeddings
    small, large = (m.states(m.embed(TOKENS)) for m in (normalized, larger))
    np.testing.assert_allclose(small, large, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, ""),
        ({"qkv_bias": True}, "qkv"),
        ({"use_bias": True}, "qkvo"),
        ({"use_bias": True, "qkv_bias": True}, "qkvo"),
    ],
)
def test_biases_are_where_the_settings_say(changes, biases):
    block = transformer("rope", **changes).block(0)
    attention = block.attention
    found = zip("qkvo", (attention.q, attention.k, attention.v, attention.out), strict=True)
    assert "".join(name for name, own in found if own.bias is not None) == biases
    assert (block.feed_forward.down.bias is not None) == ("o" in biases)


def test_logits_are_capped():
    capped, plain = transformer("rope", logit_softcap=3.0), transformer("rope")
    np.testing.assert_allclose(capped(TOKENS), 3 * np.tanh(plain(TOKENS) / 3), atol=1e-5)


@pytest.mark.parametrize("encoding", ["rope", "alibi", "fire", "fox", "none"])
def test_attention_logits_are_capped_before_biases(encoding):
    """At lengths that the algorithm for long sequences computes too."""
    capped, plain = transformer(encoding, attention_softcap=0.2), transformer(encoding)
    seen = []

    def record(encoding, inputs, mask):
        seen.append((encoding, inputs))
        return dense(encoding, inputs, mask)

    x, places = jax.random.normal(jax.random.key(1), (1, 300, 32)), jnp.arange(300)[None]
    capped.block(0).attention.attend = record
    of_dense = capped.block(0).attention(capped.encoding(0), x, places)
    own, inputs = seen[0]
    products = np.einsum("bthd,bshd->bhts", inputs.q, inputs.k) / np.sqrt(8)
    np.testing.assert_allclose(own.scores(inputs.q, inputs.k, inputs.ctx), 0.2 * np.tanh(products / 0.2), atol=1e-5)
    capped.block(0).attention.attend = None
    np.testing.assert_allclose(capped.block(0).attention(capped.encoding(0), x, places), of_dense, atol=1e-5)
    assert np.abs(of_dense - plain.block(0).attention(plain.encoding(0), x, places)).max() > 1e-3


@pytest.mark.parametrize("encoding", ["path", "wall", "grape_ap", "cope"])
def test_encodings_with_logits_of_their_own_take_no_cap(encoding):
    with pytest.raises(ConfigError, match=r"attention_softcap = 2.0: must be 0 for encoding"):
        transformer(encoding, attention_softcap=2.0)


@pytest.mark.parametrize("length", [2, 9])
def test_canon_adds_a_sum_of_the_last_four_tokens(length):
    layer, x = Canon(5, nnx.Rngs(0)), np.random.default_rng(0).normal(size=(2, length, 5)).astype(np.float32)
    weights, expected = np.asarray(layer.weights[...]), x.copy()
    for t in range(length):
        for s in range(min(4, t + 1)):
            expected[:, t] += weights[s] * x[:, t - s]
    whole, last = layer(jnp.asarray(x))
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    first, before = layer(jnp.asarray(x[:, :1]))
    rest, end = layer(jnp.asarray(x[:, 1:]), before)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), expected, atol=1e-6)
    np.testing.assert_array_equal(end, last)


def test_canon_tells_the_order_of_nearby_tokens_without_an_encoding():
    swapped = TOKENS.at[:, [3, 4]].set(TOKENS[:, [4, 3]])
    change = {}
    for canon in (False, True):
        model = transformer("none", num_layers=1, canon=canon)
        change[canon] = jnp.abs(model(TOKENS) - model(swapped))[:, -1].max()
    assert change[False] < 1e-5 < 1e-3 < change[True]


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_gate_multiplies_the_outputs_of_heads(kv_heads):
    model = transformer("rope", attention_gate=True, num_kv_heads=kv_heads)
    x, places = jax.random.normal(jax.random.key(1), (2, 7, 32)), jnp.arange(7)[None]
    attention, encoding = model.block(0).attention, model.encoding(0)
    gated = attention(encoding, x, places)
    q, k, v = attention.project(x)
    heads = dispatch.attention(encoding, q, k, v, places, x=x).reshape(2, 7, 32)
    gate = 1 / (1 + np.exp(-np.asarray(x @ attention.gate.kernel[...])))
    np.testing.assert_allclose(gated, (heads * gate) @ attention.out.kernel[...], atol=1e-5)


def test_only_a_softmax_has_sinks():
    with pytest.raises(ConfigError, match=r"attention_sinks = True: must be False for encoding 'stick_breaking'"):
        transformer("stick_breaking", attention_sinks=True)


@pytest.mark.parametrize("encoding", ["rope", "fire", "learned_rope"])
def test_global_layers_have_the_encoding_and_no_window(encoding):
    mixed = transformer(encoding, pattern="EG", window=4)
    windowed, whole = transformer(encoding, window=4), transformer(encoding)
    x = hidden()
    np.testing.assert_array_equal(states(mixed, 0, x), states(windowed, 0, x))
    np.testing.assert_array_equal(states(mixed, 1, x), states(whole, 1, x))
    assert np.abs(states(mixed, 1, x) - states(windowed, 1, x)).max() > 1e-3


def test_windows_have_a_base_of_their_own_that_no_rule_scales():
    hyperparameters = {"base": 1e6, "window_base": 100.0, "scaling": "linear:factor=4"}
    mixed = transformer("rope", pattern="EGN", num_layers=3, window=4, hyperparameters=hyperparameters)
    local = transformer("rope", window=4, hyperparameters={"base": 100.0})
    whole = transformer("rope", hyperparameters={"base": 1e6, "scaling": "linear:factor=4"})
    rates = [model.encoding(i).inverse_frequencies[...] for model, i in ((local, 0), (whole, 0))]
    np.testing.assert_array_equal(mixed.encoding(0).inverse_frequencies[...], rates[0])
    np.testing.assert_array_equal(mixed.encoding(1).inverse_frequencies[...], rates[1])
    assert mixed.encoding(2) is mixed.without
    without = transformer("rope", hyperparameters={"window_base": 100.0})  # no window, so no layer has that base
    np.testing.assert_array_equal(without(TOKENS), transformer("rope")(TOKENS))
    with pytest.raises(ConfigError, match=r"window_base = 0.5: must be above 1, or 0"):
        transformer("rope", hyperparameters={"window_base": 0.5})


def test_activations_are_the_published_ones():
    x = hidden()
    for name, function in (("gelu_exact", lambda z: jax.scipy.stats.norm.cdf(z) * z), ("gelu", jax.nn.gelu)):
        block = transformer("rope", activation=name).block(0).feed_forward
        np.testing.assert_allclose(
            block(x[0]), function(x[0] @ block.up.kernel[...]) @ block.down.kernel[...], atol=1e-5
        )
    block = transformer("rope", activation="geglu").block(0).feed_forward
    gate, up = (x[0] @ own.kernel[...] for own in (block.gate, block.up))
    np.testing.assert_allclose(block(x[0]), (jax.nn.gelu(gate) * up) @ block.down.kernel[...], atol=1e-5)


@pytest.mark.parametrize("field", ["branch_norm", "embedding_norm", "parallel_residual"])
def test_norms_after_the_residual_sum_exclude_others(field):
    with pytest.raises(ConfigError, match=rf"config.model.{field} = True: must be False for post_norm = True"):
        run_config(model__post_norm=True, **{f"model__{field}": True})
