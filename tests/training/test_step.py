"""The training step: the same results for every accumulation and sharding, and no update from non-finite values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert, recurrent
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.model_config import RECURRENT
from posenc_jax.schema import ConfigError
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step
from tests.encodings.test_contract import one_of_each_kind
from tests.small import run_config


def small_config(encoding="rope", **changes):
    return run_config(encoding, **{"model__num_layers": 1} | changes)


@functools.cache
def trained(config, steps=3, devices=1, bytes_per_token=1):
    """The state and metrics after some steps on random tokens, as NumPy arrays, and how often the step was traced."""
    optimizer = optimizers.build(config.optimizer, total_steps=10, warmup_steps=2)
    token_bytes = jnp.full((256,), bytes_per_token)
    train_step = make_train_step(config, abstract_model(config)[0], optimizer, token_bytes)
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        traces.append(tokens)
        return train_step(state, tokens)

    mesh = sharding.make_mesh(16, jax.devices()[:devices])
    state = sharding.replicate(initial_state(config, optimizer), mesh)
    metrics = []
    for seed in range(steps):
        tokens = np.random.default_rng(seed).integers(0, 256, (16, 33), dtype=np.int32)
        state, values = step(state, sharding.shard_rows(tokens, mesh))
        metrics.append(values)
    return *jax.device_get((state, metrics)), len(traces)


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


def test_loss_of_a_new_model_is_that_of_uniform_guesses_and_falls():
    # Logits of standard deviation 1 cost half a nat. Tied embeddings start higher: they favour the token just read.
    _, metrics, _ = trained(small_config(optimizer__learning_rate=0.01, model__tied_embeddings=False), steps=8)
    assert metrics[0]["loss"] == pytest.approx(math.log(256) + 0.5, abs=0.3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_bits_per_byte_count_the_bytes_of_the_targets():
    _, metrics, _ = trained(small_config(), steps=1, bytes_per_token=3)
    assert metrics[0]["bits_per_byte"] == pytest.approx(float(metrics[0]["loss"]) / math.log(2) / 3, rel=1e-5)


@one_of_each_kind
def test_the_step_is_traced_once_and_eight_devices_equal_one(name):
    one, one_metrics, traces = trained(small_config(name))
    assert traces == 1
    eight, eight_metrics, _ = trained(small_config(name), devices=8)
    assert_close(one_metrics, eight_metrics, 1e-4)
    assert_close(one["params"], eight["params"], 2e-4)


@pytest.mark.parametrize("cell", RECURRENT)
def test_recurrent_models_are_trained_alike_on_eight_devices(cell):
    recipe = recurrent.get_config(f"size=smoke,cell={cell}")
    recipe.model.num_layers = 1
    config = RunConfig.from_mapping(recipe.to_dict())
    one, _, traces = trained(config)
    assert traces == 1
    assert_close(one["params"], trained(config, devices=8)[0]["params"], 1e-4)


def test_an_encoder_is_trained_alike_on_eight_devices():
    recipe = bert.get_config("size=smoke,tokens=bytes,positions=rope")
    recipe.model.num_layers = 1
    config = RunConfig.from_mapping(recipe.to_dict())
    one, _, traces = trained(config)
    assert traces == 1
    assert_close(one["params"], trained(config, devices=8)[0]["params"], 1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(devices):
    whole, whole_metrics, _ = trained(small_config())
    parts, parts_metrics, _ = trained(small_config(training__grad_accum_steps=4), devices=devices)
    assert_close(whole_metrics, parts_metrics, 1e-4)
    assert_close(whole["params"], parts["params"], 1e-4)


@pytest.mark.parametrize("changes", [{"model__remat": True}, {"model__num_kv_heads": 1, "model__remat": True}])
def test_recomputation_changes_nothing(changes):
    plain = {name: value for name, value in changes.items() if name != "model__remat"}
    assert_close(trained(small_config(**changes))[0]["params"], trained(small_config(**plain))[0]["params"], 1e-5)


def test_dropout_follows_seed_and_step_alone():
    dropout = {"model__dropout": 0.3}
    first, again = trained(small_config(**dropout))[1], trained.__wrapped__(small_config(**dropout))[1]
    assert_close(first, again, 0)
    assert abs(first[0]["loss"] - trained(small_config())[1][0]["loss"]) > 1e-3
    recomputed = trained(small_config(model__remat=True, **dropout))[1]
    assert_close(first, recomputed, 1e-5)


def test_bfloat16_stays_close_to_float32_and_keeps_float32_parameters():
    low, metrics, _ = trained(small_config(model__dtype="bfloat16"))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(low["params"]))
    assert metrics[-1]["loss"] == pytest.approx(float(trained(small_config())[1][-1]["loss"]), abs=0.05)


def test_a_loss_that_is_not_finite_changes_nothing_from_then_on():
    config = small_config()
    optimizer = optimizers.build(config.optimizer, total_steps=10, warmup_steps=2)
    step = jax.jit(make_train_step(config, abstract_model(config)[0], optimizer, jnp.ones(256, int)))
    state = initial_state(config, optimizer)
    tokens = jnp.zeros((16, 33), jnp.int32)
    broken = state | {"params": state["params"] | {"embedding": state["params"]["embedding"].at[0, 0].set(jnp.nan)}}
    after, metrics = step(broken, tokens)
    assert not metrics["finite"]
    assert_close(broken["params"], after["params"], 0)
    assert_close(broken["optimizer"], after["optimizer"], 0)
    repaired, metrics = step(after | {"params": state["params"]}, tokens)
    assert not metrics["finite"]
    assert_close(state["params"], repaired["params"], 0)


def test_windows_longer_than_a_learned_table_are_refused():
    config = run_config("learned", training__length=128, training__pretrained_length=64)
    with pytest.raises(ConfigError, match="must be at most 64, the positions in the table of encoding 'learned'"):
        abstract_model(config)
