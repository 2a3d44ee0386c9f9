"""Stacked runs that are killed and resumed have the same bits as separate runs."""

import contextlib
import json
import os
import signal

import jax
import numpy as np
import pytest

from posenc_jax.training import checkpoint, manifest
from posenc_jax.runs import train
from posenc_jax.runs import stack
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import Checkpoints
from posenc_jax.runs.stack import train_stack
from posenc_jax.training.step import initial_state
from posenc_jax.runs.stopping import Stop, Stopped
from tests.runs.test_members import ONE, alone, text, tiny


class Killed(BaseException):
    pass


def final_state(config, workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", 2)
    optimizer = optimizers.build(config.optimizer, total_steps=7, warmup_steps=2)
    state, _ = checkpoints.restore(initial_state(config, optimizer))
    checkpoints.close()
    return state


@pytest.mark.bits
def test_a_stack_that_was_killed_goes_on_and_each_member_ends_as_alone(tmp_path, monkeypatch):
    saves = {"training__checkpoint_every": "2 steps", "model__dropout": 0.1}
    configs = [tiny(seed=seed, encoding__base=base, **saves) for seed, base in ((0, 1e4), (3, 500.0))]
    runs = {tmp_path / f"member{i}": config for i, config in enumerate(configs)}
    for workdir in runs:
        workdir.mkdir()
    save = Checkpoints.save

    def save_until_6(self, step, *arguments):
        if step == 6:
            raise Killed
        return save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_until_6)
        with pytest.raises(Killed):
            train_stack(runs, text(), tmp_path / "together", devices=ONE)
    train_stack(runs, text(), tmp_path / "together", devices=ONE)
    for i, (workdir, config) in enumerate(runs.items()):
        state, lines = alone(config, tmp_path / f"alone{i}")
        jax.tree.map(np.testing.assert_array_equal, final_state(config, workdir), state)
        losses = {line["step"]: line["loss"] for line in lines}
        logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged] == list(range(1, 8))
        assert [line["loss"] for line in logged] == [losses[line["step"]] for line in logged]


def test_of_a_member_that_diverged_the_batch_is_kept_when_its_run_is_completed(tmp_path):
    hot, well = tiny(optimizer__learning_rate=1e30), tiny(seed=1)
    runs = {tmp_path / "hot": hot, tmp_path / "well": well}
    for workdir in runs:
        workdir.mkdir()
    train_stack(runs, text(), tmp_path / "together", devices=ONE)
    finite = int(final_state(hot, tmp_path / "hot")["step"])
    assert finite < final_state(well, tmp_path / "well")["step"] == 7
    with pytest.raises(train.NonFiniteLoss, match=f"at step {finite + 1};"):
        alone(hot, tmp_path / "hot")
    with np.load(tmp_path / "hot" / "nonfinite.npz", allow_pickle=False) as kept:
        assert kept["step"] == finite + 1
        assert kept["tokens"].shape == (hot.training.batch_size, hot.training.length + 1)


def test_a_stack_whose_last_save_fails_does_not_say_that_it_was_saved(tmp_path, monkeypatch):
    save = Checkpoints.save

    def stopped_as_it_saves(self, *arguments):
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", stopped_as_it_saves)
    monkeypatch.setattr(manifest, "write_manifest", full)
    (tmp_path / "member").mkdir()
    runs = {tmp_path / "member": tiny(training__checkpoint_every="2 steps")}
    with pytest.raises(
        checkpoint.SaveError, match=r"step 2 could not be written to .*: No space left on device; those"
    ):
        train_stack(runs, text(), tmp_path / "together", devices=ONE)


def test_a_signal_between_two_looks_at_it_does_not_stop_a_stack_before_it_is_saved(tmp_path, monkeypatch):
    class Late(Stop):
        """A signal that arrives after the first check."""

        looks = 0

        @property
        def number(self):
            self.looks += 1
            return signal.SIGTERM if self.looks > 1 else 0

        def is_set(self):
            return self.number != 0

    monkeypatch.setattr(stack, "stop_signals", lambda: contextlib.nullcontext(Late()))
    (tmp_path / "member").mkdir()
    runs = {tmp_path / "member": tiny(training__log_every="2 steps", training__steps_per_dispatch=2)}
    with pytest.raises(Stopped) as stopped:
        train_stack(runs, text(), tmp_path / "together", devices=ONE)
    (step,) = manifest.steps(tmp_path / "together" / "members_0")
    assert f"at step {step}, saved" in str(stopped.value)
