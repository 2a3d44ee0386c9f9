"""Compares a sweep whose runs are stacked in one program with the same runs one by one: 8 RoPE bases x 3 seeds.

    python -m benchmarks.members
    python -m benchmarks.members --size=default --steps=20 --solo=1
    python -m benchmarks.members --size=default --steps=200 --task=copy

Stacked runs are trained with `jax.vmap` and with `jax.lax.map`. A single run is a stack of one with its own compiled
program. No run writes files. Only `--solo` of the runs are trained one by one, and their mean time stands for all runs.
Times include everything from settings to final states, with compilation. No compiled program is reused between them.
Wall-clock time is unreliable on a busy machine, so CPU seconds and the load average are also printed.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.alternate import alternate, load_average
from benchmarks.tables import show
from configs import rope_extrap, tasks
from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.data import tokens
from posenc_jax.distributed import sharding
from posenc_jax.distributed.environment import keep_freed_memory
from posenc_jax.runs.program import Program, Stack

BASES = [10.0 * 4**i for i in range(8)]
SEEDS = range(3)


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """The sweep at the smoke size."""
    yield from compare(
        size="smoke", steps=5 if quick else None, solo=1 if quick else 3, bases=BASES[: 2 if quick else 8]
    )


def compare(
    *, size: str, steps: int | None, solo: int, bases: Sequence[float] = BASES, task: str = ""
) -> Iterator[dict[str, Any]]:
    """A row for each way to train the runs for `steps` steps. `solo` of the runs are trained one by one."""
    configs = [config(size, steps, base, seed, task) for base in bases for seed in SEEDS]
    dataset = None if task else tokens.prepare(configs[0].data)
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if "backend_compile" in event else None
    )
    one_by_one = [configs[i] for i in np.linspace(0, len(configs) - 1, solo).astype(int)]
    alone(one_by_one[0], dataset)  # compiles the programs that all ways share
    ways = {
        "one by one": lambda: [alone(config, dataset) for config in one_by_one],
        "members, lax.map": lambda: stacked(configs, dataset, vectorized=False),
        "members, vmap": lambda: stacked(configs, dataset, vectorized=True),
    }
    reference = None
    for name, train in ways.items():
        compiled.clear()
        share = len(configs) / solo if reference is None else 1
        times = alternate({name: train}, blocks=1, calls=1)[name]
        wall, processor = share * times.wall[0], share * times.processor[0]
        reference = reference or (wall, processor)
        yield {
            "runs": name,
            "count": len(configs),
            "wall_seconds": round(wall, 2),
            "processor_seconds": round(processor, 2),
            "programs": round(share * len(compiled)),
            "compile_seconds": round(share * sum(compiled), 2),
            "wall_to_one_by_one": round(wall / reference[0], 3),
            "processor_to_one_by_one": round(processor / reference[1], 3),
            "load_average": load_average(),
        }


def recipe_of(size: str, task: str) -> ConfigDict:
    return tasks.get_config(f"size={size},task={task}") if task else rope_extrap.get_config(f"size={size}")


def config(size: str, steps: int | None, base: float, seed: int, task: str) -> RunConfig:
    recipe = recipe_of(size, task)
    recipe.encoding.base, recipe.seed = base, seed
    if steps:
        recipe.training.duration, recipe.training.warmup = f"{steps} steps", "0 steps"
    return RunConfig.from_mapping(recipe.to_dict())


def alone(config: RunConfig, dataset: tokens.Dataset | None) -> None:
    take_steps(Program(config, dataset).single, [config])


def stacked(configs: Sequence[RunConfig], dataset: tokens.Dataset | None, *, vectorized: bool) -> None:
    stack = Program(configs[0], dataset).stack(len(configs), vectorized=vectorized)
    for start in range(0, len(configs), stack.size):
        take_steps(stack, configs[start : start + stack.size])


def take_steps(stack: Stack, configs: Sequence[RunConfig]) -> None:
    """Train runs with the dispatches of the training loop, without writing files."""
    states, read = stack.initial_states(configs), stack.reader([config.seed for config in configs], 0)
    step, schedule = 0, stack.program.schedule
    with jax.set_mesh(stack.mesh):
        while step < schedule.total:
            first, step = step, schedule.dispatch_end(step)
            states, _ = stack.train_steps(False)(states, read(step - first), step - first)
    jax.block_until_ready(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="smoke", help="a size of configs/rope_extrap.py, or of configs/tasks.py")
    parser.add_argument("--task", default="", help="a task of configs/tasks.py; default: text")
    parser.add_argument("--steps", type=command.count, help="steps of each run; default: those of the recipe")
    parser.add_argument("--solo", type=command.count, default=3, help="number of runs that are trained one by one")
    args = parser.parse_args()
    keep_freed_memory()  # the same allocator and devices as in launch.py
    training = recipe_of(args.size, args.task).training
    sharding.divide_cpu(training.cpu_devices, training.batch_size)
    show(compare(size=args.size, steps=args.steps, solo=args.solo, task=args.task))


if __name__ == "__main__":
    command.run(main)
