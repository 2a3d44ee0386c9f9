"""The plan of a study: its runs, the programs that they share, their FLOPs, and an estimate of their time."""

import time
from dataclasses import replace

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.reporting.progress import clock
from posenc_jax.reporting.tables import text_table
from posenc_jax.runs.driver import prepare
from posenc_jax.runs.grid import Study
from posenc_jax.runs.program import Program, groups, shards
from posenc_jax.runs.study import divide_cpu
from posenc_jax.training import flops


def print_plan(study: Study) -> None:
    """Print a row per program, and totals, after a few steps of each program. No file is written.

    The shard numbers are those of --shard. A shard has several programs if runs continue others. The time is that of
    training at the measured speed, and of evaluation at the same FLOPs per second, without compilation.
    """
    divide_cpu(study)
    console, rows, total_flops, total_seconds = Console(), [], 0.0, 0.0
    programs = [(shard, own) for shard, specs in enumerate(shards(study.runs), 1) for own in groups(specs)]
    for number, (shard, specs) in enumerate(programs, 1):
        console.print(Text(f"program {number} of {len(programs)}: a few steps of {specs[0].variant}"), soft_wrap=True)
        config = specs[0].config
        program = prepare(config)
        steps, step_seconds = program.schedule.total, probe(program)
        step_flops = config.training.batch_size * config.training.length * flops.per_token(config)
        reading = evaluation_flops(config)
        own_flops = len(specs) * (steps * step_flops + reading)
        seconds = len(specs) * (steps + reading / step_flops) * step_seconds
        variants = ", ".join(dict.fromkeys(spec.variant for spec in specs))
        counts = f"{len(specs)}", f"{steps:,}", f"{own_flops:.2e}", f"{step_seconds:.3f}"
        rows.append((f"{shard}", variants, *counts, clock(seconds)))
        total_flops, total_seconds = total_flops + own_flops, total_seconds + seconds
    rows.append(("", "all", str(len(study.runs)), "", f"{total_flops:.2e}", "", clock(total_seconds)))
    console.print(text_table(("shard", "variants", "runs", "steps", "FLOPs", "seconds per step", "time"), rows).rich())


def probe(program: Program) -> float:
    """Seconds per train step, measured on a few compiled steps whose state is discarded."""
    config, count, times = program.config, program.schedule.max_per_dispatch, []
    state, steps = program.single.initial_states([config]), program.single.train_steps(False)
    tokens = np.zeros((count, config.training.batch_size, config.training.length + 1), np.int32)
    batches = sharding.shard_rows(tokens, program.mesh, axis=1)
    with jax.set_mesh(program.mesh):
        for _ in range(3):
            begun = time.perf_counter()
            state, _ = steps(state, batches, count)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - begun) / count)
    return min(times)


def evaluation_flops(config: RunConfig) -> float:
    """Model FLOPs of evaluation. A forward pass is a third of `flops.per_token`."""
    evaluation, trained = config.evaluation, config.pretrained_length

    def reading(length: int) -> float:
        own = replace(config, training=replace(config.training, length=length))
        return evaluation.windows * length * flops.per_token(own) / 3

    longer = [length for length in evaluation.lengths if length > trained]
    chunk, repeats = evaluation.copy_chunk, evaluation.copy_distances
    own = reading(evaluation.lengths[-1]) + sum(2 * reading(distance + 2 * chunk - 1) for distance in repeats)
    tasks = len(evaluation.retrieval_tasks) * evaluation.retrieval_trials / evaluation.windows
    own += sum(tasks * reading(length) for length in evaluation.task_lengths)
    return len(evaluation.rope_scalings) * own + len(longer) * reading(trained)
