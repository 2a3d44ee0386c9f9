"""The plan of a run or study: its runs, the programs that they share, their FLOPs, and an estimate of their time."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.text import Text

from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.scoring import ScoredModel
from posenc_jax.reporting.progress import clock
from posenc_jax.reporting.tables import text_table
from posenc_jax.runs.driver import prepare
from posenc_jax.runs.grid import Study
from posenc_jax.runs.program import Program, groups, shards
from posenc_jax.runs.study import divide_cpu
from posenc_jax.runs.text_data import TextData
from posenc_jax.training import flops
from posenc_jax.training.step import abstract_state, initial_constants


def print_plan(asked: RunConfig | Study) -> None:
    """Print a row per program, and totals, after a few steps of each program. No file is written.

    The shard numbers are those of --shard. A shard has several programs if runs continue others. The time is that of
    training at the measured speed, and of evaluation at the same FLOPs per second, without compilation. A program that
    only evaluates has no steps; the speed of its evaluation is measured.
    """
    study = Study.of_run(asked) if isinstance(asked, RunConfig) else asked
    divide_cpu(study)
    console, rows, total_flops, total_seconds = Console(), [], 0.0, 0.0
    programs = [(shard, own) for shard, specs in enumerate(shards(study.runs), 1) for own in groups(specs)]
    for number, (shard, specs) in enumerate(programs, 1):
        config = specs[0].config
        measured = "evaluation" if config.evaluates_only else "a few steps"
        console.print(Text(f"program {number} of {len(programs)}: {measured} of {specs[0].variant}"), soft_wrap=True)
        program = prepare(config)
        steps, run_flops = program.schedule.total, evaluation_flops(config)
        if config.evaluates_only:
            length = min(config.evaluation.lengths[0], config.pretrained_length)
            probe_seconds, probe_flops, step_seconds = probe_reading(program, length), reading_flops(config, length), ""
        else:
            probe_seconds = probe_step(program)
            probe_flops = config.training.batch_size * config.training.length * flops.per_token(config)
            run_flops, step_seconds = run_flops + steps * probe_flops, f"{probe_seconds:.3f}"
        own_flops = len(specs) * run_flops
        seconds = own_flops / probe_flops * probe_seconds
        variants = ", ".join(dict.fromkeys(spec.variant for spec in specs))
        rows.append(
            (f"{shard}", variants, f"{len(specs)}", f"{steps:,}", f"{own_flops:.2e}", step_seconds, clock(seconds))
        )
        total_flops, total_seconds = total_flops + own_flops, total_seconds + seconds
    rows.append(("", "all", str(len(study.runs)), "", f"{total_flops:.2e}", "", clock(total_seconds)))
    text_table(("shard", "variants", "runs", "steps", "FLOPs", "seconds per step", "time"), rows).print(console)


def probe_step(program: Program) -> float:
    """Seconds per train step, measured on a few compiled steps whose state is discarded."""
    config, count, times = program.config, program.schedule.max_per_dispatch, []
    state, steps = program.single.initial_states([config]), program.single.train_steps(False)
    tokens = np.zeros((count, *config.batch_shape), np.int32)
    batches = sharding.shard_rows(tokens, program.mesh, axis=1)
    with jax.set_mesh(program.mesh):
        for _ in range(3):
            begun = time.perf_counter()
            state, _ = steps(state, batches, count)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - begun) / count)
    return min(times)


def probe_reading(program: Program, length: int) -> float:
    """Seconds to score the first `length` tokens of all evaluation windows, measured with parameters of zero."""
    config, times = program.config, []
    abstract = abstract_state(config, program.optimizer(config), program.mesh)["params"]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
    scorer, constants = program.final_scorer, initial_constants(config, program.mesh)
    data = program.data
    assert isinstance(data, TextData)  # a run on a task is trained
    model, windows = ScoredModel(config, scorer, params, constants), data.windows.tokens[:, : length + 1]
    for _ in range(2):
        begun = time.perf_counter()
        extrapolation.score(model, windows, data.dataset.tokenizer.token_bytes)
        times.append(time.perf_counter() - begun)
    return min(times)


def evaluation_flops(config: RunConfig) -> float:
    """Model FLOPs of evaluation."""
    evaluation, trained = config.evaluation, config.pretrained_length
    longer = [length for length in evaluation.lengths if length > trained]
    chunk, repeats = evaluation.copy_chunk, evaluation.copy_distances
    own = reading_flops(config, evaluation.lengths[-1])
    if config.task.name:
        own *= len(config.task.task.cases()) * len(evaluation.lengths)
    own += sum(2 * reading_flops(config, distance + 2 * chunk - 1) for distance in repeats)
    tasks = len(evaluation.retrieval_tasks) * evaluation.retrieval_trials / evaluation.windows
    own += sum(tasks * reading_flops(config, length) for length in evaluation.task_lengths)
    return len(evaluation.rope_scalings) * own + len(longer) * reading_flops(config, trained)


def reading_flops(config: RunConfig, length: int) -> float:
    """Model FLOPs to read so many tokens of all windows. A forward pass is a third of `flops.per_token`."""
    own = replace(config, training=replace(config.training, length=length))
    return config.evaluation.windows * length * flops.per_token(own) / 3
