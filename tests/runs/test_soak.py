"""A long study of two hundred runs: killed at random moments, and with bounded memory and open files."""

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from posenc_jax.evaluation.window_sums import read_sums
from tests.test_launch import ROOT, command, environment

STUDY = """
from ml_collections import ConfigDict
from configs import rope_extrap

def get_config():
    config = ConfigDict()
    config.name, config.question, config.baseline = "soak", "Does it last?", "none"
    config.base = recipe = rope_extrap.get_config("size=smoke,encoding=none")
    recipe.training.duration, recipe.training.warmup = "6 steps", "2 steps"
    recipe.training.checkpoint_every, recipe.training.steps_per_dispatch = "2 steps", 2
    recipe.evaluation.lengths, recipe.evaluation.windows = (32, 64), 4
    recipe.evaluation.validation_windows, recipe.evaluation.resamples = 4, 100
    config.sweep = ConfigDict({
        "encoding": ("encoding=none", "encoding=alibi"),
        "seed": tuple(f"seed={seed}" for seed in range(100)),
    })
    return config
"""


def start(config: Path, workdir: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(f"--config={config}", f"--workdir={workdir}"),
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def watch(pid: int, workdir: Path, readings: list[tuple[int, float, int]]) -> None:
    """Append (finished runs, MiB of memory, open files) every half second until the process ends."""
    process = Path("/proc") / str(pid)
    while True:
        try:
            status = (process / "status").read_text()
            held = int(status.split("VmRSS:")[1].split()[0]) / 1024
            readings.append((len(list((workdir / "members").glob("*.npz"))), held, len(os.listdir(process / "fd"))))
        except (OSError, IndexError):
            return
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_two_hundred_runs_killed_at_random_equal_undisturbed_ones_and_nothing_grows(tmp_path):
    config, cache = tmp_path / "soak.py", tmp_path / "cache"
    config.write_text(STUDY)
    whole, readings = tmp_path / "whole", []
    with start(config, whole, cache) as process:
        watching = threading.Thread(target=watch, args=(process.pid, whole, readings))
        watching.start()
        error = process.stderr.read()
    watching.join()
    assert process.returncode == 0, error

    chance, killed = random.Random(0), tmp_path / "killed"
    for kill in range(10):
        with start(config, killed, cache) as process:
            while len(list(killed.glob("members/*.npz"))) < 18 * kill and process.poll() is None:
                time.sleep(0.1)
            time.sleep(chance.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    with start(config, killed, cache) as process:
        error = process.stderr.read()
    assert process.returncode == 0, error
    names = {path.name for path in (whole / "members").iterdir()}
    assert len(names) == 200
    for name in names:
        ours, theirs = (read_sums(folder / "members" / name)[0] for folder in (killed, whole))
        assert list(ours) == list(theirs)
        for key, sums in ours.items():
            np.testing.assert_array_equal(sums, theirs[key])
    assert (killed / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()

    done, held, files = np.array(readings).T
    figure = Figure((8, 3), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2), (held, files), ("memory held (MiB)", "open files"), strict=True
    ):
        axes.plot(done, values)
        axes.set(title=title, xlabel="runs done", ylim=(0, None))
    figure.savefig(tmp_path / "soak.png")
    print(f"drawn in {tmp_path / 'soak.png'}")
    early, late = (done > 50) & (done <= 100), (done > 150) & (done < 200)
    assert np.median(held[late]) < 1.1 * np.median(held[early])
    assert np.median(files[late]) <= np.median(files[early])
