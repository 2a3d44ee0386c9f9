"""Kept losses are those of the scorer, and are used only for the same batch of the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert
from posenc_jax.config import RunConfig
from posenc_jax.evaluation.score_cache import ScoreCache
from posenc_jax.evaluation.scoring import Scorer
from tests.evaluation.test_scoring import model, new_scorer, windows
from tests.runs.run_helpers import empty, flip, truncate

TOKENS = windows(5, 64)


@pytest.fixture
def computed(monkeypatch):
    """The tokens of each batch that is computed."""
    batches, compute = [], Scorer.score_batch

    def score_batch(self, mesh, params, constants, tokens, *arguments, **options):
        batches.append(tokens)
        return compute(self, mesh, params, constants, tokens, *arguments, **options)

    monkeypatch.setattr(Scorer, "score_batch", score_batch)
    return batches


@pytest.mark.parametrize("devices", [1, 8])
def test_losses_are_equal_bit_for_bit_and_computed_once(devices, computed, tmp_path):
    scorer, params, constants = new_scorer(model(), devices, batch_tokens=128)
    expected = scorer(params, constants, TOKENS)
    batches = len(computed)
    for _ in range(2):
        cache = ScoreCache(scorer, tmp_path / "scores", "one", least_seconds=0)
        np.testing.assert_array_equal(cache(params, constants, TOKENS), expected)
    assert len(computed) == 2 * batches
    assert cache.compilations == 1


def test_predictions_are_kept_apart_from_losses(computed, tmp_path):
    scorer, params, constants = new_scorer(model(), 1)
    losses, expected = scorer(params, constants, TOKENS), scorer.predictions(params, constants, TOKENS, last=64)
    before = len(computed)
    for _ in range(2):
        cache = ScoreCache(scorer, tmp_path / "scores", "one", least_seconds=0)
        np.testing.assert_array_equal(cache(params, constants, TOKENS), losses)
        for own, other in zip(cache.predictions(params, constants, TOKENS, last=64), expected, strict=True):
            np.testing.assert_array_equal(own, other)
    assert len(computed) == before + 2


def test_an_evaluation_that_was_stopped_computes_the_rest(computed, tmp_path):
    scorer, params, constants = new_scorer(model(), 1, batch_tokens=128)
    expected = scorer(params, constants, TOKENS)
    computed.clear()

    def stop():
        if len(computed) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ScoreCache(scorer, tmp_path / "scores", "one", after_batch=stop, least_seconds=0)(params, constants, TOKENS)
    resumed = ScoreCache(scorer, tmp_path / "scores", "one", least_seconds=0)(params, constants, TOKENS)
    np.testing.assert_array_equal(resumed, expected)
    np.testing.assert_array_equal(np.concatenate(computed), np.resize(TOKENS, (6, 65)))


def test_other_tokens_positions_constants_or_identity_are_computed(computed, tmp_path):
    scorer, params, constants = new_scorer(model(), 1)
    other = jax.tree.map(lambda x: x + 1, constants)
    cases = [
        ("one", constants, TOKENS, None),
        ("two", constants, TOKENS, None),
        ("one", other, TOKENS, None),
        ("one", constants, TOKENS[:, ::-1], None),
        ("one", constants, TOKENS, 3 * jnp.arange(64)[None]),
        ("one", constants, TOKENS, 3.0 * jnp.arange(64)[None]),
    ]
    for identity, own, tokens, positions in cases:
        cache = ScoreCache(scorer, tmp_path / "scores", identity, least_seconds=0)
        found, before = cache(params, own, tokens, positions), len(computed)
        np.testing.assert_array_equal(found, scorer(params, own, tokens, positions))
        np.testing.assert_array_equal(found, cache(params, own, tokens, positions))
        assert len(computed) == before + 1
    assert len(list((tmp_path / "scores").iterdir())) == len(cases)


def test_another_choice_of_hidden_tokens_is_computed(computed, tmp_path):
    config = RunConfig.from_mapping(bert.get_config("size=smoke,tokens=bytes,positions=rope").to_dict())
    scorer, params, constants = new_scorer(config, 1)
    cache = ScoreCache(scorer, tmp_path / "scores", "one", least_seconds=0)
    for share in (0.1, 0.2, 0.2):
        hidden = np.random.default_rng(0).random((5, 64)) < share
        np.testing.assert_array_equal((cache(params, constants, TOKENS, None, hidden) > 0), hidden)
    assert len(computed) == 2


def swap(path):
    """Write losses of another shape."""
    np.savez(path, np.zeros((1, 64), np.float32))


@pytest.mark.parametrize("harm", [flip, truncate, empty, swap])
def test_a_damaged_file_is_ignored_and_written_again(harm, computed, tmp_path):
    scorer, params, constants = new_scorer(model(), 1)
    cache = ScoreCache(scorer, tmp_path / "scores", "one", least_seconds=0)
    expected = cache(params, constants, TOKENS)
    (path,) = (tmp_path / "scores").iterdir()
    intact = path.read_bytes()
    harm(path)
    np.testing.assert_array_equal(cache(params, constants, TOKENS), expected)
    assert path.read_bytes() == intact
    assert len(computed) == 2


def test_a_batch_that_takes_no_time_is_not_kept(tmp_path):
    scorer, params, constants = new_scorer(model(), 1)
    ScoreCache(scorer, tmp_path / "scores", "one", least_seconds=1e9)(params, constants, TOKENS)
    assert not list((tmp_path / "scores").iterdir())
