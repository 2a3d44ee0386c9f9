"""Every optimizer trains, and its runs are the same alone, resumed, stacked and sharded.

AdamW is left out, because the other tests of runs train with it.
"""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from posenc_jax.training.checkpoint import Checkpoints
from posenc_jax.training.optimizer import DIRECTIONS
from tests.runs.tiny_runs import program_of, tiny

STEPS = 3
WIDE = {"model__d_model": 128, "model__d_ff": 128}  # Adafactor factors the moments of some kernels


def trained(stack, configs, states=None, start=0):
    """The states and losses after three steps from `start`. The states are given up."""
    states = stack.initial_states(configs) if states is None else states
    batches = stack.reader([config.seed for config in configs], start)(STEPS)
    with jax.set_mesh(stack.mesh):
        states, metrics = stack.train_steps(False)(states, batches, STEPS)
    return states, jax.device_get(metrics["loss"])


def assert_close(state, expected):
    for own, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, atol=2e-5)


@pytest.mark.parametrize("name", sorted(DIRECTIONS.keys() - {"adamw"}))
def test_resumed_stacked_and_sharded_runs_of_an_optimizer_are_those_alone(name, tmp_path):
    settings = {f"training__{part}_every": f"{STEPS} steps" for part in ("log", "validate", "checkpoint")} | WIDE
    settings |= {"training__duration": "9 steps", "optimizer__schedule": "wsd", "training__decay": "4 steps"}
    settings |= {"optimizer__name": name}
    one, other = (tiny(seed=seed, optimizer__learning_rate=rate, **settings) for seed, rate in ((0, 0.01), (1, 0.03)))
    program = program_of(one)
    (first, losses), (state, _) = trained(program.single, [one]), trained(program.single, [other])
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    alone = jax.device_get((first, state))
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", 2)) as checkpoints:
        checkpoints.save(STEPS, state, {"step": STEPS})
        checkpoints.wait()
        resumed, _ = checkpoints.restore(program.single.initial_states([one]))
    (ended, _), (again, _) = (trained(program.single, [other], own, STEPS) for own in (state, resumed))
    jax.tree.map(np.testing.assert_array_equal, again, ended)

    stack = program.stack(2, vectorized=True)
    for own, expected in zip(stack.split(trained(stack, [one, other])[0]), alone, strict=True):
        assert_close(own, expected)

    divided = dataclasses.replace(one, sharding=dataclasses.replace(one.sharding, fsdp=2, tensor=2))
    assert_close(trained(program_of(divided, jax.devices()[:4]).single, [divided])[0], alone[0])
