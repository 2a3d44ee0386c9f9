"""Runs that are extended, shortened, stopped, or repeated, and runs whose files are damaged."""

import fcntl
import functools
import json
import os
import re
import shutil
import signal

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from posenc_jax.evaluation.score_cache import ScoreCache
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.runs import driver
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.train import Stopped
from posenc_jax.runs.workdir import WorkdirError
from tests.runs.run_helpers import (
    config_of,
    content,
    empty,
    flip,
    launch,
    logged,
    refuse_to_begin,
    remove,
    stopping_at,
    truncate,
)
from tests.small import write_text

pytestmark = pytest.mark.usefixtures("undrawn")
CONSTANT = {"optimizer__end_lr_ratio": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of twelve steps."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    launch(config_of(folder), workdir)
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def sessions(workdir):
    return workdirs.read(workdir)["sessions"]


def test_a_run_that_has_ended_is_shown_and_not_touched(folder, whole, monkeypatch, capsys):
    refuse_to_begin(monkeypatch)
    before = content(whole)
    launch(config_of(folder), whole)
    assert "Bits per byte" in capsys.readouterr().out
    assert content(whole) == before


def test_a_folder_that_is_no_runs_is_refused_and_left_as_it_is(folder, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(WorkdirError, match="no run's"):
        launch(config_of(folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_workdir_in_use_is_refused_and_its_owner_named(folder, tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        lock.write("process 12345 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkdirError, match="in use by process 12345"):
            launch(config_of(folder), tmp_path)


def test_a_run_that_is_extended_stopped_and_continued_ends_as_a_straight_one(folder, tmp_path, monkeypatch):
    launch(config_of(folder, **CONSTANT), tmp_path / "run")
    longer = config_of(folder, training__duration="24 steps", **CONSTANT)
    with monkeypatch.context() as patch:
        stopping_at(patch, 15)
        with pytest.raises(Stopped):
            launch(longer, tmp_path / "run")
    launch(longer, tmp_path / "run")
    launch(longer, tmp_path / "straight")
    assert [line["step"] for line in logged(tmp_path / "run") if "loss" in line][-1] == 24
    assert json.loads((tmp_path / "run" / "complete.json").read_text())["content"]["step"] == 24
    assert (tmp_path / "run" / "results.csv").read_bytes() == (tmp_path / "straight" / "results.csv").read_bytes()
    starts = [(start["step"], start["total_steps"], start["changed"]) for start in sessions(tmp_path / "run")]
    assert starts[:2] == [(0, 12, {}), (12, 24, {"training.duration": ["12 steps", "24 steps"]})]
    assert 15 < starts[2][0] < 24
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- start 2: from step 12 of 24; training.duration changed from 12 steps to 24 steps\n" in report
    assert "jumped" not in report
    assert "- start" not in (tmp_path / "straight" / "report.md").read_text()


def test_an_evaluation_that_is_stopped_continues_and_ends_in_the_same_bits(folder, whole, tmp_path, monkeypatch):
    compute, computed = Scorer.score_batch, []

    def signalled(self, mesh, params, constants, tokens, *arguments, **options):
        if isinstance(self, ScoreCache):
            computed.append(tokens.shape)
            if len(computed) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, mesh, params, constants, tokens, *arguments, **options)

    monkeypatch.setattr(driver, "ScoreCache", functools.partial(ScoreCache, least_seconds=0))
    monkeypatch.setattr(Scorer, "score_batch", signalled)
    with pytest.raises(Stopped, match="stopped by SIGTERM during evaluation, saved") as stopped:
        launch(config_of(folder), tmp_path / "run")
    assert stopped.value.exit_code == 143
    assert len(list((tmp_path / "run" / "scores").iterdir())) == 1
    launch(config_of(folder), tmp_path / "run")
    assert [shape[1] for shape in computed] == [33, 17]  # the longest length, and the short context of the gain
    assert not (tmp_path / "run" / "scores").exists()
    assert (tmp_path / "run" / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


def test_a_duration_that_is_over_is_refused_and_the_folder_left_as_it_is(folder, copy):
    before = content(copy)
    with pytest.raises(WorkdirError, match=r"trained to step 12 with .*'12 steps', and '9 steps' ends .* at step 9"):
        launch(config_of(folder, training__duration="9 steps"), copy)
    assert content(copy) == before


def test_a_longer_duration_is_refused_where_the_rate_would_jump_unless_it_is_asked_for(folder, copy):
    longer, before = {"training__duration": "24 steps"}, content(copy)
    with pytest.raises(WorkdirError, match=r"'12 steps', and with '24 steps' .* jump from 0.0\d+ to 0.0\d+; .*=True"):
        launch(config_of(folder, **longer), copy)
    assert content(copy) == before
    launch(config_of(folder, **longer, training__allow_schedule_change=True), copy)
    first, second = sessions(copy)
    assert "learning_rates" not in first
    low, high = second["learning_rates"]
    assert low < high / 2
    assert logged(copy)[-1]["step"] == 24
    report = (copy / "report.md").read_text()
    assert f"training.duration changed from 12 steps to 24 steps; the learning rate jumped from {low:.3g}" in report


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *(("results.csv", harm) for harm in (flip, truncate, empty, remove)),
        ("windows.npz", flip),
        ("windows.npz", remove),
        ("complete.json", flip),
    ],
)
def test_a_damaged_result_is_named_set_aside_and_made_again(name, harm, folder, whole, copy, monkeypatch, caplog):
    harm(copy / name)
    left = (copy / name).read_bytes() if (copy / name).exists() else None
    if name == "results.csv":
        refuse_to_begin(monkeypatch)
    launch(config_of(folder), copy)
    assert (copy / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    told = [record.getMessage() for record in caplog.records if "\n" not in record.getMessage()]
    (line,) = (line for line in told if name in line)
    if left is None:
        assert not (copy / "damaged").exists()
    else:
        (aside,) = (copy / "damaged").iterdir()
        assert aside.read_bytes() == left
        assert str(aside) in line
    caplog.clear()
    refuse_to_begin(monkeypatch)
    launch(config_of(folder), copy)
    assert not caplog.records


def test_a_report_that_was_edited_is_kept(folder, copy, monkeypatch):
    refuse_to_begin(monkeypatch)
    (copy / "report.md").write_text("by hand")
    (copy / "results.csv").unlink()
    launch(config_of(folder), copy)
    assert (copy / "report.md").read_text() == "by hand"


def test_a_damaged_log_is_named_in_the_report(folder, copy, caplog):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join([lines[0], lines[1].replace("loss", "lose"), *lines[2:]]))
    (copy / "report.md").unlink()
    launch(config_of(folder), copy)
    lost = "metrics.jsonl: 1 damaged line left out, between step 1 and step 6"
    assert f"- log: {lost}\n" in (copy / "report.md").read_text()
    assert lost in caplog.text
    assert [line["step"] for line in logged(copy) if "loss" in line] == [1, 6, 9, 12]


def test_each_start_is_kept_in_the_record_and_told_where_it_differs(folder, copy, monkeypatch):
    monkeypatch.setattr(driver, "_git_revision", lambda: "feedbeef")
    monkeypatch.setattr(driver, "_version", lambda package: "7.7" if package == "flax" else "1.0")
    first = sessions(copy)
    shutil.rmtree(copy / "checkpoints" / "step_12")
    launch(config_of(folder, training__keep_last=3), copy)
    assert sessions(copy)[:1] == first
    assert sessions(copy)[1]["step"] == 9
    _, one, two = re.split("- start [12]: ", (copy / "report.md").read_text())
    assert two.startswith("from step 9 of 12; training.keep_last changed from 2 to 3; git revision feedbeef; jax 1.0")
    assert "flax 7.7" in two
    assert f"flax {first[0]['versions']['flax']}" in one
    assert "device" not in two


def test_a_report_made_again_doubles_nothing_in_tensorboard(folder, copy):
    (copy / "report.md").unlink()
    launch(config_of(folder), copy)
    events = EventMultiplexer().AddRunsFromDirectory(str(copy / "tensorboard")).Reload()
    finals = [tag for tag in events.Runs()["final"]["scalars"] if tag.startswith("windows_final/")]
    assert len(finals) > 3
    for name, tags in events.Runs().items():
        for tag in tags["scalars"]:
            steps = [event.step for event in events.Scalars(name, tag)]
            assert len(steps) == len(set(steps)), (name, tag)
    assert not [tag for tag in events.Runs()["."]["scalars"] if tag.startswith("windows_final/")]
