"""Runs of twelve steps on random text, from training to report, for tests of interrupted and damaged runs."""

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

from posenc_jax.config import RunConfig
from posenc_jax.runs import driver, run
from posenc_jax.training.checkpoint import Checkpoints
from tests.small import run_config

BRIEF = {
    "model__num_layers": 1,
    "model__d_model": 32,
    "model__d_ff": 32,
    "model__head_dim": 16,
    "training__duration": "12 steps",
    "training__warmup": "4 steps",
    "training__log_every": "3 steps",
    "training__validate_every": "12 steps",
    "training__checkpoint_every": "3 steps",
    "training__batch_size": 8,
    "training__length": 16,
    "evaluation__lengths": (16, 32),
    "evaluation__tail": 8,
    "evaluation__windows": 4,
    "evaluation__validation_windows": 4,
    "evaluation__resamples": 100,
    "evaluation__rope_scalings": ("none",),
}


def config_of(folder: Path, encoding: str = "none", **changes: Any) -> RunConfig:
    """The config of such a run. `folder` was made by `tests.small.write_text`."""
    data = {"data__path": str(folder / "text"), "data__cache_dir": str(folder / "cache")}
    return run_config(encoding, **BRIEF | data | changes)


def launch(config: RunConfig, workdir: Path) -> None:
    run.run(config, workdir, launched=0.0)


def stopping_at(monkeypatch: Any, step: int) -> None:
    """Raise SIGTERM while this step is saved. Training then stops after the next step."""
    save = Checkpoints.save

    def signalled(self, at, *arguments):
        save(self, at, *arguments)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", signalled)


def refuse_to_begin(monkeypatch: Any) -> None:
    """Make the test fail if a run trains or evaluates."""

    def begun(*_):
        raise AssertionError("a program was prepared")

    monkeypatch.setattr(driver, "prepare", begun)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: float = 0.5) -> None:
    """Change one bit of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[int(len(damaged) * at)] ^= 1
    path.write_bytes(damaged)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


remove = functools.partial(Path.unlink)


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The log without the values that depend on the clock."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    clock = ("step_seconds", "tokens_per_second", "flops_per_second", "crc32")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]
