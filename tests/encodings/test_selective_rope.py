"""Selective RoPE and CARoPE against their equations, and RoPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims
from posenc_jax.schema import ConfigError

POSITIONS = jnp.arange(20)[None]


def build(name="selective_rope", num_kv_heads=4, **hyperparameters):
    return encodings.build(name, Dims(32, 4, num_kv_heads, 8, 64), nnx.Rngs(0), **hyperparameters)


def inputs(num_kv_heads=4):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 20, 32), (2, 20, 4, 8), (2, 20, num_kv_heads, 8)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def logits(encoding, x, q, k, positions=POSITIONS):
    ctx = encoding.prepare(x, positions)
    q, k = encoding.rotate(q, k, positions, positions, ctx)
    return encoding.scores(q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2), ctx)


@pytest.mark.parametrize(
    ("num_kv_heads", "hyperparameters"),
    [
        *[(4, {}), (2, {"base": 100.0, "rank": 3, "taps": 2}), (2, {"faithful": True})],
        *[(4, {"taps": 6, "faithful": True}), (4, {"bias": False}), (2, {"activation": "silu", "gate": True})],
        (2, {"bias": False, "activation": "silu"}),
    ],
)
def test_logits_equal_the_equation(num_kv_heads, hyperparameters):
    encoding = build(num_kv_heads=num_kv_heads, **hyperparameters)
    if encoding.log_bias is not None:
        encoding.log_bias[...] = jax.random.normal(jax.random.key(1), (4 * num_kv_heads,))
    if encoding.gate is not None:
        encoding.gate.bias[...] = jnp.arange(num_kv_heads) - 0.5
    base, count = hyperparameters.get("base", 5e5), hyperparameters.get("taps", 4)
    x, q, k = inputs(num_kv_heads)
    found = logits(encoding, x, q, k)
    x, q, k, down, up, taps = (
        np.asarray(array, np.float64)
        for array in (x, q, k, encoding.down.kernel[...], encoding.up.kernel[...], encoding.taps[...])
    )
    if hyperparameters.get("faithful"):
        unit = np.concatenate([part / np.linalg.norm(part, axis=-1, keepdims=True) for part in np.split(x, 4, -1)], -1)
    else:
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    low_rank = unit @ down @ up
    total = np.zeros_like(low_rank)
    for t in range(20):
        turn = sum(taps[count - 1 - n] * low_rank[:, t - n] for n in range(count) if t >= n)
        if hyperparameters.get("activation") == "silu":
            turn = turn / (1 + np.exp(-turn))
        if hyperparameters.get("bias", True):
            turn = turn + np.exp(np.asarray(encoding.log_bias[...], np.float64))
        if hyperparameters.get("gate"):
            gate = unit[:, t] @ np.asarray(encoding.gate.kernel[...], np.float64) + np.asarray(encoding.gate.bias[...])
            turn = turn * np.repeat(1 / (1 + np.exp(-gate)), 4, axis=-1)
        total[:, t] = turn + (total[:, t - 1] if t else 0)
    total = total.reshape(2, 20, num_kv_heads, 4)
    q, k = q[..., :4] + 1j * q[..., 4:], k[..., :4] + 1j * k[..., 4:]
    for i, j in ((0, 0), (6, 4), (19, 0)):
        for h in range(4):
            group, expected = h * num_kv_heads // 4, 0
            for m in range(4):
                turn = base ** (-2 * m / 8) * (total[:, j, group, m] - total[:, i, group, m])
                expected += (q[:, i, h, m].conj() * k[:, j, group, m] * np.exp(1j * turn)).real
            np.testing.assert_allclose(found[:, h, i, j], expected / np.sqrt(8), atol=2e-5)


@pytest.mark.parametrize("base", [5e5, 100.0])
def test_turns_of_one_are_rope_with_positions_counted_in_tokens(base):
    encoding = build(base=base, rank=1, bias=False)
    encoding.down.kernel[...] = jnp.zeros((32, 1)).at[0].set(1.0)
    encoding.up.kernel[...] = jnp.ones((1, 16))
    encoding.taps[...] = jnp.zeros((4, 16)).at[-1].set(1.0)
    _, q, k = inputs()
    x = jnp.zeros((2, 20, 32)).at[..., 0].set(3.0)
    found = logits(encoding, x, q, k, 7 * POSITIONS)
    np.testing.assert_allclose(found, logits(build("rope", base=base), x, q, k), atol=2e-5)


def test_a_new_model_is_near_rope_with_the_bias_and_near_no_encoding_without():
    x, q, k = inputs()
    for bias, name in ((True, "rope"), (False, "none")):
        other = build(name, **({"base": 5e5} if bias else {}))
        difference = logits(build(bias=bias), x, q, k) - logits(other, x, q, k)
        assert jnp.sqrt((difference**2).mean()) < 0.1 * logits(other, x, q, k).std()


def test_a_token_turns_by_the_tokens_before_it_alone():
    x = inputs()[0]
    encoding = build()
    before, _ = encoding.prepare(x, POSITIONS)
    after, _ = encoding.prepare(x.at[:, 12].add(1.0), POSITIONS)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert (jnp.abs(before[:, 12:] - after[:, 12:]).max(axis=(0, 2, 3)) > 1e-5).all()


def test_sums_are_float32_whatever_the_input():
    x, q, k = (array.astype(jnp.bfloat16) for array in inputs())
    encoding = build()
    ctx = encoding.prepare(x, POSITIONS)
    assert ctx[0].dtype == jnp.float32
    assert encoding.rotate(q, k, POSITIONS, POSITIONS, ctx)[0].dtype == jnp.bfloat16


def test_temperatures_are_not_trained():
    state = nnx.to_pure_dict(nnx.state(build(), nnx.Param))
    assert set(state) == {"down", "up", "taps", "log_bias"}


def test_initial_weights_are_those_of_pytorchs_layers():
    encoding = encodings.build("selective_rope", Dims(512, 8, 8, 64, 64), nnx.Rngs(0))
    for weights, fan_in in ((encoding.down.kernel, 512), (encoding.up.kernel, 32), (encoding.taps, 4)):
        bound = fan_in**-0.5
        assert jnp.abs(weights[...]).max() == pytest.approx(bound, rel=0.01)
        assert weights[...].std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_parts_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="num_heads = 4 does not divide d_model = 30"):
        encodings.build("selective_rope", Dims(30, 4, 4, 8, 64), nnx.Rngs(0), faithful=True)


@pytest.mark.parametrize(("base", "num_kv_heads"), [(1e4, 4), (50.0, 2)])
def test_carope_equals_its_equation(base, num_kv_heads):
    encoding = build("carope", num_kv_heads, base=base)
    x, q, k = inputs(num_kv_heads)
    np.testing.assert_allclose(
        logits(encoding, x, q, k, 7 * POSITIONS), logits(build("rope", base=base), x, q, k), atol=2e-5
    )
    encoding.frequency.kernel[...] = jax.random.normal(jax.random.key(1), (32, num_kv_heads)) / 4
    found = logits(encoding, x, q, k, 7 * POSITIONS)
    x, q, k, w, b = (
        np.asarray(array, np.float64)
        for array in (x, q, k, encoding.frequency.kernel[...], encoding.frequency.bias[...])
    )
    f = 1 / (1 + np.log1p(np.exp(x @ w + b)))
    q, k = q[..., :4] + 1j * q[..., 4:], k[..., :4] + 1j * k[..., 4:]
    for i, j in ((0, 0), (6, 4), (19, 0)):
        for h in range(4):
            group = h * num_kv_heads // 4
            turn = (f[:, j + 1 : i + 1, group, None] ** np.arange(4)).sum(axis=1)
            expected = (q[:, i, h] * k[:, j, group].conj() * np.exp(1j * turn)).real.sum(-1)
            np.testing.assert_allclose(found[:, h, i, j], expected / np.sqrt(8), atol=2e-5)
