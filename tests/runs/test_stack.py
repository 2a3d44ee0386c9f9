"""Runs that are trained in a stack leave the same files as separate runs, even if the stack was killed."""

import contextlib
import dataclasses
import os
import re
import signal

import jax
import numpy as np
import pytest

from posenc_jax.distributed import sharding
from posenc_jax.runs import train
from posenc_jax.runs.program import Stack
from posenc_jax.runs.train import Stop, Stopped
from posenc_jax.training import checkpoint
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import Checkpoints
from posenc_jax.training.step import initial_state
from tests.runs.tiny_runs import alone, logged, program_of, stacked, tiny

RUNS = [
    tiny(model__dropout=0.1),
    tiny(model__dropout=0.1, seed=3, encoding__base=500.0),
    tiny(model__dropout=0.1, seed=3, encoding__scaling="yarn:factor=4", optimizer__weight_decay=0.0),
    tiny(model__dropout=0.1, name="other", optimizer__learning_rate=0.03, optimizer__weight_decay=3.0),
]


@pytest.fixture(scope="module")
def runs_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return [alone(config, folder / str(i)) for i, config in enumerate(RUNS)]


def left(config, workdir):
    """The state in the checkpoint of a finished run of seven steps."""
    with contextlib.closing(Checkpoints(workdir / "checkpoints", 2)) as checkpoints:
        optimizer = optimizers.build(config.optimizer, total_steps=7, warmup_steps=2)
        return checkpoints.restore(initial_state(config, optimizer))[0]


def assert_equal(run, of_run):
    jax.tree.map(np.testing.assert_array_equal, run[0], of_run[0])
    assert run[1] == of_run[1]


def assert_close(runs, runs_alone):
    for (state, log), (state_alone, log_alone) in zip(runs, runs_alone, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), state, state_alone)
        assert [line.keys() for line in log] == [line.keys() for line in log_alone]
        for name in ("loss", "validation_loss", "attention_entropy"):
            values, expected = ([line[name] for line in lines if name in line] for lines in (log, log_alone))
            np.testing.assert_allclose(values, expected, rtol=1e-4 if name == "attention_entropy" else 1e-5)


@pytest.mark.bits
def test_runs_one_after_another_leave_what_they_leave_alone_bit_for_bit(runs_alone, tmp_path):
    runs = stacked(RUNS, tmp_path)
    for i, (run, of_run) in enumerate(zip(runs, runs_alone, strict=True)):
        assert_equal(run, of_run)
        jax.tree.map(np.testing.assert_array_equal, left(RUNS[i], tmp_path / str(i)), of_run[0])
        assert {path.name for path in (tmp_path / str(i)).iterdir()} == {"checkpoints", "metrics.jsonl", "tensorboard"}
    steps = [(line["step"], "validation_loss" in line) for line in runs[0][1]]
    assert steps == [*((i, False) for i in range(1, 5)), (4, True), *((i, False) for i in range(5, 8)), (7, True)]
    first, *others = (jax.tree.leaves(state["params"]) for state, _ in runs)
    assert all(any((x != y).any() for x, y in zip(first, other, strict=True)) for other in others)


@pytest.mark.parametrize(
    ("devices", "vectorized"), [(2, True), (4, False), pytest.param(8, False, marks=pytest.mark.slow)]
)
def test_runs_at_once_or_on_several_devices_are_those_alone_to_rounding(runs_alone, tmp_path, devices, vectorized):
    assert_close(stacked(RUNS, tmp_path, jax.devices()[:devices], vectorized=vectorized), runs_alone)


def test_states_are_on_the_devices_once(tmp_path, monkeypatch):
    before, found, steps = sum(x.nbytes for x in jax.live_arrays()), [], Stack.initial_states

    def measured(self, *arguments):
        compiled = self.train_steps(False)

        def call(states, batches, count):
            results = compiled(states, batches, count)
            found.append((sum(x.nbytes for x in jax.live_arrays()) - before, results[0], batches.nbytes))
            return results

        self.train_steps = lambda dropped: call
        return steps(self, *arguments)

    monkeypatch.setattr(Stack, "initial_states", measured)
    stacked([tiny(seed=seed, training__validate_every="7 steps") for seed in range(4)], tmp_path, vectorized=False)
    of_states = sum(x.nbytes for x in jax.tree.leaves(found[-1][1]))
    assert found
    for live, _, of_batches in found:
        assert live < 1.5 * of_states + 3 * of_batches


@pytest.mark.parametrize(
    "divided",
    [
        {"parallel_runs": 2},  # each over four devices that share its rows
        {"parallel_runs": 2, "fsdp": 2, "tensor": 2},
        {"parallel_runs": 1, "fsdp": 4},
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_runs_that_devices_share_are_those_alone_to_rounding(runs_alone, tmp_path, divided):
    configs = [dataclasses.replace(c, sharding=dataclasses.replace(c.sharding, **divided)) for c in RUNS]
    assert_close(stacked(configs, tmp_path, jax.devices(), vectorized="fsdp" not in divided), runs_alone)


def test_parts_of_the_devices_hold_runs_of_their_own():
    mesh = sharding.make_stack_mesh(4, 8, parallel_runs=2, fsdp=2)
    steps = Stack(program_of(RUNS[0], jax.devices()), 4, mesh, vectorized=True).train_steps(False)
    (states, batches, _), _ = steps.input_shardings
    assert states["params"]["block_0"]["attention"]["q"]["kernel"].shard_shape((4, 32, 32)) == (2, 16, 32)
    assert batches.shard_shape((4, 3, 8, 17)) == (2, 3, 2, 17)


@pytest.mark.parametrize("vectorized", [False, True])
def test_devices_send_each_other_nothing(vectorized):
    stack = Stack(program_of(RUNS[0], jax.devices()), 8, sharding.make_stack_mesh(8, 8), vectorized=vectorized)
    compiled = stack.train_steps(False).as_text()
    assert "while" in compiled
    assert not re.search("all-reduce|all-gather|all-to-all|reduce-scatter|collective", compiled)


@pytest.mark.bits
def test_the_encoding_is_dropped_from_a_stack_when_it_is_from_its_runs(tmp_path):
    configs = [tiny(training__drope="2 steps", seed=seed) for seed in (0, 1)]
    for i, run in enumerate(stacked(configs, tmp_path)):
        assert_equal(run, alone(configs[i], tmp_path / f"alone{i}"))


@pytest.mark.parametrize("vectorized", [pytest.param(False, marks=pytest.mark.bits), True])
def test_a_run_that_diverges_stops_while_the_others_go_on_and_says_so_when_it_is_trained_alone(
    runs_alone, tmp_path, vectorized
):
    absurd = dataclasses.replace(RUNS[0], optimizer=dataclasses.replace(RUNS[0].optimizer, learning_rate=1e30))
    with pytest.raises(train.NonFiniteLoss) as stopped:
        alone(absurd, tmp_path / "alone")
    stopped_at = int(re.search(r"at step (\d+);", str(stopped.value))[1])
    first, hot, last = stacked([RUNS[0], absurd, RUNS[1]], tmp_path, vectorized=vectorized)
    assert hot[0]["step"] == stopped_at - 1
    assert [line["step"] for line in hot[1] if "loss" in line] == list(range(1, stopped_at))
    assert not any("validation_loss" in line for line in hot[1] if line["step"] >= stopped_at)
    if vectorized:
        assert_close([first, last], runs_alone[:2])
    else:
        assert_equal(first, runs_alone[0])
        assert_equal(last, runs_alone[1])
    with pytest.raises(train.NonFiniteLoss, match=f"at step {stopped_at};"):
        alone(absurd, tmp_path / "1")
    with np.load(tmp_path / "1" / "nonfinite.npz", allow_pickle=False) as kept:
        assert kept["step"] == stopped_at
        assert kept["tokens"].shape == (absurd.training.batch_size, absurd.training.length + 1)


@pytest.mark.bits
def test_runs_that_do_not_fit_are_trained_in_equal_parts(runs_alone, tmp_path):
    program = program_of(RUNS[0])
    available = program.stack(2).memory()
    assert program.stack(4, available=2 * available).size == 4
    assert program.stack(4, available=available).size == 2
    assert program.stack(4, available=available - 1) is program.stack(4, available=1) is program.single
    for run, of_run in zip(stacked(RUNS[:3], tmp_path, available=available), runs_alone, strict=False):
        assert_equal(run, of_run)


def test_stacks_that_the_compiler_refuses_are_made_smaller(monkeypatch):
    """The TPU compiler refuses a program that does not fit into memory. Any other error is raised."""
    program, asked = program_of(RUNS[0], jax.devices()[:2]), []

    def refuse(stack, dropped):
        asked.append(stack.size)
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(Stack, "_jit", refuse)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."
    assert program.stack(24, vectorized=True, available=2**60).size == 2
    assert asked == [24, 12, 8, 6, 4]
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="else"):
        program.stack(20, vectorized=True, available=2**60)


class Killed(BaseException):
    pass


@pytest.mark.bits
def test_a_stack_that_was_killed_goes_on_and_each_run_ends_as_alone(tmp_path, monkeypatch):
    saves = {"training__checkpoint_every": "2 steps", "model__dropout": 0.1}
    configs = [tiny(seed=seed, encoding__base=base, **saves) for seed, base in ((0, 1e4), (3, 500.0))]
    save = Checkpoints.save

    def save_until_6(self, step, *arguments):
        if step == 6:
            raise Killed
        return save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_until_6)
        with pytest.raises(Killed):
            stacked(configs, tmp_path)
    for i, run in enumerate(stacked(configs, tmp_path)):
        assert_equal(run, alone(configs[i], tmp_path / f"alone{i}"))


def test_a_stack_whose_last_save_fails_does_not_say_that_it_was_saved(tmp_path, monkeypatch):
    save = Checkpoints.save

    def stopped_as_it_saves(self, *arguments):
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", stopped_as_it_saves)
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    runs = [tiny(training__checkpoint_every="2 steps", seed=seed) for seed in (0, 1)]
    with pytest.raises(
        checkpoint.SaveError, match=r"step 2 could not be written to .*: No space left on device; those"
    ):
        stacked(runs, tmp_path)


def test_a_signal_between_two_looks_at_it_does_not_stop_a_stack_before_it_is_saved(tmp_path, monkeypatch):
    class Late(Stop):
        """A signal that arrives after the first check."""

        looks = 0

        @property
        def number(self):
            self.looks += 1
            return signal.SIGTERM if self.looks > 1 else 0

    monkeypatch.setattr(train, "stop_signals", lambda: contextlib.nullcontext(Late()))
    runs = [tiny(training__log_every="2 steps", training__steps_per_dispatch=2, seed=seed) for seed in (0, 1)]
    with pytest.raises(Stopped) as stopped:
        stacked(runs, tmp_path)
    (step,) = checkpoint.steps(tmp_path / "stack0")
    assert f"at step {step}, saved" in str(stopped.value)


def test_the_speed_of_a_run_in_a_stack_is_its_own(tmp_path):
    stacked(RUNS[:2], tmp_path)
    line = (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()[2]
    assert '"step_seconds"' in line
    assert '"tokens_per_second"' in line
    assert len(logged(tmp_path / "1")) == 9
