"""The loop: steps taken many at a time give what steps one at a time give, and are told apart where it matters."""

import itertools
import json
import logging
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from posenc_jax.data import tokens
from posenc_jax.schema import ConfigError
from posenc_jax.training import loop, sharding
from tests.small import run_config

SCHEDULE = loop.Schedule(100, 10, 20, 30, 50, 7, 0)


def test_more_steps_than_can_be_counted_are_refused():
    config = run_config(training__duration="3 epochs")
    with pytest.raises(ConfigError, match=r"config.training.duration = '3 epochs': must be below 2\^31 steps"):
        loop.Schedule.of(config, tokens_per_epoch=10**13)
    assert loop.Schedule.of(config, tokens_per_epoch=10**6).total == 2930


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text to train on, and where its tokens are kept."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text("".join(random.choice(list("abcd \n"), 400)))
    return folder


def train(folder, workdir, **changes):
    """The final state of a run of 12 steps, and its log without what depends on the clock."""
    training = {"duration": "12 steps", "warmup": "2 steps", "log_every": "4 steps", "validate_every": "6 steps"}
    training |= {
        "checkpoint_every": "6 steps",
        "drop_encoding": "5 steps",
        "batch_size": 8,
        "length": 16,
        "steps_per_dispatch": 5,
    }
    changes = {f"training__{name}": value for name, value in training.items()} | changes
    data = {"data__path": str(folder / "text"), "data__cache_dir": str(folder / "cache")}
    evaluation = {"evaluation__lengths": (16,), "evaluation__tail": 8}
    config = run_config(model__num_layers=1, model__dropout=0.1, **data, **evaluation, **changes)
    mesh = sharding.make_mesh(8, jax.devices()[:2])

    def validate(params, constants, dropped):
        return {"validation_loss": 1.0, "validation_bits_per_byte": float(dropped)}

    workdir.mkdir(exist_ok=True)
    state = loop.train(config, tokens.prepare(config.data), mesh, workdir, validate, launched=0.0)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("step_seconds", "tokens_per_second", "flops_per_second")
    return state, [{name: value for name, value in line.items() if name not in clock} for line in lines]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert one[1] == other[1]


def test_a_dispatch_ends_where_there_is_more_to_do_than_train():
    ends, step = [], 0
    while step < 100:
        step = SCHEDULE.dispatch_end(step, 8, 1, 33)
        ends.append(step)
    assert ends == [1, 9, 17, 20, 28, 30, 33, 40, 48, 50, 58, 60, 68, 76, 80, 88, 90, 93, 100]


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """A run that takes each step by itself."""
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
    assert len(compiled) == 2  # with the encoding, and once it is dropped


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

    make_train_step = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(seconds) + ahead[0]))
    train(folder, tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    speeds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    assert len(speeds) == 2  # none where it was compiled
    assert ahead[0] == 2000
    assert max(speeds) < 1


def test_a_loss_that_is_not_finite_is_told_with_its_step(folder, tmp_path, monkeypatch):
    # Steps 9 to 12 are one dispatch, of which the second breaks.
    def broken(*args):
        train_step = make_train_step(*args)

        def breaks(state, rows):
            state, metrics = train_step(state, rows)
            finite = metrics["finite"] & (state["step"] != 10)
            return state, metrics | {"finite": finite, "loss": jax.numpy.where(finite, metrics["loss"], math.inf)}

        return breaks

    make_train_step = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", broken)
    with pytest.raises(loop.NonFiniteLoss, match=r"loss inf, gradient norm \S+ at step 10;"):
        train(folder, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 8
