"""Training objectives: masked tokens as in BERT, and both directions as in ELMo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import bert, recurrent
from posenc_jax.config import RunConfig
from posenc_jax.training import objectives, step
from posenc_jax.training import optimizer as optimizers
from tests.small import run_config


def setup(recipe, **training):
    config = RunConfig.from_mapping(recipe.to_dict())
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    state = step.initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    return config, nnx.merge(step.abstract_model(config)[0], state["params"], state["constants"])


def test_as_many_tokens_are_chosen_in_every_row_and_other_ones_for_another_key():
    first, other = (objectives.chosen(jax.random.key(seed), (50, 40), 0.15) for seed in (0, 1))
    assert (first.sum(axis=1) == 6).all()
    assert (first != other).any()
    assert objectives.chosen(jax.random.key(0), (3, 4), 0.01).sum(axis=1).tolist() == [1, 1, 1]
    assert (first.sum(axis=0) > 0).all()


def test_chosen_tokens_are_hidden_replaced_or_left_as_bert_does():
    tokens = jnp.full((200, 300), 7)
    scored = objectives.chosen(jax.random.key(0), tokens.shape, 0.5)
    read = objectives.corrupted(jax.random.key(1), tokens, scored, 64)
    assert (read[~scored] == 7).all()
    found = np.asarray(read[scored])
    assert np.mean(found == 64) == pytest.approx(0.8, abs=0.01)
    assert np.mean(found == 7) == pytest.approx(0.1 + 0.1 / 64, abs=0.01)
    assert set(np.unique(found)) == set(range(65))


def test_an_encoder_is_scored_on_what_it_does_not_see():
    _, model = setup(bert.get_config("size=smoke,tokens=bytes"))
    tokens = jax.random.randint(jax.random.key(0), (4, 41), 0, 256)
    hidden = jnp.zeros((4, 40), bool).at[:, 10].set(True)
    nats = objectives.token_losses(model, tokens, hidden=hidden)
    assert (nats[:, 10] > 0).all()
    assert jnp.abs(jnp.delete(nats, 10, axis=1)).max() == 0
    other = objectives.token_losses(model, tokens.at[:, 11].set(0), hidden=hidden)
    logits = model(jnp.where(hidden, 256, tokens[:, 1:]))
    expected = -jax.nn.log_softmax(logits)[jnp.arange(4), 10, tokens[:, 11]]
    np.testing.assert_allclose(nats[:, 10], expected, rtol=1e-5)
    np.testing.assert_allclose(other[:, 10], -jax.nn.log_softmax(logits)[:, 10, 0], rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_training_scores_the_share_of_tokens_asked_for(fraction):
    config, model = setup(bert.get_config("size=smoke,tokens=bytes"), mask_ratio=fraction)
    tokens = jax.random.randint(jax.random.key(0), (4, 41), 0, 256)
    loss, scored = objectives.training_loss(config, model, tokens, None, jax.random.key(1))
    assert scored.mean() == fraction
    key = jax.random.split(jax.random.fold_in(jax.random.key(1), 1))[1]
    read = objectives.corrupted(key, tokens[:, 1:], scored > 0, 256)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(model(read)), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, (nats * scored).sum() / scored.sum(), rtol=1e-5)


def test_elmo_learns_in_both_directions_and_is_scored_forwards():
    config, model = setup(recurrent.get_config("size=smoke,cell=elmo"))
    tokens = jax.random.randint(jax.random.key(0), (4, 41), 0, 256)
    loss, _ = objectives.training_loss(config, model, tokens, None, jax.random.key(1))
    ahead = objectives.token_losses(model, tokens)
    logits = jax.nn.log_softmax(model.backward_logits(tokens[:, 1:]))
    back = -jnp.take_along_axis(logits, tokens[:, :-1, None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, (ahead.mean() + back.mean()) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        ahead, -jnp.take_along_axis(jax.nn.log_softmax(model(tokens[:, :-1])), tokens[:, 1:, None], axis=-1)[..., 0],
        rtol=1e-4,
    )  # fmt: skip


def test_evaluation_scores_the_same_tokens_always_and_all_of_a_causal_model():
    encoder = RunConfig.from_mapping(bert.get_config("size=smoke").to_dict())
    windows = np.zeros((100, 201), np.int32)
    first, again = (objectives.evaluation_choice(encoder, windows) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.mean() == pytest.approx(0.15, abs=0.01)
    assert objectives.evaluation_choice(run_config("rope"), windows).all()
