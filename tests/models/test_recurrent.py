"""Recurrent language models: equations of their papers, order without positions, and no settings without effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import qwen3, recurrent, rope_extrap
from posenc_jax.config import RunConfig
from posenc_jax.model_config import RECURRENT
from posenc_jax.models.recurrent import ELMo, Recurrent
from posenc_jax.schema import ConfigError
from posenc_jax.training.step import abstract_model
from tests.small import split, tokens


def config(cell: str, **changes) -> RunConfig:
    recipe = recurrent.get_config(f"size=smoke,cell={cell}")
    for field, value in changes.items():
        section, name = field.split("__")
        recipe[section][name] = value
    return RunConfig.from_mapping(recipe.to_dict())


def model(cell: str, **changes) -> Recurrent:
    fields = {"model__d_model": 24, "model__num_layers": 2} | {f"model__{key}": value for key, value in changes.items()}
    kind = ELMo if cell == "elmo" else Recurrent
    return kind(config(cell, **fields).model, vocab_size=64, rngs=nnx.Rngs(0))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(cell, params, x, h, c):
    """The state after one more input, by the equations of the papers in float64."""
    width = h.shape[-1]
    kernel = {name: np.asarray(params[name]["kernel"], np.float64) for name in ("dense_i", "dense_h")}
    gates = [slice(i * width, (i + 1) * width) for i in range(4)]
    from_input, from_state = x @ kernel["dense_i"], h @ kernel["dense_h"]
    if cell == "lstm":
        i, f, g, o = ((from_input + from_state + np.asarray(params["dense_h"]["bias"]))[:, gate] for gate in gates)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    from_input = from_input + np.asarray(params["dense_i"]["bias"])
    if cell == "rnn":
        return np.tanh(from_input + from_state), c
    r, z = (sigmoid(from_input[:, gate] + from_state[:, gate]) for gate in gates[:2])
    candidate = np.tanh(from_input[:, gates[2]] + r * from_state[:, gates[2]])
    return (1 - z) * candidate + z * h, c


def perturbed(own):
    """The model, and its parameters with noise, because biases initialized to zero would hide where they are added."""
    graphdef, params, _ = split(own)
    noise = iter(np.random.default_rng(0).normal(0, 0.3, (99, 4096)))
    params = jax.tree.map(lambda x: x + next(noise)[: x.size].reshape(x.shape).astype(np.float32), params)
    return nnx.merge(graphdef, params, {}), params


def layers(cell, params, x):
    """The output, and the states of every layer, computed one token after another."""
    found = [x]
    for layer in range(len(params)):
        h, c, states = np.zeros_like(x[:, 0]), np.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h, c = step(cell, params[f"cell_{layer}"], found[-1][:, t], h, c)
            states.append(h)
        found.append(np.stack(states, axis=1))
    return found


def embedded(params, text):
    embedding = np.asarray(params["embedding"], np.float64)
    return embedding[np.asarray(text)] * np.sqrt(embedding.shape[1])


def unembedded(params, states):
    tied = "unembedding" not in params
    return states @ (np.asarray(params["embedding"]).T if tied else np.asarray(params["unembedding"]["kernel"]))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "d_model": 16, "tied_embeddings": False}])
def test_logits_are_those_of_the_papers_equations(cell, changes):
    own, params = perturbed(model(cell, **changes))
    text = tokens(3, 12)
    states = layers(cell, params["stack"], embedded(params, text))[-1]
    np.testing.assert_allclose(own(text), unembedded(params, states), atol=2e-4)


@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "d_model": 16, "tied_embeddings": False}])
def test_elmo_mixes_the_layers_of_an_lstm_forwards_and_one_backwards(changes):
    own, params = perturbed(model("elmo", **changes))
    text = tokens(3, 12)
    x, shares = embedded(params, text), np.exp(params["mixture"]) / np.exp(params["mixture"]).sum()
    forwards = layers("lstm", params["forwards"], x)
    backwards = [states[:, ::-1] for states in layers("lstm", params["backwards"], x[:, ::-1])]
    ahead, back = (
        params["scale"] * sum(share * states for share, states in zip(shares, stack, strict=True))
        for stack in (forwards, backwards)
    )
    np.testing.assert_allclose(own(text), unembedded(params, ahead), atol=2e-4)
    np.testing.assert_allclose(own.backward_logits(text), unembedded(params, back), atol=2e-4)
    np.testing.assert_allclose(own.representations(text), np.concatenate([ahead, back], axis=-1), atol=2e-4)


def test_elmos_backward_half_reads_the_tokens_ahead_alone():
    own, text = model("elmo"), tokens()
    change = jnp.abs(own.backward_logits(text) - own.backward_logits(text.at[:, 20].add(1))).max(axis=(0, 2))
    assert change[21:].max() == 0
    assert change[:21].min() > 0


@pytest.mark.parametrize("cell", RECURRENT)
def test_a_token_changes_what_follows_and_nothing_before(cell):
    own, text = model(cell), tokens()
    change = jnp.abs(own(text) - own(text.at[:, 20].add(1))).max(axis=(0, 2))
    assert change[:20].max() == 0
    assert change[20:].min() > 0


@pytest.mark.parametrize("cell", RECURRENT)
def test_the_order_of_earlier_tokens_is_known(cell):
    own, text = model(cell), tokens(1, 4)
    swapped = text[:, jnp.array([1, 0, 2, 3])]
    assert text[0, 0] != text[0, 1]
    assert jnp.abs(own(text) - own(swapped))[:, -1].max() > 1e-4


def test_gates_start_orthogonal_and_forget_gates_open():
    for cell, gates in (("lstm", 4), ("gru", 3), ("rnn", 1)):
        _, params, _ = split(model(cell))
        for kernel in jnp.split(params["stack"]["cell_0"]["dense_h"]["kernel"], gates, axis=1):
            np.testing.assert_allclose(kernel @ kernel.T, np.eye(24), atol=1e-5)
    _, params, _ = split(model("lstm"))
    np.testing.assert_array_equal(params["stack"]["cell_1"]["dense_h"]["bias"], [0] * 24 + [1] * 24 + [0] * 48)


@pytest.mark.parametrize("cell", RECURRENT)
def test_recomputation_changes_nothing_and_bfloat16_little(cell):
    def gradient(**changes):
        graphdef, params, _ = split(model(cell, **changes))
        return jax.jit(jax.grad(lambda params: (nnx.merge(graphdef, params, {})(tokens()) ** 2).mean()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(), gradient(remat=True))
    low = model(cell, dtype="bfloat16")(tokens())
    assert low.dtype == jnp.float32
    assert 0 < jnp.abs(low - model(cell)(tokens())).max() < 0.05


def test_dropout_follows_its_key_and_is_off_without_one():
    own, text = model("gru", dropout=0.5), tokens()
    first, again, other = (own(text, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 0.01
    np.testing.assert_array_equal(own(text), model("gru")(text))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"encoding__name": "alibi"}, "config.encoding.name = 'alibi'"),
        ({"positions__training": "randomized"}, "config.positions.training"),
        ({"positions__evaluation": "even"}, "config.positions.evaluation"),
        ({"temperature__form": "ssmax"}, "config.temperature.form"),
        ({"training__drope": "9 steps"}, "config.training.drope"),
        ({"model__architecture": "ltsm"}, "config.model.architecture = 'ltsm'.*'lstm'"),
        ({"model__num_heads": 2}, "config.model.architecture = 'lstm': num_heads applies only to transformers"),
        ({"model__cells": 2}, "config.model.cells.*no such field"),
    ],
)
def test_settings_of_attention_are_refused(changes, field):
    with pytest.raises(ConfigError, match=field):
        config("lstm", **changes)


@pytest.mark.parametrize("cell", RECURRENT)
def test_recipes_are_of_the_transformers_size(cell):
    sizes = [
        abstract_model(RunConfig.from_mapping(recipe.to_dict()))[1]
        for recipe in (recurrent.get_config(f"cell={cell}"), rope_extrap.get_config())
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_qwen3_has_as_many_parameters_as_the_released_model():
    def parameters(layers):
        recipe.model.num_layers = layers
        return abstract_model(RunConfig.from_mapping(recipe.to_dict()))[1]

    recipe = qwen3.get_config("size=0.6B")
    layers, one = recipe.model.num_layers, parameters(1)
    assert one + (layers - 1) * (parameters(2) - one) == 596_049_920
