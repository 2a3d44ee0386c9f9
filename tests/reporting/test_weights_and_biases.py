"""Weights & Biases, offline: its files are read back; failures do not end a run."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import wandb

from posenc_jax.reporting import weights_and_biases
from posenc_jax.reporting.figures import extrapolation_curve
from posenc_jax.reporting.weights_and_biases import WeightsAndBiases, check
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import DamagedError, link_in
from tests.reporting.rows import results
from tests.wandb_files import offline, points, records, settings  # noqa: F401  (a fixture)


@pytest.fixture
def workdir(tmp_path):
    """The folder of a run with the part of its record that is read."""
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"config": {"name": "recipe", "seed": 3}, "sessions": [{"started": "2026-01-01"}]}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.usefixtures("offline")
def test_a_run_comes_back_with_all_that_was_sent_and_nothing_else_is_written_or_printed(
    workdir, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    check("project")
    with WeightsAndBiases(workdir, "project") as board:
        assert board.place.startswith(f"offline, in {workdir}/wandb/offline-run-")
        assert link_in(workdir) is None
        board.scalars(5, {"train/loss": 2.5, "validation_attention/entropy": [1.5, 0.5]})
        board.plain_text("validation/sample", "<b>\n", 5)
        board.figure("figures/curve", extrapolation_curve(results()), 5)
        board.summary({"windows_final/loss/16": 0.25})
        board.extrapolation_curves(results())
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in workdir.iterdir()} == {"config.json", "wandb"}
    (sent,) = records(workdir)
    run = settings(sent)
    assert (run["project"], run["run_group"], run["display_name"]) == ("project", "recipe", "run")
    assert run["config"]["update"]["seed"] == 3
    assert points(sent, "train/loss") == [(5, 2.5)]
    assert points(sent, "validation_attention/entropy/layer_1") == [(5, 0.5)]
    files = next(workdir.glob("wandb/*/files"))
    ((_, page),) = points(sent, "validation/sample.path")
    assert (files / page).read_text() == "<pre>&lt;b&gt;\n</pre>"
    ((_, image),) = points(sent, "figures/curve.path")
    assert (files / image).read_bytes().startswith(b"\x89PNG")
    assert any(record.get("summary", {}).get("update", {}).get("windows_final/loss/16") == 0.25 for record in sent)
    for rule, group in (("none", ""), ("ntk", "scaling-ntk/")):
        metric = "prefix_bits_per_byte"
        expected = [(row.eval_length, row.value) for row in results() if (row.metric, row.scaling) == (metric, rule)]
        assert points(sent, f"windows/{group}{metric}", "eval_length") == expected != []


class Broken(SimpleNamespace):
    """wandb without a connection, from the start or after a while."""

    def init(self, **_):
        if self.at == "init":
            raise wandb.errors.CommError("no\nnetwork")
        return SimpleNamespace(url="https://example.org/\x1b", define_metric=lambda *_, **__: None, log=self.log)

    def log(self, values):
        raise wandb.errors.CommError("no\nnetwork")


@pytest.mark.parametrize("at", ["init", "log"])
def test_a_failure_is_told_once_and_ends_nothing(at, workdir, monkeypatch, caplog):
    monkeypatch.setattr(weights_and_biases, "_wandb", lambda: Broken(at=at))
    with caplog.at_level(logging.WARNING), WeightsAndBiases(workdir, "project") as board:
        assert board.place == ("" if at == "init" else "https://example.org/\\x1b")
        for step in (1, 2):
            board.scalars(step, {"train/loss": 1.0})
    (message,) = caplog.messages
    assert message == "Weights & Biases: no network; the run goes on without it"


@pytest.mark.usefixtures("offline")
def test_what_is_missing_is_told_before_training(monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=r"config.logging.wandb = 'p': needs a login: wandb login; WANDB_MODE=offl"):
        check("p")
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match=r"config.logging.wandb = 'p': cannot be used: .* must have 40"):
        check("p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"config.logging.wandb = 'p': needs wandb: pip install wandb"):
        check("p")
    assert capfd.readouterr() == ("", "")


def test_a_damaged_record_is_refused(workdir):
    (workdir / "config.json").write_text('{"config": {"name": "recipe"}, "sessions": []}')
    with pytest.raises(DamagedError, match=r"config.json is damaged"):
        WeightsAndBiases(workdir, "project")
