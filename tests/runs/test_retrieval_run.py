"""A run with a retrieval task: what its files, its report and its resumed evaluation say."""

import pytest

from posenc_jax.results import read_results
from posenc_jax.runs import driver
from posenc_jax.schema import ConfigError
from tests.runs.run_helpers import config_of, launch
from tests.small import write_text

TASK = {
    "evaluation__retrieval_tasks": ("needle",),
    "evaluation__retrieval_trials": 2,
    "evaluation__retrieval_depths": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.mark.usefixtures("undrawn")
def test_a_run_reports_the_recall_and_repairs_it(folder, tmp_path, capsys):
    config = config_of(folder, "rope", evaluation__lengths=(16, 256), evaluation__retrieval_lengths=(256,), **TASK)
    launch(config, tmp_path / "run")
    rows = {row.metric: row for row in read_results(tmp_path / "run" / "results.csv") if "recall" in row.metric}
    assert set(rows) == {"needle_recall", "needle_recall_at_depth_0.00", "needle_recall_at_depth_1.00"}
    assert (rows["needle_recall"].eval_length, rows["needle_recall"].tokens) == (256, 2)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "### Recall of needle" in report
    assert "(figures/recall_needle.png)" in report
    first = (tmp_path / "run" / "results.csv").read_bytes()
    (tmp_path / "run" / "results.csv").write_text("damaged")
    launch(config, tmp_path / "run")
    assert (tmp_path / "run" / "results.csv").read_bytes() == first


def test_a_text_that_is_too_short_for_a_task_is_refused_before_training(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"config.evaluation.lengths = 16: must be longer .* 'needle'"):
        driver.prepare(config_of(folder, **TASK)).trace()
