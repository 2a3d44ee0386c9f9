"""Logs are on disk immediately: a killed process loses no log lines and no points of curves."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.runs.train import RunLogger
from posenc_jax.untrusted import link_in
from tests import wandb_files
from tests.runs.conftest import undrawn  # noqa: F401  (a fixture)
from tests.runs.run_helpers import config_of, launch
from tests.wandb_files import offline  # noqa: F401  (a fixture)


def points(workdir, tag):
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_each_line_of_the_log_is_on_the_curves_while_the_run_goes_on(tmp_path):
    with RunLogger(tmp_path, 0) as logger:
        for step in (5, 10):
            logger.trained(step, 8 * step, {"loss": 1 / step, "bits_per_byte": 0.5})
            assert [entry["step"] for entry in read_log(tmp_path / "metrics.jsonl").entries][-1] == step
            assert points(tmp_path, "train/loss")[-1] == pytest.approx((step, 1 / step))
        logger.validated(10, {"validation_loss": 0.25, "validation_bits_per_byte": 0.5})
        assert points(tmp_path, "validation/loss") == [(10, 0.25)]


def test_a_run_that_was_killed_and_goes_on_has_each_point_once(tmp_path):
    killed = RunLogger(tmp_path, 0).__enter__()
    for step in (5, 10, 15):
        killed.trained(step, step, {"loss": 1.0, "bits_per_byte": 0.5})
    with RunLogger(tmp_path, 10) as logger:
        logger.trained(15, 15, {"loss": 2.0, "bits_per_byte": 0.5})
    assert points(tmp_path, "train/loss") == [(5, 1.0), (10, 1.0), (15, 2.0)]
    assert [entry["step"] for entry in read_log(tmp_path / "metrics.jsonl").entries] == [5, 10, 15]
    killed.close()


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_is_the_same_one_of_weights_and_biases_and_sends_no_earlier_step_again(tmp_path):
    record = {"config": {"name": "recipe"}, "sessions": [{"started": "2026-01-01"}, {"started": "2026-01-02"}]}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with RunLogger(tmp_path, 0, "project") as logger:
        for step in (5, 10, 15):
            logger.trained(step, step, {"loss": 1.0, "bits_per_byte": 0.5})
    with RunLogger(tmp_path, 5, "project") as logger:
        for step in (10, 15, 20):
            logger.trained(step, step, {"loss": 1.0, "bits_per_byte": 0.5})
    first, second = wandb_files.records(tmp_path)
    assert wandb_files.settings(first)["run_id"] == wandb_files.settings(second)["run_id"]
    steps = [[step for step, _ in wandb_files.points(sent, "train/loss")] for sent in (first, second)]
    assert steps == [[5, 10, 15], [15, 20]]  # a process that was killed at step 15 may not have sent it


@pytest.mark.usefixtures("offline", "undrawn")
def test_weights_and_biases_has_what_tensorboard_has(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    launch(config_of(folder, logging__wandb="project"), workdir)
    assert capsys.readouterr().out.count("Weights & Biases: offline, in ") == 1
    assert link_in(workdir) is None
    trained, final = wandb_files.records(workdir)
    board = EventAccumulator(str(workdir / "tensorboard")).Reload()
    for tag in board.Tags()["scalars"]:
        sent = dict(wandb_files.points(trained, tag))
        assert sent == pytest.approx(dict(points(workdir, tag)), nan_ok=True), tag
    curves = EventAccumulator(str(workdir / "tensorboard" / "windows")).Reload()
    for tag in curves.Tags()["scalars"]:
        expected = {event.step: event.value for event in curves.Scalars(tag)}
        assert dict(wandb_files.points(final, tag, "eval_length")) == pytest.approx(expected), tag
    assert wandb_files.settings(trained)["config"]["update"]["training"]["length"] == 16
    assert wandb_files.points(final, "figures/extrapolation.path")[0][0] == 12
    summaries = [record["summary"]["update"] for record in final if record["type"] == "summary"]
    results = EventAccumulator(str(workdir / "tensorboard" / "final")).Reload()
    for tag in results.Tags()["scalars"]:
        assert any(tag in update for update in summaries), tag
