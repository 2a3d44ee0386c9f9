"""A resumed run has the same states, logs and curves as an uninterrupted run, bit for bit."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posenc_jax import encodings
from posenc_jax.encodings.base import Constant
from tests.runs.small_runs import train
from tests.small import DIMS


def kinds_of_state():
    """Every encoding, marked slow if an earlier one has the same kinds of state (parameters, constants, per layer)."""
    seen = set()
    for name in encodings.names():
        state = nnx.state(encodings.build(name, DIMS, nnx.Rngs(0)))
        types = {type(variable) for _, variable in nnx.to_flat_state(state)}
        kind = nnx.Param in types, Constant in types, encodings.load(name).shared
        yield pytest.param(name, {}, marks=pytest.mark.slow if kind in seen else (), id=name)
        seen.add(kind)


def points(workdir):
    """The TensorBoard scalars of the run: (step, value) by tag, without throughput."""
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "second" not in tag
    }


def stopped_at_6(whole, workdir):
    """The workdir of a run after step 6, when the log already contains a later line."""
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "step_12")


@pytest.mark.parametrize(
    ("encoding", "changes"),
    [
        *kinds_of_state(),
        ("rope", {"training__grad_accum_steps": 2, "positions__training": "randomized", "positions__range": 64}),
        ("rope", {"training__drope": "8 steps", "devices": 8}),
    ],
)
def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(encoding, changes, folder, tmp_path):
    changes = {"training__drope": "0 steps", "devices": 1, "programs": {}, **changes}
    state, log = train(folder, tmp_path / "whole", encoding, **changes)
    stopped_at_6(tmp_path / "whole", tmp_path / "resumed")
    resumed, resumed_log = train(folder, tmp_path / "resumed", encoding, **changes)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    assert resumed_log == log
    # A resumed run logs its first step, too.
    assert {tag: dict(own) for tag, own in points(tmp_path / "resumed").items()} == {
        tag: dict(own) for tag, own in points(tmp_path / "whole").items()
    }


def test_on_another_number_of_devices_a_run_goes_on_to_rounding(folder, tmp_path):
    state, log = train(folder, tmp_path / "whole", devices=8)
    stopped_at_6(tmp_path / "whole", tmp_path / "resumed")
    resumed, resumed_log = train(folder, tmp_path / "resumed", devices=1)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), resumed["params"], state["params"]
    )
    for own, other in zip(resumed_log, log, strict=True):
        assert own == pytest.approx(other, rel=1e-4)
