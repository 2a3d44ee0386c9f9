"""Position schedules: the positions that they draw, and that every encoding trains and evaluates with each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax import encodings, positions
from posenc_jax.evaluation_config import PositionsConfig
from posenc_jax.schema import ConfigError
from tests.encodings.test_contract import one_of_each_kind
from tests.small import forward, run_config, transformer
from tests.small import tokens as random_tokens

TRAINING = ("contiguous", "offset", "randomized", "random_float")
EVALUATION = ("contiguous", "drawn", "even", "interpolated")


def schedule(training="contiguous", evaluation="contiguous", *, range=64, per_layer=False):
    return PositionsConfig(training, range, per_layer, evaluation)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("training", TRAINING[1:])
def test_positions_increase_strictly_and_stay_below_the_range(training, seed):
    drawn = positions.in_training(schedule(training), 40, 3, jax.random.key(seed))
    assert drawn.shape == (1, 40)
    assert (jnp.diff(drawn[0]) > 0).all()
    assert drawn.min() >= 0
    assert drawn.max() < 64


def test_contiguous_positions_are_those_a_model_takes_by_itself():
    assert positions.in_training(schedule("contiguous"), 40, 3, jax.random.key(0)) is None
    assert positions.in_evaluation(schedule("randomized", "contiguous"), 40, 3, 16) is None
    assert positions.in_evaluation(schedule("contiguous", "drawn"), 40, 3, 16) is None
    assert positions.in_evaluation(schedule(evaluation="interpolated"), 16, 3, 16) is None


@pytest.mark.parametrize("training", TRAINING[1:])
def test_draws_follow_the_key_alone(training):
    first, again, other = (positions.in_training(schedule(training), 40, 3, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_randomized_positions_are_distinct_whole_numbers_spread_over_the_range():
    draws = np.stack([positions.in_training(schedule("randomized"), 8, 3, jax.random.key(i))[0] for i in range(200)])
    assert draws.dtype == np.int32
    np.testing.assert_allclose(draws.mean(axis=0), np.arange(1, 9) * 65 / 9 - 1, atol=2.5)  # order statistics


def test_offset_positions_are_consecutive_and_reach_both_ends():
    starts = [int(positions.in_training(schedule("offset"), 60, 3, jax.random.key(i))[0, 0]) for i in range(60)]
    assert set(starts) == {0, 1, 2, 3, 4}


def test_each_layer_may_draw_its_own():
    drawn = positions.in_training(schedule("randomized", per_layer=True), 40, 3, jax.random.key(0))
    assert drawn.shape == (3, 1, 40)
    assert (drawn[0] != drawn[1]).any()


def test_evaluation_forms():
    at = {name: positions.in_evaluation(schedule("randomized", name), 32, 2, 16)[0] for name in EVALUATION[1:]}
    np.testing.assert_allclose(at["even"], np.linspace(0, 63, 32), rtol=1e-6)
    np.testing.assert_allclose(at["interpolated"], np.linspace(0, 15, 32), rtol=1e-6)
    np.testing.assert_array_equal(
        at["drawn"], positions.in_training(schedule("randomized"), 32, 2, jax.random.key(0))[0]
    )


def test_interpolating_is_linear_scaling_of_rope():
    text = random_tokens(length=64)
    squeezed = forward(transformer("rope"), text, jnp.arange(64)[None] / 2)
    scaled = forward(transformer("rope", hyperparameters={"scaling": "linear:factor=2"}), text)
    np.testing.assert_allclose(squeezed, scaled, atol=1e-4)


@pytest.mark.parametrize("name", encodings.names())
def test_every_encoding_takes_fractional_positions(name):
    model, text = transformer(name, num_layers=1, max_length=64), random_tokens()
    whole = jnp.arange(32)[None]
    np.testing.assert_allclose(forward(model, text, whole), forward(model, text, whole.astype(jnp.float32)), atol=1e-4)
    assert jnp.isfinite(forward(model, text, whole * 1.37)).all()


@one_of_each_kind
def test_an_encoding_takes_the_positions_of_each_layer(name):
    model, text = transformer(name, max_length=64), random_tokens()
    whole = jnp.arange(32)[None]
    np.testing.assert_allclose(forward(model, text, whole), forward(model, text, jnp.stack([whole, whole])), atol=1e-5)


def test_a_range_below_the_training_length_is_refused():
    with pytest.raises(ConfigError, match=r"config.positions.range = 10: must be at least training.length"):
        run_config(positions__training="offset", positions__range=10)
