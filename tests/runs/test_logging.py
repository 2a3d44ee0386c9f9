"""Logs are on disk immediately: a killed process loses no log lines and no points of curves."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.runs.train import RunLogger


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
