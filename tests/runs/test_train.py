"""The training loop: several steps per dispatch give the same results as single steps, and stop at the same steps."""

import itertools
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from posenc_jax.data import pipeline, tokens
from posenc_jax.runs import program
from posenc_jax.runs import train as loop
from posenc_jax.schema import ConfigError
from posenc_jax.training.schedule import Schedule
from tests.runs.small_runs import train
from tests.small import run_config

ROOT = Path(__file__).parents[2]
SCHEDULE = Schedule(100, 10, 20, 30, 50, 7, 0, 8)


def test_more_steps_than_can_be_counted_are_refused():
    config = run_config(training__duration="3 epochs")
    with pytest.raises(ConfigError, match=r"config.training.duration = '3 epochs': must be below 2\^31 steps"):
        Schedule.of(config, tokens_per_epoch=10**13)
    assert Schedule.of(config, tokens_per_epoch=10**6).total == 2930


@pytest.mark.parametrize("name", ["warmup", "drope"])
def test_a_part_of_a_run_that_is_longer_than_it_is_refused(name):
    changes = {f"training__{name}": "61 steps"}
    with pytest.raises(ConfigError, match=f"config.training.{name} = '61 steps': must be at most the 60 steps"):
        Schedule.of(run_config(**changes), tokens_per_epoch=10**6)
    Schedule.of(run_config(**changes | {"training__duration": "61 steps"}), tokens_per_epoch=10**6)


def test_a_decay_must_fit_behind_the_warm_up():
    wsd = {"optimizer__schedule": "wsd", "training__warmup": "20 steps"}
    with pytest.raises(
        ConfigError, match=r"config.training.decay = '41 steps': must be at most the 40 steps after .* is 41"
    ):
        Schedule.of(run_config(**wsd, training__decay="41 steps"), tokens_per_epoch=10**6)
    assert Schedule.of(run_config(**wsd, training__decay="40 steps"), tokens_per_epoch=10**6).decay == 40


def test_a_dispatch_holds_no_more_steps_than_it_can_take():
    def most(asked, **changes):
        config = run_config(training__steps_per_dispatch=asked, **changes)
        return Schedule.of(config, tokens_per_epoch=10**6).max_per_dispatch

    assert most(5) == 5
    assert most(200_000) == 10  # the interval of the log
    every = {f"training__{name}_every": "1000000 steps" for name in ("log", "validate", "checkpoint")}
    assert most(200_000, **every) == 60


def assert_same(one, other):
    """With a different number of steps per call, XLA of jax 0.12 rounds the logged learning rate differently."""
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    rates = [[line.get("learning_rate", 0) for line in log] for _, log in (one, other)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    logs = [[line | {"learning_rate": 0} for line in log] for _, log in (one, other)]
    assert logs[0] == logs[1]


def test_a_dispatch_ends_where_there_is_more_to_do_than_train():
    ends, step = [], 0
    while step < 100:
        step = SCHEDULE.dispatch_end(step, 1, 33)
        ends.append(step)
    assert ends == [1, 9, 17, 20, 28, 30, 33, 40, 48, 50, 58, 60, 68, 76, 80, 88, 90, 93, 100]


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """A run with one step per dispatch."""
    return train(folder, tmp_path_factory.mktemp("single"), training__steps_per_dispatch=1)


@pytest.mark.bits
def test_steps_taken_together_change_no_bit_and_dispatches_of_any_length_share_a_program(
    single, folder, tmp_path, caplog
):
    assert [line["step"] for line in single[1]] == [1, 4, 6, 8, 12, 12]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        together = train(folder, tmp_path / "run")
    assert_same(single, together)
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(train_steps)" in r.getMessage()]
    assert len(compiled) == 2  # once with the encoding, and once after it is dropped


@pytest.mark.bits
def test_a_profile_changes_no_bit(single, folder, tmp_path):
    assert_same(single, train(folder, tmp_path / "run", training__profile="2 steps"))
    assert [path.suffix for path in (tmp_path / "run" / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")]


def test_the_time_that_compilation_takes_is_not_in_the_speed(folder, tmp_path, monkeypatch):
    seconds = itertools.count(step=0.001)
    ahead = [0.0]

    def slow(*args):
        ahead[0] += 1000
        return make_train_step(*args)

    make_train_step = program.make_train_step
    monkeypatch.setattr(program, "make_train_step", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds) + ahead[0]))
    train(folder, tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    speeds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    assert len(speeds) == 2  # no throughput is logged for the dispatch that compiles
    assert ahead[0] == 2000
    assert max(speeds) < 1


def test_a_loss_that_is_not_finite_is_told_with_its_step(folder, tmp_path, monkeypatch):
    # Steps 9 to 12 are one dispatch, whose second step breaks.
    def broken(*args):
        train_step = make_train_step(*args)

        def breaks(state, rows):
            state, metrics = train_step(state, rows)
            finite = metrics["finite"] & (state["step"] != 10)
            return state, metrics | {"finite": finite, "loss": jax.numpy.where(finite, metrics["loss"], math.inf)}

        return breaks

    make_train_step = program.make_train_step
    monkeypatch.setattr(program, "make_train_step", broken)
    with pytest.raises(loop.NonFiniteLoss, match=r"loss inf, gradient norm \S+ at step 10;"):
        train(folder, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 8
    data = run_config(data__path=str(folder / "text"), data__cache_dir=str(folder / "cache")).data
    batches = pipeline.training_batches(tokens.prepare(data).splits["train"], length=16, batch_size=8, seed=0)
    with np.load(tmp_path / "run" / "nonfinite.npz") as replay:
        assert replay["step"] == 10
        np.testing.assert_array_equal(replay["tokens"], next(itertools.islice(batches, 9, None)))


def test_the_first_signal_is_told_and_a_second_ends_the_process_at_once():
    program = (
        "import os, signal, sys, time\n"
        "from posenc_jax.runs.train import stop_signals\n"
        "with stop_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.number == 15\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('unwound', flush=True)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")
