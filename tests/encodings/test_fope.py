"""FoPE against its equation, the formula of the reference code, and HoPE."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Constant, Dims
from posenc_jax.encodings.rotary import main_rates

NOTHING = (None, None)
POSITIONS = 3 * jnp.arange(20)[None]


def build(name="fope", num_kv_heads=2, length=64, **hyperparameters):
    return encodings.build(name, Dims(32, 4, num_kv_heads, 16, length), nnx.Rngs(0), **hyperparameters)


def inputs(num_kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 2)
    return tuple(jax.random.normal(key, (2, 20, heads, 16)) for key, heads in zip(keys, (4, num_kv_heads), strict=True))


def series(encoding, base, length, still_sin):
    """The cos and sin of each head, position and pair, computed one at a time in float64."""
    a, b = (np.asarray(x[...], np.float64) for x in (encoding.cos_coefficients, encoding.sin_coefficients))
    theta = [base ** (-2 * m / 16) for m in range(8)]
    theta = [rate for rate in theta if rate >= 2 * math.pi / length]
    cos, sin = np.ones((len(a), 20, 8)), np.full((len(a), 20, 8), float(still_sin))
    for h in range(len(a)):
        for t in range(20):
            for m in range(a.shape[-1]):
                cos[h, t, m] = sum(a[h, k, m] * math.cos(3 * t * rate) for k, rate in enumerate(theta))
                sin[h, t, m] = sum(b[h, k, m] * math.sin(3 * t * rate) for k, rate in enumerate(theta))
    return cos, sin


@pytest.mark.parametrize(("base", "length"), [(1e4, 64), (100.0, 100)])
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_rotation_equals_the_equation(base, length, faithful, num_kv_heads):
    encoding = build(num_kv_heads=num_kv_heads, base=base, length=length, faithful=faithful)
    cos, sin = series(encoding, base, length, still_sin=faithful)
    q, k = inputs(num_kv_heads)
    for x, found in zip((q, k), encoding.rotate(q, k, POSITIONS, POSITIONS, NOTHING), strict=True):
        x = np.asarray(x, np.float64)
        for head in range(x.shape[2]):
            c, s = (wave[head * num_kv_heads // x.shape[2]] for wave in (cos, sin))
            left, right = x[:, :, head, :8], x[:, :, head, 8:]
            expected = np.concatenate([left * c - right * s, right * c + left * s], axis=-1)
            np.testing.assert_allclose(found[:, :, head], expected, atol=5e-5)


def test_without_noise_it_is_hope():
    q, k = inputs()
    found = build(gain=0.0).rotate(q, k, POSITIONS, POSITIONS, NOTHING)
    expected = build("hope").rotate(q, k, POSITIONS, POSITIONS, NOTHING)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_logits_depend_on_more_than_distance_but_for_a_gain_of_zero():
    q, k = inputs(4)
    changes = []
    for gain in (0.0, 0.3):
        encoding = build(num_kv_heads=4, gain=gain)
        z = [
            encoding.scores(*encoding.rotate(q, k, positions, positions, NOTHING), NOTHING)
            for positions in (POSITIONS, POSITIONS + 100)
        ]
        changes.append(float(jnp.abs(z[0] - z[1]).max()))
    assert changes[0] < 1e-4
    assert changes[1] > 0.1


def test_pairs_that_do_not_turn_keep_their_logits_and_double_them_in_the_reference():
    still = jnp.zeros((1, 20, 4, 16)).at[..., 7].set(1.0).at[..., 15].set(2.0)  # only the slowest pair is nonzero
    for faithful, ratio in ((False, 1), (True, 2)):
        encoding = build(num_kv_heads=4, faithful=faithful)
        q, k = encoding.rotate(still, still, POSITIONS, POSITIONS, NOTHING)
        plain = encoding.scores(still, still, NOTHING)
        np.testing.assert_allclose(encoding.scores(q, k, NOTHING), ratio * plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("faithful", "shape", "stddev"),
    [(False, (4, 24, 24), 0.3 * math.sqrt(2 / 48)), (True, (4, 24, 16), 0.3 * math.sqrt(2 / (24 * 16 + 4 * 16)))],
)
def test_noise_is_around_each_pairs_own_rate(faithful, shape, stddev):
    encoding = encodings.build("fope", Dims(32, 4, 4, 64, 6000), nnx.Rngs(0), faithful=faithful)
    for coefficients in (encoding.cos_coefficients[...], encoding.sin_coefficients[...]):
        assert coefficients.shape == shape
        noise = coefficients - main_rates(*shape[1:])
        assert noise.mean() == pytest.approx(0, abs=stddev / 10)
        assert noise.std() == pytest.approx(stddev, rel=0.05)
    assert jnp.abs(encoding.cos_coefficients[...] - encoding.sin_coefficients[...]).min(initial=1) > 0


def test_fewer_series_than_rates_leave_some_without_their_own_as_in_the_reference():
    np.testing.assert_array_equal(main_rates(4, 4), np.eye(4))
    expected = np.zeros((5, 4))
    expected[0, 0] = expected[2, 1] = expected[4, 2] = 1
    np.testing.assert_array_equal(main_rates(5, 4), expected)


@pytest.mark.parametrize(("learned", "kind"), [(False, Constant), (True, nnx.Param)])
def test_coefficients_are_trained_only_if_learned(learned, kind):
    encoding = build(learned=learned)
    assert type(encoding.cos_coefficients) is type(encoding.sin_coefficients) is kind
