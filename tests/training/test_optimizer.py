"""The optimizer against an implementation of AdamW in NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posenc_jax.training import optimizer as optimizers
from tests.small import run_config


@pytest.mark.parametrize(("grad_clip_norm", "weight_decay"), [(1.0, 0.1), (100.0, 0.0)])
def test_three_steps_equal_adamw_in_numpy(grad_clip_norm, weight_decay):
    config = run_config(optimizer__grad_clip_norm=grad_clip_norm, optimizer__weight_decay=weight_decay).optimizer
    optimizer = optimizers.build(config, total_steps=10, warmup_steps=2)
    share = optimizers.warmup_cosine(config, total_steps=10, warmup_steps=2)
    params = {"a": {"kernel": jnp.array([1.0, -2.0])}, "scale": jnp.array([3.0])}
    state = optimizer.init(params)
    expected = {"kernel": np.array([1.0, -2.0]), "scale": np.array([3.0])}
    mean = dict.fromkeys(expected, 0.0)
    square = dict.fromkeys(expected, 0.0)
    for step in range(3):
        gradients = {"kernel": np.array([3.0, 4.0 + step]), "scale": np.array([-1.0])}
        updates, state = optimizer.update(
            {"a": {"kernel": jnp.asarray(gradients["kernel"])}, "scale": jnp.asarray(gradients["scale"])}, state, params
        )
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        rate = config.learning_rate * float(share(step))
        for name, gradient in gradients.items():
            gradient = gradient * min(1, grad_clip_norm / norm)
            mean[name] = config.b1 * mean[name] + (1 - config.b1) * gradient
            square[name] = config.b2 * square[name] + (1 - config.b2) * gradient**2
            direction = mean[name] / (1 - config.b1 ** (step + 1))
            direction = direction / (np.sqrt(square[name] / (1 - config.b2 ** (step + 1))) + config.eps)
            decay = weight_decay * expected[name] if name == "kernel" else 0
            expected[name] = expected[name] - rate * (direction + decay)
    np.testing.assert_allclose(params["a"]["kernel"], expected["kernel"], rtol=1e-5)
    np.testing.assert_allclose(params["scale"], expected["scale"], rtol=1e-5)


def test_schedule_warms_up_to_one_and_ends_at_its_final_fraction():
    share = optimizers.warmup_cosine(run_config().optimizer, total_steps=100, warmup_steps=10)
    assert 0 < share(0) < share(5) < 1
    assert share(10) == pytest.approx(1)
    assert share(55) == pytest.approx(0.55, abs=1e-3)
    assert share(100) == pytest.approx(0.1)


def test_only_matrices_are_decayed_by_default():
    params = {"embedding": 0, "block_0": {"norm": {"scale": 0}, "out": {"kernel": 0, "bias": 0}}}
    decayed = optimizers.weight_decay_mask(params, run_config().optimizer.weight_decay_mask)
    assert decayed == {
        "embedding": False,
        "block_0": {"norm": {"scale": False}, "out": {"kernel": True, "bias": False}},
    }
