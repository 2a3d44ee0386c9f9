"""Faults around a run: full disks, read-only folders, and kills at any moment, including during a save."""

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.test_launch import BRIEF, ROOT, SAVES, checkpoint_arrays, command, environment, launch, logged


@pytest.fixture
def mounted(tmp_path):
    """Mount a new file system with these options, or skip the test if mounting is not permitted."""
    folders = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if ran.returncode:
            pytest.skip(f"needs the right to mount a file system: {ran.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs the command mount")
@pytest.mark.parametrize(
    ("free", "told"),
    [
        # When writing the log or, before it, the first checkpoint.
        pytest.param(20_000, r"error: .*No space left on device.*", marks=pytest.mark.slow),
        (2_000_000, "error: the checkpoint of step 30 could not be written to .*: No space left on device; .*"),
    ],
    ids=["log", "checkpoint"],
)
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(free, told, whole, cache, mounted):
    size = 20_000_000
    disk = mounted(f"size={size}")
    used = shutil.disk_usage(disk).used
    (disk / "other").write_bytes(bytes(size - used - free))
    ran = launch(cache, *BRIEF, f"--workdir={disk / 'run'}")
    assert ran.returncode == 1
    assert re.fullmatch(rf"{told}\n", ran.stderr)
    assert len(ran.stderr) < 400
    assert not (disk / "run" / "report.md").exists()
    (disk / "other").unlink()
    resumed = launch(cache, *BRIEF, f"--workdir={disk / 'run'}", drawn=False)
    assert resumed.returncode == 0, resumed.stderr
    assert ("step 1/60" in resumed.stdout) == (free < 2_000_000)
    assert (disk / "run" / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert logged(disk / "run") == logged(whole)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs the command mount")
def test_a_figure_that_finds_no_room_is_told_and_drawn_once_there_is(whole, cache, mounted):
    disk = mounted("size=20000000")
    run = shutil.copytree(whole, disk / "run")
    (run / "report.md").unlink()
    shutil.rmtree(run / "figures")
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 500_000))  # the figures are 800,000 bytes
    ran = launch(cache, *BRIEF, f"--workdir={run}")
    assert ran.returncode == 1
    assert re.search("^error: No space left on device", ran.stderr, re.MULTILINE)
    assert not (run / "report.md").exists()
    (disk / "other").unlink()
    assert launch(cache, *BRIEF, f"--workdir={run}").returncode == 0
    assert {path.name for path in (run / "figures").iterdir()} == {path.name for path in (whole / "figures").iterdir()}
    assert (run / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs the command mount")
def test_a_folder_that_cannot_be_written_is_told(cache, mounted):
    ran = launch(cache, *BRIEF, f"--workdir={mounted('ro') / 'run'}")
    assert ran.returncode == 4
    assert "cannot be written: Read-only file system" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("below", "code", "reason"), [("", 4, "is a file, not a folder"), ("/run", 4, "cannot be written: Not a directory")]
)
def test_a_workdir_that_is_a_file_or_below_one_is_told(below, code, reason, cache, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    ran = launch(cache, *BRIEF, f"--workdir={tmp_path / 'letter.txt'}{below}")
    assert ran.returncode == code
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.slow
def test_a_run_killed_twenty_times_at_any_moment_ends_in_the_same_bits(whole, cache, tmp_path):
    """Every step is saved, so that most kills happen during a save."""
    chance = random.Random(0)
    workdir = tmp_path / "run"
    saves = [*(argument for argument in BRIEF if argument not in SAVES), *SAVES[:1]]
    saves += ["--config.training.checkpoint_every=1 steps", f"--workdir={workdir}"]
    arguments = command(*saves)
    rounds, torn = 0, 0
    while rounds < 20:
        with subprocess.Popen(
            arguments, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith("first step done"):
                    break
            time.sleep(chance.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()
        assert "Traceback" not in rest
        if process.returncode == 0:  # the run is complete
            break
        assert process.returncode == -9
        rounds += 1
        torn += any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    assert rounds >= 10
    assert torn >= 3
    resumed = launch(cache, *saves)
    assert resumed.returncode == 0, resumed.stderr
    assert [line for line in logged(workdir) if line["step"] % 5 == 0] == [
        line for line in logged(whole) if line["step"] % 5 == 0
    ]
    assert (workdir / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, checkpoint_arrays(workdir), checkpoint_arrays(whole))
