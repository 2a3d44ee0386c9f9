"""AdamW against an implementation in NumPy, the schedules against their formulas, and the tables of both."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from posenc_jax.config import UNUSED
from posenc_jax.training import memory
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import initial_state
from posenc_jax.training_config import OptimizerConfig
from tests.small import run_config


@pytest.mark.parametrize(("grad_clip_norm", "weight_decay"), [(1.0, 0.1), (100.0, 0.0)])
def test_three_steps_equal_adamw_in_numpy(grad_clip_norm, weight_decay):
    config = run_config(optimizer__grad_clip_norm=grad_clip_norm, optimizer__weight_decay=weight_decay).optimizer
    optimizer = optimizers.build(config, total_steps=10, warmup_steps=2)
    share = optimizers.relative_rate(config, total_steps=10, warmup_steps=2)
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


FORMULAS = {  # of the share of the steps after the warm-up, the share of the decay, and the rate at the end
    "cosine": lambda done, decay, end: end + (1 - end) * (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done, decay, end: 1 - (1 - end) * done,
    "wsd": lambda done, decay, end: 1 - (1 - end) * max(done - (1 - decay), 0) / decay,
    "constant": lambda done, decay, end: 1,
}


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
@pytest.mark.parametrize(("total", "warmup", "decay", "end"), [(100, 10, 30, 0.1), (50, 0, 50, 0.0)])
def test_a_schedule_warms_up_and_follows_its_formula(name, total, warmup, decay, end):
    config = dataclasses.replace(run_config().optimizer, schedule=name, end_lr_ratio=end)
    share = optimizers.relative_rate(config, total_steps=total, warmup_steps=warmup, decay_steps=decay)
    after = total - warmup
    expected = [(step + 1) / (warmup + 1) for step in range(warmup)]
    expected += [FORMULAS[name](step / after, decay / after, end) for step in range(after + 1)]
    np.testing.assert_allclose(share(jnp.arange(total + 1)), expected, atol=1e-6)


def test_tables_have_the_names_and_the_defaults_of_the_settings():
    names = {field: typing.get_args(hint) for field, hint in typing.get_type_hints(OptimizerConfig).items()}
    assert tuple(optimizers.DIRECTIONS) == tuple(memory.STATE_BYTES) == names["name"]
    assert tuple(optimizers.SCHEDULES) == names["schedule"]
    for name, unused in UNUSED.items():
        assert name in names["name"] + names["schedule"]
        assert unused.items() <= base.get_config().optimizer.to_dict().items()


def directions(name, gradients):
    """The first step of an optimizer for parameters that are 1, at learning rate 1 and without weight decay."""
    config = run_config(optimizer__name=name, optimizer__learning_rate=1.0, optimizer__weight_decay=0.0).optimizer
    optimizer = optimizers.build(config, total_steps=1, warmup_steps=0)
    params = jax.tree.map(jnp.ones_like, gradients)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_muon_orthogonalizes_hidden_matrices_and_leaves_the_rest_to_adamw():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    hidden = {"block_0": {"attention": {"q": {"kernel": (16, 8)}}}, "head": {"hidden": {"kernel": (8, 8)}}}
    rest = {"embedding": (9, 8), "unembedding": {"kernel": (8, 9)}, "encoding_0": {"out": {"kernel": (8, 2)}}}
    shapes = {**hidden, **rest}
    gradients = jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    muon, adamw = directions("muon", gradients), directions("adamw", gradients)
    jax.tree.map(np.testing.assert_array_equal, {k: muon[k] for k in rest}, {k: adamw[k] for k in rest})
    own = (jax.tree.leaves({k: tree[k] for k in hidden}) for tree in (muon, gradients))
    for kernel, gradient in zip(*own, strict=True):
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        sizes = np.diag(u.T @ kernel @ v.T) / (0.2 * math.sqrt(max(kernel.shape)))
        assert np.all((sizes < -0.6) & (sizes > -1.3))  # Newton and Schulz's iteration ends near 1


def test_lion_takes_the_sign_and_adafactor_a_share_of_each_parameter():
    gradients = {"block_0": {"kernel": jnp.array([[3.0, -4.0]])}}
    np.testing.assert_allclose(directions("lion", gradients)["block_0"]["kernel"], [[-1, 1]])
    np.testing.assert_allclose(directions("adafactor", gradients)["block_0"]["kernel"], [[-1, 1]], rtol=1e-6)


@pytest.mark.parametrize("name", optimizers.DIRECTIONS)
def test_the_memory_check_counts_no_more_than_parameters_and_moments_have(name):
    config = run_config(optimizer__name=name, model__d_model=256, model__d_ff=512)
    optimizer = optimizers.build(config.optimizer, total_steps=1, warmup_steps=0)
    state = jax.eval_shape(lambda: initial_state(config, optimizer))
    parameters = sum(x.size for x in jax.tree.leaves(state["params"]))
    held = sum(4 * x.size for x in jax.tree.leaves((state["params"], state["optimizer"])))
    assert held / 2 < memory.STATE_BYTES[name] * parameters <= held


def test_only_matrices_are_decayed_by_default():
    params = {"embedding": 0, "block_0": {"norm": {"scale": 0}, "out": {"kernel": 0, "bias": 0}}}
    decayed = optimizers.matching(params, run_config().optimizer.weight_decay_mask)
    assert decayed == {
        "embedding": False,
        "block_0": {"norm": {"scale": False}, "out": {"kernel": True, "bias": False}},
    }
