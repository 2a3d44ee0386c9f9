"""The attention function for user-defined models: it equals the layer, and refuses sizes that do not match."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention import Attention, AttentionMask, Dims, attention
from posenc_jax.attention.dense import dense
from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import TemperatureConfig, TransformerConfig
from posenc_jax.encodings.base import AttentionInputs

DIMS = Dims(d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, max_length=32)
B, T = 2, 20


def build(name, dims=DIMS, **hyperparameters):
    return encodings.build(name, dims, nnx.Rngs(0), **hyperparameters)


def arrays(dtype="float32"):
    """Random x, q, k and v."""
    shapes = (B, T, 32), (B, T, 4, 8), (B, T, 2, 8), (B, T, 2, 6)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(encoding, x, q, k, v, positions):
    ctx = encoding.prepare(x, positions)
    q, k = encoding.rotate(q, k, positions, positions, ctx)
    return dense(encoding, AttentionInputs(q, k, v, positions, positions, ctx))


@pytest.mark.parametrize("name", ["none", "rope", "alibi", "fire", "fox", "path", "stick_breaking", "pope"])
@pytest.mark.parametrize("given", ["default", "[T]", "[1, T]", "[B, T]"])
def test_it_prepares_rotates_and_attends(name, given):
    encoding, (x, q, k, v) = build(name), arrays()
    apart = 3 * jnp.arange(T) + 5
    used = {
        "default": jnp.arange(T)[None],
        "[T]": apart[None],
        "[1, T]": apart[None],
        "[B, T]": jnp.stack([apart, 2 * apart]),
    }[given]
    positions = None if given == "default" else apart if given == "[T]" else used
    out = attention(encoding, q, k, v, positions, x=x)
    np.testing.assert_allclose(out, by_hand(encoding, x, q, k, v, used), atol=1e-5)


@pytest.mark.parametrize("name", ["rope", "alibi", "fox", "path"])
def test_fewer_queries_are_the_last_tokens_of_the_keys(name):
    """This is decoding with a key-value cache, also with an attention window."""
    encoding, (x, q, k, v) = build(name), arrays()
    for mask in (AttentionMask(), AttentionMask(window=6)):
        whole, last = attention(encoding, q, k, v, mask=mask, x=x), attention(encoding, q[:, -3:], k, v, mask=mask, x=x)
        np.testing.assert_allclose(last, whole[:, -3:], atol=1e-5)


@pytest.mark.parametrize("form", ["ssmax", "llama4"])
def test_a_temperature_scales_the_last_queries_as_it_does_all(form):
    temperature = Temperature(TemperatureConfig(form, 0.5, 3, "EN"), DIMS.num_heads, 32)
    encoding, (_, q, k, v) = build("rope"), arrays()
    whole = attention(encoding, q, k, v, temperature=temperature)
    last = attention(encoding, q[:, -3:], k, v, temperature=temperature)
    np.testing.assert_allclose(last, whole[:, -3:], atol=1e-5)
    assert jnp.abs(whole - attention(encoding, q, k, v)).max() > 1e-3


def test_the_layer_is_the_function_between_projections():
    config = TransformerConfig(d_model=32, num_heads=4, num_kv_heads=2, head_dim=8)
    layer, encoding, x = Attention(config, nnx.Rngs(1)), build("fox"), arrays()[0]
    expected = attention(encoding, *layer.project(x), x=x)
    np.testing.assert_array_equal(
        layer(encoding, x, jnp.arange(T)[None], AttentionMask(contiguous=True)),
        layer.out(expected.reshape(B * T, -1)).reshape(x.shape),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_output_has_the_dtype_of_the_values(dtype):
    x, q, k, v = arrays(dtype)
    out = attention(build("fire"), q, k, v, x=x)
    assert out.dtype == dtype
    full = attention(build("fire"), *(a.astype("float32") for a in (q, k, v)))
    assert jnp.abs(out - full).max() < 0.05


def test_another_algorithm_can_be_given():
    _, q, k, v = arrays()
    calls = []

    def attend(*arguments):
        calls.append(arguments)
        return dense(*arguments)

    attention(build("alibi"), q, k, v, attend=attend)
    assert len(calls) == 1


def shaped(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


WRONG = {
    "head_dim of another build": (
        {"q": shaped(B, T, 4, 16), "k": shaped(B, T, 2, 16)},
        r"q.shape\[3\] = 16: must be 8, the head_dim",
    ),
    "heads of another build": ({"q": shaped(B, T, 8, 8)}, r"q.shape\[2\] = 8: must be 4, the num_heads"),
    "key heads of another build": ({"k": shaped(B, T, 4, 8)}, r"k.shape\[2\] = 4: must be 2, the num_kv_heads"),
    "heads before tokens": ({"q": shaped(B, 4, T, 8)}, r"q.shape\[2\] = 20: must be 4"),
    "no batch": ({"q": shaped(T, 4, 8)}, r"q.shape = \(20, 4, 8\): must be \[B, T, H, d\]"),
    "batch of k": ({"k": shaped(1, T, 2, 8)}, r"k.shape\[0\] = 1: must be 2, the batch of q"),
    "batch of v": ({"v": shaped(1, T, 2, 8)}, r"v.shape\[0\] = 1: must be 2, the batch of q"),
    "width of k": ({"k": shaped(B, T, 2, 4)}, r"k.shape\[3\] = 4: must be 8, the head_dim of q"),
    "more queries than keys": ({"q": shaped(B, T + 1, 4, 8)}, r"q.shape\[1\] = 21: must be at most k.shape\[1\] = 20"),
    "length of v": ({"v": shaped(B, T + 1, 2, 8)}, r"v.shape\[1\] = 21: must be 20, the number of tokens of k"),
    "heads of v": ({"v": shaped(B, T, 4, 8)}, r"v.shape\[2\] = 4: must be 2, the number of heads of k"),
    "width of x": ({"x": shaped(B, T, 16)}, r"x.shape\[2\] = 16: must be 32, the d_model"),
    "batch of x": ({"x": shaped(1, T, 32)}, r"x.shape\[0\] = 1: must be 2, the batch of q"),
    "length of x": ({"x": shaped(B, 7, 32)}, r"x.shape\[1\] = 7: must be 20, the number of tokens of k"),
    "x of tokens in a row": ({"x": shaped(B * T, 32)}, r"x.shape = \(40, 32\): must be \[B, S, D\]"),
    "no x": ({"x": None}, r"x = None: must be the input of the layer \[B, S, D\], which FoX.prepare reads"),
    "dtypes": ({"v": shaped(B, T, 2, 8, dtype="bfloat16")}, r"v.dtype = 'bfloat16': .* the same for q, k and v"),
    "whole numbers": ({"q": shaped(B, T, 4, 8, dtype="int32")}, r"q.dtype = 'int32': must be one of float32, bfloat16"),
    "length of positions": ({"positions": jnp.arange(7)}, r"positions.shape = \(7,\): must be \(20,\), \(1, 20\) or"),
    "batch of positions": ({"positions": jnp.zeros((3, T))}, r"positions.shape = \(3, 20\): must be \(20,\)"),
    "dtype of positions": ({"positions": jnp.zeros(T, "bfloat16")}, r"positions.dtype = 'bfloat16': must be"),
    "an array for a mask": ({"mask": jnp.ones((T, T), bool)}, "mask = .*: must be an AttentionMask"),
    "keys ahead": ({"mask": AttentionMask(causal=False)}, "mask.causal = False: must be True for FoX"),
}
UNCHECKED = inspect.unwrap(attention)  # without type checking, which only the tests enable


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_match_is_refused_by_name_when_it_is_traced(change, message):
    encoding, given = build("fox"), dict(zip("xqkv", arrays(), strict=True)) | change
    arrays_given = {key: given.pop(key) for key in "qkv"}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda arrays: UNCHECKED(encoding, **arrays, **given), arrays_given)


def test_one_head_of_alibi_is_not_broadcast_to_four():
    _, q, k, v = arrays()
    encoding = build("alibi", dataclasses.replace(DIMS, num_heads=1, num_kv_heads=1))
    with pytest.raises(ValueError, match=r"q.shape\[2\] = 4: must be 1, the num_heads that the encoding was built for"):
        attention(encoding, q, k, v)


def test_heads_of_keys_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_kv_heads = 3: must divide num_heads = 4"):
        dataclasses.replace(DIMS, num_kv_heads=3)
    cls = encodings.load("alibi")
    encoding = cls(cls.Config(), DIMS, nnx.Rngs(0))  # sizes are not known
    with pytest.raises(ValueError, match=r"k.shape\[2\] = 3: must be a divisor of q.shape\[2\] = 4"):
        attention(encoding, shaped(B, T, 4, 8), shaped(B, T, 3, 8), shaped(B, T, 3, 8))


def test_a_name_is_not_an_encoding():
    _, q, k, v = arrays()
    with pytest.raises(ValueError, match=r"encoding = 'rope': must be an encoding, as posenc_jax.encodings.build"):
        UNCHECKED("rope", q, k, v)


def test_gradients_reach_arrays_of_the_encoding_under_jit():
    encoding, (x, q, k, v) = build("fire"), arrays()
    graphdef, state = nnx.split(encoding)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(state, q):
        return (attention(nnx.merge(graphdef, state), q, k, v, x=x) ** 2).mean()

    for leaf in jax.tree.leaves(gradient(state, q)):
        assert jnp.isfinite(leaf).all()
    assert jnp.abs(gradient(state, q)[1]).max() > 0
    with pytest.raises(ValueError, match=r"q.shape\[1\] = 21"):
        gradient(state, shaped(B, T + 1, 4, 8))
