"""A run may continue with another duration if a new run with that duration would have reached the same state."""

import json

import pytest

from posenc_jax.runs import driver
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import plain
from posenc_jax.training import checkpoint
from posenc_jax.training.schedule import Schedule
from tests.small import run_config

WARMUP = 10


def schedule(total, dropped=0, decay=0):
    return Schedule(total, WARMUP, 5, 5, 5, dropped, 0, 5, decay)


def jump(*sessions, total, step, dropped=0, decay=0, **changes):
    record = {"sessions": [{"step": first, "total_steps": own} for first, own in sessions]}
    return driver.rate_jump(record, run_config(**changes), schedule(total, dropped, decay), step)


@pytest.mark.parametrize(("step", "same"), [(0, True), (5, True), (WARMUP + 1, True), (WARMUP + 2, False), (60, False)])
def test_within_the_warm_up_and_its_peak_durations_are_the_same(step, same):
    assert (jump((0, 60), total=90, step=step) is None) == same


def test_without_decay_durations_are_the_same_until_the_encoding_is_dropped():
    for constant in ({"optimizer__end_lr_ratio": 1.0}, {"optimizer__schedule": "constant"}):
        assert jump((0, 60), total=90, step=60, **constant) is None
        assert jump((0, 60), total=90, step=50, dropped=10, **constant) is None
        assert jump((0, 60), total=90, step=51, dropped=10, **constant) is not None


WSD = {"optimizer__schedule": "wsd", "training__decay": "20 steps"}


def test_the_decay_of_wsd_starts_anew_before_the_new_end_unless_it_has_begun():
    assert jump((0, 60), total=90, step=41, decay=20, **WSD) is None
    before, after = jump((0, 60), total=90, step=60, decay=20, optimizer__learning_rate=1.0, **WSD)
    assert before == pytest.approx(0.1 + 0.9 / 20)
    assert after == 1
    assert jump((0, 60), total=90, step=30, optimizer__schedule="linear") is not None


def test_the_jump_is_from_the_rate_of_the_last_step_to_that_of_the_next():
    before, after = jump((0, 60), total=90, step=60, optimizer__learning_rate=1.0)
    assert before == pytest.approx(0.1, abs=0.01)
    assert after == pytest.approx(0.1 + 0.9 * 0.31, abs=0.02)  # (1 + cos(pi * 50 / 80)) / 2 = 0.31


def test_what_counts_is_the_schedule_that_each_step_was_trained_with():
    assert jump((0, 60), (30, 90), total=60, step=30) is None  # goes back to before a step of the other one
    assert jump((0, 60), (30, 90), total=60, step=35) is not None
    assert jump((0, 60), (30, 90), (20, 60), total=60, step=40) is None  # the steps after 20 were lost
    assert jump((0, 60), (30, 90), (20, 90), total=60, step=40) is not None


def folder_at(tmp_path, step, total):
    record = {"format": workdirs.FORMAT, "data": {"fingerprint": ""}, "config": plain(run_config())}
    record["windows"] = {"asked": 1, "found": 1, "documents": 1}
    start = {"started": "", "versions": {}, "device": "", "git_revision": None, "changed": {}}
    sessions = [{"step": 0, "total_steps": total, **start}]
    (tmp_path / "config.json").write_text(json.dumps({**record, "sessions": sessions}))
    (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    checkpoint.write_manifest(tmp_path / "checkpoints" / f"step_{step}")
    return tmp_path


@pytest.mark.parametrize(
    ("total", "allowed", "reason"),
    [
        (60, False, None),
        (30, True, "'60 steps', and '30 steps' ends before it, at step 30; choose another"),
        (
            90,
            False,
            r"'60 steps', and with '90 steps' the learning rate would jump from 0.0\d+ to 0.0\d+; choose .*=True",
        ),
        (90, True, None),
        (40, False, "would jump"),
    ],
)
def test_a_duration_is_refused_if_it_is_over_or_jumps_unasked(total, allowed, reason, tmp_path):
    changes = {"training__duration": f"{total} steps", "training__allow_schedule_change": allowed}
    config, workdir = run_config(**changes), folder_at(tmp_path, step=40, total=60)
    if reason is None:
        driver.check_duration(workdir, config, schedule(total))
    else:
        with pytest.raises(WorkdirError, match=f"trained to step 40 with training.duration = .*{reason}"):
            driver.check_duration(workdir, config, schedule(total))


def test_the_refusal_names_a_checkpoint_from_before_the_decay(tmp_path):
    workdir, config = folder_at(tmp_path, step=60, total=60), run_config(training__duration="90 steps", **WSD)
    for step in (40, 50):
        (workdir / "checkpoints" / f"step_{step}").mkdir()
    with pytest.raises(WorkdirError, match="move the checkpoints after step 40 away to go on"):
        driver.check_duration(workdir, config, schedule(90, decay=20))


def test_damaged_checkpoints_do_not_count_as_trained(tmp_path):
    workdir = folder_at(tmp_path, step=40, total=60)
    (workdir / "checkpoints" / "step_40" / "manifest.json").unlink()
    config = run_config(training__duration="30 steps")
    driver.check_duration(workdir, config, schedule(30))
    assert (workdir / "checkpoints" / "step_40").exists()
