"""What a study would run: its runs, the programs that they share, their FLOPs, and the time that they would take."""

import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from posenc_jax.distributed.allocator import keep_freed_memory
from posenc_jax.training.schedule import Schedule
from posenc_jax.config import RunConfig
from posenc_jax.reporting.progress import clock
from posenc_jax.reporting.tables import text_table
from posenc_jax.runs.run import Session
from posenc_jax.runs.study import divide_cpu, parts
from posenc_jax.runs.grid import Member, Study


def print_plan(study: Study) -> None:
    """Print a row for each program and the totals, after a few steps of each; no file is written.

    Parts are those of --shard: one may have several programs, where runs go on from others. Time is that of training at
    the speed found, and of reading the evaluation windows at as many FLOPs per second. It leaves out compilation and
    what runs share.
    """
    keep_freed_memory()
    divide_cpu(study)
    console, rows, total_flops, total_seconds = Console(), [], 0.0, 0.0
    groups = [(part, members) for part, own in enumerate(parts(study), 1) for members in _programs(own)]
    for number, (part, members) in enumerate(groups, 1):
        console.print(Text(f"program {number} of {len(groups)}: a few steps of {members[0].variant}"), soft_wrap=True)
        config = members[0].config
        session = Session(config)
        steps, step_seconds = probe(session, config)
        step_flops, reading = training_flops(config), evaluation_flops(config)
        flops = len(members) * (steps * step_flops + reading)
        seconds = len(members) * (steps + reading / step_flops) * step_seconds
        variants = ", ".join(dict.fromkeys(member.variant for member in members))
        rows.append(
            (
                str(part),
                variants,
                str(len(members)),
                f"{steps:,}",
                f"{flops:.2e}",
                f"{step_seconds:.3f}",
                clock(seconds),
            )
        )
        total_flops, total_seconds = total_flops + flops, total_seconds + seconds
    rows.append(("", "all", str(len(study.members)), "", f"{total_flops:.2e}", "", clock(total_seconds)))
    console.print(text_table(("part", "variants", "runs", "steps", "FLOPs", "seconds per step", "time"), rows).rich())


def _programs(members: Sequence[Member]) -> Iterable[list[Member]]:
    """Those of each compiled program."""
    from posenc_jax.runs.members import program_of

    found: dict[Hashable, list[Member]] = {}
    for member in members:
        found.setdefault(program_of(member.config), []).append(member)
    return found.values()


def probe(session: Session, config: RunConfig) -> tuple[int, float]:
    """Steps of a run, and the seconds that each takes: of a few, once they are compiled, whose state is thrown away."""
    import jax
    import numpy as np

    from posenc_jax.data import pipeline
    from posenc_jax.training import optimizer
    from posenc_jax.runs import train
    from posenc_jax.distributed import sharding
    from posenc_jax.training.step import initial_state

    training, mesh = config.training, session.mesh
    schedule = Schedule.of(config, pipeline.epoch_tokens(session.dataset.splits["train"], training.length))
    adamw = optimizer.build(config.optimizer, total_steps=schedule.total, warmup_steps=schedule.warmup)
    state, count = initial_state(config, adamw, mesh), schedule.most_per_dispatch
    tokens = np.zeros((count, training.batch_size, training.length + 1), np.int32)
    batches, times = sharding.shard_rows(tokens, mesh, axis=1), []
    with jax.set_mesh(mesh):
        for _ in range(3):
            begun = time.perf_counter()
            state, _ = session.programs(False)(state, batches, count)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - begun) / count)
    return schedule.total, min(times)


def training_flops(config: RunConfig) -> float:
    """Model FLOPs of a training step."""
    from posenc_jax.training import flops

    return config.training.batch_size * config.training.length * flops.per_token(config)


def evaluation_flops(config: RunConfig) -> float:
    """Model FLOPs of reading the evaluation windows, as of `flops.per_token`, of which forward is a third."""
    from posenc_jax.training import flops

    evaluation, trained = config.evaluation, config.pretrained_length

    def reading(length: int) -> float:
        own = replace(config, training=replace(config.training, length=length))
        return evaluation.windows * length * flops.per_token(own) / 3

    longer = [length for length in evaluation.lengths if length > trained]
    chunk, repeats = evaluation.copy_chunk, evaluation.copy_distances
    own = reading(evaluation.lengths[-1]) + sum(2 * reading(distance + 2 * chunk - 1) for distance in repeats)
    return len(evaluation.rope_scalings) * own + len(longer) * reading(trained)
