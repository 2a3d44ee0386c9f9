"""A recall task without shortcuts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recurrence import recall
from experiments.recurrence.recall import NOTHING_ASKED, RecallTask
from tests.small import run_config

TASK = RecallTask(markers=4, values=8, fillers=6, length=48, nearest=2, furthest=16)

draw = jax.jit(RecallTask.draw, static_argnums=(0, 2))


def drawn(task=TASK, rows=200, seed=0):
    return jax.tree.map(np.asarray, draw(task, jax.random.key(seed), rows))


def test_every_question_is_the_return_of_a_marker_that_stood_beside_the_answer():
    texts = drawn()
    row, place = np.nonzero(texts.answers != NOTHING_ASKED)
    distance = texts.distances[row, place]
    marker = texts.tokens[row, place]
    assert len(row) > 0.9 * 4 * 200
    np.testing.assert_array_equal(texts.tokens[row, place - distance], marker)
    np.testing.assert_array_equal(texts.tokens[row, place - distance + 1], texts.answers[row, place])
    assert (marker < 4).all()
    assert set(texts.answers[row, place]) == set(range(4, 12))
    assert set(distance) == set(range(2, 17))
    assert ((distance == 0) == (texts.answers[row, place] == NOTHING_ASKED)).all()


def test_nothing_else_in_a_text_is_a_marker_or_a_value():
    texts = drawn()
    questions = (texts.answers != NOTHING_ASKED).sum(axis=1)
    np.testing.assert_array_equal((texts.tokens < 4).sum(axis=1), 2 * questions)
    np.testing.assert_array_equal(((texts.tokens >= 4) & (texts.tokens < 12)).sum(axis=1), questions)
    assert texts.tokens.max() < TASK.vocab_size
    for row in texts.tokens:
        assert all(count == 2 for count in np.unique(row[row < 4], return_counts=True)[1])


def test_the_answer_does_not_follow_from_the_marker_or_the_token_before():
    texts = drawn(rows=4000)
    row, place = np.nonzero(texts.answers != NOTHING_ASKED)
    answer = texts.answers[row, place] - 4
    for known in (texts.tokens[row, place], texts.tokens[row, place - 1], place % 4):
        counts = np.zeros((known.max() + 1, 8))
        np.add.at(counts, (known, answer), 1)
        shares = counts[counts.sum(axis=1) > 1000]
        best = (shares.max(axis=1) / shares.sum(axis=1)).max()
        assert best < 0.125 + 0.05


def test_short_and_long_distances_are_asked_as_often_per_octave():
    distances = drawn(RecallTask(length=256, nearest=2, furthest=63), rows=500).distances
    shares = [((low <= distances) & (distances < 2 * low)).sum() / (distances > 0).sum() for low in (2, 4, 8, 16, 32)]
    np.testing.assert_allclose(shares, 0.2, atol=0.03)


def test_texts_follow_from_the_key():
    first, again, other = drawn(), drawn(), drawn(seed=4)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.answers, again.answers)
    assert (first.tokens != other.tokens).mean() > 0.5


def looks_back(texts):
    """The value next to the last occurrence of each token."""
    texts = np.asarray(texts)
    found = np.zeros_like(texts)
    for b, row in enumerate(texts):
        beside = {}
        for t, token in enumerate(row):
            found[b, t] = beside.get(token, 0)
            beside[token] = row[t + 1] if t + 1 < len(row) else 0
    return jnp.asarray(found)


def test_one_that_looks_back_recalls_everything():
    rows = recall.accuracy_by_distance("oracle", looks_back, TASK, (2, 16, 40), questions=100, batch_size=30)
    assert [row.accuracy for row in rows] == [1.0] * 3
    assert [row.trained for row in rows] == [True, True, False]
    assert all(row.correct == row.asked >= 100 and row.ci_high == 1.0 > row.ci_low > 0.9 for row in rows)


def test_a_guess_among_the_values_is_right_by_chance():
    def guess(texts):
        return jax.random.randint(jax.random.key(int(texts.sum())), texts.shape, 4, 12)

    (row,) = recall.accuracy_by_distance("guess", guess, TASK, (5,), questions=2000, batch_size=200)
    assert TASK.chance == 1 / 8
    assert abs(row.accuracy - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / row.asked)
    share, weight = row.accuracy, 1.959964**2 / row.asked  # Wilson's interval
    half = math.sqrt(weight * (share * (1 - share) + weight / 4))
    expected = [(share + weight / 2 + sign * half) / (1 + weight) for sign in (-1, 1)]
    assert [row.ci_low, row.ci_high] == pytest.approx(expected, rel=1e-6)


def test_training_learns_the_nearest_distance_and_follows_from_the_seed():
    task = RecallTask(markers=2, values=4, fillers=2, length=12, nearest=2, furthest=2)
    settings = {"encoding": "rope", "optimizer__learning_rate": 1e-2, "model__num_layers": 1}
    own = run_config(**settings)
    trained, losses = recall.train_recall(own, task, steps=60, batch_size=32)
    assert np.mean(losses[-10:]) < 0.1 < math.log(4) < losses[0]
    (row,) = recall.accuracy_by_distance("rope", recall.greedy(trained), task, (2,), questions=100)
    assert row.accuracy > 0.95


def test_a_vocabulary_that_does_not_hold_the_task_is_refused():
    with pytest.raises(ValueError, match=r"data\.vocab_size is 256, must be at least 324"):
        recall.train_recall(run_config(), RecallTask(fillers=300), steps=1, batch_size=1)


@pytest.mark.parametrize("changes", [{"nearest": 1}, {"nearest": 20}, {"furthest": 48}])
def test_distances_that_no_text_can_have_are_refused(changes):
    with pytest.raises(ValueError, match="below length = 48"):
        dataclasses.replace(TASK, **changes)
