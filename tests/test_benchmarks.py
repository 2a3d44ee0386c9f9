"""The benchmarks at tiny sizes: parts measure what they claim, and the command writes tables and figures."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks.__main__ import PARTS
from benchmarks.alternate import Times, alternate
from tests import compile_flags
from tests.interop import foreign

ROOT = Path(__file__).parent.parent


def run(*command, cwd=ROOT, tmp_path):
    own = {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": compile_flags.XLA_FLAGS, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_programs_take_turns():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, blocks=2, calls=3)
    assert "".join(order) == "aaabbb" * 2
    assert [len(times[name].wall) for name in "ab"] == [2, 2]


def test_wall_and_processor_seconds_of_a_call():
    times = alternate({"sleep": lambda: time.sleep(0.05)}, blocks=1, calls=2)["sleep"]
    assert times.wall[0] >= 0.05
    assert times.processor[0] < 0.05


def test_a_ratio_is_the_median_over_blocks_of_the_same_moment():
    busy_in_the_second = Times(wall=[2.0, 40.0, 2.2]), Times(wall=[1.0, 20.0, 1.0])
    assert busy_in_the_second[0].relative_to(busy_in_the_second[1]) == pytest.approx(2.0)


def written(folder, *parts):
    """The rows of the table of each part, after the command has measured these parts at tiny sizes."""
    ran = run("benchmarks", *parts, "--quick", f"--output={folder}", tmp_path=folder)
    assert ran.returncode == 0, ran.stderr
    return [list(csv.DictReader((folder / f"{part}.csv").read_text().splitlines())) for part in parts]


def test_the_command_writes_a_table_for_each_part_and_figures(tmp_path):
    encodings, evaluation, members = written(tmp_path, *(parts := ("encodings", "evaluation", "members")))
    assert [row["encoding"] for row in encodings] == ["rope", "t5"]
    assert int(encodings[1]["parameters_added"]) == 64
    assert [row["length"] for row in evaluation] == ["64", "128"]
    assert all(float(row["seconds"]) > 0 for row in evaluation)
    assert [row["runs"] for row in members] == ["one by one", "members, lax.map", "members, vmap"]
    assert [row["programs"] for row in members] == ["6", "1", "1"]
    assert {file.name for file in tmp_path.glob("*.png")} == {"evaluation_seconds.png", "evaluation_peak_mib.png"}
    machines = json.loads((tmp_path / "machine.json").read_text())
    assert tuple(machines) == parts
    assert machines["members"]["command"] == f"python -m benchmarks {' '.join(parts)} --quick --output={tmp_path}"


@pytest.mark.torch
def test_training_is_beside_that_of_x_transformers(monkeypatch):
    pytest.importorskip("x_transformers")
    from benchmarks import training_step

    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: two)
    assert PARTS["training"] == training_step.__name__
    ours, theirs = training_step.rows(quick=True)
    assert [row["peer"] for row in (ours, theirs)] == ["posenc_jax", "torch, eager"]
    assert ours["ours_faster_by"] == 1
    assert abs(ours["loss"] - theirs["loss"]) < 1


@pytest.mark.torch
def test_on_one_device_programs_are_beside_those_of_pytorch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # which the module sets where it is not set
    from benchmarks import gpu

    one = jax.devices()[:1]
    monkeypatch.setattr("sys.argv", ["gpu", "training", "encodings", "--quick", f"--output={tmp_path}"])
    with pytest.raises(SystemExit):
        gpu.main()  # refuses eight devices
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    try:
        gpu.main()
    finally:
        torch.set_float32_matmul_precision(precision)
    with (tmp_path / "training.csv").open() as training, (tmp_path / "encodings.csv").open() as encodings:
        assert [row["program"] for row in csv.DictReader(training)] == ["ours", "torch"]
        assert [row["encoding"] for row in csv.DictReader(encodings)] == ["alibi", "t5", "fire", "fox"]


def test_an_unknown_part_or_encoding_is_refused(tmp_path):
    ran = run("benchmarks", "trainign", tmp_path=tmp_path)
    assert ran.returncode == 2
    assert "unknown part 'trainign'" in ran.stderr


@pytest.mark.torch
def test_a_pretrained_model_is_beside_that_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    from benchmarks import pretrained

    folder = str(foreign.llama_folder(tmp_path / "model"))
    rows = list(pretrained.compare(folder, (24,), 16, blocks=1))
    assert [(row["part"], row["peer"], row["batch"], row["tokens"]) for row in rows] == [
        (part, peer, batch, tokens)
        for part, batch, tokens in [("prefill", 1, 24), ("decode", 1, 16), ("decode", 8, 16)]
        for peer in (pretrained.OURS, pretrained.THEIRS)
    ]
    assert all(row["ours_faster_by"] == 1 for row in rows[::2])
    assert all(row["ms"] > 0 for row in rows)
    window = pretrained.score_window(folder, 48)
    assert window["tokens"] == 48
    assert window["seconds"] > 0
