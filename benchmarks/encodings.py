"""What each encoding costs in training: step time beside no encoding, in alternating blocks of one run.

    python -m benchmarks.encodings                  every encoding, at the default size
    python -m benchmarks.encodings rope alibi fire --length=1024 --batch=4

Printed, and written to --output as CSV, per encoding: parameters beyond those of none, seconds to trace and compile the
step, time of a step relative to none's (median over blocks of the ratio to none's block beside it) and the attention
algorithm. Step times are CPU or device wall clock; the ratios mean little where other programs compete.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from posenc_jax import encodings
from posenc_jax.allocator import keep_freed_memory
from posenc_jax.config import RunConfig
from posenc_jax.encodings.__main__ import Facts
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=encodings.names(), help="encodings; default: all")
    parser.add_argument("--length", type=int, default=256, help="tokens of context")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps in a block")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    none, none_parameters, _ = training_step("none", args.length, args.batch)
    rows = []
    for name in args.names:
        step, parameters, compile_seconds = training_step(name, args.length, args.batch)
        ratios = []
        for _ in range(args.blocks):
            seconds = timed(none, args.steps)
            ratios.append(timed(step, args.steps) / seconds)
        row = {
            "encoding": name,
            "parameters_added": parameters - none_parameters,
            "compile_seconds": round(compile_seconds, 2),
            "step_time_to_none": round(statistics.median(ratios), 3),
            "attention": Facts.of(name).algorithm,
            "load_average": round(os.getloadavg()[0], 2),
        }
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.output:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores", file=sys.stderr)


def training_step(name: str, length: int, batch: int) -> tuple[Callable[[], None], int, float]:
    """A training step of the default model to call, the model's parameters, and the seconds to trace and compile."""
    recipe = base.get_config()
    recipe.encoding = base.encoding(name)
    recipe.training.length, recipe.training.batch_size = length, batch
    config = RunConfig.from_mapping(recipe.to_dict())
    graphdef, parameters = abstract_model(config)
    optimizer = optimizers.build(config.optimizer, total_steps=1000, warmup_steps=10)
    share = optimizers.schedule(config.optimizer, total_steps=1000, warmup_steps=10)
    tokens = np.random.default_rng(0).integers(0, 256, (batch, length + 1), dtype=np.int32)
    state = initial_state(config, optimizer)
    train_step = make_train_step(config, graphdef, optimizer, share, jnp.ones(256, jnp.int32))
    begun = time.monotonic()
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, tokens).compile()
    compile_seconds = time.monotonic() - begun

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, tokens)
        jax.block_until_ready(metrics)

    step()
    return step, parameters, compile_seconds


def timed(step: Callable[[], None], steps: int) -> float:
    begun = time.monotonic()
    for _ in range(steps):
        step()
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
