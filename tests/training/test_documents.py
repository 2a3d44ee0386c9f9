"""Training on windows that hold several documents: the loss, its parts, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax.schema import ConfigError
from posenc_jax.training import objectives
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step
from tests.models.test_recurrent import config as recurrent
from tests.small import run_config

TOKENS = jax.random.randint(jax.random.key(0), (2, 25), 0, 256)
DOCUMENTS = jnp.asarray([[0] * 4 + [1] * 1 + [2] * 20, [0] * 25], jnp.int32)  # 22 and 24 scored tokens
BATCH = jnp.stack([TOKENS, DOCUMENTS], axis=1)
PACKED = {"data__packing": "documents", "model__num_layers": 1}


def model_of(config, state):
    return nnx.merge(abstract_model(config)[0], state["params"], state["constants"])


def step_of(**changes):
    """The configuration and the initial state of a run, and its state and metrics after one step on the batch."""
    config = run_config(**PACKED, **changes)
    optimizer = optimizers.build(config.optimizer, total_steps=10, warmup_steps=0)
    step = make_train_step(config, abstract_model(config)[0], optimizer, jnp.arange(256))
    state = initial_state(config, optimizer)
    return config, state, *jax.jit(step)(state, BATCH)


def test_the_loss_is_the_mean_over_tokens_that_have_one_before_them_in_their_document():
    config, initial, state, metrics = step_of(training__grad_accum_steps=1, training__batch_size=2)
    # Each document at the beginning of a window: in a causal model, what follows does not change its losses.
    windows, sizes = jnp.stack([TOKENS[0], jnp.roll(TOKENS[0], -5), TOKENS[1]]), (4, 20, 25)
    losses = nnx.jit(objectives.token_losses)(model_of(config, initial), windows)
    nats = jnp.concatenate([row[: size - 1] for row, size in zip(losses, sizes, strict=True)])
    scored = np.concatenate([row[1:size] for row, size in zip(windows, sizes, strict=True)])
    assert metrics["loss"] == pytest.approx(float(nats.mean()), rel=1e-5)
    bits = float(nats.mean()) / scored.mean() / np.log(2)  # token n has n bytes
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    _, _, in_parts, metrics_of_parts = step_of(training__grad_accum_steps=2, training__batch_size=2)
    for name in ("loss", "bits_per_byte", "gradient_norm"):
        assert metrics_of_parts[name] == pytest.approx(float(metrics[name]), rel=1e-5)
    moments = in_parts["optimizer"], state["optimizer"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *moments)


def test_elmo_predicts_tokens_of_the_same_document_in_both_directions():
    config = recurrent("elmo", data__packing="documents")
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    model = model_of(config, state)
    found, scored = objectives.training_loss(config, model, TOKENS, None, jax.random.key(1), DOCUMENTS)
    parts, key = [TOKENS[:1, :4], TOKENS[:1, 5:], TOKENS[1:]], jax.random.key(1)
    sums = [(part.size - 1) * objectives.training_loss(config, model, part, None, key)[0] for part in parts]
    assert scored.sum() == 46
    assert found == pytest.approx(float(sum(sums)) / 46, rel=1e-5)


def test_settings_that_cannot_stay_within_documents_are_refused():
    with pytest.raises(ConfigError, match=r"positions.training = 'offset': must be 'contiguous' for data.packing"):
        run_config(positions__training="offset", **PACKED)
    config = run_config("p_rope", encoding__key_offset=True, **PACKED)
    with pytest.raises(ConfigError, match=r"config.data.packing = 'documents': must be 'none' for PRoPE"):
        abstract_model(config)
    abstract_model(run_config("p_rope", **PACKED))
