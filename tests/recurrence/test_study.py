"""The study of attention and recurrence, run as a user does, at the smoke size."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.recurrence.recall import Recall
from posenc_jax.results import read_rows
from tests import compile_flags

ROOT = Path(__file__).parents[2]


def study(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    folders = (f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'results'}")
    return subprocess.run(
        [sys.executable, "-m", "experiments.attention_vs_recurrence", *arguments, "--size=smoke", *folders],
        cwd=ROOT,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(tmp_path),
            "XLA_FLAGS": compile_flags.XLA_FLAGS,
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=580,
    )


def cells(report: str, section: str, row: str) -> list[str]:
    """The cells of the first row in a section that starts with this name."""
    (line, *_) = (line for line in report.split(section)[1].splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.slow
def test_all_parts_end_in_one_report(tmp_path):
    models = ("--models", "gru", "none", "encoder_none")
    ran = study(tmp_path, *models)
    assert ran.returncode == 0, ran.stderr
    report = (tmp_path / "results" / "report.md").read_text()
    # Only the encoder without positions ignores the order, before and after training.
    changes = {name: [float(cell.split()[0]) for cell in cells(report, "## Order", name)] for name in models[1:]}
    assert max(changes["encoder_none"]) < 1e-5
    assert min(min(changes[name]) for name in ("gru", "none")) > 1e-3
    one, two = (
        float(cells(report, "## Order", f"causal decoder without positions, {n}, untrained")[0].split()[0])
        for n in ("1 layer", "2 layers")
    )
    assert one < 1e-5 < two
    # A shift of all positions changes the logits of added positions, but not of rotations.
    assert float(cells(report, "## Add", "added, before the projections")[4]) > 0.1
    assert float(cells(report, "## Add", "rotating queries and keys (RoPE)")[4]) < 1e-3
    with (tmp_path / "results" / "results.csv").open() as file:
        assert {row["encoding"] for row in csv.DictReader(file)} == set(models[1:])
    assert len(cells(report, "## Sequential", "attention")) == 4
    assert {row.distance for row in read_rows(tmp_path / "results" / "recall.csv", Recall)} == {2, 64, 96}
    for figure in re.findall(r"\((figures/\w+\.png)\)", report):
        assert (tmp_path / "results" / figure).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["ordre"], "Did you mean 'order'"), (["table", "--models", "ltsm"], "Did you mean 'lstm'")],
)
def test_a_wrong_name_ends_with_2(tmp_path, arguments, reason):
    ran = study(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert reason in ran.stderr
    assert not (tmp_path / "results").exists()
