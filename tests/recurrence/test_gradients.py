"""Gradients through time against those of one loss at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from experiments.recurrence import gradients
from experiments.recurrence.gradients import GradientNorm
from posenc_jax.config import RunConfig
from posenc_jax.training.step import build_model
from tests.small import tokens, transformer


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
    norms = gradients.gradient_norms(own, windows, at=(7, 11))
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
    norms = gradients.gradient_norms(own, windows, at=(t,))
    assert norms[0, 0, n] == pytest.approx(float(up - down) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("name", ["gru", "rope"])
def test_no_loss_depends_on_inputs_ahead(name):
    graphdef, state = nnx.split(model(name))
    norms = gradients.norms_by_input(graphdef, state, tokens(2, 13), None, jnp.array([0, 5]))
    assert norms.shape == (2, 2, 12)
    for i, t in enumerate((0, 5)):
        assert (norms[i, :, : t + 1] > 0).all()
        assert (norms[i, :, t + 1 :] == 0).all()


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_a_linear_recurrence_fades_by_its_factor_at_every_step(factor):
    own = model("rnn")
    own.embedding[...] *= 1e-3  # so that tanh is the identity
    own.stack.cell_0.dense_h.kernel[...] = factor * jnp.eye(16)
    norms = gradients.gradient_norms(own, tokens(2, 21), at=(10, 19))
    np.testing.assert_allclose(norms[..., 1:] / norms[..., :-1], factor, rtol=1e-3)
    assert norms[..., 10].min() > 0  # about 1e-30, whose square underflows in float32


def test_positions_reach_the_model():
    own, windows = model("sinusoidal"), tokens(1, 9)
    shifted = gradients.gradient_norms(own, windows, 1 + jnp.arange(8)[None], at=(7,))
    assert not np.allclose(shifted, gradients.gradient_norms(own, windows, at=(7,)))
    contiguous = gradients.gradient_norms(own, windows, jnp.arange(8)[None], at=(7,))
    np.testing.assert_allclose(contiguous, gradients.gradient_norms(own, windows, at=(7,)))


def test_positions_outside_the_window_are_refused():
    with pytest.raises(ValueError, match="must be positions of 0 to 7"):
        gradients.gradient_norms(model("rnn"), tokens(1, 9), at=(8,))


def test_the_summary_is_the_median_over_windows_and_positions():
    norms = np.array([[[4.0, 1.0]], [[4.0, 0.0]], [[4.0, 1e9]]])
    first, second = gradients.summary("rnn", "trained", norms)
    assert first == GradientNorm("rnn", "trained", 0, 4.0, 4.0, 4.0)
    assert (second.distance, second.value, second.ci_low, second.ci_high) == (1, 1.0, 0.0, 1e9)


def test_reach_is_the_distance_from_which_on_little_is_left():
    def rows(*values):
        return [GradientNorm("rnn", "trained", n, value, value, value) for n, value in enumerate(values)]

    assert gradients.reach(rows(9.0, 2.0, 1.0, 0.001, 0.5, 0.001, 0.0)) == 5
    assert gradients.reach(rows(9.0, 2.0, 0.001)) == 2
    assert gradients.reach(rows(900.0, 2.0, 1.0, 0.5)) is None
    assert gradients.reach(rows(9.0, 2.0, 1.0, 0.5), share=0.5) == 3
