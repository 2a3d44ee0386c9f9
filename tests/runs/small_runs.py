"""Runs of a few steps on random text, for tests of the training loop."""

import json
from pathlib import Path
from typing import Any

import jax

from posenc_jax.data import tokens
from posenc_jax.runs import train as loop
from posenc_jax.runs.program import Program
from tests.small import run_config


def train(
    folder: Path,
    workdir: Path,
    encoding: str = "rope",
    *,
    devices: int = 2,
    programs: dict[str, Program] | None = None,
    **changes: Any,
) -> tuple[Any, list[dict[str, Any]]]:
    """Return the final state of a run of 12 steps, and its log without the values that depend on the clock.

    Runs with the same settings and the same `programs` are compiled once.
    """
    training = {"duration": "12 steps", "warmup": "2 steps", "log_every": "4 steps", "validate_every": "6 steps"}
    training |= {
        "checkpoint_every": "6 steps",
        "drope": "5 steps",
        "batch_size": 8,
        "length": 16,
        "steps_per_dispatch": 5,
    }
    changes = {f"training__{name}": value for name, value in training.items()} | changes
    data = {"data__path": str(folder / "text"), "data__cache_dir": str(folder / "cache")}
    evaluation = {"evaluation__lengths": (16,), "evaluation__tail": 8}
    config = run_config(encoding, model__num_layers=1, model__dropout=0.1, **data, **evaluation, **changes)

    def validate(config, params, constants, dropped):
        return {"validation_loss": 1.0, "validation_bits_per_byte": float(dropped)}

    workdir.mkdir(exist_ok=True)
    programs = {} if programs is None else programs
    if encoding not in programs:
        programs[encoding] = Program(config, tokens.prepare(config.data), jax.devices()[:devices])
        programs[encoding].validate = validate
    state = loop.train(programs[encoding].single, {workdir: config}, workdir / "checkpoints", launched=0.0)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("step_seconds", "tokens_per_second", "flops_per_second", "crc32")
    return state, [{name: value for name, value in line.items() if name not in clock} for line in lines]
