"""Measures the overhead of the training loop per step, with a 12-layer model whose training step computes nothing.

    python -m benchmarks.loop_overhead

The loop is that of a normal run, with batches, dispatches, logs and checks. The step returns its state unchanged, apart
from the step counter. For each number of steps per dispatch, the wall-clock and CPU microseconds per step are printed,
the best of several alternating runs.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import base
from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.data import tokens
from posenc_jax.runs import program
from posenc_jax.runs.train import train

METRICS = ("loss", "bits_per_byte", "learning_rate", "gradient_norm", "update_norm", "parameter_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=command.count, default=12)
    parser.add_argument("--devices", type=command.count, default=2, help="number of CPU devices")
    parser.add_argument(
        "--dispatch", type=command.count, nargs="+", default=[1, 2, 5, 10, 20], help="steps per dispatch"
    )
    parser.add_argument(
        "--steps", type=command.count, default=400, help="timed steps, after the same number of untimed steps"
    )
    parser.add_argument("--blocks", type=command.count, default=3, help="number of runs, of which the best counts")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    program.make_train_step = lambda *_: nothing
    wall, processor = dict.fromkeys(args.dispatch, math.inf), dict.fromkeys(args.dispatch, math.inf)
    for _ in range(args.blocks):
        for K in args.dispatch:
            seconds, used = run(args, K)
            wall[K], processor[K] = min(wall[K], seconds), min(processor[K], used)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; microseconds per step")
    print(f"{'steps per dispatch':>18} {'wall':>8} {'CPU':>8}")
    for K in args.dispatch:
        print(f"{K:18} {1e6 * wall[K]:8.0f} {1e6 * processor[K]:8.0f}")


def run(args: argparse.Namespace, K: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds per step, over the second half of a run."""
    recipe = base.get_config()
    model, training = recipe.model, recipe.training
    model.num_layers, model.d_model, model.d_ff, model.num_heads, model.num_kv_heads = args.layers, 8, 8, 1, 1
    training.steps_per_dispatch, training.duration = K, f"{2 * args.steps} steps"
    training.warmup = "0 steps"
    training.validate_every, training.checkpoint_every = f"{args.steps} steps", f"{2 * args.steps} steps"
    config = RunConfig.from_mapping(recipe.to_dict())
    times = []

    def validate(config: RunConfig, params: Any, constants: Any, dropped: bool) -> dict[str, float]:
        times.append((time.monotonic(), time.process_time()))
        return {"validation_loss": 0.0, "validation_bits_per_byte": 0.0}

    own = program.Program(config, tokens.prepare(config.data))
    own.validate = validate
    with tempfile.TemporaryDirectory() as workdir:
        train(own.single, {Path(workdir): config}, Path(workdir, "checkpoints"), launched=time.monotonic())
    half, end = times
    return (end[0] - half[0]) / args.steps, (end[1] - half[1]) / args.steps


def nothing(state: Any, tokens: Any) -> tuple[Any, Any]:
    return state | {"step": state["step"] + 1}, {name: jnp.zeros(()) for name in METRICS} | {"finite": state["finite"]}


if __name__ == "__main__":
    command.run(main)
