"""Hard-ALiBi and BAM against transcriptions of their equations."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import attention_weights
from posenc_jax.encodings.base import AttentionInputs, Dims
from tests.encodings.test_bias import bias, bias_between, build, visible_pairs
from tests.small import tokens, transformer


@pytest.mark.parametrize(
    ("heads", "fraction", "reaches"),
    [
        (4, 0.5, [1, 2, math.inf, math.inf]),
        (4, 1.0, [1, 2, 3, 4]),
        (6, 0.34, [1, 2] + 4 * [math.inf]),
        (2, 0.1, [1, math.inf]),
    ],
)
def test_heads_of_hard_alibi_see_so_many_tokens(heads, fraction, reaches):
    encoding = encodings.build("hard_alibi", Dims(32, heads, heads, 8, 64), nnx.Rngs(0), fraction=fraction)
    q = jnp.ones((1, 12, heads, 8))
    places = jnp.arange(12)[None]
    weights = np.asarray(attention_weights(encoding, AttentionInputs(q, q, q, places, places)))[0]
    for h, reach in enumerate(reaches):
        for i in range(12):
            seen = min(reach, i + 1)
            expected = [1 / seen if i - j < seen else 0 for j in range(i + 1)]
            np.testing.assert_allclose(weights[h, i, : i + 1], expected, atol=1e-6)


def test_heads_that_see_only_the_last_tokens_forget_all_others_at_any_length():
    model, text = transformer("hard_alibi", num_layers=1, hyperparameters={"fraction": 1.0}), tokens(1, 300)
    before, after = model(text), model(text.at[:, 100].add(1))
    assert jnp.abs(before - after)[:, 100:104].max() > 1e-3
    np.testing.assert_allclose(before[:, 104:], after[:, 104:], atol=1e-6)  # four heads see at most four tokens


def bam(alpha, beta, theta=None, epsilon=1e-5):
    encoding = build("bam", learned_location=theta is not None, epsilon=epsilon)
    encoding.alpha[...], encoding.beta[...] = jnp.array(alpha), jnp.array(beta)
    if theta is not None:
        encoding.theta[...] = jnp.array(theta)
    return encoding


@pytest.mark.parametrize(
    ("alpha", "beta", "theta", "epsilon"),
    [
        ([0.0, 1.0, -2.0, 0.3], [1.0, 2.0, 0.5, -0.7], None, 1e-5),
        ([0.5, 0.0, -1.0, 0.1], [0.3, 1.0, -0.2, 2.0], [0.0, 1.0, -1.5, 0.2], 0.5),
    ],
)
def test_bam_equals_its_equation(alpha, beta, theta, epsilon):
    encoding = bam(alpha, beta, theta, epsilon)
    for i, j in visible_pairs():
        for h, found in enumerate(bias_between(encoding, i, j)):
            location = 0.0 if theta is None else math.exp(theta[h]) - math.exp(-theta[h])
            expected = -math.exp(alpha[h]) * (abs(i - j + location) + epsilon) ** beta[h]
            assert found == pytest.approx(expected, rel=1e-4)


def test_bam_begins_without_positions_and_contains_alibi():
    assert np.ptp(np.asarray(bias(build("bam"), 20))) == 0
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    found = bias(bam(np.log(slopes), np.ones(4)), 20)
    np.testing.assert_allclose(np.tril(found), np.tril(bias(build("alibi"), 20)), atol=1e-4)
