"""Runs of one layer and seven steps on random text, trained separately or in stacks."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.data.tokens import Dataset, Split
from posenc_jax.runs.program import Program, program_key
from posenc_jax.runs.train import train
from tests.small import run_config

ONE = jax.devices()[:1]
CLOCK = ("step_seconds", "tokens_per_second", "flops_per_second", "crc32")
Trained = tuple[Any, list[dict[str, Any]]]  # the final state, and the log without the values that depend on the clock


def tiny(encoding: str = "rope", **changes: Any) -> RunConfig:
    """A run with one layer and seven steps, in dispatches of at most three."""
    model = {"model__num_layers": 1, "model__d_model": 32, "model__d_ff": 32, "model__head_dim": 16}
    training = {"duration": "7 steps", "warmup": "2 steps", "batch_size": 8, "length": 16, "log_every": "1 step"}
    training |= {"validate_every": "4 steps", "checkpoint_every": "7 steps", "steps_per_dispatch": 3}
    evaluation = {"evaluation__lengths": (16,), "evaluation__tail": 8, "evaluation__validation_windows": 8}
    training = {f"training__{name}": value for name, value in training.items()}
    return run_config(encoding, **model | evaluation | training | changes)


def text(size: int = 4000) -> Dataset:
    tokens = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    splits = {
        name: Split(name, tokens[:end], np.array([0, end // 3, end]), ("one", "two"), end)
        for name, end in (("train", size), ("validation", size // 4))
    }
    return Dataset("random", "0", ByteTokenizer(), splits)


def program_of(config: RunConfig, devices: Sequence[Any] = ONE) -> Program:
    return Program(config, text(), devices)


def logged(workdir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


_programs: dict[Hashable, Program] = {}


def alone(config: RunConfig, workdir: Path) -> Trained:
    """Train a run by itself. Runs of one program are compiled once; tests/runs/test_program.py tests that it is one."""
    workdir.mkdir(exist_ok=True)
    program = _programs.setdefault(program_key(config), program_of(config))
    state = train(program.single, {workdir: config}, workdir / "checkpoints", launched=0.0)
    return state, logged(workdir)


def stacked(configs: Sequence[RunConfig], folder: Path, devices: Sequence[Any] = ONE, **options: Any) -> list[Trained]:
    """Train the runs of one program in as many stacks as needed. The options are those of `Program.stack`."""
    stack, found = program_of(configs[0], devices).stack(len(configs), **options), []
    for start in range(0, len(configs), stack.size):
        runs = {folder / str(start + i): config for i, config in enumerate(configs[start : start + stack.size])}
        for workdir in runs:
            workdir.mkdir(parents=True, exist_ok=True)
        states = stack.split(train(stack, runs, folder / f"stack{start}", launched=0.0))
        found += [(state, logged(workdir)) for state, workdir in zip(states, runs, strict=False)]
    return found
