"""The arrays of the walkthrough, against independent formulas."""

import dataclasses
import math

import numpy as np
import pytest

from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough import tokens, trace
from posenc_jax.walkthrough.trace import Settings
from tests.walkthrough.conftest import PIECES, SENTENCE

FIVE = tokens.given(PIECES, SENTENCE, vocab_size=100)
SMALL = Settings(width=64, heads=4)


def sinusoids(positions, width):
    table = np.zeros((len(positions), width))
    for row, m in enumerate(positions):
        for i in range(width // 2):
            angle = m * 10000 ** (-2 * i / width)
            table[row, 2 * i], table[row, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def rotated(x, m):
    """Rotate x [H, d]: pairs of neighbouring channels, as complex numbers, are multiplied by e^(i m theta)."""
    d = x.shape[-1]
    theta = 10000 ** (-2 * np.arange(d // 2) / d)
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * m * theta)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def test_shapes_are_those_of_the_example(followed):
    assert followed.one_hot.shape == (5, 30522)
    assert followed.embedding.shape == (30522, 512)
    assert followed.looked_up.shape == followed.positional.shape == followed.added.shape == (5, 512)
    assert followed.q.shape == followed.k.shape == (5, 8, 64)
    assert (followed.pair.q_position, followed.pair.k_position) == (0, 4)
    assert (followed.shifted.q_position, followed.shifted.k_position) == (7, 11)


def test_one_hot_times_the_matrix_is_a_row_of_it(followed):
    np.testing.assert_array_equal(followed.looked_up, followed.embedding[list(followed.tokens.ids)])


def test_embeddings_enter_at_standard_deviation_one(followed):
    assert followed.embedding.std() == pytest.approx(1 / math.sqrt(512), rel=1e-2)
    assert followed.embedded.std() == pytest.approx(1, rel=5e-2)
    np.testing.assert_allclose(followed.embedded, followed.looked_up * math.sqrt(512), rtol=1e-6)


def test_sinusoids_follow_the_paper(followed):
    np.testing.assert_allclose(followed.sinusoidal, sinusoids(range(5), 512), atol=1e-6)
    np.testing.assert_array_equal(followed.sinusoidal[0], np.tile([0, 1], 256))
    np.testing.assert_array_equal(followed.added, followed.embedded + followed.sinusoidal)


def test_rates_follow_the_paper(followed):
    np.testing.assert_allclose(followed.theta, 10000 ** (-2 * np.arange(32) / 64), rtol=1e-6)
    assert trace.BASE == 10000


def test_queries_and_keys_are_turned_by_their_own_positions(followed):
    np.testing.assert_allclose(followed.pair.q, followed.q[0], atol=0)
    for at in (followed.pair, followed.shifted):
        np.testing.assert_allclose(at.q, rotated(followed.q[0], at.q_position), atol=1e-5)
        np.testing.assert_allclose(at.k, rotated(followed.k[-1], at.k_position), atol=1e-5)
        np.testing.assert_allclose(at.product, (at.q * at.k).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_product_stays_when_both_positions_move_alike(followed):
    np.testing.assert_allclose(followed.shifted.product, followed.pair.product, atol=1e-4)
    by_difference = (followed.q[0] * rotated(followed.k[-1], 4)).sum(-1)
    np.testing.assert_allclose(followed.pair.product, by_difference, atol=1e-4)
    assert np.abs(followed.shifted.q - followed.pair.q).max() > 0.1
    assert np.abs(followed.shifted.k - followed.pair.k).max() > 0.1


def test_attention_of_the_last_token_is_a_softmax_over_its_keys(followed):
    d = followed.q.shape[-1]
    for at, shift in zip(followed.turned, (0, trace.SHIFT), strict=True):
        query = rotated(followed.q[-1], 4 + shift)[0]
        logits = np.array([query @ rotated(k, m + shift)[0] for m, k in enumerate(followed.k)]) / math.sqrt(d)
        weights = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(at.logits, logits, atol=1e-4)
        np.testing.assert_allclose(at.weights, weights, atol=1e-5)
        np.testing.assert_allclose(
            at.output, sum(w * v[0] for w, v in zip(weights, followed.v, strict=True)), atol=1e-4
        )


def test_the_output_moves_with_the_positions_only_where_they_are_added(followed):
    np.testing.assert_allclose(followed.turned[0].output, followed.turned[1].output, atol=1e-4)
    assert np.abs(followed.summed[0].output - followed.summed[1].output).max() > 0.1


def test_with_positions_added_the_product_changes(followed):
    assert np.abs(followed.shifted.added - followed.pair.added).max() > 0.1


def test_with_embeddings_rotated_early_the_product_changes(followed):
    assert np.abs(followed.shifted.turned_early - followed.pair.turned_early).max() > 0.1


def test_a_learned_table_is_added_row_by_row():
    first = trace.follow(FIVE, dataclasses.replace(SMALL, positions="learned", table_length=12))
    assert np.abs(first.positional - first.sinusoidal).max() > 0.1
    np.testing.assert_array_equal(first.added, first.embedded + first.positional)
    assert first.shifted.added is not None  # position 11 is the last row of the table


def test_a_product_beyond_the_learned_table_does_not_exist():
    short = trace.follow(FIVE, dataclasses.replace(SMALL, positions="learned", table_length=11))
    assert short.pair.added is not None
    assert short.shifted.added is None
    assert short.summed[1] is None


def test_one_token_is_compared_with_itself():
    alone = trace.follow(tokens.given(["a"], vocab_size=8), SMALL)
    np.testing.assert_allclose(alone.pair.product, (alone.q[0] * alone.k[0]).sum(-1), atol=1e-4)
    np.testing.assert_allclose(alone.shifted.product, alone.pair.product, atol=1e-4)


def test_the_seed_decides_the_weights():
    first, again, other = (trace.follow(FIVE, dataclasses.replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.pair.product, again.pair.product)
    assert (first.pair.product != other.pair.product).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 511}, "--width = 511: must be even"),
        ({"width": 100, "heads": 8}, "--width = 100: must be a multiple of 16"),
        ({"width": 32, "heads": 8}, "--width = 32: must be at least 64, 8 for each head"),
        ({"width": 0}, "--width = 0: must be at least 64"),
        ({"width": 2**24}, "--width = 16777216: must be at most"),
        ({"heads": 0}, "--heads = 0: must be at least 1"),
        ({"seed": -1}, "--seed = -1: must be at least 0"),
        (
            {"positions": "learned", "table_length": 4},
            "--table-length = 4: must be at least 5, the number of tokens: position 4 is beyond the learned table",
        ),
    ],
)
def test_settings_that_no_model_could_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        trace.follow(FIVE, Settings(**settings))


def test_a_claim_that_does_not_hold_is_an_error(monkeypatch):
    monkeypatch.setattr(trace, "rotated", lambda rope, x, positions: x + np.float32(np.max(positions)))
    with pytest.raises(
        RuntimeError, match="does not hold: the dot product depends only on the difference of positions"
    ):
        trace.follow(FIVE, SMALL)
