"""Gradients through time against those of one loss at a time, and a recall task without shortcuts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from experiments.recurrence import memory_measures
from experiments.recurrence.memory_measures import NOTHING_ASKED, GradientNorm, RecallTask
from posenc_jax.config import RunConfig
from posenc_jax.training.step import build_model
from tests.small import run_config, tokens, transformer

TASK = RecallTask(markers=4, values=8, fillers=6, length=48, nearest=2, furthest=16)


def config(cell, **changes) -> RunConfig:
    recipe = recurrent.get_config(f"size=smoke,cell={cell}")
    recipe.model.update({"num_layers": 1, "d_model": 16} | changes)
    return RunConfig.from_mapping(recipe.to_dict())


def model(name):
    if name in ("rnn", "lstm", "gru"):
        return build_model(config(name), jnp.zeros((), jnp.uint32))
    return transformer(name, num_layers=1)


def loss_at(model, x, window, t):
    """The loss in nats of the token after position t of one window, as a function of the input embeddings [T, D]."""
    logits = model.unembed(model.states(x[None]))[0, t]
    return -jax.nn.log_softmax(logits)[window[t + 1]]


@pytest.mark.parametrize("name", ["gru", "rope", "fox"])
def test_norms_are_those_of_one_loss_and_one_input_at_a_time(name):
    own, windows = model(name), tokens(3, 13)
    norms = memory_measures.gradient_norms(own, windows, at=(7, 11))
    assert norms.shape == (3, 2, 8)
    gradient = jax.jit(jax.grad(lambda x: loss_at(own, x, windows[2], 11)))(own.embed(windows[2:, :-1])[0])
    expected = [np.linalg.norm(gradient[11 - n]) for n in range(8)]
    np.testing.assert_allclose(norms[2, 1], expected, rtol=1e-4)


def test_a_norm_is_the_steepest_change_of_the_loss():
    own, windows = model("alibi"), tokens(1, 9)
    x, t, n, step = own.embed(windows[:, :-1])[0], 6, 4, 1e-2
    loss = jax.jit(lambda x: loss_at(own, x, windows[0], t))
    direction = jax.grad(loss)(x)[t - n]
    direction = direction / jnp.linalg.norm(direction)
    up, down = (loss(x.at[t - n].add(sign * step * direction)) for sign in (1, -1))
    norms = memory_measures.gradient_norms(own, windows, at=(t,))
    assert norms[0, 0, n] == pytest.approx(float(up - down) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("name", ["gru", "rope"])
def test_no_loss_depends_on_inputs_ahead(name):
    graphdef, state = nnx.split(model(name))
    norms = memory_measures.norms_by_input(graphdef, state, tokens(2, 13), None, jnp.array([0, 5]))
    assert norms.shape == (2, 2, 12)
    for i, t in enumerate((0, 5)):
        assert (norms[i, :, : t + 1] > 0).all()
        assert (norms[i, :, t + 1 :] == 0).all()


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_a_linear_recurrence_fades_by_its_factor_at_every_step(factor):
    own = model("rnn")
    own.embedding[...] *= 1e-3  # so that tanh is the identity
    own.stack.cell_0.dense_h.kernel[...] = factor * jnp.eye(16)
    norms = memory_measures.gradient_norms(own, tokens(2, 21), at=(10, 19))
    np.testing.assert_allclose(norms[..., 1:] / norms[..., :-1], factor, rtol=1e-3)
    assert norms[..., 10].min() > 0  # about 1e-30, whose square underflows in float32


def test_positions_reach_the_model():
    own, windows = model("sinusoidal"), tokens(1, 9)
    shifted = memory_measures.gradient_norms(own, windows, 1 + jnp.arange(8)[None], at=(7,))
    assert not np.allclose(shifted, memory_measures.gradient_norms(own, windows, at=(7,)))
    contiguous = memory_measures.gradient_norms(own, windows, jnp.arange(8)[None], at=(7,))
    np.testing.assert_allclose(contiguous, memory_measures.gradient_norms(own, windows, at=(7,)))


def test_positions_outside_the_window_are_refused():
    with pytest.raises(ValueError, match="must be positions of 0 to 7"):
        memory_measures.gradient_norms(model("rnn"), tokens(1, 9), at=(8,))


def test_the_summary_is_the_median_over_windows_and_positions():
    norms = np.array([[[4.0, 1.0]], [[4.0, 0.0]], [[4.0, 1e9]]])
    first, second = memory_measures.summary("rnn", "trained", norms)
    assert first == GradientNorm("rnn", "trained", 0, 4.0, 4.0, 4.0)
    assert (second.distance, second.value, second.ci_low, second.ci_high) == (1, 1.0, 0.0, 1e9)


def test_reach_is_the_distance_from_which_on_little_is_left():
    def rows(*values):
        return [GradientNorm("rnn", "trained", n, value, value, value) for n, value in enumerate(values)]

    assert memory_measures.reach(rows(9.0, 2.0, 1.0, 0.001, 0.5, 0.001, 0.0)) == 5
    assert memory_measures.reach(rows(9.0, 2.0, 0.001)) == 2
    assert memory_measures.reach(rows(900.0, 2.0, 1.0, 0.5)) is None
    assert memory_measures.reach(rows(9.0, 2.0, 1.0, 0.5), share=0.5) == 3


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
    rows = memory_measures.recall("oracle", looks_back, TASK, (2, 16, 40), questions=100, batch_size=30)
    assert [row.accuracy for row in rows] == [1.0] * 3
    assert [row.trained for row in rows] == [True, True, False]
    assert all(row.correct == row.asked >= 100 and row.ci_high == 1.0 > row.ci_low > 0.9 for row in rows)


def test_a_guess_among_the_values_is_right_by_chance():
    def guess(texts):
        return jax.random.randint(jax.random.key(int(texts.sum())), texts.shape, 4, 12)

    (row,) = memory_measures.recall("guess", guess, TASK, (5,), questions=2000, batch_size=200)
    assert TASK.chance == 1 / 8
    assert abs(row.accuracy - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / row.asked)


def test_training_learns_the_nearest_distance_and_follows_from_the_seed():
    task = RecallTask(markers=2, values=4, fillers=2, length=12, nearest=2, furthest=2)
    settings = {"encoding": "rope", "optimizer__learning_rate": 1e-2, "model__num_layers": 1}
    own = run_config(**settings)
    trained, losses = memory_measures.train_recall(own, task, steps=60, batch_size=32)
    assert np.mean(losses[-10:]) < 0.1 < math.log(4) < losses[0]
    (row,) = memory_measures.recall("rope", memory_measures.greedy(trained), task, (2,), questions=100)
    assert row.accuracy > 0.95


def test_a_vocabulary_that_does_not_hold_the_task_is_refused():
    with pytest.raises(ValueError, match=r"data\.vocab_size is 256, must be at least 324"):
        memory_measures.train_recall(run_config(), RecallTask(fillers=300), steps=1, batch_size=1)


@pytest.mark.parametrize("changes", [{"nearest": 1}, {"nearest": 20}, {"furthest": 48}])
def test_distances_that_no_text_can_have_are_refused(changes):
    with pytest.raises(ValueError, match="below length = 48"):
        dataclasses.replace(TASK, **changes)
