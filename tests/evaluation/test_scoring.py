"""Losses of windows are the same for every distribution over devices."""

import functools

import jax
import numpy as np
import pytest

from configs import bert, recurrent
from posenc_jax.config import RunConfig
from posenc_jax.distributed import parallel, sharding
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state
from tests.small import run_config


@functools.cache
def arrays(config):
    return initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))


def new_scorer(config, devices, batch_tokens=4096, **axes):
    """A scorer on this number of devices, and params and constants placed on them."""
    mesh = sharding.make_mesh(devices, jax.devices()[:devices], **axes)
    state = jax.device_put(arrays(config), sharding.placement(arrays(config), mesh))
    return Scorer(abstract_model(config)[0], mesh, batch_tokens), state["params"], state["constants"]


def model(encoding="rope", **changes):
    return run_config(encoding, model__num_layers=1, **changes)


def windows(count, length):
    return np.random.default_rng(0).integers(0, 256, (count, length + 1), dtype=np.int32)


def losses(config, devices, tokens, **options):
    scorer, params, constants = new_scorer(config, devices, **options)
    return scorer(params, constants, tokens)


def temporary_bytes(config, devices, length):
    """The temporary memory of each device, without parameters and results."""
    scorer, params, constants = new_scorer(config, devices)
    compiled = []
    compute = scorer._losses

    def record(*arguments):
        compiled.append(compute.lower(*arguments).compile())
        return compute(*arguments)

    scorer._losses = record
    scorer(params, constants, windows(1, length))
    return compiled[0].memory_analysis().temp_size_in_bytes


BLOCKWISE, IN_ORDER = ("rope", "alibi", "t5", "fire", "fox"), ("cope", "path", "shaw", "stick_breaking", "dape_v2")
SLOW = pytest.mark.slow  # the same code paths as t5


@pytest.mark.parametrize(
    "encoding",
    [pytest.param(name, marks=SLOW if name == "alibi" else ()) for name in BLOCKWISE + IN_ORDER],
)
def test_a_window_shared_by_eight_devices_has_the_losses_of_one(encoding):
    config = model(encoding, model__num_kv_heads=1)
    one, eight = (losses(config, devices, windows(1, 2048 if encoding in BLOCKWISE else 1024)) for devices in (1, 8))
    # FoX subtracts sums of up to 2,048 logarithms, which several devices add in a different order.
    np.testing.assert_allclose(one, eight, atol=3e-4 if encoding == "fox" else 1e-5)


def test_what_feed_forward_layers_make_of_a_shared_window_is_held_in_parts(monkeypatch):
    config = model(model__d_ff=2048)
    whole = losses(config, 8, windows(1, 1024))
    used = temporary_bytes(config, 8, 1024)
    monkeypatch.setattr(parallel, "TOKENS_AT_A_TIME", 32)
    np.testing.assert_allclose(whole, losses(config, 8, windows(1, 1024)), atol=1e-5)
    assert temporary_bytes(config, 8, 1024) < used / 2


def test_windows_longer_than_a_batch_are_shared_too():
    tokens = windows(9, 1024)
    alone, shared = (losses(model(), 8, tokens, batch_tokens=n) for n in (8192, 1000))
    np.testing.assert_allclose(alone, shared, atol=1e-5)


GRU = RunConfig.from_mapping(recurrent.get_config("size=smoke,cell=gru").to_dict())


@pytest.mark.parametrize(
    ("config", "count", "length"),
    [(model(), 3, 1100), (model(), 3, 512), (model(), 8, 1024), (GRU, 3, 1024)],
    ids=["indivisible", "short", "as many as devices", "recurrent"],
)
def test_windows_that_devices_cannot_share_or_need_not_are_scored_whole(config, count, length, monkeypatch):
    monkeypatch.setattr(sharding, "sequence_mesh", lambda mesh: None)
    one, eight = (losses(config, devices, windows(count, length)) for devices in (1, 8))
    np.testing.assert_allclose(one, eight, atol=1e-5)


def test_devices_that_share_kernels_share_windows():
    one = losses(model(), 1, windows(1, 1024))
    np.testing.assert_allclose(one, losses(model(), 8, windows(1, 1024), fsdp=2, tensor=2), atol=1e-5)


def test_an_encoder_reads_a_shared_window_from_both_sides():
    config = RunConfig.from_mapping(bert.get_config("size=smoke,tokens=bytes,positions=rope").to_dict())
    tokens = windows(1, 1024)
    hidden = np.random.default_rng(1).random((1, 1024)) < 0.15
    nats = []
    for devices in (1, 8):
        scorer, params, constants = new_scorer(config, devices)
        nats.append(scorer(params, constants, tokens, None, hidden))
    np.testing.assert_allclose(*nats, atol=1e-5)


@pytest.mark.parametrize("encoding", ["rope", "fire"])
def test_of_a_shared_window_each_device_holds_the_keys_and_an_eighth_of_the_rest(encoding):
    config = model(encoding, model__d_model=256, model__num_kv_heads=1)
    one, eight = (temporary_bytes(config, devices, 4096) - temporary_bytes(config, devices, 2048) for devices in (1, 8))
    keys = 2048 * 2 * config.model.num_kv_heads * config.model.head_dim * 4
    assert eight < one / 8 + 2 * keys, (one, eight, keys)


@pytest.mark.skipif(sharding.forward_options() is None, reason="this XLA does not have the option")
def test_layers_share_their_memory():
    two, eight = (temporary_bytes(run_config("rope", model__num_layers=layers), 1, 2048) for layers in (2, 8))
    assert eight < 1.2 * two
